"""attention() with the keys split among programs, one chunk each, for few query tokens over a long context.

The chunks are computed and folded by the functions of dschat_kernels/triton/attention.py on tiles of the same size: the
bits are those of attention(). Lengths are read on the GPU only, and the grid depends on the width of the block table,
so that a launch serves every length (as a CUDA graph wants it).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.cache import CHUNK, PAGE
from dschat_kernels.ops.rope_append import packed_heads
from dschat_kernels.triton._launch import Config, launch
from dschat_kernels.triton.attention import (
    attention,
    chunk_sums,
    fold,
    query_tile,
    result,
    shared_arguments,
    tile_config,
)


@triton.jit
def _row_of(bounds, rows, token):
    """The row r with bounds[r] <= token < bounds[r + 1], by halving."""
    low = 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(bounds + middle) <= token:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["rows", "chunks"])
def _split(
    q, k_cache, v_cache, table, slots, bounds, lengths, slopes, part_m, part_l, part_acc, rows, chunks, q_stride,
    table_stride, kv_heads, group, dim, v_dim, scale, softcap, window,
    M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    token = tl.program_id(1)
    head = tl.program_id(2)
    row = _row_of(bounds, rows, token)
    keys = tl.load(lengths + row)
    here = keys - tl.load(bounds + row + 1) + token
    seen = 0
    if window is not None:
        seen = tl.maximum(0, here - window + 1)
    if (chunk * CHUNK <= here) & (chunk * CHUNK + CHUNK > seen):
        i = tl.arange(0, M)
        inside = i < group
        q_head = head * group + i
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + q_head, mask=inside, other=0.0)
        slot = row
        if slots is not None:
            slot = tl.load(slots + row)
        pages = table + slot.to(tl.int64) * table_stride
        position = tl.full([M], 0, tl.int32) + here
        tile = query_tile(q, tl.full([M], 0, tl.int32) + token, q_head, inside, q_stride, dim, D)
        stop = tl.minimum(chunk * CHUNK + CHUNK, here + 1)
        m, l, acc = chunk_sums(
            tile, position, slope, chunk * CHUNK, stop, keys, k_cache, v_cache, pages, head, kv_heads, dim, v_dim,
            scale, softcap, window, M, D, PAGE, LANES, STEP,
        )  # fmt: skip
        part = (token.to(tl.int64) * kv_heads * group + q_head) * chunks + chunk
        d = tl.arange(0, D)
        tl.store(part_m + part, m, mask=inside)
        tl.store(part_l + part, l, mask=inside)
        tl.store(part_acc + part[:, None] * D + d[None, :], acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "chunks"])
def _join(
    part_m, part_l, part_acc, bounds, lengths, out, rows, chunks, heads, dim, window,
    D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = _row_of(bounds, rows, token)
    here = tl.load(lengths + row) - tl.load(bounds + row + 1) + token
    first = 0
    if window is not None:
        first = tl.maximum(0, here - window + 1) // CHUNK
    one = tl.arange(0, 1)
    d = tl.arange(0, D)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, D], tl.float32)
    place = token.to(tl.int64) * heads + head
    for chunk in range(first, here // CHUNK + 1):
        part = place * chunks + chunk + one
        new_acc = tl.load(part_acc + part[:, None] * D + d[None, :])
        m, l, acc = fold(m, l, acc, tl.load(part_m + part), tl.load(part_l + part), new_acc)
    y = result(m, l, acc).to(out.dtype.element_ty)
    tl.store(out + (place + one)[:, None] * dim + d[None, :], y, mask=(d < dim)[None, :])


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    slots: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> Tensor:
    """The op; every chunk is a program whatever num_splits says, and nothing here waits for the GPU."""
    q = packed_heads(q.detach())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tile = tile_config(q.dtype, q.shape[2])
    group = q.shape[1] // k_cache.shape[1]
    if group > tile.blocks["M"]:  # more heads share a kv head than a tile has rows
        return attention(
            q, k_cache, v_cache, block_table, cu_seqlens, kv_lens, slots, scale, window, softcap, alibi_slopes
        )
    arguments = shared_arguments(
        q, k_cache, v_cache, block_table, cu_seqlens, kv_lens, slots, scale, window, softcap, alibi_slopes
    )
    tokens, heads, dim = q.shape
    chunks = -(-block_table.shape[1] * PAGE // CHUNK)
    part_m, part_l = (
        torch.empty(tokens, heads, chunks, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    part_acc = torch.empty(tokens, heads, chunks, tile.blocks["D"], dtype=torch.float32, device=q.device)
    parts = {"part_m": part_m, "part_l": part_l, "part_acc": part_acc, "chunks": chunks}
    launch(_split, (chunks, tokens, k_cache.shape[1]), {**arguments, **parts}, tile)
    launch(
        _join, (tokens, heads),
        {
            **parts, "bounds": arguments["bounds"], "lengths": arguments["lengths"], "out": out,
            "rows": arguments["rows"], "heads": heads, "dim": dim, "window": window, "CHUNK": CHUNK,
        },
        Config({"D": tile.blocks["D"]}, num_warps=1, num_stages=1),
    )  # fmt: skip
    return out
