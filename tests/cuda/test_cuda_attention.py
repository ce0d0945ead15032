"""attention and attention_decode of csrc/cuda against float64; prefill, decode and every split have the same bits."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from emulated import Order, emulated_cuda
from helpers import assert_close_to_fp64
from paged import Batch, cumulative, int_tensor, make_batch, same_bits
from torch import Tensor

from dschat_kernels.ops import _common
from dschat_kernels.ops.attention import attention, packed_attention, packed_attention_reference
from dschat_kernels.ops.attention_decode import attention_decode

pytestmark = pytest.mark.usefixtures("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expected(batch: Batch, dtype: torch.dtype, **options: Any) -> Tensor:
    """The reference, row by row, from the contiguous keys and values."""
    out, bounds = [], cumulative(batch.q_lens).tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            k, v = batch.k[row].to(dtype), batch.v[row].to(dtype)
            q = torch.zeros(len(k), *batch.q.shape[1:], dtype=dtype)
            q[len(k) - (end - begin) :] = batch.q[begin:end].to(dtype)
            cu = cumulative([len(k)])
            out.append(packed_attention_reference(q, k, v, cu, **options)[len(k) - (end - begin) :])
    return torch.cat(out) if out else batch.q.to(dtype)


def check(batch: Batch, **options: Any) -> Tensor:
    """attention, and attention_decode with the same bits whatever the splits."""
    y = attention(*batch.arguments, backend="cuda", **options)
    assert_close_to_fp64(
        y, expected(batch, torch.float64, **options), expected(batch, batch.q.dtype, **options)
    )
    for splits in (None, 2, 1000):
        split = attention_decode(*batch.arguments, num_splits=splits, backend="cuda", **options)
        assert same_bits(split, y)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 33, 64, 80, 128, 200, 256])
def test_head_sizes(dim: int, dtype: torch.dtype) -> None:
    check(make_batch([1, 3], [66, 40], 2, 1, dim, dtype), scale=dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (17, 1), (5, 5)])
def test_groups_of_heads(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """More heads a kv head than a tile has rows, too."""
    check(make_batch([1, 2], [70, 3], heads, kv_heads, 24, dtype), scale=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
def test_lengths_around_a_page(length: int, dtype: torch.dtype) -> None:
    check(make_batch([1], [length], 2, 2, 16, dtype), scale=0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 70}], ids=str)
def test_prefill_is_decode_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The queries of a row at once, a few at a time, alone or in the batch, in every order of the threads."""
    batch = make_batch([40, 5], [140, 66], 4, 2, 32, dtype)
    q, k_cache, v_cache, table, cu, _ = batch.arguments
    together = attention(*batch.arguments, scale=0.2, backend="cuda", **options)
    for row, (begin, end) in enumerate(pairwise(cu.tolist())):
        for i, j in ((begin, begin + 1), (begin + 1, begin + 4), (end - 1, end), (begin, end)):
            kv_len = int_tensor([batch.kv_lens[row] - (end - j)])
            where = (table[row : row + 1], cumulative([j - i]), kv_len)
            for op in (attention, attention_decode):
                part = op(q[i:j], k_cache, v_cache, *where, scale=0.2, backend="cuda", **options)
                assert same_bits(part, together[i:j])
    for order in Order:
        with emulated_cuda(order, seed=4):
            assert same_bits(attention(*batch.arguments, scale=0.2, backend="cuda", **options), together)


def test_slots_and_slices_of_a_packed_qkv() -> None:
    batch = make_batch([3, 1, 2], [70, 77, 2], 4, 2, 16)
    q, k_cache, v_cache, table, cu, kv_lens = batch.arguments
    y = attention(*batch.arguments, scale=0.2, backend="cuda")
    order = [2, 0, 1]
    rows = [torch.arange(cu[r], cu[r + 1]) for r in order]
    qkv = torch.randn(6, 8, 16)
    qkv[:, :4] = q[torch.cat(rows)]
    shuffled = (qkv[:, :4], k_cache, v_cache, table, cumulative([len(r) for r in rows]), kv_lens[order])
    for op in (attention, attention_decode):
        z = op(*shuffled, slots=int_tensor(order), scale=0.2, backend="cuda")
        assert same_bits(z, y[torch.cat(rows)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_no_tokens(dtype: torch.dtype) -> None:
    check(make_batch([4], [100], 2, 2, 32, dtype, scale=8.0), scale=1.0)
    assert attention(*make_batch([], [], 2, 2, 32, dtype).arguments, scale=1.0, backend="cuda").shape == (
        0,
        2,
        32,
    )
    assert attention(*make_batch([0], [9], 2, 2, 32, dtype).arguments, scale=1.0, backend="cuda").shape == (
        0,
        2,
        32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_has_the_bits_of_attention(dtype: torch.dtype) -> None:
    batch = make_batch([70, 1, 20], [70, 1, 20], 4, 2, 20, dtype)
    y = packed_attention(
        batch.q, torch.cat(batch.k), torch.cat(batch.v), cumulative([70, 1, 20]), scale=0.25, backend="cuda"
    )
    assert same_bits(y, attention(*batch.arguments, scale=0.25, backend="cuda"))


@pytest.mark.parametrize("window", [None, 4100])
def test_more_pages_than_are_folded_at_a_time(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tiles of keys: a block folds parts in turns."""
    batch = make_batch([1, 2], [64 * 64 + 70, 64 * 64], 3, 1, 16)
    split = attention_decode(*batch.arguments, scale=0.2, window=window, num_splits=3, backend="cuda")
    monkeypatch.setattr("dschat_kernels.ops.attention.SCRATCH", 99)
    assert same_bits(split, attention(*batch.arguments, scale=0.2, window=window, backend="cuda"))


def test_keys_that_are_not_split_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the partial results would not fit, with the same bits; silent where a split would not help."""
    batch = make_batch([1, 1], [300, 70], 4, 2, 24)
    split = attention_decode(*batch.arguments, scale=0.2, backend="cuda")
    monkeypatch.setattr(_common, "_said", set())
    monkeypatch.setattr("dschat_kernels.ops.attention.SCRATCH", 99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*batch.arguments, scale=0.2, backend="cuda")
        attention_decode(*batch.arguments, scale=0.2, num_splits=1, backend="cuda")
        with monkeypatch.context() as patch:
            patch.setattr("dschat_kernels.ops.attention.BLOCKS", 4)
            attention_decode(*batch.arguments, scale=0.2, backend="cuda")
    with pytest.warns(UserWarning, match="keys are not split among blocks.* of 2 tokens over 5 pages a row"):
        whole = attention_decode(*batch.arguments, scale=0.2, backend="cuda")
    assert same_bits(whole, split)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_decode(*batch.arguments, scale=0.2, num_splits=2, backend="cuda")
