"""Rotary position embedding and the write of keys and values into the paged cache; the formulas are in
dschat_kernels/ops/rope_append.py, the layout of the cache in dschat_kernels/cache.py.

A program owns all heads of one token. Every entry is computed from itself and its partner, so both styles are one
loop-free formula. Products and sums are rounded separately (fp_fusion off), as the reference rounds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.cache import LANES, PAGE, padded_head_dim
from dschat_kernels.ops.rope_append import int32, packed_heads
from dschat_kernels.triton._launch import Config, float32, launch, next_power_of_2


@triton.jit
def _rotated(x, heads, head, d, dim, cos, sin, position, rotary_dim, sign, INTERLEAVED: tl.constexpr):
    """x[head, d] rotated, for head [H, 1] and d [1, D]; x points at the token's first head."""
    inside = (head < heads) & (d < dim)
    v = tl.load(x + head * dim + d, mask=inside, other=0.0)
    if cos is not None:  # one way out: the compiler goes on behind a return
        half = rotary_dim // 2
        if INTERLEAVED:
            first = d % 2 == 0
            angle = d // 2
            partner = tl.where(first, d + 1, d - 1)
        else:
            first = d < half
            angle = tl.where(first, d, d - half)
            partner = tl.where(first, d + half, d - half)
        turns = d < rotary_dim
        w = tl.load(x + head * dim + partner, mask=inside & turns, other=0.0).to(tl.float32)
        place = position.to(tl.int64) * half + angle
        a = v.to(tl.float32) * tl.load(cos + place, mask=turns, other=1.0)
        b = w * (tl.load(sin + place, mask=turns, other=0.0) * sign)
        v = tl.where(turns, tl.where(first, a - b, a + b).to(v.dtype), v)
    return v


@triton.jit
def _rope(
    x, y, cos, sin, positions, x_stride, heads, dim, rotary_dim, sign,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DIM)[None, :]
    position = tl.load(positions + token)
    v = _rotated(x + token * x_stride, heads, head, d, dim, cos, sin, position, rotary_dim, sign, INTERLEAVED)
    tl.store(y + token * heads * dim + head * dim + d, v, mask=(head < heads) & (d < dim))


@triton.jit
def _append(
    q, k, v, out, cos, sin, positions, slots, table, k_cache, v_cache, q_stride, k_stride, v_stride, table_stride,
    q_heads, kv_heads, dim, v_dim, rotary_dim,
    INTERLEAVED: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    PAGE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM)[None, :]
    position = tl.load(positions + token)
    if tl.program_id(1) == 0:
        head = tl.arange(0, KV_HEADS)[:, None]
        inside = (head < kv_heads) & (d < dim)
        key = _rotated(
            k + token * k_stride, kv_heads, head, d, dim, cos, sin, position, rotary_dim, 1.0, INTERLEAVED
        )
        value = tl.load(v + token * v_stride + head * dim + d, mask=inside, other=0.0)
        slot = tl.load(slots + token).to(tl.int64)
        page = tl.load(table + slot * table_stride + position // PAGE).to(tl.int64)
        at = position % PAGE
        block = page * kv_heads + head
        k_place = (block * (PAGE // LANES) + at // LANES) * dim * LANES + d * LANES + at % LANES
        tl.store(k_cache + k_place, key, mask=inside)
        tl.store(v_cache + (block * PAGE + at) * v_dim + d, value, mask=inside)
    elif q is not None:
        q_head = tl.arange(0, Q_HEADS)[:, None]
        rotated = _rotated(
            q + token * q_stride, q_heads, q_head, d, dim, cos, sin, position, rotary_dim, 1.0, INTERLEAVED
        )
        place = out + token * q_heads * dim + q_head * dim + d
        tl.store(place, rotated, mask=(q_head < q_heads) & (d < dim))


def _config(heads: int, dim: int) -> Config:
    return Config(num_warps=min(8, max(1, heads * dim // 512)), num_stages=1, fp_fusion=False)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, rotary_dim: int, style: str, inverse: bool
) -> Tensor:
    x = packed_heads(x.detach())
    tokens, heads, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = {"HEADS": next_power_of_2(heads), "DIM": next_power_of_2(dim)}
    launch(
        _rope, (tokens,),
        {
            "x": x, "y": y, "cos": float32(cos), "sin": float32(sin), "positions": int32(positions),
            "x_stride": x.stride(0), "heads": heads, "dim": dim, "rotary_dim": rotary_dim,
            "sign": -1.0 if inverse else 1.0, "INTERLEAVED": style == "interleaved", **blocks,
        },
        _config(*blocks.values()),
    )  # fmt: skip
    return y


def rope_append(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rotary_dim: int,
    style: str,
) -> Tensor:
    """The op; without q only k and v are written, and the result is k."""
    k, v = packed_heads(k.detach()), packed_heads(v.detach())
    q = None if q is None else packed_heads(q.detach())
    out = k if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, kv_heads, dim = k.shape
    block_table = int32(block_table)
    blocks = {
        "Q_HEADS": next_power_of_2(out.shape[1]), "KV_HEADS": next_power_of_2(kv_heads), "DIM": next_power_of_2(dim)
    }  # fmt: skip
    launch(
        _append, (tokens, 1 if q is None else 2),
        {
            "q": q, "k": k, "v": v, "out": None if q is None else out, "cos": float32(cos), "sin": float32(sin),
            "positions": int32(positions), "slots": int32(slots), "table": block_table, "k_cache": k_cache,
            "v_cache": v_cache, "q_stride": 0 if q is None else q.stride(0), "k_stride": k.stride(0),
            "v_stride": v.stride(0), "table_stride": block_table.stride(0), "q_heads": out.shape[1],
            "kv_heads": kv_heads, "dim": dim, "v_dim": padded_head_dim(dim), "rotary_dim": rotary_dim,
            "INTERLEAVED": style == "interleaved", "PAGE": PAGE, "LANES": LANES, **blocks,
        },
        _config(blocks["Q_HEADS"], blocks["DIM"]),
    )  # fmt: skip
    return out
