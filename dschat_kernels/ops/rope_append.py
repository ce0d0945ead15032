"""Rotary position embedding, and the write of keys and values into the paged cache.

With the angles of a token's position p, c = cos[p] and s = sin[p] (each [rotary_dim / 2]), every pair (x1,
x2) of a head becomes

    y1 = x1 c - x2 s        y2 = x2 c + x1 s

in float32 (products and sum rounded separately), then rounded to the dtype of x. The pairs are

    "half"          (x[i], x[i + rotary_dim / 2])    Llama, GPT-NeoX
    "interleaved"   (x[2 i], x[2 i + 1])             GPT-J

and the dimensions from rotary_dim on pass through. Su et al., "RoFormer", 2021,
https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dschat_kernels.cache import LANES, PAGE, SCALE_BYTES, cache_shapes, write_pages
from dschat_kernels.ops._common import (
    DTYPES,
    LIBRARY,
    check,
    check_choice,
    check_device,
    check_tensor,
    implementation,
    kernels,
    ptr,
    register,
    resolve_backend,
    runs_on_cuda,
    say_once,
)

STYLES = {"half": 0, "interleaved": 1}  # csrc/cpu/rope_append.h RopeStyle
MAX_HEAD_DIM = 256  # csrc/cpu/kv_cache.h kMaxHeadDim


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    style: str = "half",
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates x [T, heads, D] by the angles of `positions` [T]; see the module for the formula.

    cos and sin are float32 tables [max_pos, rotary_dim / 2], scaling included. rotary_dim defaults to twice
    their width. Differentiable in x. Raises ValueError or TypeError for wrong shapes, dtypes and positions
    outside the tables.
    """
    rotary_dim = _check_rotary("rope", "x", x, cos, sin, positions, style, rotary_dim)
    backend = resolve_backend("rope", backend, x)
    if backend == "reference":
        return rope_reference(x, cos, sin, positions, style=style, rotary_dim=rotary_dim)
    op = implementation("rope", backend, x)
    return op(x, cos, sin, positions, rotary_dim, style, False)


