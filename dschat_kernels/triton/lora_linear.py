"""Linear layer with a low-rank side path, and the fusion of an update into a weight; the formulas are in
dschat_kernels/ops/lora_linear.py.

x A^T, a few columns, is computed first; the main program adds scale (x A^T) B^T to its tile before the one rounding.
The factors' gradients are four products, none of which is split over its inner dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._gemm import WIDE_TILE, matmul, product, tile
from dschat_kernels.triton._launch import aligned, as_rows, float32, launch


@triton.jit(do_not_specialize=["rows"])
def _lora_linear(
    x, weight, bias, side, lora_b, y, rows, columns, depth, rank, scale, x_stride, weight_row, weight_k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    z = product(x, weight, row, column, rows, columns, depth, x_stride, 1, weight_k, weight_row, K, False)
    if bias is not None:
        z += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    z += scale * product(side, lora_b, row, column, rows, columns, rank, rank, 1, 1, rank, RANK, False)
    place = y + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, z.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _fuse_lora(
    weight, lora_a, lora_b, out, rows, columns, rank, scale, weight_row, weight_k,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    update = product(lora_b, lora_a, row, column, rows, columns, rank, rank, 1, columns, 1, K, False)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * weight_row + column.to(tl.int64)[None, :] * weight_k
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) + scale * update
    tl.store(
        out + row.to(tl.int64)[:, None] * columns + column[None, :], w.to(out.dtype.element_ty), mask=inside
    )


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    rows, stride = as_rows(x)
    (n, k), rank = weight.shape, lora_a.shape[0]
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    side = torch.empty(rows.shape[0], rank, dtype=torch.float32, device=x.device)
    a = float32(lora_a)
    assert a is not None
    matmul(rows, a.t(), side)
    config = tile(x.dtype, rows.shape[0], n, k)
    launch(
        _lora_linear, (-(-rows.shape[0] // config.blocks["M"]), -(-n // config.blocks["N"])),
        {
            "x": rows, "weight": weight.detach(), "bias": float32(bias), "side": side, "lora_b": float32(lora_b),
            "y": y, "rows": rows.shape[0], "columns": n, "depth": k, "rank": rank, "scale": scale,
            "x_stride": stride, "weight_row": weight.stride(0), "weight_k": weight.stride(1), "RANK": 16,
        },
        config,
    )  # fmt: skip
    return y


def fuse_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    n, k = weight.shape
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    blocks = WIDE_TILE.blocks
    launch(
        _fuse_lora, (-(-n // blocks["M"]), -(-k // blocks["N"])),
        {
            "weight": aligned(weight) if weight.is_contiguous() else weight.detach(), "lora_a": float32(lora_a),
            "lora_b": float32(lora_b), "out": out, "rows": n, "columns": k, "rank": lora_a.shape[0],
            "scale": scale, "weight_row": weight.stride(0), "weight_k": weight.stride(1),
        },
        WIDE_TILE,
    )  # fmt: skip
    return out


def low_rank_grads(
    x: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, _), (grads, _) = as_rows(x), as_rows(dy)
    a, b = float32(lora_a), float32(lora_b)
    assert a is not None and b is not None
    inner, side = (torch.empty(len(rows), len(a), dtype=torch.float32, device=x.device) for _ in range(2))
    d_a, d_b = (torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in (a, b))
    matmul(grads, b, inner, scale)
    matmul(rows, a.t(), side, scale)
    matmul(inner.t(), rows, d_a)
    matmul(grads.t(), side, d_b)
    return d_a.to(lora_a.dtype), d_b.to(lora_b.dtype), inner
