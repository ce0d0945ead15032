"""attention and packed_attention against float64 and sdpa; prefill is decode bit for bit; gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_close_to_fp64
from hypothesis import given
from hypothesis import strategies as st
from paged import Batch, cumulative, int_tensor, make_batch, same_bits, threads
from torch import Tensor

from dschat_kernels.ops.attention import (
    attention,
    attention_reference,
    packed_attention,
    packed_attention_reference,
)

CACHES = [None, torch.int8]
"""Dtypes of a cache: that of the queries, or int8."""


def expected(batch: Batch, dtype: torch.dtype, **options: Any) -> Tensor:
    """The reference, row by row, from the contiguous keys and values."""
    out, bounds = [], cumulative(batch.q_lens).tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            kv_dtype = (
                dtype if batch.k[row].dtype == batch.q.dtype else torch.promote_types(dtype, torch.float32)
            )
            k, v = batch.k[row].to(kv_dtype), batch.v[row].to(kv_dtype)
            q = torch.zeros(len(k), *batch.q.shape[1:], dtype=dtype)
            q[len(k) - (end - begin) :] = batch.q[begin:end].to(dtype)
            cu = cumulative([len(k)])
            out.append(packed_attention_reference(q, k, v, cu, **options)[len(k) - (end - begin) :])
    return torch.cat(out) if out else batch.q.to(dtype)


def check(batch: Batch, **options: Any) -> Tensor:
    y = attention(*batch.arguments, backend="cpu", **options)
    assert_close_to_fp64(
        y, expected(batch, torch.float64, **options), expected(batch, batch.q.dtype, **options)
    )
    return y


@st.composite
def problems(draw: st.DrawFn) -> tuple[Batch, dict[str, Any]]:
    rows = draw(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 400)), min_size=0, max_size=4))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 127, 256])))
    dtype = draw(st.sampled_from(DTYPES))
    batch = make_batch(
        [q for q, _ in rows],
        [q + past for q, past in rows],
        kv_heads * group,
        kv_heads,
        dim,
        dtype,
        draw(st.integers(0, 99)),
        cache_dtype=draw(st.sampled_from(CACHES)),
    )
    slopes = torch.rand(kv_heads * group) * 0.2 - 0.1 if draw(st.booleans()) else None
    options = {
        "scale": draw(st.sampled_from([dim**-0.5, 0.3, 1.0])),
        "window": draw(st.sampled_from([None, None, 1, 5, 64, 100, 257, 1000])),
        "softcap": draw(st.sampled_from([None, None, 20.0])),
        "alibi_slopes": slopes,
    }
    return batch, options


@given(problems())
def test_matches_float64(problem: tuple[Batch, dict[str, Any]]) -> None:
    check(problem[0], **problem[1])


@given(problems(), st.sampled_from([1, 2, 3]))
def test_prefill_is_decode_bit_for_bit(problem: tuple[Batch, dict[str, Any]], step: int) -> None:
    """The queries of a row at once, a few at a time, alone or in the batch, on one thread or three."""
    batch, options = problem
    q, k_cache, v_cache, table, cu, _ = batch.arguments
    together = attention(*batch.arguments, backend="cpu", **options)
    for row, (begin, end) in enumerate(pairwise(cu.tolist())):
        with threads(1 + row % 3):
            for i in range(begin, end, step):
                j = min(i + step, end)
                kv_len = int_tensor([batch.kv_lens[row] - (end - j)])
                where = (table[row : row + 1], cumulative([j - i]), kv_len)
                part = attention(q[i:j], k_cache, v_cache, *where, backend="cpu", **options)
                assert same_bits(part, together[i:j])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("cache", CACHES)
def test_long_rows_across_chunks(dtype: torch.dtype, window: int | None, cache: torch.dtype | None) -> None:
    """Several chunks of 256, tiles that begin anywhere, and one token at a time over the same cache."""
    batch = make_batch([600, 1, 129], [900, 1025, 129], 6, 2, 64, dtype, cache_dtype=cache)
    y = check(batch, scale=0.125, window=window)
    q, k_cache, v_cache, table, _, _ = batch.arguments
    for token in (0, 100, 212, 213, 467, 468, 599):
        where = (table[:1], cumulative([1]), int_tensor([301 + token]))
        one = attention(
            q[token : token + 1], k_cache, v_cache, *where, scale=0.125, window=window, backend="cpu"
        )
        assert same_bits(one, y[token : token + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES)
def test_batch_order_slots_and_threads(dtype: torch.dtype, cache: torch.dtype | None) -> None:
    batch = make_batch([3, 1, 40, 1, 0, 1], [300, 77, 40, 1, 5, 513], 8, 4, 32, dtype, cache_dtype=cache)
    q, k_cache, v_cache, table, cu, kv_lens = batch.arguments
    y = attention(*batch.arguments, scale=0.2, backend="cpu")
    order = [5, 2, 0, 4, 3, 1]
    rows = [torch.arange(cu[r], cu[r + 1]) for r in order]
    shuffled = (
        q[torch.cat(rows)],
        k_cache,
        v_cache,
        table,
        cumulative([len(r) for r in rows]),
        kv_lens[order],
    )
    for n in (1, 2, 5):
        with threads(n):
            z = attention(*shuffled, slots=int_tensor(order), scale=0.2, backend="cpu")
        assert same_bits(z, y[torch.cat(rows)])


@pytest.mark.parametrize("cache", CACHES)
def test_sees_nothing_but_its_keys(cache: torch.dtype | None) -> None:
    """Keys behind the mask or the window may hold NaN or infinity without a trace."""
    options = {"scale": 0.25, "window": 20}
    clean = make_batch([30], [100], 4, 2, 16, cache_dtype=cache)
    y = attention(*clean.arguments, backend="cpu", **options)
    dirty = make_batch([30], [100], 4, 2, 16, cache_dtype=cache)
    k, v = dirty.k[0], dirty.v[0]
    for bad in (float("nan"), float("inf")):
        k[:40], v[:40] = bad, bad  # the first query, at 70, sees 51 ..
        k[90:], v[90:] = bad, bad
        dirty.cache.free(0)
        dirty.cache.prepare_append([0], 100)
        dirty.cache.write(0, 0, 0, k.transpose(0, 1), v.transpose(0, 1))
        z = attention(*dirty.arguments, backend="cpu", **options)
        assert same_bits(z[:20], y[:20]) and not z[20:].isfinite().any()


@pytest.mark.parametrize("cache", CACHES)
def test_large_scores_do_not_overflow(cache: torch.dtype | None) -> None:
    batch = make_batch([40], [600], 2, 2, 32, scale=30.0, cache_dtype=cache)
    check(batch, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_cache_is_within_its_rounding(dtype: torch.dtype) -> None:
    """A score is off by at most |q|_1 times half a key's scale, so every weight by at most the factor exp(2 that); the
    output, a mean of values, by what that moves and half a value's scale."""
    plain, quantised = (make_batch([5, 1], [300, 60], 6, 2, 40, dtype, cache_dtype=cache) for cache in CACHES)
    y, z = (attention(*b.arguments, scale=0.1, backend="reference").double() for b in (plain, quantised))
    rows = torch.repeat_interleave(torch.arange(2), torch.tensor(plain.q_lens))
    for token, row in enumerate(rows.tolist()):
        k, v = (x[row].double().abs().amax(2).amax(0).repeat_interleave(3) for x in (plain.k, plain.v))
        score = 0.1 * plain.q[token].double().abs().sum(1) * k / 254
        bound = (torch.expm1(2 * score) * v + v / 254)[:, None] + 0.02 * (dtype == torch.bfloat16)
        assert ((y[token] - z[token]).abs() <= bound).all()
        assert bound.max() < 1.0
    ours = attention(*quantised.arguments, scale=0.1, backend="cpu").double()
    assert not torch.equal(ours, y) and (ours - z).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7])
