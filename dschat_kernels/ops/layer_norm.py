"""LayerNorm with an optional fused residual add.

    h = x + residual
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

The variance is the mean of (h - mean)^2, summed in a second pass over the row; one rounding at the end.

Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dschat_kernels.ops._common import (
    DTYPES,
    LIBRARY,
    as_rows,
    check_vector,
    implementation,
    kernels,
    no_tensor,
    ptr,
    register,
    resolve_backend,
    row_scratch,
    widen,
)
from dschat_kernels.ops.rms_norm import check_arguments


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of x [..., hidden] with weight and bias [hidden] or None; see the module for the formula.

    With `residual` (shape and dtype of x) the sum round(x + residual) is normalised, and returned as second
    result. The statistics are float32 (float64 for float64 input), the result has the dtype of x; weight and
    bias may have another. Differentiable in x, residual, weight and bias.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices and backends.
    """
    check_arguments("layer_norm", x, eps, residual)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector("layer_norm", name, vector, x, x.shape[-1])
    backend = resolve_backend("layer_norm", backend, x, weight, bias)
    if backend == "reference":
        return layer_norm_reference(x, weight, bias, eps, residual=residual)
    op = implementation("layer_norm", backend, x, weight, bias, residual)
    y, residual_out, _, _ = op(x, weight, bias, residual, eps)
    return y if residual is None else (y, residual_out)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    h = x if residual is None else x + residual
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    v = h.to(wide)
    centered = v - v.mean(-1, keepdim=True)
    n = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        n = n * weight.to(wide)
    if bias is not None:
        n = n + bias.to(wide)
    y = n.to(h.dtype)
    return y if residual is None else (y, h)


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps) "
    "-> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor? d_residual_out, Tensor h, Tensor? weight, Tensor mean, "
    "Tensor rstd, bool weight_grad, bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _forward_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = kernels()
    rows, stride = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    residual = None if residual is None else residual.contiguous()
    residual_out = no_tensor(x) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, bias = widen(weight), widen(bias)
    module.layer_norm(
        DTYPES[x.dtype], ptr(rows), ptr(residual), ptr(weight), ptr(bias), ptr(y), ptr(residual_out),
        ptr(mean), ptr(rstd), rows.shape[0], rows.shape[1], stride, eps,
    )  # fmt: skip
    return y, residual_out, mean, rstd


def _backward_cpu(
    dy: Tensor,
    d_residual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    module = kernels()
    dy, h = dy.contiguous(), h.contiguous()
    d_residual_out = None if d_residual_out is None else d_residual_out.contiguous()
    hidden = h.shape[-1]
    rows = h.numel() // hidden
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dweight = torch.empty(hidden if weight_grad else 0, dtype=torch.float32, device=h.device)
    dbias = torch.empty(hidden if bias_grad else 0, dtype=torch.float32, device=h.device)
    partial = row_scratch(module, h, rows, hidden, int(weight_grad) + int(bias_grad))
    scale = widen(weight)
    module.layer_norm_backward(
        DTYPES[h.dtype], ptr(dy), ptr(d_residual_out), ptr(h), ptr(scale), ptr(mean), ptr(rstd), ptr(dx),
        ptr(dweight), ptr(dbias), ptr(partial), rows, hidden,
    )  # fmt: skip
    return dx, dweight, dbias


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = no_tensor(x) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return y, residual_out, mean, rstd


def _backward_fake(
    dy: Tensor,
    d_residual_out: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = h.shape[-1]
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    return dx, mean.new_empty(hidden if weight_grad else 0), mean.new_empty(hidden if bias_grad else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.eps = inputs
    _, residual_out, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual_out if ctx.has_residual else x, weight, mean, rstd, bias)


def _grad(ctx: Any, dy: Tensor, d_residual_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd, bias = ctx.saved_tensors
    _, weight_grad, bias_grad, *_ = ctx.needs_input_grad
    dx, dweight, dbias = ctx.ops.layer_norm_backward(
        dy, d_residual_out if ctx.has_residual else None, h, weight, mean, rstd, weight_grad, bias_grad
    )
    return (
        dx,
        dweight.to(weight.dtype) if weight_grad else None,
        dbias.to(bias.dtype) if bias_grad else None,
        dx if ctx.has_residual else None,
        None,
    )


def _again(ctx: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
    h, weight, _, _, bias = ctx.saved_tensors
    y = layer_norm_reference(h, weight, bias, ctx.eps)
    if not ctx.has_residual:
        return y, (h, weight, bias, None, None)
    return (y, h), (h, weight, bias, h, None)


register("layer_norm", _forward_cpu, _forward_fake, _save, _grad, _again)
register("layer_norm_backward", _backward_cpu, _backward_fake)
