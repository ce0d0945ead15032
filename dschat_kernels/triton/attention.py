"""Attention over the paged cache, and the training form with its gradients; the formulas are in
dschat_kernels/ops/attention.py, the layout of the cache in dschat_kernels/cache.py.

Keys are reduced in chunks of CHUNK at absolute positions, page by page inside a chunk, and chunks are folded in order.
A prefill program does that for a tile of rows (the query heads of one kv head, token by token); a program of
attention_decode computes one chunk for one token and leaves it to be folded. Both run the same function on a tile of
the same size, so a token's bits depend neither on how many tokens are queries at once nor on the split, and pages that
a token does not see change nothing: they multiply by one and add zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.cache import CHUNK, LANES, PAGE, padded_head_dim
from dschat_kernels.ops.attention import cache_of
from dschat_kernels.ops.rope_append import int32, packed_heads
from dschat_kernels.triton._launch import Config, float32, launch, next_power_of_2
from dschat_kernels.triton._math import softcapped, tanh
from dschat_kernels.triton.rope_append import rope_append


@triton.jit
def _alibi(slope, key, distance, scale):
    """What ALiBi adds to scores [M, N]: of slopes and key positions that broadcast to them."""
    rounded = (key.to(tl.float32).to(tl.bfloat16).to(tl.float32) * -slope).to(tl.bfloat16).to(tl.float32)
    return tl.where(slope < 0.0, scale * rounded, slope * distance.to(tl.float32))


@triton.jit
def _scores(q, k, key, position, slope, scale, softcap, window):
    """Scores of q [M, D] at position [M] with k [D, N] at key [N], -inf for keys out of sight."""
    distance = key[None, :] - position[:, None]
    s = tl.dot(q, k, input_precision="ieee") * scale
    if softcap is not None:
        s = softcapped(s, softcap)
    if slope is not None:
        s += _alibi(slope[:, None], key[None, :], distance, scale)
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    return tl.where(hidden, float("-inf"), s)


@triton.jit
def fold(m, l, acc, new_m, new_l, new_acc):
    """Two sums over keys, of weights relative to their largest score, as one; that of no keys has m = -inf, l = 0."""
    top = tl.maximum(m, new_m)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp(m - pivot), tl.exp(new_m - pivot)
    return top, l * old + new_l * new, acc * old[:, None] + new_acc * new[:, None]


@triton.jit
def chunk_sums(
    q, position, slope, begin, end, keys, k_cache, v_cache, pages, head, kv_heads, dim, v_dim, scale, softcap, window,
    M: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """(largest score, sum of weights, weighted values) of the tile q [M, D] over the keys from begin, a multiple of
    PAGE, to end of one kv head, STEP at a time; `keys` are in the cache, `pages` points at the row of the block table.
    """
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    at = tl.arange(0, STEP)
    d = tl.arange(0, D)
    k_place = (at // LANES)[None, :] * dim * LANES + d[:, None] * LANES + (at % LANES)[None, :]
    v_place = at[:, None] * v_dim + d[None, :]
    for start in range(begin, end, STEP):
        page = tl.load(pages + start // PAGE).to(tl.int64) * kv_heads + head
        place = page * PAGE + start % PAGE  # LANES divides STEP
        there = at < keys - start
        k = tl.load(k_cache + place * dim + k_place, mask=there[None, :] & (d < dim)[:, None], other=0.0)
        s = _scores(q, k, start + at, position, slope, scale, softcap, window)
        top = tl.maximum(m, tl.max(s, 1))
        pivot = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(s - pivot[:, None])
        kept = tl.exp(m - pivot)
        l = l * kept + tl.sum(p, 1)
        v = tl.load(v_cache + place * v_dim + v_place, mask=there[:, None] & (d < dim)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        m = top
    return m, l, acc


@triton.jit
def query_tile(q, token, q_head, inside, q_stride, dim, D: tl.constexpr):
    d = tl.arange(0, D)
    place = token.to(tl.int64)[:, None] * q_stride + (q_head * dim)[:, None] + d[None, :]
    return tl.load(q + place, mask=inside[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def result(m, l, acc):
    """Weighted values over the sum of weights; of no keys zero."""
    return acc / tl.where(l > 0.0, l, 1.0)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _prefill(
    q, k_cache, v_cache, table, slots, bounds, lengths, slopes, out, rows, q_stride, table_stride, kv_heads, group, dim,
    v_dim, scale, softcap, window,
    M: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    head = tl.program_id(2)
    first = tl.load(bounds + row)
    queries = tl.load(bounds + row + 1) - first
    keys = tl.load(lengths + row)
    # Rows of the tile: query heads of one token, then those of the next.
    i = tl.program_id(0) * M + tl.arange(0, M)
    if tl.program_id(0) * M < queries * group:
        inside = i < queries * group
        token = i // group
        q_head = head * group + i % group
        position = keys - queries + token
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + q_head, mask=inside, other=0.0)
        slot = row
        if slots is not None:
            slot = tl.load(slots + row)
        pages = table + slot.to(tl.int64) * table_stride
        tile = query_tile(q, first + token, q_head, inside, q_stride, dim, D)
        m = tl.full([M], float("-inf"), tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        end = tl.minimum(keys, keys - queries + (tl.program_id(0) * M + M - 1) // group + 1)
        begin = 0
        if window is not None:
            seen = tl.maximum(0, keys - queries + tl.program_id(0) * M // group - window + 1)
            begin = seen // CHUNK * CHUNK
        for start in range(begin, end, CHUNK):
            stop = tl.minimum(start + CHUNK, end)
            new_m, new_l, new_acc = chunk_sums(
                tile, position, slope, start, stop, keys, k_cache, v_cache, pages, head, kv_heads, dim, v_dim,
                scale, softcap, window, M, D, PAGE, LANES, STEP,
            )  # fmt: skip
            m, l, acc = fold(m, l, acc, new_m, new_l, new_acc)
        d = tl.arange(0, D)
        place = ((first + token) * kv_heads * group + q_head).to(tl.int64)[:, None] * dim + d[None, :]
        y = result(m, l, acc).to(out.dtype.element_ty)
        tl.store(out + place, y, mask=inside[:, None] & (d < dim)[None, :])


def tile_config(dtype: torch.dtype, dim: int) -> Config:
    """The tile; one for prefill and decode, which is what makes their bits equal."""
    block, wide = max(16, next_power_of_2(dim)), dtype == torch.float32
    rows, keys = 16 if wide or block > 128 else 32, 16 if wide and block > 128 else 32
    return Config({"M": rows, "STEP": keys, "D": block}, num_warps=8, num_stages=2)


def shared_arguments(
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
) -> dict[str, object]:
    """The arguments that prefill and decode share."""
    table, kv_heads = int32(block_table), k_cache.shape[1]
    return {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "table": table, "bounds": int32(cu_seqlens),
        "slots": None if slots is None else int32(slots), "lengths": int32(kv_lens), "rows": kv_lens.shape[0],
        "slopes": float32(alibi_slopes), "q_stride": q.stride(0), "table_stride": table.stride(0),
        "kv_heads": kv_heads, "group": q.shape[1] // kv_heads, "dim": q.shape[2],
        "v_dim": padded_head_dim(q.shape[2]), "scale": scale, "softcap": softcap, "window": window, "CHUNK": CHUNK,
        "PAGE": PAGE, "LANES": LANES,
    }  # fmt: skip


def attention(
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
) -> Tensor:
    q = packed_heads(q.detach())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    arguments = shared_arguments(
        q, k_cache, v_cache, block_table, cu_seqlens, kv_lens, slots, scale, window, softcap, alibi_slopes
    )
    tile = tile_config(q.dtype, q.shape[2])
    kv_heads = k_cache.shape[1]
    longest = int(cu_seqlens.diff().max()) * (q.shape[1] // kv_heads)
    grid = (-(-longest // tile.blocks["M"]), kv_lens.shape[0], kv_heads)
    launch(_prefill, grid, {**arguments, "out": out}, tile)
    return out


# ---------------------------------------------------------------------------------------------- training form


@triton.jit
def _weights(s_raw, lse, key, position, slope, scale, softcap, window):
    """(softmax weights, derivative of the scores in q . k) from the products s_raw and the log of their sum."""
    distance = key[None, :] - position[:, None]
    s = s_raw * scale
    turn = scale + 0.0 * s
    if softcap is not None:
        t = tanh(s / softcap)
        s = softcap * t
        turn = scale * (1.0 - t * t)
    if slope is not None:
        s += _alibi(slope, key[None, :], distance, scale)
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    return tl.where(hidden, 0.0, tl.exp(s - lse)), turn


@triton.jit
def _tile(x, place, stride, head, dim, inside, D: tl.constexpr):
    """x [tokens, heads, dim] at place [N] of one head, 0 outside."""
    d = tl.arange(0, D)
    at = place.to(tl.int64)[:, None] * stride + head * dim + d[None, :]
    return tl.load(x + at, mask=inside[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _backward_q(
    dout, q, k, v, bounds, slopes, dq, lse_out, delta_out, tokens, dout_stride, q_stride, k_stride, v_stride, heads,
    group, dim, scale, softcap, window, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head; and for _backward_kv the log of their sums of weights, and sum_j p_j dout . v_j."""
    row = tl.program_id(1)
    head = tl.program_id(2)
    first = tl.load(bounds + row)
    length = tl.load(bounds + row + 1) - first
    at = tl.program_id(0) * M
    if at < length:
        i = at + tl.arange(0, M)
        inside = i < length
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head)
        query = _tile(q, first + i, q_stride, head, dim, inside, D)
        grad = _tile(dout, first + i, dout_stride, head, dim, inside, D)
        m = tl.full([M], float("-inf"), tl.float32)
        l = tl.zeros([M], tl.float32)
        delta = tl.zeros([M], tl.float32)
        begin = 0
        if window is not None:
            begin = tl.maximum(0, at - window + 1) // N * N
        end = tl.minimum(length, at + M)
        slope_rows = None
        if slopes is not None:
            slope_rows = tl.zeros([M], tl.float32) + slope
        for start in range(begin, end, N):
            j = start + tl.arange(0, N)
            key = _tile(k, first + j, k_stride, head // group, dim, j < length, D)
            value = _tile(v, first + j, v_stride, head // group, dim, j < length, D)
            s = _scores(query, tl.trans(key), j, i, slope_rows, scale, softcap, window)
            top = tl.maximum(m, tl.max(s, 1))
            pivot = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp(s - pivot[:, None])
            kept = tl.exp(m - pivot)
            l = l * kept + tl.sum(p, 1)
            delta = delta * kept + tl.sum(p * tl.dot(grad, tl.trans(value), input_precision="ieee"), 1)
            m = top
        lse = m + tl.log(l)
        delta = delta / l
        acc = tl.zeros([M, D], tl.float32)
        for start in range(begin, end, N):
            j = start + tl.arange(0, N)
            key = _tile(k, first + j, k_stride, head // group, dim, j < length, D)
            value = _tile(v, first + j, v_stride, head // group, dim, j < length, D)
            s = tl.dot(query, tl.trans(key), input_precision="ieee")
            p, turn = _weights(s, lse[:, None], j, i, slope, scale, softcap, window)
            dp = tl.dot(grad, tl.trans(value), input_precision="ieee")
            ds = p * (dp - delta[:, None]) * turn
            acc = tl.dot(ds, key.to(tl.float32), acc, input_precision="ieee")
        d = tl.arange(0, D)
        place = ((first + i).to(tl.int64) * heads + head)[:, None] * dim + d[None, :]
        tl.store(dq + place, acc.to(dq.dtype.element_ty), mask=inside[:, None] & (d < dim)[None, :])
        tl.store(lse_out + head.to(tl.int64) * tokens + first + i, lse, mask=inside)
        tl.store(delta_out + head.to(tl.int64) * tokens + first + i, delta, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kv(
    dout, q, k, v, bounds, slopes, dk, dv, lse_in, delta_in, tokens, dout_stride, q_stride, k_stride, v_stride, heads,
    group, dim, scale, softcap, window, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one kv head: over its query heads, and their queries in order."""
    row = tl.program_id(1)
    kv_head = tl.program_id(2)
    first = tl.load(bounds + row)
    length = tl.load(bounds + row + 1) - first
    at = tl.program_id(0) * N
    if at < length:
        j = at + tl.arange(0, N)
        key = _tile(k, first + j, k_stride, kv_head, dim, j < length, D)
        value = _tile(v, first + j, v_stride, kv_head, dim, j < length, D)
        d_key = tl.zeros([N, D], tl.float32)
        d_value = tl.zeros([N, D], tl.float32)
        end = length
        if window is not None:
            end = tl.minimum(length, at + N - 1 + window)
        for head in range(kv_head * group, kv_head * group + group):
            slope = None
            if slopes is not None:
                slope = tl.load(slopes + head)
            for start in range(at // M * M, end, M):
                i = start + tl.arange(0, M)
                inside = i < length
                query = _tile(q, first + i, q_stride, head, dim, inside, D)
                grad = _tile(dout, first + i, dout_stride, head, dim, inside, D)
                stats = head * tokens + first + i
                lse = tl.load(lse_in + stats, mask=inside, other=float("inf"))
                delta = tl.load(delta_in + stats, mask=inside, other=0.0)
                s = tl.dot(query, tl.trans(key), input_precision="ieee")
                p, turn = _weights(s, lse[:, None], j, i, slope, scale, softcap, window)
                dp = tl.dot(grad, tl.trans(value), input_precision="ieee")
                ds = p * (dp - delta[:, None]) * turn
                d_value = tl.dot(tl.trans(p), grad.to(tl.float32), d_value, input_precision="ieee")
                d_key = tl.dot(tl.trans(ds), query.to(tl.float32), d_key, input_precision="ieee")
        d = tl.arange(0, D)
        place = ((first + j).to(tl.int64) * (heads // group) + kv_head)[:, None] * dim + d[None, :]
        mask = (j < length)[:, None] & (d < dim)[None, :]
        tl.store(dk + place, d_key.to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + place, d_value.to(dv.dtype.element_ty), mask=mask)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """attention() over a temporary cache: its bits."""
    k_cache, v_cache, table, lens, rows, positions = cache_of(k, cu_seqlens, torch.empty)
    rope_append(None, k, v, None, None, positions, rows, k_cache, v_cache, table, 0, "half")
    return attention(q, k_cache, v_cache, table, cu_seqlens, lens, None, scale, window, softcap, alibi_slopes)


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = (packed_heads(x.detach()) for x in (dout, q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    lse, delta = (torch.empty(heads, tokens, dtype=torch.float32, device=q.device) for _ in range(2))
    shared = {
        "dout": dout, "q": q, "k": k, "v": v, "bounds": int32(cu_seqlens), "slopes": float32(alibi_slopes),
        "tokens": tokens, "dout_stride": dout.stride(0), "q_stride": q.stride(0), "k_stride": k.stride(0),
        "v_stride": v.stride(0), "heads": heads, "group": heads // kv_heads, "dim": dim, "scale": scale,
        "softcap": softcap, "window": window,
    }  # fmt: skip
    block = max(16, next_power_of_2(dim))
    tile = Config(
        {"M": 16 if q.dtype == torch.float32 else 32, "N": 16, "D": block}, num_warps=8, num_stages=1
    )
    rows, longest = len(cu_seqlens) - 1, int(cu_seqlens.diff().max())
    q_blocks, k_blocks = (-(-longest // tile.blocks[name]) for name in ("M", "N"))
    of_q = {"dq": dq, "lse_out": lse, "delta_out": delta}
    of_kv = {"dk": dk, "dv": dv, "lse_in": lse, "delta_in": delta}
    launch(_backward_q, (q_blocks, rows, heads), {**shared, **of_q}, tile)
    launch(_backward_kv, (k_blocks, rows, kv_heads), {**shared, **of_kv}, tile)
    return dq, dk, dv
