"""Bias and activation; the formulas are in dschat_kernels/ops/bias_act.py. A program owns a piece of one row, in the
backward of ROWS rows, and leaves a partial sum of the bias's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._launch import aligned, as_rows, float32, launch
from dschat_kernels.triton._math import activate, slope
from dschat_kernels.triton._rows import ROWS, column_sum, partial_sums, piece_config


@triton.jit
def _forward(x, bias, y, columns, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    v = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(y + row * columns + column, activate(v, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy, x, bias, dx, dbias, rows, columns, stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    b = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = block * ROWS + i
        here = inside & (row < rows)
        v = tl.load(x + row * stride + column, mask=here, other=0.0).to(tl.float32) + b
        g = tl.load(dy + row * columns + column, mask=here, other=0.0).to(tl.float32) * slope(v, ACTIVATION)
        tl.store(dx + row * columns + column, g.to(dx.dtype.element_ty), mask=here)
        total += g
    if dbias is not None:
        tl.store(dbias + block * columns + column, total, mask=inside)


def bias_act(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    rows, stride = as_rows(x)
    columns = rows.shape[1]
    config = piece_config(columns)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _forward, (rows.shape[0], -(-columns // config.blocks["BLOCK"])),
        {"x": rows, "bias": float32(bias), "y": y, "columns": columns, "stride": stride, "ACTIVATION": activation},
        config,
    )  # fmt: skip
    return y


def bias_act_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    rows, stride = as_rows(x)
    count, columns = rows.shape
    config = piece_config(columns)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks, (dbias,) = partial_sums(count, columns, x.device, bias_grad)
    launch(
        _backward, (blocks, -(-columns // config.blocks["BLOCK"])),
        {
            "dy": aligned(dy), "x": rows, "bias": float32(bias), "dx": dx, "dbias": dbias, "rows": count,
            "columns": columns, "stride": stride, "ACTIVATION": activation, "ROWS": ROWS,
        },
        config,
    )  # fmt: skip
    return dx, column_sum(dbias, columns, x.device)
