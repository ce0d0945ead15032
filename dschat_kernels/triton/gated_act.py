"""The gate of a gated MLP; the formula is in dschat_kernels/ops/gated_act.py. A program owns a piece of one row, in the
backward of ROWS rows, and leaves partial sums of the biases' gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.ops.gated_act import _result_shape
from dschat_kernels.triton._launch import aligned, as_rows, float32, launch, no_tensor
from dschat_kernels.triton._math import activate, slope
from dschat_kernels.triton._rows import ROWS, column_sum, partial_sums, piece_config


@triton.jit
def _forward(
    gate, up, gate_bias, up_bias, y, columns, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    if PACKED:
        u = tl.load(gate + row * gate_stride + columns + column, mask=inside, other=0.0).to(tl.float32)
    else:
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if gate_bias is not None:
        g += tl.load(gate_bias + column, mask=inside, other=0.0)
    if up_bias is not None:
        u += tl.load(up_bias + column, mask=inside, other=0.0)
    tl.store(y + row * columns + column, (activate(g, ACTIVATION) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy, gate, up, gate_bias, up_bias, dgate, dup, dgate_bias, dup_bias, rows, columns, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate_shift = tl.zeros([BLOCK], tl.float32)
    up_shift = tl.zeros([BLOCK], tl.float32)
    if gate_bias is not None:
        gate_shift = tl.load(gate_bias + column, mask=inside, other=0.0)
    if up_bias is not None:
        up_shift = tl.load(up_bias + column, mask=inside, other=0.0)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    up_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = block * ROWS + i
        here = inside & (row < rows)
        g = tl.load(gate + row * gate_stride + column, mask=here, other=0.0).to(tl.float32) + gate_shift
        if PACKED:
            u = tl.load(gate + row * gate_stride + columns + column, mask=here, other=0.0).to(tl.float32)
        else:
            u = tl.load(up + row * up_stride + column, mask=here, other=0.0).to(tl.float32)
        u += up_shift
        d = tl.load(dy + row * columns + column, mask=here, other=0.0).to(tl.float32)
        dg = d * u * slope(g, ACTIVATION)
        du = d * activate(g, ACTIVATION)
        if PACKED:
            place = dgate + row * 2 * columns + column
            tl.store(place, dg.to(dgate.dtype.element_ty), mask=here)
            tl.store(place + columns, du.to(dgate.dtype.element_ty), mask=here)
        else:
            tl.store(dgate + row * columns + column, dg.to(dgate.dtype.element_ty), mask=here)
            tl.store(dup + row * columns + column, du.to(dgate.dtype.element_ty), mask=here)
        gate_sum += dg
        up_sum += du
    if dgate_bias is not None:
        tl.store(dgate_bias + block * columns + column, gate_sum, mask=inside)
    if dup_bias is not None:
        tl.store(dup_bias + block * columns + column, up_sum, mask=inside)


def _inputs(
    gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None
) -> tuple[int, dict[str, object]]:
    """Rows, and the arguments that forward and backward share."""
    rows, stride = as_rows(gate)
    up_rows, up_stride = (None, 0) if up is None else as_rows(up)
    columns = rows.shape[1] // 2 if up is None else rows.shape[1]
    return rows.shape[0], {
        "gate": rows, "up": up_rows, "gate_bias": float32(gate_bias), "up_bias": float32(up_bias),
        "columns": columns, "gate_stride": stride, "up_stride": up_stride, "PACKED": up is None,
    }  # fmt: skip


def gated_act(
    gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    y = torch.empty(_result_shape(gate, up), dtype=gate.dtype, device=gate.device)
    rows, arguments = _inputs(gate, up, gate_bias, up_bias)
    config = piece_config(y.shape[-1])
    grid = (rows, -(-y.shape[-1] // config.blocks["BLOCK"]))
    launch(_forward, grid, {**arguments, "y": y, "ACTIVATION": activation}, config)
    return y


def gated_act_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    gate_bias_grad: bool,
    up_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns, device = dy.shape[-1], gate.device
    rows, arguments = _inputs(gate, up, gate_bias, up_bias)
    config = piece_config(columns)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=device)
    dup = no_tensor(gate) if up is None else torch.empty(gate.shape, dtype=gate.dtype, device=device)
    blocks, (gate_sums, up_sums) = partial_sums(rows, columns, device, gate_bias_grad, up_bias_grad)
    launch(
        _backward, (blocks, -(-columns // config.blocks["BLOCK"])),
        {
            **arguments, "dy": aligned(dy), "dgate": dgate, "dup": None if up is None else dup,
            "dgate_bias": gate_sums, "dup_bias": up_sums, "rows": rows, "ACTIVATION": activation, "ROWS": ROWS,
        },
        config,
    )  # fmt: skip
    return dgate, dup, column_sum(gate_sums, columns, device), column_sum(up_sums, columns, device)
