"""sample and token_logprobs of csrc/cuda: the tokens of reference and CPU, and log-probs against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import emulated_cuda
from helpers import assert_close_to_fp64, non_contiguous
from paged import same_bits
from torch import Tensor

from dschat_kernels.ops.linear import linear
from dschat_kernels.ops.sample import sample, sample_reference
from dschat_kernels.ops.token_logprobs import token_logprobs, token_logprobs_reference
from dschat_kernels.packing import PackedLinear, ResolvedLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 200, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 300, "top_p": 0.95, "min_p": 0.01},
)


def numbers(rows: int) -> dict[str, Tensor]:
    return {"streams": torch.arange(rows) + 2**40, "positions": torch.arange(rows) * 7 + 3}


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_tokens_as_the_reference_and_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    for vocab in (1, 7, 256, 1000):
        for spread in (0.0, 0.01, 3.0):
            logits = (spread * torch.randn(4, vocab)).to(dtype)
            arguments = {**numbers(4), **options, "seed": 2**62 + 5}
            with emulated_cuda():
                tokens, log_probs = sample(logits, backend="cuda", **arguments)
            expected, expected_log_probs = sample_reference(logits, **arguments)
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-6, atol=3e-6)
            if dtype != torch.float16:
                assert torch.equal(tokens, sample(logits, backend="cpu", **arguments)[0])


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
    weight = (torch.randn(vocab, size) * 2 / size**0.5).to(dtype)
    return torch.randn(tokens, size).to(dtype), weight, torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, size, vocab", [(0, 4, 9), (1, 1, 1), (3, 40, 255), (17, 33, 257), (70, 24, 600)]
)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_token_logprobs(
    cuda: Any, tokens: int, size: int, vocab: int, dtype: torch.dtype, cap: float | None
) -> None:
    hidden, weight, targets = problem(tokens, size, vocab, dtype)
    bias = torch.randn(vocab)
    options: dict[str, Any] = {"temperature": 0.7, "logit_softcap": cap, "return_entropy": True}
    got = token_logprobs(hidden, weight, targets, bias=bias, backend="cuda", **options)
    own = token_logprobs_reference(hidden, weight, targets, bias=bias, **options)
    exact = token_logprobs_reference(hidden.double(), weight.double(), targets, bias=bias.double(), **options)
    for a, e, t in zip(got, exact, own, strict=True):
        assert_close_to_fp64(a, e, t, size=8.0)
    only = token_logprobs(
        hidden, weight, targets, bias=bias, backend="cuda", temperature=0.7, logit_softcap=cap
    )
    assert same_bits(only, got[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rollouts_bits(cuda: Any, dtype: torch.dtype) -> None:
    """linear, then sample: the same log-probs bit for bit, in batches of any size."""
    hidden, weight, _ = problem(21, 40, 700, dtype)
    bias = torch.randn(700).to(dtype)
    packed = PackedLinear.from_parts([ResolvedLinear(weight, bias, ())], dense=True)
    logits = linear(hidden, packed, float_output=True, backend="cuda")
    tokens, log_probs = sample(logits, temperature=0.6, seed=5, backend="cuda", **numbers(21))
    for rows in (slice(0, 21), slice(4, 5), slice(3, 20)):
        again = token_logprobs(hidden[rows], weight, tokens[rows], temperature=0.6, bias=bias, backend="cuda")
        assert same_bits(again, log_probs[rows])


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs_gradients(cuda: Any, dtype: torch.dtype, cap: float | None) -> None:
    hidden, weight, targets = problem(20, 12, 300, dtype)
    bias, grads = torch.randn(300), (torch.randn(20), torch.randn(20))
    options: dict[str, Any] = {"temperature": 0.7, "logit_softcap": cap, "return_entropy": True}

    def gradients(function: Any, cast: Any, **more: Any) -> list[Tensor]:
        leaves = [cast(t).detach().requires_grad_() for t in (hidden, weight, bias)]
        out = function(leaves[0], leaves[1], targets, bias=leaves[2], **options, **more)
        torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])
        return [leaf.grad for leaf in leaves]

    ours = gradients(token_logprobs, lambda t: t, backend="cuda")
    own = gradients(token_logprobs_reference, lambda t: t)
    exact = gradients(token_logprobs_reference, lambda t: t.double())
    for a, e, t in zip(ours, exact, own, strict=True):
        assert_close_to_fp64(a, e, t, size=1.0)
