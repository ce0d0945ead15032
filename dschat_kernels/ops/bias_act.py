"""Bias and activation in one pass:  y = act(x + bias), rounded once.

    none        x gelu        x Phi(x), Phi the normal distribution function (by erf) gelu_tanh   x/2 (1 +
    tanh(sqrt(2/pi) (x + 0.044715 x^3)))          HF: gelu_new, gelu_pytorch_tanh, gelu_fast relu
    max(x, 0) silu        x sigmoid(x)                                           HF: silu, swish quick_gelu  x
    sigmoid(1.702 x)

Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

import math
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


def bias_act(
    x: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, backend: str | None = None
) -> Tensor:
    """act(x + bias) of x [..., n] with bias [n] or None; see the module for the activations.

    The arithmetic is float32 (float64 for float64 input), the result has the dtype of x. Differentiable in
    both.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices, activations and backends.
    """
    check_tensor("bias_act", "x", x)
    check(x.dim() > 0, "bias_act: x is a number without dimensions; give [..., n].")
    check_choice("bias_act", "activation", activation, ACTIVATIONS)
    if bias is not None:
        check_vector("bias_act", "bias", bias, x, x.shape[-1])
    backend = resolve_backend("bias_act", backend, x, bias)
    if backend == "reference":
        return bias_act_reference(x, bias, activation)
    op = implementation("bias_act", backend, x, bias)
    return op(x, bias, activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """An activation by its formula, in the dtype of x."""
    if activation == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
    if activation == "relu":
        return torch.relu(x)
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return x


def bias_act_reference(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """The specification, in plain PyTorch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = x.to(wide)
    if bias is not None:
        v = v + bias.to(wide)
    return activate(v, activation).to(x.dtype)


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define("bias_act(Tensor x, Tensor? bias, str activation) -> Tensor")
LIBRARY.define(
    "bias_act_backward(Tensor dy, Tensor x, Tensor? bias, str activation, bool bias_grad) "
    "-> (Tensor dx, Tensor dbias)"
)


def _forward_cpu(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    rows, stride = as_rows(x)
    bias = widen(bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernels().bias_act(
        DTYPES[x.dtype],
        ACTIVATIONS[activation],
        ptr(rows),
        ptr(bias),
        ptr(y),
        rows.shape[0],
        rows.shape[1],
        stride,
    )
    return y


def _backward_cpu(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    module = kernels()
    dy = dy.contiguous()
    rows, stride = as_rows(x)
    n, columns = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbias = torch.empty(columns if bias_grad else 0, dtype=torch.float32, device=x.device)
    partial = row_scratch(module, x, n, columns, int(bias_grad))
    bias = widen(bias)
    module.bias_act_backward(
        DTYPES[x.dtype], ACTIVATIONS[activation], ptr(dy), ptr(rows), ptr(bias), ptr(dx), ptr(dbias),
        ptr(partial), n, columns, stride,
    )  # fmt: skip
    return dx, dbias


def _forward_fake(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _backward_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(x.shape[-1] if bias_grad else 0, dtype=torch.float32, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    bias_grad = ctx.needs_input_grad[1]
    dx, dbias = ctx.ops.bias_act_backward(dy, x, bias, ctx.activation, bias_grad)
    return dx, dbias.to(bias.dtype) if bias_grad else None, None


def _again(ctx: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
    x, bias = ctx.saved_tensors
    return bias_act_reference(x, bias, ctx.activation), (x, bias, None)


register("bias_act", _forward_cpu, _forward_fake, _save, _grad, _again)
register("bias_act_backward", _backward_cpu, _backward_fake)
