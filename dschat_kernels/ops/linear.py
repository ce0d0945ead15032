"""Linear layer over packed weights, with the epilogues that a decoder needs.

    z = round(x W^T + b)                      float32 sums in a fixed order; the bias is added in float32
    z = round(scale * (x Q^T) + b)            int8 weights: the sums of the integers, then a float32 scale a column
    z = round(scale * sum_g s_g (X_g Q_g^T) + b)   int8_dynamic: x is quantised too, in groups g of 64 with scales s_g;
                                                    on the backends cpu and reference only
    y = round(act(z))                         activation, not gated
    y = round(act(z_gate) * z_up)             gated pack (gate and up in one matrix)
    y = round(residual + y)                   residual

Every rounding is where the separate ops would round, so fusing an epilogue never changes bits, and a row's bits depend
neither on the other rows nor on the number of threads. `float_output` returns x W^T + b in float32, unrounded (logits).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    implementation,
    kernels,
    ptr,
    register,
    resolve_backend,
)
from dschat_kernels.ops.bias_act import bias_act_reference
from dschat_kernels.ops.gated_act import gated_act_reference
from dschat_kernels.packing import PANEL, QUANT_GROUP, WEIGHTS, PackedLinear, quantised_rows


def linear(
    x: Tensor,
    packed: PackedLinear,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    float_output: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x [..., k] times a packed matrix: [..., n] of x's dtype (float32 with `float_output`), by the module's formula.

    `packed` has the dtype of x; `residual` the shape and dtype of the result. Forward only: training goes through the
    model's own linear layers, or through `forward.exact_linear`.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices, activations and backends.
    """
    check_tensor("linear", "x", x)
    check(
        isinstance(packed, PackedLinear),
        f"linear: packed is a {type(packed).__name__}; give a PackedLinear.",
        TypeError,
    )
    check(
        x.dim() > 0 and x.shape[-1] == packed.k,
        f"linear: x has shape {list(x.shape)}; its last dimension must be {packed.k}, the width of the packed weight.",
    )
    check(
        x.dtype == packed.dtype,
        f"linear: x is {x.dtype} and the packed weight {packed.dtype}; pack the weight in the dtype of x.",
        TypeError,
    )
    held = packed.panels if packed.dense is None else packed.dense
    if held is not None:
        check_device("linear", "packed", held, x)
    check_choice("linear", "activation", activation, ACTIVATIONS)
    if residual is not None:
        check_tensor("linear", "residual", residual)
        expected = [*x.shape[:-1], packed.n]
        check(
            list(residual.shape) == expected,
            f"linear: residual has shape {list(residual.shape)}; give {expected}.",
        )
        check(
            residual.dtype == x.dtype,
            f"linear: residual is {residual.dtype} and x {x.dtype}; give one dtype.",
            TypeError,
        )
        check_device("linear", "residual", residual, x)
    check(
        not float_output or (activation == "none" and residual is None and not packed.gated),
        "linear: float_output returns the bare sums; give it without activation, residual or gate.",
    )
    backend = resolve_backend("linear", backend, x)
    check(
        packed.weights != "int8_dynamic" or backend in ("cpu", "reference"),
        f"linear: int8_dynamic weights run on the backends 'cpu' and 'reference', not on {backend!r}; "
        "pack with weights='int8'.",
    )
    held = packed.panels if backend == "cpu" else packed.dense
    if backend == "reference" or (backend == "cpu" and held is None):
        return linear_reference(
            x, packed, activation=activation, residual=residual, float_output=float_output
        )
    if held is None:
        raise ValueError(
            f"linear: packed is in the cpu's layout; pack with dense=True for backend {backend!r}."
        )
    if packed.scales is not None:
        return implementation("linear_int8", backend, x)(
            x,
            held,
            WEIGHTS.index(packed.weights),
            packed.scales,
            packed.bias,
            packed.n,
            packed.k,
            packed.gated,
            activation,
            residual,
            float_output,
        )
    return implementation("linear", backend, x)(
        x, held, packed.bias, packed.n, packed.k, packed.gated, activation, residual, float_output
    )


def linear_reference(
    x: Tensor,
    packed: PackedLinear,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    float_output: bool = False,
) -> Tensor:
    """The specification, in plain PyTorch."""
    z = int8_sums(x, packed) if packed.weights == "int8_dynamic" else x.float() @ packed.stored().float().t()
    scales, bias = packed.plain_scales(), packed.plain_bias()
    if scales is not None:
        z = z * scales
    if bias is not None:
        z = z + bias
    if float_output:
        return z
    y = z.to(x.dtype)
    if packed.gated:
        gate, up = y.split(packed.n, dim=-1)
        y = gated_act_reference(gate, up, activation)
    elif activation != "none":
        y = bias_act_reference(y, None, activation)
    return y if residual is None else residual + y


