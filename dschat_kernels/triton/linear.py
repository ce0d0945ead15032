"""Linear layer with epilogues; the formula and its roundings are in dschat_kernels/ops/linear.py.

A program owns a tile of the result; a gated program sums the tiles of gate and up at once, so that neither is written.
The weight is dense [n, k] (gated: [2 n, k], gate first): a PackedLinear with layout "dense". Its integers, where it is
int8, are widened tile by tile, and their sums multiplied by the columns' scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.packing import WEIGHTS
from dschat_kernels.triton._gemm import product, tile
from dschat_kernels.triton._launch import Config, aligned, as_rows, float32, launch
from dschat_kernels.triton._math import activate


@triton.jit
def rounded(sums, scales, bias, column, columns, y):
    """round(scales sums + bias) of y's dtype, as float32."""
    if scales is not None:
        sums *= tl.load(scales + column, mask=column < columns, other=0.0)[None, :]
    if bias is not None:
        sums += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    return sums.to(y.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, weight, scales, bias, up, up_scales, up_bias, residual, y, rows, columns, depth, x_stride, weight_stride,
    ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    z = product(x, weight, row, column, rows, columns, depth, x_stride, 1, 1, weight_stride, K, False)
    z = rounded(z, scales, bias, column, columns, y)
    z = activate(z, ACTIVATION)
    if up is not None:
        u = product(x, up, row, column, rows, columns, depth, x_stride, 1, 1, weight_stride, K, False)
        z *= rounded(u, up_scales, up_bias, column, columns, y)
    z = z.to(y.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if residual is not None:
        other = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        z = (other + z.to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + place, z, mask=inside)


def pipelines(config: Config) -> list[Config]:
    """That of the tile, and others for the same tile, to be timed: they move the same blocks, in the same order."""
    others = ((4, 3), (4, 4), (8, 3)) if config.num_stages > 2 else ()  # the float32 tile has one
    return [Config({}, warps, stages) for warps, stages in ((config.num_warps, config.num_stages), *others)]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    gated: bool,
    activation: str,
    residual: Tensor | None,
    float_output: bool,
) -> Tensor:
    return _run(x, weight, None, bias, n, k, gated, activation, residual, float_output)


def linear_int8(
    x: Tensor,
    weight: Tensor,
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
    if WEIGHTS[weights] != "int8":
        raise ValueError(f"linear_int8: weights is {WEIGHTS[weights]!r}; the triton backend has 'int8'.")
    return _run(x, weight, float32(scales), bias, n, k, gated, activation, residual, float_output)


def _run(
    x: Tensor,
    weight: Tensor,
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
    bias = float32(bias)
    config = tile(x.dtype, rows.shape[0], n, k)
    grid = (-(-rows.shape[0] // config.blocks["M"]), -(-n // config.blocks["N"]))
    # The number of rows chooses the blocks. As arguments they fit the grid whichever pipeline runs, and tell tiles that
    # were tuned apart.
    pipeline, *others = pipelines(config)
    launch(
        _linear, grid,
        {
            "x": rows, "weight": weight, "scales": scales, "bias": bias, "up": weight[n:] if gated else None,
            "up_scales": scales[n:] if gated and scales is not None else None,
            "up_bias": bias[n:] if gated and bias is not None else None, "residual": aligned(residual), "y": y,
            "rows": rows.shape[0], "columns": n, "depth": k, "x_stride": stride, "weight_stride": weight.stride(0),
            "ACTIVATION": activation, **config.blocks,
        },
        pipeline, others,
    )  # fmt: skip
    return y
