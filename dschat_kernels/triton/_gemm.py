"""Matrix products in tiles: float32 sums over the inner dimension, in blocks and in order.

No product is split over its inner dimension, and every tile adds it up in one order, so a row's sums do not depend on
its batch. float32 products are those of IEEE numbers, never TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._launch import Config, launch


@triton.jit
def product(
    a, b, row, column, rows, columns, depth, a_row, a_k, b_k, b_column, K: tl.constexpr, WIDE: tl.constexpr
):
    """sum_k a[row, k] b[k, column] in float32, for row [M] and column [N]; strides are of elements. WIDE: operands are
    widened to float32 first. b may be int8: its integers become a's dtype, which holds them exactly."""
    k = tl.arange(0, K)
    a_inside, b_inside = row < rows, column < columns
    a_place = a + row.to(tl.int64)[:, None] * a_row + k[None, :] * a_k
    b_place = b + k[:, None] * b_k + column.to(tl.int64)[None, :] * b_column
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, depth, K):
        inside = k < depth - start
        x = tl.load(a_place, mask=a_inside[:, None] & inside[None, :], other=0.0)
        w = tl.load(b_place, mask=inside[:, None] & b_inside[None, :], other=0.0)
        if WIDE:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if w.dtype == tl.int8:
            w = w.to(x.dtype)
        if x.dtype == tl.float32:
            # Short sums round less. Written as an addition, the compiler would sum into total again.
            part = tl.dot(x, w, input_precision="ieee")
            total = tl.fma(part, tl.full(total.shape, 1.0, tl.float32), total)
        else:
            total = tl.dot(x, w, total)
        a_place += K * a_k
        b_place += K * b_k
    return total


@triton.jit(do_not_specialize=["rows", "depth"])
def _matmul(
    a, b, out, rows, columns, depth, a_row, a_k, b_k, b_column, scale,
    ADD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    y = product(a, b, row, column, rows, columns, depth, a_row, a_k, b_k, b_column, K, True) * scale
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if ADD:
        y += tl.load(place, mask=inside, other=0.0)
    tl.store(place, y, mask=inside)


WIDE_TILE = Config({"M": 32, "N": 32, "K": 32}, num_warps=4, num_stages=2)
"""The tile of float32 products, which no tensor core computes."""


def matmul(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0, *, add: bool = False) -> None:
    """out = scale a b, or out += scale a b, in float32 whatever the operands' dtypes.

    a [r, k] and b [k, c] have any strides, out is float32 [r, c] and contiguous."""
    (rows, depth), columns = a.shape, b.shape[1]
    tile = WIDE_TILE.blocks
    launch(
        _matmul, (-(-rows // tile["M"]), -(-columns // tile["N"])),
        {
            "a": a, "b": b, "out": out, "rows": rows, "columns": columns, "depth": depth, "a_row": a.stride(0),
            "a_k": a.stride(1), "b_k": b.stride(0), "b_column": b.stride(1), "scale": scale, "ADD": add,
        },
        WIDE_TILE,
    )  # fmt: skip


def tile(dtype: torch.dtype, rows: int, columns: int, depth: int) -> Config:
    """The tile of a weight product [rows, depth] x [depth, columns].

    A tile of 64 rows or more takes one kind of matrix instruction, which adds up K in one order whatever the tile, so
    that the number of rows may choose it. Few rows wait for the weights: narrow tiles, to have enough of them; many
    rows wait for the matrix units: large ones.
    """
    if dtype == torch.float32:
        return WIDE_TILE
    if depth < 128:
        return Config({"M": 64, "N": 64, "K": 64 if depth > 32 else 32}, num_warps=8, num_stages=4)
    if rows > 1024:
        return Config({"M": 128, "N": 128, "K": 32}, num_warps=8, num_stages=4)
    if rows > 64:
        return Config({"M": 64, "N": 64, "K": 64}, num_warps=8, num_stages=4)
    if columns < 3072:
        return Config({"M": 64, "N": 16, "K": 128}, num_warps=4, num_stages=4)
    if columns < 12288:
        return Config({"M": 64, "N": 32, "K": 128}, num_warps=4, num_stages=3)
    return Config({"M": 64, "N": 64, "K": 64}, num_warps=4, num_stages=5)
