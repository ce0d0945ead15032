"""LayerNorm forward and backward; the formulas are in dschat_kernels/ops/layer_norm.py.

A program owns one row and keeps it in registers, so that the variance's second pass reads no memory. The backward's
programs own ROWS rows each and leave partial sums of the parameters' gradients, which column_sum adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._launch import Config, aligned, as_rows, float32, launch, no_tensor
from dschat_kernels.triton._rows import ROWS, column_sum, partial_sums, row_config, row_options


@triton.jit
def _forward(
    x, residual, weight, bias, y, residual_out, mean_out, rstd_out, hidden, stride, eps, BLOCK: tl.constexpr
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
    mean = tl.sum(v, 0) / hidden
    # The mean of what is left takes back the rounding error of the sum.
    mean += tl.sum(tl.where(inside, v - mean, 0.0), 0) / hidden
    centered = tl.where(inside, v - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 0) / hidden + eps)
    n = centered * rstd
    if weight is not None:
        n *= tl.load(weight + column, mask=inside, other=0.0)
    if bias is not None:
        n += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(y + row * hidden + column, n.to(y.dtype.element_ty), mask=inside)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy, d_residual_out, h, weight, mean, rstd, dx, dweight, dbias, rows, hidden,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = block * ROWS + i
        here = inside & (row < rows)
        g = tl.load(dy + row * hidden + column, mask=here, other=0.0).to(tl.float32)
        v = tl.load(h + row * hidden + column, mask=here, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        n = tl.where(inside, (v - tl.load(mean + row, mask=row < rows, other=0.0)) * r, 0.0)
        weight_sum += g * n
        bias_sum += g
        if weight is not None:
            g *= tl.load(weight + column, mask=inside, other=0.0)
        grad = r * (g - tl.sum(g, 0) / hidden - n * (tl.sum(g * n, 0) / hidden))
        if d_residual_out is not None:
            grad += tl.load(d_residual_out + row * hidden + column, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * hidden + column, grad.to(dx.dtype.element_ty), mask=here)
    if dweight is not None:
        tl.store(dweight + block * hidden + column, weight_sum, mask=inside)
    if dbias is not None:
        tl.store(dbias + block * hidden + column, bias_sum, mask=inside)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, stride = as_rows(x)
    hidden = rows.shape[1]
    config = row_config("layer_norm", hidden)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    residual_out = no_tensor(x) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _forward, (rows.shape[0],),
        {
            "x": rows, "residual": aligned(residual), "weight": float32(weight), "bias": float32(bias), "y": y,
            "residual_out": None if residual is None else residual_out, "mean_out": mean, "rstd_out": rstd,
            "hidden": hidden, "stride": stride, "eps": eps,
        },
        config, row_options(config),
    )  # fmt: skip
    return y, residual_out, mean, rstd


def layer_norm_backward(
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
    rows = h.numel() // hidden
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    blocks, (dweight, dbias) = partial_sums(rows, hidden, h.device, weight_grad, bias_grad)
    config = row_config("layer_norm", hidden)
    launch(
        _backward, (blocks,),
        {
            "dy": aligned(dy), "d_residual_out": aligned(d_residual_out), "h": aligned(h), "weight": float32(weight),
            "mean": aligned(mean), "rstd": aligned(rstd), "dx": dx, "dweight": dweight, "dbias": dbias, "rows": rows,
            "hidden": hidden, "ROWS": ROWS,
        },
        Config(config.blocks, config.num_warps),
    )  # fmt: skip
    return dx, column_sum(dweight, hidden, h.device), column_sum(dbias, hidden, h.device)
