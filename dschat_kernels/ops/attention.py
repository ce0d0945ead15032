"""Causal attention over the paged cache (prefill, decode and mixtures), and its differentiable form over
packed k and v.

The query tokens of all rows lie packed one row after the other; row r has the tokens cu_seqlens[r] ..
cu_seqlens[r + 1]. Query i of row r stands at position p = kv_lens[r] - q_len(r) + i and sees the keys j with
p - window < j <= p:

    s_j = scale * (q . k_j)
    s_j = softcap * tanh(s_j / softcap)              where softcap is given (Gemma 2)
    s_j = s_j + slope_h * (j - p)                    where alibi_slopes are given (BLOOM, MPT)
    s_j = s_j + scale * bf16(-slope_h * bf16(j))     where a slope is negative (Falcon rounds its biases to bfloat16)
    out = sum_j softmax(s)_j v_j                     kv head of query head h: h // (Hq / Hkv)

All in float32, rounded once at the end. The cpu backend reduces keys in chunks of 256 cut at absolute
positions and folds them in order (csrc/cpu/attention.h), so a row's bits depend on nothing but the row: not
on the batch, on how many of its tokens are queries at once, on threads or on splits. Rabe and Staats,
"Self-attention Does Not Need O(n^2) Memory", 2021, https://arxiv.org/abs/2112.05682
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dschat_kernels.cache import PAGE, cache_shapes, read_pages
from dschat_kernels.ops._common import (
    DTYPES,
    LIBRARY,
    check,
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
from dschat_kernels.ops.rope_append import (
    cache_backend,
    cache_kind,
    check_cache,
    check_head_dim,
    check_heads,
    check_index,
    check_pages,
    check_qkv,
    check_slots,
    float32,
    int32,
    packed_heads,
)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    slots: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of q [T, Hq, D] over one layer of the paged cache: [T, Hq, D]; the module has the formula.

    Args:
        k_cache, v_cache: `cache.k[layer]`, `cache.v[layer]`; they already hold the keys of the query tokens. Those of
            int8 are read as scale * integer, a scale for each token's key and each token's value in a head.
        block_table: int32 [slots, max_pages]. Row r of the batch is its row `slots[r]`, or r where slots is
            None.
        cu_seqlens: int32 [rows + 1], from 0 to T. A row may have no query tokens.
        kv_lens: int32 [rows], keys of each row, its query tokens included.
        window: keys seen, the token's own included; None: all.
        softcap, alibi_slopes (float32 [Hq], negative ones for rounded biases): None for none.

    Forward only; `packed_attention` is the differentiable form with the same bits. Raises ValueError or
    TypeError for wrong shapes, dtypes, lengths, and for pages that are not there.
    """
    return run(
        "attention", q, k_cache, v_cache, block_table, cu_seqlens, kv_lens, scale, window, softcap,
        alibi_slopes, slots, backend, 1,
    )  # fmt: skip


def run(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    slots: Tensor | None,
    backend: str | None,
    num_splits: int,
) -> Tensor:
    """Checks and dispatch of attention and attention_decode."""
    check_heads(op, "q", q)
    check_cache(op, q, k_cache, v_cache, block_table)
    _check_options(op, q, k_cache.shape[1], scale, window, softcap, alibi_slopes)
    q_lens = _check_cu_seqlens(op, cu_seqlens, q)
    check_index(op, "kv_lens", kv_lens, len(q_lens), q)
    lens = kv_lens.tolist()
    for row, (queries, keys) in enumerate(zip(q_lens, lens, strict=True)):
        check(
            keys >= queries,
            f"{op}: row {row} has {queries} query tokens and kv_lens {keys}; kv_lens counts the query "
            "tokens too.",
        )
    if slots is None:
        check(
            block_table.shape[0] >= len(lens),
            f"{op}: block_table has {block_table.shape[0]} rows for a batch of {len(lens)}; give a row "
            "each, or slots.",
        )
        table = block_table[: len(lens)]
    else:
        check_slots(op, slots, len(lens), block_table)
        table = block_table[slots.long()]
    longest = max(lens, default=0)
    check(
        longest <= block_table.shape[1] * PAGE,
        f"{op}: kv_lens reaches {longest} and a row of the block table holds {block_table.shape[1] * PAGE} "
        "tokens; "
        "make the cache with more pages per slot.",
    )
    used = torch.arange(block_table.shape[1], device=table.device) * PAGE < kv_lens[:, None]
    check_pages(op, table[used], k_cache)
    backend = cache_backend(op, backend, q, k_cache)
    if backend == "reference":
        return attention_reference(
            q, k_cache, v_cache, block_table, cu_seqlens, kv_lens, scale=scale, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, slots=slots,
        )  # fmt: skip
    check_head_dim(op, q.shape[2], backend)
    arguments = (
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens,
        kv_lens,
        slots,
        float(scale),
        window,
        softcap,
        alibi_slopes,
    )
    split = (num_splits,) if op == "attention_decode" else ()
    return implementation(op, backend, q, k_cache, v_cache)(*arguments, *split)


def attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """The specification of `attention`, in plain PyTorch."""
    bounds, lens = cu_seqlens.tolist(), kv_lens.tolist()
    rows = range(len(lens)) if slots is None else slots.tolist()
    wide = torch.promote_types(q.dtype, torch.float32)
    out = []
    for (begin, end), keys, row in zip(pairwise(bounds), lens, rows, strict=True):
        pages = block_table[row, : -(-keys // PAGE)].long()
        k, v = (x[:keys] for x in read_pages(k_cache, v_cache, pages, q.shape[2], wide))
        out.append(_row_reference(q[begin:end], k, v, scale, window, softcap, alibi_slopes))
    return torch.cat(out) if out else q.clone()


def _row_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """One sequence: q [L, Hq, D] are the last L tokens of k, v [N, Hkv, D]."""
    if q.shape[0] == 0:
        return q.clone()
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    query, key, value = (x.to(wide).transpose(0, 1) for x in (q, k, v))
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    s = query @ key.transpose(1, 2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = _distance(q.shape[0], k.shape[0], q.device)
    if alibi_slopes is not None:
        s = s + _alibi(alibi_slopes, distance, scale).to(wide)
    s = s.masked_fill(_hidden(distance, window), float("-inf"))
    return (s.softmax(-1) @ value).transpose(0, 1).to(q.dtype)


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys]: position of the key minus that of the query, the queries being the last tokens."""
    position = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) - position[:, None]


def _alibi(slopes: Tensor, distance: Tensor, scale: float) -> Tensor:
    """What is added to the scores, [Hq, queries, keys]."""
    slopes = slopes.double()[:, None, None]
    key = torch.arange(distance.shape[1], device=distance.device).bfloat16().double()
    rounded = (-slopes * key).float().bfloat16().double() * scale
    return torch.where(slopes < 0, rounded, slopes * distance)


def _hidden(distance: Tensor, window: int | None) -> Tensor:
    hidden = distance > 0
    return hidden | (distance <= -window) if window else hidden


# --------------------------------------------------------------------------------------- training form


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of packed sequences, [T, Hq, D].

    q is [T, Hq, D], k and v are [T, Hkv, D]; row r is the tokens cu_seqlens[r] .. cu_seqlens[r + 1] (int32).

    The forward runs `attention`'s kernel over a temporary cache: it has the bits of the rollout.
    Differentiable in q, k and v: the backward (csrc/cpu/attention_backward.h) recomputes the weights in float32,
    a few queries at a time.

    Raises ValueError or TypeError for wrong shapes, dtypes and lengths.
    """
    op = "packed_attention"
    check_qkv(op, q, k, v)
    _check_options(op, q, k.shape[1], scale, window, softcap, alibi_slopes)
    _check_cu_seqlens(op, cu_seqlens, q)
    backend = resolve_backend(op, backend, q, k, v)
    if backend == "reference":
        return packed_attention_reference(
            q, k, v, cu_seqlens, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes
        )
    check_head_dim(op, q.shape[2], backend)
    call = implementation("packed_attention", backend, q, k, v)
    return call(q, k, v, cu_seqlens, float(scale), window, softcap, alibi_slopes)


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The specification of `packed_attention`, in plain PyTorch."""
    bounds = cu_seqlens.tolist()
    rows = [slice(*pair) for pair in pairwise(bounds)]
    out = [_row_reference(q[row], k[row], v[row], scale, window, softcap, alibi_slopes) for row in rows]
    return torch.cat(out) if out else q.clone()


# ---------------------------------------------------------------------------------------------- checks


def _check_options(
    op: str,
    q: Tensor,
    kv_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> None:
    check(
        q.shape[1] % kv_heads == 0,
        f"{op}: {q.shape[1]} query heads do not divide among {kv_heads} kv heads; give a multiple.",
    )
    check(scale == scale and abs(scale) != float("inf"), f"{op}: scale is {scale}; give a finite number.")
    check(
        window is None or window > 0,
        f"{op}: window is {window}; give the number of keys seen, or None for all.",
    )
    check(
        softcap is None or 0 < softcap < float("inf"),
        f"{op}: softcap is {softcap}; give a positive number or None.",
    )
    if alibi_slopes is not None:
        check_tensor(op, "alibi_slopes", alibi_slopes)
        check(
            alibi_slopes.shape == (q.shape[1],),
            f"{op}: alibi_slopes has shape {list(alibi_slopes.shape)}; give [{q.shape[1]}], one slope a "
            "query head.",
        )
        check_device(op, "alibi_slopes", alibi_slopes, q)


def _check_cu_seqlens(op: str, cu_seqlens: Any, q: Tensor) -> list[int]:
    """Lengths of the rows."""
    tokens = q.shape[0]
    check_tensor(op, "cu_seqlens", cu_seqlens, floating=False)
    check(cu_seqlens.dim() == 1, f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}; give [rows + 1].")
    check_index(op, "cu_seqlens", cu_seqlens, max(1, cu_seqlens.shape[0]), q)
    bounds = cu_seqlens.tolist()
    lens = [end - begin for begin, end in pairwise(bounds)]
    check(
        bounds[0] == 0 and bounds[-1] == tokens and min(lens, default=0) >= 0,
        f"{op}: cu_seqlens runs from {bounds[0]} to {bounds[-1]} with a smallest step of "
        f"{min(lens, default=0)}; "
        f"it must rise from 0 to the {tokens} tokens of q.",
    )
    return lens


# --------------------------------------------------------------------------------------- torch.library

_OPTIONS = "float scale, int? window, float? softcap, Tensor? alibi_slopes"
_CACHE = (
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens, Tensor kv_lens, "
    "Tensor? slots"
)
LIBRARY.define(f"attention({_CACHE}, {_OPTIONS}) -> Tensor")
LIBRARY.define(f"packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, {_OPTIONS}) -> Tensor")
LIBRARY.define(
    f"packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def attention_cpu(
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
    num_splits: int = 1,
) -> Tensor:
    q, block_table, cu_seqlens, kv_lens = (
        packed_heads(q),
        int32(block_table),
        int32(cu_seqlens),
        int32(kv_lens),
    )
    slots = None if slots is None else int32(slots)
    slopes = float32(alibi_slopes)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    where = (
        DTYPES[q.dtype], ptr(q), q.stride(0), ptr(out), out.stride(0), ptr(k_cache), ptr(v_cache),
        ptr(block_table), block_table.shape[1], ptr(slots), ptr(cu_seqlens), ptr(kv_lens), kv_lens.shape[0],
    )  # fmt: skip
    how = (
        q.shape[1], k_cache.shape[1], q.shape[2], scale, window or 0, softcap or 0.0, ptr(slopes)
    )  # fmt: skip
    if runs_on_cuda():
        blocks = kv_lens.shape[0] * k_cache.shape[1]  # at least, of a GPU, without splits
        _attention_cuda(q, (*where, q.shape[0], *how), block_table.shape[1], num_splits, blocks)
    else:
        kernels().attention(*where, *how, num_splits, *cache_kind(k_cache))
    return out


SCRATCH = 2**28
"""Numbers of partial results beyond which a CUDA call does not split its keys; its bits are the same."""
BLOCKS = 1024
"""Of a grid that splits would not make faster: kBlocks of csrc/cuda/attention_decode.cu."""


def _attention_cuda(q: Tensor, arguments: tuple[Any, ...], pages: int, num_splits: int, blocks: int) -> None:
    """csrc/cuda keeps a split's partial results, for every page of the longest row that the table can hold: however
    many splits there are."""
    size = q.shape[0] * q.shape[1] * pages * (q.shape[2] + 2)
    if num_splits == 1 or size > SCRATCH:
        if num_splits > 1 or (num_splits == 0 and blocks < BLOCKS):
            say_once(
                f"attention_decode: keys are not split among blocks, which is slower, because the partial results of "
                f"{q.shape[0]} tokens over {pages} pages a row would take {size * 4 / 2**30:.1f} GiB; make the cache "
                "with fewer pages per slot."
            )
        kernels().attention(*arguments)
    else:
        scratch = torch.empty(size, dtype=torch.float32, device=q.device)
        kernels().attention_decode(*arguments, num_splits, ptr(scratch))


def attention_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def cache_of(k: Tensor, cu_seqlens: Tensor, make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """What packed sequences are to attention: a cache from `make` that holds them and nothing else, its block table,
    the length of every row, and row and position of every token."""
    tokens, kv_heads, dim = k.shape
    device = k.device
    lens = cu_seqlens.diff().to(torch.int32)
    pages = (lens + (PAGE - 1)) // PAGE
    total, widest = (int(pages.sum()), int(pages.max())) if len(pages) else (0, 0)
    shapes = cache_shapes(max(total, 1), kv_heads, dim, k.dtype)
    k_cache, v_cache = (make(shape, dtype=k.dtype, device=device) for shape in shapes)
    # Row r owns the pages that follow those of the rows before it; entries past its last are never read.
    table = int32((pages.cumsum(0) - pages)[:, None] + torch.arange(max(widest, 1), device=device))
    rows = torch.repeat_interleave(torch.arange(len(lens), dtype=torch.int32, device=device), lens)
    positions = int32(torch.arange(tokens, device=device) - cu_seqlens[:-1].repeat_interleave(lens))
    return k_cache, v_cache, table, lens, rows, positions


def _packed_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    k_cache, v_cache, table, lens, rows, positions = cache_of(k, cu_seqlens, torch.zeros)
    tokens, kv_heads, dim = k.shape
    k, v = packed_heads(k), packed_heads(v)
    kernels().rope_append(
        DTYPES[k.dtype], 0, 0, ptr(k), k.stride(0), ptr(v), v.stride(0), 0, 0, 0, 0, ptr(positions),
        ptr(rows), ptr(table), table.stride(0), ptr(k_cache), ptr(v_cache), tokens, q.shape[1], kv_heads, dim,
        0, 0, *cache_kind(k_cache),
    )  # fmt: skip
    return attention_cpu(
        q, k_cache, v_cache, table, cu_seqlens, lens, None, scale, window, softcap, alibi_slopes
    )


def _packed_backward_cpu(
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
    dout, q, k, v = (packed_heads(x) for x in (dout, q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    cu_seqlens, slopes = int32(cu_seqlens), float32(alibi_slopes)
    more: tuple[int, ...] = ()
    if runs_on_cuda():  # the softmax statistics of every query head, between its two kernels
        stats = torch.empty(*q.shape[:2], 2, dtype=torch.float32, device=q.device)
        more = (q.shape[0], ptr(stats))
    kernels().attention_backward(
        DTYPES[q.dtype], ptr(dout), dout.stride(0), ptr(q), q.stride(0), ptr(k), k.stride(0), ptr(v), v.stride(0),
        ptr(dq), ptr(dk), ptr(dv), ptr(cu_seqlens), len(cu_seqlens) - 1, q.shape[1], k.shape[1], q.shape[2], scale,
        window or 0, softcap or 0.0, ptr(slopes), *more,
    )  # fmt: skip
    return dq, dk, dv


def _packed_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _packed_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.window, ctx.softcap, alibi_slopes = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, alibi_slopes)


def _packed_grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, alibi_slopes = ctx.saved_tensors
    dq, dk, dv = ctx.ops.packed_attention_backward(
        dout, q, k, v, cu_seqlens, ctx.scale, ctx.window, ctx.softcap, alibi_slopes
    )
    return dq, dk, dv, None, None, None, None, None


register("attention", attention_cpu, attention_fake)
register("packed_attention", _packed_cpu, attention_fake, _packed_save, _packed_grad)
register("packed_attention_backward", _packed_backward_cpu, _packed_backward_fake)