def int8_sums(x: Tensor, packed: PackedLinear) -> Tensor:
    """sum over groups of (scale of x) * (integers of x times integers of the weight): float32 [..., total]."""
    values, scales = quantised_rows(x.reshape(-1, packed.k))
    weight = torch.nn.functional.pad(packed.stored(), (0, -packed.k % QUANT_GROUP)).float()
    sums = scales.new_zeros(len(values), len(weight))
    for g, columns in enumerate(weight.split(QUANT_GROUP, dim=1)):
        sums += scales[:, g, None] * (values[:, g].float() @ columns.t())
    return sums.view(*x.shape[:-1], len(weight))


def linear_sums(x: Tensor, packed: PackedLinear, backend: str | None = None) -> tuple[Tensor, ...]:
    """round(x W_p^T + b_p) of every part of a pack, one [T, n_p] each, x [T, k]; a gated pack's halves unmultiplied.

    The bits are those that `linear` and its epilogues start from. Not for int8 weights, which nothing trains through.
    """
    check(
        packed.scales is None, "linear_sums: packed holds int8 weights; pack with weights='model'.", TypeError
    )
    if packed.panels is None:
        parts = [n for n, _ in packed.shapes]
        chosen = resolve_backend("linear", backend, x)
        if chosen not in ("reference", "cpu"):
            op = implementation("linear", chosen, x)
            z = op(x, packed.dense, packed.bias, packed.total, packed.k, False, "none", None, False)
            return z.split(parts, dim=-1)
        z = x.float() @ packed.to_dense().float().t()
        bias = packed.plain_bias()
        z = (z if bias is None else z + bias).to(x.dtype)
        return z.split(parts, dim=-1)
    columns = packed.num_panels * PANEL if packed.gated else packed.n
    y = torch.ops.dschat.linear(x, packed.panels, packed.bias, columns, packed.k, False, "none", None, False)
    if not packed.gated:
        return y.split([n for n, _ in packed.shapes], dim=-1)
    halves = y.view(len(y), packed.num_panels, 2, PANEL // 2)
    return tuple(halves[:, :, i].reshape(len(y), -1)[:, : packed.n] for i in range(2))


def linear_input_grad(grads: Sequence[Tensor], packed: PackedLinear) -> Tensor:
    """dx = sum over parts of dy_p W_p, [T, k], from the gradients [T, n_p] of what `linear_sums` returned.

    One product over all parts with the bits of the packed weight: float32 sums, rounded once.
    """
    dy = grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)
    if packed.dense is not None:
        return dy @ packed.dense
    panels = packed.transposed_panels()
    return torch.ops.dschat.linear(dy, panels, None, packed.k, packed.total, False, "none", None, False)


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    # The weight: cpu reads the panels of PackedLinear, cuda and triton its dense matrix, plain bias and scales.
    "linear(Tensor x, Tensor panels, Tensor? bias, int n, int k, bool gated, str activation, Tensor? residual, "
    "bool float_output) -> Tensor"
)
LIBRARY.define(
    "linear_int8(Tensor x, Tensor panels, int weights, Tensor scales, Tensor? bias, int n, int k, bool gated, "
    "str activation, Tensor? residual, bool float_output) -> Tensor"
)


def _native(
    x: Tensor,
    panels: Tensor,
    weights: int,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    gated: bool,
    activation: str,
    residual: Tensor | None,
    float_output: bool,
) -> Tensor:
    rows, stride = as_rows(x)
    y = torch.empty(*x.shape[:-1], n, dtype=torch.float32 if float_output else x.dtype, device=x.device)
    residual = None if residual is None else residual.contiguous()
    arguments = (
        DTYPES[x.dtype], ptr(rows), stride, rows.shape[0], ptr(panels), ptr(bias), n, k, gated, ACTIVATIONS[activation],
        ptr(residual), n, float_output, ptr(y), n,
    )  # fmt: skip
    if scales is None:
        kernels().linear(*arguments)
    else:
        kernels().linear_int8(*arguments, weights, ptr(scales))
    return y


def _forward_cpu(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    gated: bool,
    activation: str,
    residual: Tensor | None,
    float_output: bool,
) -> Tensor:
    return _native(x, panels, 0, None, bias, n, k, gated, activation, residual, float_output)


def _forward_fake(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    gated: bool,
    activation: str,
    residual: Tensor | None,
    float_output: bool,
) -> Tensor:
    return torch.empty(*x.shape[:-1], n, dtype=torch.float32 if float_output else x.dtype, device=x.device)


def _int8_fake(
    x: Tensor,
    panels: Tensor,
    weights: int,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    gated: bool,
    activation: str,
    residual: Tensor | None,
    float_output: bool,
) -> Tensor:
    return _forward_fake(x, panels, bias, n, k, gated, activation, residual, float_output)


register("linear", _forward_cpu, _forward_fake)
register("linear_int8", _native, _int8_fake)
