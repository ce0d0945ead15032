"""sample of csrc/cuda: masked and broken rows, layouts, the distribution (tokens: tests/backends); and the backward of
token_logprobs: blocks, layouts, very small gradients, and its memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_close_to_fp64, non_contiguous
from paged import same_bits
from torch import Tensor

from dschat_kernels.ops._common import implementation
from dschat_kernels.ops.sample import sample
from dschat_kernels.ops.token_logprobs import token_logprobs, token_logprobs_reference

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


def problem(tokens: int, size: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(tokens, size).to(dtype), (torch.randn(vocab, size) * 0.4).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,))


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """Of a loss of log-probs and entropies in which every row has a weight of its own."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    op = options.pop("op", partial(token_logprobs, backend="cuda"))
    weights = options.pop("weights", 1.0 / (2.0 + targets))
    logprob, entropy = op(leaves[0], leaves[1], targets, bias=leaves[2], return_entropy=True, **options)
    ((logprob - 0.5 * entropy) * weights).sum().backward()
    return [t.grad for t in leaves if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_do_not_depend_on_blocks_batch_or_layout(
    dtype: torch.dtype, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = problem(67, 40, 333, dtype)
    bias = torch.randn(333)
    whole = gradients(hidden, weight, targets, bias, logit_softcap=9.0)
    for view in non_contiguous(hidden):
        assert all(map(same_bits, gradients(view, weight, targets, bias, logit_softcap=9.0), whole))
    for rows in (slice(0, 1), slice(40, 67)):
        alone = gradients(hidden[rows], weight, targets[rows], bias, logit_softcap=9.0)
        assert same_bits(alone[0], whole[0][rows])
    monkeypatch.setattr("dschat_kernels.ops.token_logprobs.BLOCK", 96)
    assert all(map(same_bits, gradients(hidden, weight, targets, bias, logit_softcap=9.0), whole))


def test_small_gradients_in_float16(cuda: Any) -> None:
    """The gradients of logits are below the least number of float16, and their sum, times a head whose rows have much
    in common, is not."""
    hidden, weight, targets = problem(70, 16, 300, torch.float16)
    hidden, weight = hidden * 0.01, weight + 4.0
    options: dict[str, Any] = {"weights": 2.0**-12 / (2.0 + targets), "temperature": 0.5}
    ours = gradients(hidden, weight, targets, **options)
    own = gradients(hidden, weight, targets, op=token_logprobs_reference, **options)
    exact = gradients(hidden.double(), weight.double(), targets, op=token_logprobs_reference, **options)
    for a, t, e in zip(ours, own, exact, strict=True):
        assert_close_to_fp64(a, e, t)


def test_gradients_of_masked_entries_and_certain_targets(cuda: Any) -> None:
    """A bias of -inf forbids a token, as if it were not there; where the target is certain 1 - p is far below the
    rounding of p."""
    hidden, weight, _ = problem(4, 8, 700, torch.float32)
    bias, targets = torch.zeros(700), torch.tensor([0, 600, 699, 255])
    bias[256:512] = float("-inf")
    weight[0], hidden[0] = 5.0 * hidden[0], 3.0 * hidden[0]
    d_hidden, d_weight, d_bias = gradients(hidden, weight, targets, bias)
    there = bias == 0.0
    exact = gradients(hidden.double(), weight[there].double(), targets - targets // 512 * 256, bias[there].double(),
                      op=token_logprobs_reference, weights=1.0 / (2.0 + targets))  # fmt: skip
    for ours, e in zip((d_hidden, d_weight[there], d_bias[there]), exact, strict=True):
        torch.testing.assert_close(ours.double(), e, rtol=1e-5, atol=1e-6)
    assert not d_weight[~there].any() and not d_bias[~there].any()


def test_memory_of_a_backward(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the gradients and float32 sums of the one by hidden states."""
    hidden, weight, targets = problem(70, 8, 5000, torch.bfloat16)
    made, empty = [], torch.empty

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        made.append(empty(*args, **kwargs))
        return made[-1]

    op = implementation("token_logprobs", "cuda", hidden, weight)
    logprob, lse, entropy, _ = op(hidden, weight, targets, None, 1.0, None, False)
    monkeypatch.setattr(torch, "empty", recorded)
    backward = implementation("token_logprobs_backward", "cuda", hidden, weight)
    for wanted, blocks in (([True, False, False], 1), ([True, True, True], 2)):
        made.clear()
        backward(logprob, None, hidden, weight, targets, None, lse, entropy, 1.0, None, wanted)
        scratch = sum(t.nbytes for t in made) - 2 * (hidden.numel() + wanted[1] * weight.numel())
        assert scratch <= blocks * 2048 * 72 * 2 + 4 * hidden.numel()
