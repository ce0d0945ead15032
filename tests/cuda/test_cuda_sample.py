"""sample of csrc/cuda: masked and broken rows, layouts, the distribution (tokens: tests/backends)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import non_contiguous
from paged import same_bits
from torch import Tensor

from dschat_kernels.ops.sample import sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(rows: int) -> dict[str, Tensor]:
    return {"streams": torch.arange(rows) + 2**40, "positions": torch.arange(rows) * 7 + 3}


def test_masked_entries_and_rows_that_are_no_distribution(cuda: Any) -> None:
    logits = torch.randn(8, 600)
    logits[:, ::2] = float("-inf")
    for options in ({}, {"top_k": 400}, {"top_p": 0.999}, {"temperature": 0.0}):
        tokens, log_probs = sample(logits, backend="cuda", **numbers(8), **options)
        assert (tokens % 2 == 1).all() and log_probs.isfinite().all()
    for bad, message in (("nan", "row 3 of logits has a NaN"), ("inf", "row 3 of logits has a NaN or is infinite"),
                         ("-inf", "every logit of row 3 is -inf")):  # fmt: skip
        broken = logits.clone()
        broken[3, 5 if bad != "-inf" else slice(None)] = float(bad)
        with pytest.raises(ValueError, match=message):
            sample(broken, backend="cuda", **numbers(8))


def test_rows_do_not_depend_on_batch_or_layout(cuda: Any) -> None:
    logits, where = torch.randn(9, 700).half(), numbers(9)
    options: dict[str, Any] = {"top_p": 0.8, "top_k": 50, "backend": "cuda"}
    whole = sample(logits, **where, **options)
    for i in (0, 5):
        one = sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in where.items()}, **options)
        assert torch.equal(one[0], whole[0][i : i + 1]) and same_bits(one[1], whole[1][i : i + 1])
    for view in non_contiguous(logits):
        assert all(torch.equal(a, b) for a, b in zip(sample(view, **where, **options), whole, strict=True))
    assert sample(logits[:0], **{k: v[:0] for k, v in where.items()}, **options)[0].shape == (0,)


def test_draws_follow_the_distribution(cuda: Any) -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, float("-inf")])
    draws = 1500
    tokens, _ = sample(logits.expand(draws, -1), backend="cuda", seed=1, streams=torch.arange(draws),
                       positions=torch.zeros(draws).long())  # fmt: skip
    expected = logits.softmax(0) * draws
    counts = torch.bincount(tokens, minlength=5)
    assert counts[4] == 0
    assert float(((counts - expected)[:4] ** 2 / expected[:4]).sum()) < 20  # chi-square, 3 degrees


# ------------------------------------------------------------------------------------------------ token_logprobs