def test_matches_sdpa(dtype: torch.dtype, window: int | None) -> None:
    """HF's masks: causal, and sliding with i - j < window; grouped heads."""
    n = 65
    batch = make_batch([n], [n], 6, 2, 24, dtype)
    i = torch.arange(n)
    mask = i[:, None] >= i
    if window:
        mask &= i[:, None] - i < window
    q, k, v = (x.transpose(0, 1)[None].float() for x in (batch.q, batch.k[0], batch.v[0]))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    y = attention(*batch.arguments, scale=0.3, window=window, backend="cpu")
    torch.testing.assert_close(
        y.float(), sdpa[0].transpose(0, 1), atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-5
    )


def test_takes_slices_of_a_packed_qkv() -> None:
    batch = make_batch([5, 2], [20, 2], 4, 2, 16)
    qkv = torch.randn(7, 8, 16)
    qkv[:, :4] = batch.q
    _, *rest = batch.arguments
    y = attention(batch.q, *rest, scale=0.25, backend="cpu")
    assert same_bits(attention(qkv[:, :4], *rest, scale=0.25, backend="cpu"), y)
    strided = batch.q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert same_bits(attention(strided, *rest, scale=0.25, backend="cpu"), y)


@pytest.mark.parametrize("cache", CACHES)
def test_reference_reads_the_cache(cache: torch.dtype | None) -> None:
    batch = make_batch([5, 0, 2], [200, 3, 2], 4, 2, 20, cache_dtype=cache)
    options = {"scale": 0.25, "window": 100, "softcap": 5.0, "alibi_slopes": torch.rand(4)}
    y = attention(*batch.arguments, backend="reference", **options)
    assert torch.equal(y, attention_reference(*batch.arguments, **options))
    torch.testing.assert_close(y, expected(batch, torch.float32, **options))


