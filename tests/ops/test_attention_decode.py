"""attention_decode is attention bit for bit, however the keys are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from paged import make_batch, same_bits, threads

from dschat_kernels.ops.attention import attention, attention_reference
from dschat_kernels.ops.attention_decode import attention_decode


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1500)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (9, 3), (60, 1)]),
    dim=st.sampled_from([5, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, None, 40, 600]),
    splits=st.sampled_from([None, 1, 2, 3, 8, 100]),
    team=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 99),
    cache=st.sampled_from([None, torch.int8]),
)
def test_splits_and_threads_do_not_change_a_bit(
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    splits: int | None,
    team: int,
    seed: int,
    cache: torch.dtype | None,
) -> None:
    lens = [q for q, _ in rows], [q + past for q, past in rows]
    batch = make_batch(*lens, *heads, dim, dtype, seed, cache_dtype=cache)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window, "backend": "cpu"}
    expected = attention(*batch.arguments, **options)
    with threads(team):
        assert same_bits(attention_decode(*batch.arguments, num_splits=splits, **options), expected)


@pytest.mark.parametrize("splits", [2, 3, 5, 9, 10])
def test_uneven_splits_of_a_long_row(splits: int) -> None:
    other, batch = (make_batch([1, 2], [2310, 2049], 3, 1, 8, seed=seed) for seed in (1, 2))
    expected = attention(*batch.arguments, scale=0.3, backend="cpu")
    # A chunk that nobody computes would find the sums of the call before in its memory.
    attention_decode(*other.arguments, scale=0.3, num_splits=2, backend="cpu")
    y = attention_decode(*batch.arguments, scale=0.3, num_splits=splits, backend="cpu")
    assert same_bits(y, expected)


def test_options_and_slots() -> None:
    batch = make_batch([1, 2], [700, 300], 4, 2, 24)
    options = {"scale": 0.3, "softcap": 8.0, "alibi_slopes": torch.rand(4), "slots": torch.tensor([1, 0])}
    swapped = (*batch.arguments[:5], torch.tensor([300, 290]))
    y = attention_decode(*swapped, num_splits=3, backend="cpu", **options)
    assert same_bits(y, attention(*swapped, backend="cpu", **options))
    torch.testing.assert_close(y, attention_reference(*swapped, **options), atol=1e-5, rtol=1e-5)
    z = attention_decode(*swapped, backend="reference", **options)
    assert torch.equal(z, attention_reference(*swapped, **options))


def test_opcheck() -> None:
    for cache in (None, torch.int8):
        batch = make_batch([1, 2], [300, 20], 4, 2, 6, cache_dtype=cache)
        torch.library.opcheck(
            torch.ops.dschat.attention_decode.default, (*batch.arguments, None, 0.5, None, None, None, 2)
        )


def test_bad_input() -> None:
    batch = make_batch([1], [20], 4, 2, 6)
    with pytest.raises(ValueError, match="num_splits is 0"):
        attention_decode(*batch.arguments, scale=1.0, num_splits=0)
    with pytest.raises(ValueError, match="attention_decode: window is -3"):
        attention_decode(*batch.arguments, scale=1.0, window=-3)