def rope_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    style: str = "half",
    rotary_dim: int | None = None,
) -> Tensor:
    """The specification of `rope`, in plain PyTorch."""
    rotary_dim = 2 * cos.shape[1] if rotary_dim is None else rotary_dim
    wide = torch.promote_types(x.dtype, torch.float32)
    index = positions.long()
    c, s = cos[index].to(wide)[:, None], sin[index].to(wide)[:, None]
    rotated = x[..., :rotary_dim].to(wide)
    if style == "half":
        x1, x2 = rotated.chunk(2, dim=-1)
        y = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)
    else:
        x1, x2 = rotated[..., 0::2], rotated[..., 1::2]
        y = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).flatten(-2)
    return torch.cat((y.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    *,
    style: str = "half",
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates q and k, writes k and v into one layer of the paged cache, returns the rotated q [T, Hq, D].

    q [T, Hq, D], k and v [T, Hkv, D] may be slices of one packed qkv. Token t is the token at `positions[t]`
    of the sequence in row `slots[t]` of block_table [slots, max_pages]; its page must be allocated and
    unshared (`PagedKVCache.prepare_append`). k_cache and v_cache are `cache.k[layer]` and `cache.v[layer]`,
    changed in place; those of int8 get what others would hold, quantised. cos = sin = None: no rotation (learned
    positions, ALiBi). The rotation has the bits of `rope`. Forward only.

    Raises ValueError or TypeError for wrong shapes and dtypes, and for positions outside the tables or the
    pages.
    """
    op = "rope_append"
    rotary_dim = _check_rotary(op, "q", q, cos, sin, positions, style, rotary_dim)
    check_cache(op, k, k_cache, v_cache, block_table)
    check_qkv(op, q, k, v)
    check_index(op, "positions", positions, q.shape[0], q)
    check_slots(op, slots, q.shape[0], block_table)
    if q.shape[0]:
        place = positions.long() // PAGE
        check(
            int(place.max()) < block_table.shape[1],
            f"{op}: position {int(positions.max())} is beyond the {block_table.shape[1] * PAGE} tokens of a "
            "row of the "
            "block table; make the cache with more pages per slot.",
        )
        check_pages(op, block_table[slots.long(), place], k_cache)
    backend = cache_backend(op, backend, q, k_cache)
    if backend == "reference":
        return rope_append_reference(
            q,
            k,
            v,
            cos,
            sin,
            positions,
            slots,
            k_cache,
            v_cache,
            block_table,
            style=style,
            rotary_dim=rotary_dim,
        )
    check_head_dim(op, q.shape[2], backend)
    run = implementation("rope_append", backend, q, k, v)
    return run(q, k, v, cos, sin, positions, slots, k_cache, v_cache, block_table, rotary_dim, style)


def rope_append_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    *,
    style: str = "half",
    rotary_dim: int | None = None,
) -> Tensor:
    """The specification of `rope_append`, in plain PyTorch."""
    if cos is not None and sin is not None:
        q = rope_reference(q, cos, sin, positions, style=style, rotary_dim=rotary_dim)
        k = rope_reference(k, cos, sin, positions, style=style, rotary_dim=rotary_dim)
    place = positions.long()
    page = block_table[slots.long(), place // PAGE].long()
    with torch.no_grad():
        write_pages(k_cache, v_cache, page, place % PAGE, k, v)
    return q.clone()


# ------------------------------------------------------------------------- checks, shared with attention


def check_heads(op: str, name: str, x: Any) -> None:
    check_tensor(op, name, x)
    check(
        x.dim() == 3 and x.shape[1] > 0 and x.shape[2] > 0,
        f"{op}: {name} has shape {list(x.shape)}; give [tokens, heads, head_dim].",
    )


def check_qkv(op: str, q: Any, k: Any, v: Any) -> None:
    """q [T, Hq, D] and k, v [T, Hkv, D] of one dtype on one device."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_heads(op, name, tensor)
        check(
            tensor.shape[0] == q.shape[0]
            and tensor.shape[2] == q.shape[2]
            and (name == "q" or tensor.shape == k.shape),
            f"{op}: {name} has shape {list(tensor.shape)} beside q {list(q.shape)} and k {list(k.shape)}; "
            "give q [T, Hq, D] and k, v [T, Hkv, D].",
        )
        check(
            tensor.dtype == q.dtype,
            f"{op}: {name} is {tensor.dtype} and q is {q.dtype}; give one dtype.",
            TypeError,
        )
        check_device(op, name, tensor, q)


def check_slots(op: str, slots: Any, size: int, block_table: Tensor) -> None:
    """Every slot is a row of the block table."""
    check_index(op, "slots", slots, size, block_table)
    low, high = (int(slots.min()), int(slots.max())) if size else (0, 0)
    check(
        not size or (low >= 0 and high < block_table.shape[0]),
        f"{op}: slots run from {low} to {high}; the block table has rows 0 to {block_table.shape[0] - 1}.",
    )


def check_head_dim(op: str, head_dim: int, backend: str) -> None:
    check(
        head_dim <= MAX_HEAD_DIM,
        f"{op}: head_dim is {head_dim}, the {backend} backend goes to {MAX_HEAD_DIM}; use backend='reference'.",
    )


def check_index(op: str, name: str, index: Any, size: int, like: Tensor) -> None:
    """`index` is an int32 or int64 vector [size] on the device of `like`."""
    check_tensor(op, name, index, floating=False)
    check(
        index.dtype in (torch.int32, torch.int64),
        f"{op}: {name} has dtype {index.dtype}; give int32 or int64.",
        TypeError,
    )
    check(
        index.dim() == 1 and index.shape[0] == size,
        f"{op}: {name} has shape {list(index.shape)}; give [{size}].",
    )
    check_device(op, name, index, like)


def check_cache(op: str, like: Tensor, k_cache: Any, v_cache: Any, block_table: Any) -> None:
    """One layer of a PagedKVCache, and its block table, for heads of the shape of `like` [T, Hkv, D]."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, cache, floating=False)
        check(
            cache.dtype in (like.dtype, torch.int8),
            f"{op}: {name} is {cache.dtype} and the heads are {like.dtype}; make the cache in the model's "
            "dtype, or int8.",
            TypeError,
        )
        check(
            cache.dtype == k_cache.dtype,
            f"{op}: {name} is {cache.dtype} and k_cache {k_cache.dtype}; give both from one cache.",
            TypeError,
        )
        check_device(op, name, cache, like)
    dim = _head_dim(k_cache, like)
    pages, heads = k_cache.shape[:2] if dim else (0, 0)
    k_shape, v_shape = cache_shapes(pages, heads, dim, k_cache.dtype)
    names = f"Hkv, {PAGE} * (4 + D)" if k_cache.dtype == torch.int8 else f"Hkv, {PAGE // LANES}, D, {LANES}"
    check(
        k_cache.shape == k_shape,
        f"{op}: k_cache has shape {list(k_cache.shape)}; give one layer, [pages, {names}].",
    )
    check(
        v_cache.shape == v_shape,
        f"{op}: v_cache has shape {list(v_cache.shape)}; give {list(v_shape)} as k_cache asks.",
    )
    check(
        k_cache.is_contiguous() and v_cache.is_contiguous(),
        f"{op}: the cache tensors are not contiguous; give cache.k[layer] and cache.v[layer].",
    )
    check(
        like.dim() == 3 and like.shape[2] == dim,
        f"{op}: the heads have shape {list(like.shape)} and the cache has head_dim {dim}; give [tokens, "
        f"heads, {dim}].",
    )
    if op == "rope_append":
        check(
            like.shape[1] == heads,
            f"{op}: k has {like.shape[1]} heads and the cache {heads}; give the same number.",
        )
    check_tensor(op, "block_table", block_table, floating=False)
    check(
        block_table.dim() == 2 and block_table.dtype in (torch.int32, torch.int64),
        f"{op}: block_table is {block_table.dtype} {list(block_table.shape)}; give an int32 tensor [slots, "
        "max_pages].",
    )
    check_device(op, "block_table", block_table, like)


def _head_dim(k_cache: Tensor, like: Tensor) -> int:
    """Of one layer's keys; 0 where their shape is none that keys have."""
    if k_cache.dtype != torch.int8:
        return k_cache.shape[3] if k_cache.dim() == 5 else 0
    even = max(0, k_cache.shape[2] // PAGE - SCALE_BYTES) if k_cache.dim() == 3 else 0
    return like.shape[-1] if like.shape[-1] + 1 == even else even  # a byte is left over where D is odd


def cache_backend(op: str, backend: str | None, q: Tensor, k_cache: Tensor) -> str:
    """`resolve_backend` of an op over the cache: int8 is known to the cpu backend and to the reference."""
    found = resolve_backend(op, backend, q)
    if k_cache.dtype != torch.int8 or found in ("cpu", "reference"):
        return found
    reason = f"{op}: the cache is int8, which the {found} backend does not have"
    check(backend is None, f"{reason}; make the cache in the model's dtype, or use backend='reference'.")
    say_once(f"{reason}; the PyTorch reference runs instead.")
    return "reference"


def cache_kind(k_cache: Tensor) -> tuple[bool, ...]:
    """What CPU kernels are told about the cache after everything else: whether it is int8."""
    return () if runs_on_cuda() else (k_cache.dtype == torch.int8,)


def check_pages(op: str, pages: Tensor, k_cache: Tensor) -> None:
    if pages.numel():
        low, high = int(pages.min()), int(pages.max())
        check(
            low >= 0 and high < k_cache.shape[0],
            f"{op}: the block table names page {low if low < 0 else high} and the cache has pages 0 to "
            f"{k_cache.shape[0] - 1}; call prepare_append for these tokens first.",
        )


def _check_rotary(
    op: str, name: str, x: Any, cos: Any, sin: Any, positions: Any, style: str, rotary_dim: int | None
) -> int:
    """Checks the tables against x and returns rotary_dim (0: no rotation)."""
    check_heads(op, name, x)
    check_choice(op, "style", style, STYLES)
    check_index(op, "positions", positions, x.shape[0], x)
    if cos is None and sin is None and op == "rope_append":
        check(
            rotary_dim in (None, 0), f"{op}: rotary_dim is {rotary_dim} without cos and sin; give the tables."
        )
        if x.shape[0]:
            check(
                int(positions.min()) >= 0, f"{op}: position {int(positions.min())} is negative; count from 0."
            )
        return 0
    for table_name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, table_name, table)
        check_device(op, table_name, table, x)
        check(
            table.dim() == 2 and table.shape == cos.shape,
            f"{op}: {table_name} has shape {list(table.shape)}; give cos and sin [max_pos, rotary_dim / 2].",
        )
    width = 2 * cos.shape[1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    check(
        rotary_dim == width and 0 < rotary_dim <= x.shape[2],
        f"{op}: rotary_dim is {rotary_dim} with tables of {cos.shape[1]} angles and head_dim {x.shape[2]}; "
        "give twice the width of the tables, at most head_dim.",
    )
    if x.shape[0]:
        low, high = int(positions.min()), int(positions.max())
        check(
            low >= 0 and high < cos.shape[0],
            f"{op}: positions run from {low} to {high} and the tables cover 0 to {cos.shape[0] - 1}; make "
            "them longer.",
        )
    return rotary_dim


# ----------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor positions, int rotary_dim, str style, bool inverse) -> "
    "Tensor"
)
LIBRARY.define(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor positions, Tensor slots, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, int rotary_dim, str style) -> Tensor"
)


def packed_heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with the heads of a token side by side: itself (a slice of packed qkv) or a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def int32(index: Tensor) -> Tensor:
    return index.to(torch.int32).contiguous()


def float32(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.to(torch.float32).contiguous()


def _rope_cpu(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, rotary_dim: int, style: str, inverse: bool
) -> Tensor:
    x, positions = packed_heads(x), int32(positions)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, dim = x.shape
    kernels().rope(
        DTYPES[x.dtype], ptr(x), x.stride(0), ptr(y), y.stride(0), ptr(cos), ptr(sin), ptr(positions), tokens,
        heads, dim, rotary_dim, STYLES[style], -1.0 if inverse else 1.0,
    )  # fmt: skip
    return y


def _rotated_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rope_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.rotary_dim, ctx.style, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rope_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors  # a rotation's transpose is the rotation back
    dx = ctx.ops.rope(dy, cos, sin, positions, ctx.rotary_dim, ctx.style, not ctx.inverse)
    return dx, None, None, None, None, None, None


def _rope_append_cpu(
    q: Tensor,
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
    q, k, v = packed_heads(q), packed_heads(k), packed_heads(v)
    cos, sin = float32(cos), float32(sin)
    positions, slots, block_table = int32(positions), int32(slots), int32(block_table)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, q_heads, dim = q.shape
    kernels().rope_append(
        DTYPES[q.dtype], ptr(q), q.stride(0), ptr(k), k.stride(0), ptr(v), v.stride(0), ptr(out),
        out.stride(0), ptr(cos), ptr(sin), ptr(positions), ptr(slots), ptr(block_table),
        block_table.stride(0), ptr(k_cache), ptr(v_cache), tokens, q_heads, k.shape[1], dim, rotary_dim,
        STYLES[style], *cache_kind(k_cache),
    )  # fmt: skip
    return out


register("rope", _rope_cpu, _rotated_fake, _rope_save, _rope_grad)
register("rope_append", _rope_append_cpu, _rotated_fake)