# --------------------------------------------------------------------------------------- packed_attention


def packed(
    lens: list[int], q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    total = sum(lens)
    shapes = ((total, q_heads, dim), (total, kv_heads, dim), (total, kv_heads, dim))
    return [torch.randn(*shape).to(dtype) for shape in shapes], cumulative(lens)


OPTIONS = [
    {"scale": 0.25},
    {"scale": 0.25, "window": 33},
    {"scale": 1.0, "softcap": 10.0},
    {"scale": 0.25, "alibi_slopes": torch.tensor([0.5, -0.25, 0.1, -0.03])},
    {"scale": 0.3, "window": 5, "softcap": 3.0, "alibi_slopes": torch.tensor([0.5, -0.25, 0.1, -0.03])},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_has_the_bits_of_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    batch = make_batch([150, 1, 64], [150, 1, 64], 4, 2, 20, dtype)
    y = packed_attention(batch.q, torch.cat(batch.k), torch.cat(batch.v), cumulative([150, 1, 64]), **options)
    assert same_bits(y, attention(*batch.arguments, backend="cpu", **options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_gradients(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, cu = packed([130, 0, 1, 20], 4, 2, 12, dtype)
    grad = torch.randn(151, 4, 12).to(dtype)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    packed_attention(*ours, cu, backend="cpu", **options).backward(grad)
    packed_attention_reference(*theirs, cu, **options).backward(grad)
    packed_attention_reference(*exact, cu, **options).backward(grad.double())
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert_close_to_fp64(a.grad, e.grad, t.grad)


def test_packed_reference_gradcheck() -> None:
    inputs, cu = packed([5, 3], 4, 2, 3, torch.float64)
    for x in inputs:
        x.requires_grad_()
    options = {**OPTIONS[-1], "alibi_slopes": OPTIONS[-1]["alibi_slopes"].double()}
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, cu, **options), inputs)


def test_packed_backward_bounds_memory() -> None:
    """No [heads, tokens, tokens] tensor in either direction."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    inputs, cu = packed([1500], 2, 1, 8, torch.float32)
    for x in inputs:
        x.requires_grad_()
    with Largest() as largest:
        packed_attention(*inputs, cu, scale=0.3).sum().backward()
    assert 0 < largest.numel <= 2 * 256 * 1500


def test_empty() -> None:
    for lens in ([], [0], [0, 0]):
        (q, k, v), cu = packed(lens, 2, 1, 8, torch.float32)
        assert packed_attention(q, k, v, cu, scale=1.0).shape == (0, 2, 8)
        batch = make_batch(lens, [3] * len(lens), 2, 1, 8)
        assert attention(*batch.arguments, scale=1.0, backend="cpu").shape == (0, 2, 8)


def test_opcheck() -> None:
    batch = make_batch([3, 1], [10, 20], 4, 2, 6)
    slopes = torch.rand(4)
    torch.library.opcheck(torch.ops.dschat.attention.default, (*batch.arguments, None, 0.5, 8, 9.0, slopes))
    quantised = make_batch([3, 1], [10, 20], 4, 2, 6, cache_dtype=torch.int8)
    torch.library.opcheck(
        torch.ops.dschat.attention.default, (*quantised.arguments, None, 0.5, None, None, None)
    )
    torch.library.opcheck(
        torch.ops.dschat.attention.default,
        (*batch.arguments[:5], int_tensor([5, 9]), int_tensor([1, 0]), 0.5, None, None, None),
    )
    inputs, cu = packed([4, 2], 4, 2, 6, torch.float32)
    for x in inputs:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.dschat.packed_attention.default, (*inputs, cu, 0.5, 3, 9.0, slopes))


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(3, 16)}, "tokens, heads, head_dim"),
        ({"q": torch.randn(3, 3, 16)}, "3 query heads do not divide among 2"),
        ({"q": torch.randn(3, 4, 8)}, "head_dim 16"),
        ({"q": torch.randn(3, 4, 16).bfloat16()}, "model's dtype"),
        ({"v_cache": torch.zeros(9, 2, 64, 24)}, "v_cache has shape"),
        ({"k_cache": torch.zeros(9, 2, 4, 16, 8)}, "k_cache has shape"),
        (
            {"k_cache": torch.zeros(9, 2, 64 * 20, dtype=torch.int8)},
            r"v_cache is torch\.float32 and k_cache torch\.int8",
        ),
        ({"v_cache": torch.zeros(9, 2, 64, 16, dtype=torch.int16)}, r"v_cache is torch\.int16"),
        ({"cu_seqlens": int_tensor([0, 2, 4])}, "rise from 0 to the 3 tokens"),
        ({"cu_seqlens": int_tensor([0, 4, 3])}, "smallest step of -1"),
        ({"cu_seqlens": torch.tensor([0.0, 2.0, 3.0])}, "int32 or int64"),
        ({"kv_lens": int_tensor([1, 20])}, "row 0 has 2 query tokens and kv_lens 1"),
        ({"kv_lens": int_tensor([20])}, r"kv_lens has shape \[1\]"),
        ({"kv_lens": int_tensor([2, 200])}, "kv_lens reaches 200 and a row of the block table holds 128"),
        ({"kv_lens": int_tensor([2, 100])}, "page -1"),
        ({"slots": int_tensor([0, 2])}, "slots run from 0 to 2"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"alibi_slopes": torch.rand(2)}, r"alibi_slopes has shape \[2\]"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    batch = make_batch([2, 1], [70, 20], 4, 2, 16)
    names = ("q", "k_cache", "v_cache", "block_table", "cu_seqlens", "kv_lens")
    arguments = {**dict(zip(names, batch.arguments, strict=True)), "scale": 1.0, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        attention(**arguments)


def test_bad_int8_input() -> None:
    q, k_cache, v_cache, *rest = make_batch([2], [70], 4, 2, 16, cache_dtype=torch.int8).arguments
    for cut, other, message in (
        (k_cache[..., :-1].contiguous(), v_cache, "k_cache has shape"),
        (k_cache.flatten(1), v_cache, r"give one layer, \[pages, Hkv, 64 \* \(4 \+ D\)\]"),
        (k_cache, v_cache[..., 64:].contiguous(), r"give \[5, 2, 1280\]"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, cut, other, *rest, scale=1.0)
    with pytest.raises(ValueError, match="heads have shape"):
        attention(q[..., :8], k_cache, v_cache, *rest, scale=1.0)


def test_packed_bad_input() -> None:
    (q, k, v), cu = packed([3, 2], 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="v has shape"):
        packed_attention(q, k, v[:4], cu, scale=1.0)
    with pytest.raises(TypeError, match=r"k is torch\.bfloat16"):
        packed_attention(q, k.bfloat16(), v, cu, scale=1.0)
    with pytest.raises(ValueError, match="rise from 0 to the 5 tokens"):
        packed_attention(q, k, v, cumulative([3, 1]), scale=1.0)


def test_head_dim_beyond_the_kernel() -> None:
    (q, k, v), cu = packed([3], 1, 1, 257, torch.float32)
    with pytest.raises(ValueError, match="head_dim is 257"):
        packed_attention(q, k, v, cu, scale=1.0, backend="cpu")
