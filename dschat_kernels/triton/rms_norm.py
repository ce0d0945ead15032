"""RMSNorm forward and backward; the formulas are in dschat_kernels/ops/rms_norm.py.

A program owns one row and keeps it in registers: it is read once. The backward's programs own ROWS rows each and leave
one partial sum of the weight's gradient, which column_sum adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.ops.rms_norm import _result_dtype, _scale
from dschat_kernels.triton._launch import Config, aligned, as_rows, launch, no_tensor
from dschat_kernels.triton._rows import ROWS, column_sum, partial_sums, row_config, row_options


@triton.jit
def _forward(
    x, residual, scale, y, residual_out, rstd, hidden, stride, eps, LLAMA: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    h = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if residual is not None:
        other = tl.load(residual + row * hidden + column, mask=inside, other=0.0)
        h = (h.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(residual_out + row * hidden + column, h, mask=inside)
    v = h.to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / hidden + eps)
    n = v * r
    if LLAMA:
        n = n.to(x.dtype.element_ty).to(tl.float32)
    n = n * tl.load(scale + column, mask=inside, other=0.0)
    tl.store(y + row * hidden + column, n.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy, d_residual_out, h, scale, rstd, dx, partial, rows, hidden,
    LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    factor = tl.load(scale + column, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = block * ROWS + i
        here = inside & (row < rows)
        g = tl.load(dy + row * hidden + column, mask=here, other=0.0).to(tl.float32)
        v = tl.load(h + row * hidden + column, mask=here, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        n = v * r
        scaled = g * factor
        mean = tl.sum(scaled * n, 0) / hidden
        if LLAMA:
            total += g * n.to(h.dtype.element_ty).to(tl.float32)
        else:
            total += g * n
        grad = r * (scaled - n * mean)
        if d_residual_out is not None:
            grad += tl.load(d_residual_out + row * hidden + column, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * hidden + column, grad.to(dx.dtype.element_ty), mask=here)
    if partial is not None:
        tl.store(partial + block * hidden + column, total, mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, stride = as_rows(x)
    hidden = rows.shape[1]
    config = row_config("rms_norm", hidden)
    y = torch.empty(x.shape, dtype=_result_dtype(x, weight, rounding), device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    residual_out = no_tensor(x) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _forward, (rows.shape[0],),
        {
            "x": rows, "residual": aligned(residual), "scale": aligned(_scale(weight, weight_offset, rounding)),
            "y": y, "residual_out": None if residual is None else residual_out, "rstd": rstd, "hidden": hidden,
            "stride": stride, "eps": eps, "LLAMA": rounding == "llama",
        },
        config, row_options(config),
    )  # fmt: skip
    return y, residual_out, rstd


def rms_norm_backward(
    dy: Tensor,
    d_residual_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    rounding: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    hidden = h.shape[-1]
    rows = h.numel() // hidden
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    blocks, (partial,) = partial_sums(rows, hidden, h.device, weight_grad)
    config = row_config("rms_norm", hidden)
    launch(
        _backward, (blocks,),
        {
            "dy": aligned(dy), "d_residual_out": aligned(d_residual_out), "h": aligned(h),
            "scale": aligned(_scale(weight, weight_offset, rounding)), "rstd": aligned(rstd), "dx": dx,
            "partial": partial, "rows": rows, "hidden": hidden, "LLAMA": rounding == "llama", "ROWS": ROWS,
        },
        Config(config.blocks, config.num_warps),
    )  # fmt: skip
    return dx, column_sum(partial, hidden, h.device)
