"""RMSNorm with an optional fused residual add.

    h = x + residual
    y = h / sqrt(mean(h^2) + eps) * (weight_offset + weight)

`rounding` names where a reduced precision rounds, which differs between model families:

    "llama"   y = round(round(h * rstd) * weight)      LlamaRMSNorm: back to the dtype, then times the weight
    "gemma"   y = round(h * rstd * (offset + weight))  Gemma2RMSNorm: one rounding at the end

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dschat_kernels.ops._common import (
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
    no_tensor,
    ptr,
    register,
    resolve_backend,
    row_scratch,
)

ROUNDINGS = {"llama": 0, "gemma": 1}  # csrc/cpu/rms_norm.h NormRounding


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "llama",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of x [..., hidden] with weight [hidden]; see the module for the formula.

    With `residual` (shape and dtype of x) the sum round(x + residual) is normalised, and returned as second
    result. The statistics are float32 (float64 for float64 input). The result has the dtype of x, but for
    rounding "llama" with a weight of another dtype: then torch's promotion of the two, as in HF.
    Differentiable in x, residual and weight.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices, roundings and backends.
    """
    check_arguments("rms_norm", x, eps, residual)
    check_vector("rms_norm", "weight", weight, x, x.shape[-1])
    check_choice("rms_norm", "rounding", rounding, ROUNDINGS)
    backend = resolve_backend("rms_norm", backend, x, weight)
    if backend == "reference":
        return rms_norm_reference(
            x, weight, eps, residual=residual, weight_offset=weight_offset, rounding=rounding
        )
    op = implementation("rms_norm", backend, x, weight, residual)
    y, residual_out, _ = op(x, weight, residual, eps, weight_offset, rounding)
    return y if residual is None else (y, residual_out)


def check_arguments(op: str, x: Tensor, eps: float, residual: Tensor | None) -> None:
    """The checks that both norms share."""
    check_tensor(op, "x", x)
    check(
        x.dim() > 0 and x.shape[-1] > 0,
        f"{op}: x has shape {list(x.shape)}; give [..., hidden] with hidden > 0.",
    )
    check(eps >= 0.0, f"{op}: eps is {eps}; give a number that is not negative.")
    if residual is not None:
        check_tensor(op, "residual", residual)
        check(
            residual.shape == x.shape,
            f"{op}: residual has shape {list(residual.shape)} and x {list(x.shape)}; give the same shape.",
        )
        check(
            residual.dtype == x.dtype,
            f"{op}: residual is {residual.dtype} and x is {x.dtype}; give the same dtype.",
            TypeError,
        )
        check_device(op, "residual", residual, x)


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "llama",
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    h = x if residual is None else x + residual
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    v = h.to(wide)
    n = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    if rounding == "llama":
        y = n.to(h.dtype) * (weight if weight_offset == 0.0 else weight_offset + weight)
    else:
        y = (n * (weight_offset + weight.to(wide))).to(h.dtype)
    return y if residual is None else (y, h)


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, float weight_offset, str rounding) "
    "-> (Tensor y, Tensor residual_out, Tensor rstd)"
)
LIBRARY.define(
    "rms_norm_backward(Tensor dy, Tensor? d_residual_out, Tensor h, Tensor weight, Tensor rstd, "
    "float weight_offset, str rounding, bool weight_grad) -> (Tensor dx, Tensor dweight)"
)


def _result_dtype(x: Tensor, weight: Tensor, rounding: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if rounding == "llama" else x.dtype


def _scale(weight: Tensor, offset: float, rounding: str) -> Tensor:
    """The factor of the normalised row as float32: rounded to the weight's dtype where the mode says so."""
    if rounding == "gemma":
        return (offset + weight.detach().float()).contiguous()
    weight = weight.detach() if offset == 0.0 else offset + weight.detach()
    return weight.float().contiguous()


def _forward_cpu(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = kernels()
    rows, stride = as_rows(x)
    y = torch.empty(x.shape, dtype=_result_dtype(x, weight, rounding), device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    residual = None if residual is None else residual.contiguous()
    residual_out = no_tensor(x) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = _scale(weight, offset, rounding)
    module.rms_norm(
        DTYPES[x.dtype], DTYPES[y.dtype], ptr(rows), ptr(residual), ptr(scale), ptr(y), ptr(residual_out),
        ptr(rstd), rows.shape[0], rows.shape[1], stride, eps, ROUNDINGS[rounding],
    )  # fmt: skip
    return y, residual_out, rstd


def _backward_cpu(
    dy: Tensor,
    d_residual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    rounding: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    module = kernels()
    dy, h = dy.contiguous(), h.contiguous()
    d_residual_out = None if d_residual_out is None else d_residual_out.contiguous()
    hidden = h.shape[-1]
    rows = h.numel() // hidden
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dscale = torch.empty(hidden if weight_grad else 0, dtype=torch.float32, device=h.device)
    partial = row_scratch(module, h, rows, hidden, int(weight_grad))
    scale = _scale(weight, offset, rounding)
    module.rms_norm_backward(
        DTYPES[h.dtype], DTYPES[dy.dtype], ptr(dy), ptr(d_residual_out), ptr(h), ptr(scale), ptr(rstd),
        ptr(dx), ptr(dscale), ptr(partial), rows, hidden, ROUNDINGS[rounding],
    )  # fmt: skip
    return dx, dscale


def _forward_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=_result_dtype(x, weight, rounding), device=x.device)
    residual_out = no_tensor(x) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, residual_out, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _backward_fake(
    dy: Tensor,
    d_residual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    rounding: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    return dx, rstd.new_empty(h.shape[-1] if weight_grad else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, ctx.eps, ctx.offset, ctx.rounding = inputs
    _, residual_out, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(residual_out if ctx.has_residual else x, weight, rstd)


def _grad(ctx: Any, dy: Tensor, d_residual_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[1]
    dx, dweight = ctx.ops.rms_norm_backward(
        dy,
        d_residual_out if ctx.has_residual else None,
        h,
        weight,
        rstd,
        ctx.offset,
        ctx.rounding,
        weight_grad,
    )
    dweight = dweight.to(weight.dtype) if weight_grad else None
    return dx, dweight, dx if ctx.has_residual else None, None, None, None


def _again(ctx: Any) -> tuple[Any, tuple[Tensor | None, ...]]:
    h, weight, _ = ctx.saved_tensors
    y = rms_norm_reference(h, weight, ctx.eps, weight_offset=ctx.offset, rounding=ctx.rounding)
    if not ctx.has_residual:
        return y, (h, weight, None, None, None, None)
    return (y, h), (h, weight, h, None, None, None)


register("rms_norm", _forward_cpu, _forward_fake, _save, _grad, _again)
register("rms_norm_backward", _backward_cpu, _backward_fake)
