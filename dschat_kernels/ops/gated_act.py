"""The gate of a gated MLP in one pass:  y = act(gate + gate_bias) * (up + up_bias), rounded once.

SwiGLU is activation "silu", GeGLU "gelu" or "gelu_tanh", ReGLU "relu"; the formulas are in ops/bias_act.py.

Shazeer, "GLU Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dschat_kernels.ops._common import (
    ACTIVATIONS,
    DTYPES,
    LIBRARY,
    as_rows,
    check,
    check_choice,
    check_device,
    check_tensor,
    check_vector,
    implementation,
    kernels,
    ptr,
    register,
    resolve_backend,
    row_scratch,
    widen,
)
from dschat_kernels.ops.bias_act import activate


def gated_act(
    gate: Tensor,
    up: Tensor | None = None,
    activation: str = "silu",
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(gate + gate_bias) * (up + up_bias), elementwise; gate and up [..., n], biases [n] or None.

    Without `up`, gate is packed: [..., 2n] = [gate | up]. The arithmetic is float32 (float64 for float64
    input), the result has the dtype of gate. Differentiable in every tensor.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices, activations and backends.
    """
    check_tensor("gated_act", "gate", gate)
    check(gate.dim() > 0, "gated_act: gate is a number without dimensions; give [..., n].")
    check_choice("gated_act", "activation", activation, ACTIVATIONS)
    if up is None:
        check(
            gate.shape[-1] % 2 == 0,
            f"gated_act: without up, gate is packed [gate | up], but its last dimension {gate.shape[-1]} is "
            "odd; give an even one, or give up.",
        )
        columns = gate.shape[-1] // 2
    else:
        columns = gate.shape[-1]
        check_tensor("gated_act", "up", up)
        check(
            up.shape == gate.shape,
            f"gated_act: up has shape {list(up.shape)} and gate {list(gate.shape)}; give the same shape.",
        )
        check(
            up.dtype == gate.dtype,
            f"gated_act: up is {up.dtype} and gate is {gate.dtype}; give the same dtype.",
            TypeError,
        )
        check_device("gated_act", "up", up, gate)
    for name, bias in (("gate_bias", gate_bias), ("up_bias", up_bias)):
        if bias is not None:
            check_vector("gated_act", name, bias, gate, columns)
    backend = resolve_backend("gated_act", backend, gate, gate_bias, up_bias)
    if backend == "reference":
        return gated_act_reference(gate, up, activation, gate_bias=gate_bias, up_bias=up_bias)
    op = implementation("gated_act", backend, gate, up, gate_bias, up_bias)
    return op(gate, up, gate_bias, up_bias, activation)


def gated_act_reference(
    gate: Tensor,
    up: Tensor | None = None,
    activation: str = "silu",
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, u = gate.chunk(2, -1) if up is None else (gate, up)
    g, u = g.to(wide), u.to(wide)
    if gate_bias is not None:
        g = g + gate_bias.to(wide)
    if up_bias is not None:
        u = u + up_bias.to(wide)
    return (activate(g, activation) * u).to(gate.dtype)


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "gated_act(Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias, str activation) -> Tensor"
)
LIBRARY.define(
    "gated_act_backward(Tensor dy, Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias, "
    "str activation, bool gate_bias_grad, bool up_bias_grad) "
    "-> (Tensor dgate, Tensor dup, Tensor dgate_bias, Tensor dup_bias)"
)


def _result_shape(gate: Tensor, up: Tensor | None) -> tuple[Any, ...]:
    return (*gate.shape[:-1], gate.shape[-1] // 2) if up is None else tuple(gate.shape)


def _pointers(gate: Tensor, up: Tensor | None) -> tuple[tuple[Tensor, ...], int, int, int, int, int, int]:
    """(what keeps the memory alive), gate, up, rows, columns, gate stride, up stride."""
    rows, stride = as_rows(gate)
    if up is None:
        columns = rows.shape[1] // 2
        start = ptr(rows)
        return (rows,), start, start + columns * rows.element_size(), rows.shape[0], columns, stride, stride
    up_rows, up_stride = as_rows(up)
    return (rows, up_rows), ptr(rows), ptr(up_rows), rows.shape[0], rows.shape[1], stride, up_stride


def _forward_cpu(
    gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    _alive, gate_at, up_at, rows, columns, gate_stride, up_stride = _pointers(gate, up)
    gate_bias, up_bias = widen(gate_bias), widen(up_bias)
    y = torch.empty(_result_shape(gate, up), dtype=gate.dtype, device=gate.device)
    kernels().gated_act(
        DTYPES[gate.dtype], ACTIVATIONS[activation], gate_at, up_at, ptr(gate_bias), ptr(up_bias), ptr(y),
        rows, columns, gate_stride, up_stride,
    )  # fmt: skip
    return y


def _backward_cpu(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    gate_bias_grad: bool,
    up_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = kernels()
    dy = dy.contiguous()
    _alive, gate_at, up_at, rows, columns, gate_stride, up_stride = _pointers(gate, up)
    gate_bias, up_bias = widen(gate_bias), widen(up_bias)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(0 if up is None else gate.shape, dtype=gate.dtype, device=gate.device)
    dup_at = ptr(dgate) + columns * dgate.element_size() if up is None else ptr(dup)
    dgate_bias = torch.empty(columns if gate_bias_grad else 0, dtype=torch.float32, device=gate.device)
    dup_bias = torch.empty(columns if up_bias_grad else 0, dtype=torch.float32, device=gate.device)
    partial = row_scratch(module, gate, rows, columns, int(gate_bias_grad) + int(up_bias_grad))
    module.gated_act_backward(
        DTYPES[gate.dtype], ACTIVATIONS[activation], ptr(dy), gate_at, up_at, ptr(gate_bias), ptr(up_bias),
        ptr(dgate), dup_at, ptr(dgate_bias), ptr(dup_bias), ptr(partial), rows, columns, gate_stride,
        up_stride, gate.shape[-1],
    )  # fmt: skip
    return dgate, dup, dgate_bias, dup_bias


def _forward_fake(
    gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    return torch.empty(_result_shape(gate, up), dtype=gate.dtype, device=gate.device)


def _backward_fake(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    gate_bias_grad: bool,
    up_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = dy.shape[-1]
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(0 if up is None else gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(columns if gate_bias_grad else 0, dtype=torch.float32, device=gate.device),
        torch.empty(columns if up_bias_grad else 0, dtype=torch.float32, device=gate.device),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, gate_bias, up_bias = ctx.saved_tensors
    _, _, gate_bias_grad, up_bias_grad, _ = ctx.needs_input_grad
    dgate, dup, dgate_bias, dup_bias = ctx.ops.gated_act_backward(
        dy, gate, up, gate_bias, up_bias, ctx.activation, gate_bias_grad, up_bias_grad
    )
    return (
        dgate,
        None if up is None else dup,
        dgate_bias.to(gate_bias.dtype) if gate_bias_grad else None,
        dup_bias.to(up_bias.dtype) if up_bias_grad else None,
        None,
    )


def _again(ctx: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
    gate, up, gate_bias, up_bias = ctx.saved_tensors
    y = gated_act_reference(gate, up, ctx.activation, gate_bias=gate_bias, up_bias=up_bias)
    return y, (gate, up, gate_bias, up_bias, None)


register("gated_act", _forward_cpu, _forward_fake, _save, _grad, _again)
register("gated_act_backward", _backward_cpu, _backward_fake)
