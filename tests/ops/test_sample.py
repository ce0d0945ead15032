from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, assert_close_to_fp64, native_threads, non_contiguous
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dschat_kernels.ops._common import kernels
from dschat_kernels.ops.sample import kept_tokens, philox_uniform, sample, sample_reference

VOCABS = (1, 2, 7, 63, 1000, 1024, 4109)
FILTERS = (
    {},
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
    {"top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.7, "top_k": 300, "top_p": 0.95, "min_p": 0.01},
)


def numbers(rows: int) -> dict[str, Tensor]:
    """Streams and positions of independent draws."""
    return {"streams": torch.arange(rows), "positions": torch.arange(rows) * 7 + 3}


def hf_allowed(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """What HF's warpers leave of [rows, vocab], in float64, where their sums are exact enough to be the
    truth."""
    scores = logits.double()
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores > float("-inf")


def drawn_set(logits: Tensor, draws: int, **options: float) -> Tensor:
    """Which tokens of one row [vocab] come out of many draws."""
    tokens, _ = sample(
        logits.expand(draws, -1), streams=torch.arange(draws), positions=torch.zeros(draws).long(), **options
    )
    return torch.zeros(logits.numel(), dtype=torch.bool).index_fill(0, tokens.unique(), True)


# ------------------------------------------------------------------------------------------- random numbers


def test_philox_known_answers() -> None:
    """The vectors of Random123's kat_vectors file for philox4x32, 10 rounds."""
    module = kernels()
    ones = 0xFFFFFFFF
    assert module.philox4x32_10([0] * 4, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert module.philox4x32_10([ones] * 4, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert module.philox4x32_10(pi, 0xA4093822, 0x299F31D0) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


@given(seed=st.integers(0, 2**63 - 1), stream=st.integers(0, 2**63 - 1), position=st.integers(0, 2**63 - 1))
def test_uniform_is_the_references(seed: int, stream: int, position: int) -> None:
    u = kernels().philox_uniform(seed, stream, position)
    assert u == philox_uniform(seed, stream, position)
    assert 0.0 <= u < 1.0


def test_uniform_is_uniform_over_streams_and_positions() -> None:
    module = kernels()
    for draws in (
        [module.philox_uniform(3, s, 0) for s in range(20000)],
        [module.philox_uniform(3, 0, p) for p in range(20000)],
        [module.philox_uniform(s, 1, 1) for s in range(20000)],
    ):
        u = torch.tensor(draws, dtype=torch.float64)
        assert u.unique().numel() == u.numel()
        counts = torch.histc(u, 100, 0.0, 1.0)
        assert float(((counts - 200) ** 2 / 200).sum()) < 160  # chi-square, 99 degrees: beyond 5 sigma
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.03


# --------------------------------------------------------------------------------------- tokens and filters


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(options: dict, dtype: torch.dtype) -> None:
    """Same random numbers, same order: the same tokens, for every shape of distribution."""
    for vocab in VOCABS:
        for spread in (0.0, 0.01, 1.0, 5.0):
            logits = (spread * torch.randn(24, vocab)).to(dtype)
            arguments = {**numbers(24), **options, "seed": 5}
            tokens, log_probs = sample(logits, backend="cpu", **arguments)
            expected, expected_log_probs = sample_reference(logits, **arguments)
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_reference_keeps_what_hf_keeps(options: dict) -> None:
    for spread in (0.1, 1.0, 6.0):
        logits = spread * torch.randn(40, 1000, dtype=torch.float64)
        logits[:, 500:] = logits[:, :500].flip(-1) + 1e-6 * torch.randn(40, 500, dtype=torch.float64)
        filters = {k: v for k, v in options.items() if k != "temperature"}
        temperature = options.get("temperature", 1.0)
        kept = kept_tokens(logits / temperature, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters})
        # At top_p 0.999999 the hair's breadth between two running sums may go either way.
        assert (kept != hf_allowed(logits, **options)).sum() <= (1 if options.get("top_p") == 0.999999 else 0)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_exactly_the_allowed_set(options: dict) -> None:
    """Members only, and over many draws all members that are probable enough to appear."""
    for spread in (0.3, 2.0):
        logits = spread * torch.randn(60)
        allowed = hf_allowed(logits[None], **options)[0]
        drawn = drawn_set(logits, 20000, seed=1, backend="cpu", **options)
        assert not (drawn & ~allowed).any()
        scores = (logits / options.get("temperature", 1.0)).masked_fill(~allowed, float("-inf"))
        assert (drawn | (scores.softmax(-1) < 1e-3)).all()


@pytest.mark.parametrize("vocab", [5000, 49152])
@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_k": 900}, {"top_p": 0.3}, {"top_p": 0.95}, {"min_p": 0.3}]
)
def test_large_vocabularies(vocab: int, options: dict) -> None:
    for logits in (torch.randn(2, vocab), 4 * torch.randn(2, vocab), torch.zeros(2, vocab)):
        logits[:, 17] += 3.0
        arguments = {**numbers(2), **options}
        assert torch.equal(
            sample(logits, backend="cpu", **arguments)[0], sample_reference(logits, **arguments)[0]
        )


def test_ties() -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 3.0, 0.0])
    assert drawn_set(logits, 3000, top_k=3, backend="cpu").tolist() == [
        False,
        True,
        True,
        True,
        True,
        True,
        False,
    ]
    # top-p counts one by one, the lowest index of equals first.
    assert drawn_set(torch.zeros(8), 3000, top_p=0.5, backend="cpu").tolist() == [True] * 4 + [False] * 4
    # Greedy takes the lowest index.
    many = torch.zeros(4, 4109)
    many[0, [7, 4000]] = 1.0
    many[1, [4108, 1500, 1501]] = 1.0
    many[2, 4108] = 1.0
    tokens, _ = sample(many, temperature=0.0, backend="cpu")
    assert tokens.tolist() == [7, 1500, 4108, 0]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.08}]
)
def test_frequencies(options: dict) -> None:
    """Chi-square of 200,000 draws against the exact distribution."""
    logits = 1.5 * torch.randn(40)
    draws = 200_000
    tokens, _ = sample(
        logits.expand(draws, -1),
        streams=torch.arange(draws) // 100,
        positions=torch.arange(draws) % 100,
        seed=9,
        backend="cpu",
        **options,
    )
    scores = (logits / options.get("temperature", 1.0)).double()
    expected = draws * scores.masked_fill(~hf_allowed(logits[None], **options)[0], float("-inf")).softmax(-1)
    counts = torch.bincount(tokens, minlength=40).double()
    assert (counts[expected == 0] == 0).all()
    common = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    degrees = int(common.sum()) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.randn(50, 3000)
    allowed = torch.rand(50, 3000) < 0.01
    allowed[:, 11] = True
    logits[~allowed] = float("-inf")
    logits[0] = float("-inf")
    logits[0, 2999] = -40.0
    for options in FILTERS:
        tokens, log_probs = sample(logits, backend="cpu", **numbers(50), **options)
        assert allowed[torch.arange(1, 50), tokens[1:]].all() and tokens[0] == 2999
        assert log_probs[0] == 0.0 and log_probs.isfinite().all()


# ---------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1023, 1024, 1025, 4109, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_log_prob_against_float64(dtype: torch.dtype, vocab: int, temperature: float) -> None:
    logits = (5 * torch.randn(6, vocab)).to(dtype)
    tokens, log_probs = sample(logits, temperature=temperature, backend="cpu", **numbers(6))
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    own = (logits.float() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    largest = float((logits.double() / temperature).abs().max())
    assert_close_to_fp64(log_probs, exact, own, size=largest)


def test_log_prob_is_of_the_whole_distribution() -> None:
    """Filters choose the token; its log-prob is that of the unfiltered softmax at the temperature."""
    logits = torch.randn(30, 500)
    for options in FILTERS:
        tokens, log_probs = sample(logits, backend="cpu", **numbers(30), **options)
        full = (logits.double() / options.get("temperature", 1.0)).log_softmax(-1)
        torch.testing.assert_close(
            log_probs.double(), full.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6
        )


def test_greedy_log_prob_is_at_temperature_one() -> None:
    logits = torch.randn(9, 300)
    tokens, log_probs = sample(logits, temperature=0.0, backend="cpu")
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).amax(-1), rtol=1e-6, atol=2e-6)


# ------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_depend_on_seed_stream_position_only(options: dict) -> None:
    logits, where = 2 * torch.randn(33, 4109), numbers(33)

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = {name: t[rows] for name, t in where.items()}
        return sample(logits[rows], seed=77, backend="cpu", **chosen, **options)

    everything = torch.arange(33)
    with native_threads(1):
        expected = run(everything)
    for threads in (2, 5):
        with native_threads(threads):
            assert all(torch.equal(g, e) for g, e in zip(run(everything), expected, strict=True))
    order = torch.randperm(33)
    assert all(torch.equal(g, e[order]) for g, e in zip(run(order), expected, strict=True))
    for row in (0, 32):
        one = torch.tensor([row])
        assert all(torch.equal(g, e[one]) for g, e in zip(run(one), expected, strict=True))


def test_seed_stream_and_position_each_matter() -> None:
    logits = torch.zeros(1, 4109)

    def draw(seed: int, stream: int, position: int) -> int:
        where = {"streams": torch.tensor([stream]), "positions": torch.tensor([position])}
        return int(sample(logits, seed=seed, backend="cpu", **where)[0])

    base = draw(1, 2, 3)
    assert base == draw(1, 2, 3)
    others = [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 3, 2), draw(1 + 2**32, 2, 3)]
    assert base not in others and len(set(others)) == len(others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype) -> None:
    logits, where = torch.randn(6, 37).to(dtype), numbers(6)
    expected = sample(logits, top_p=0.9, backend="cpu", **where)
    strided = {name: torch.stack([t, t + 1], 1)[:, 0] for name, t in where.items()}
    for view in non_contiguous(logits):
        got = sample(view, top_p=0.9, backend="cpu", **strided)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_no_rows() -> None:
    tokens, log_probs = sample(torch.empty(0, 50), backend="cpu", **numbers(0))
    assert tokens.shape == log_probs.shape == (0,) and tokens.dtype == torch.int64


# ----------------------------------------------------------------------------------------------- the op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_opcheck(dtype: torch.dtype, temperature: float) -> None:
    where = numbers(3).values() if temperature else (None, None)
    arguments = (torch.randn(3, 50).to(dtype), temperature, 10, 0.9, 0.01, 4, *where)
    torch.library.opcheck(torch.ops.dschat.sample.default, arguments)


def test_compiles_without_graph_break() -> None:
    def f(logits: Tensor, streams: Tensor, positions: Tensor) -> Tensor:
        tokens, log_probs = sample(torch.tanh(logits), top_k=5, streams=streams, positions=positions)
        return tokens + log_probs.exp()

    inputs = (torch.randn(4, 33), *numbers(4).values())
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs), f(*inputs))


def test_logits_that_need_a_gradient_are_accepted() -> None:
    logits = torch.randn(2, 9, requires_grad=True)
    _, log_probs = sample(logits, backend="cpu", **numbers(2))
    assert not log_probs.requires_grad


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, NAN, 2.0], "row 1 of logits has a NaN or is infinite at temperature 0.5"),
        ([NAN, -INF, -INF], "row 1 of logits has a NaN"),
        ([1.0, INF, -INF], "row 1 of logits has a NaN or is infinite"),
        ([3e38, 0.0, 0.0], "row 1 of logits has a NaN or is infinite at temperature 0.5"),
        ([-INF, -INF, -INF], "every logit of row 1 is -inf; leave at least one token allowed"),
    ],
)
@pytest.mark.parametrize("padding", [0, 2000])
def test_bad_rows(backend: str, values: list[float], message: str, padding: int) -> None:
    logits = torch.cat([torch.full((3, padding), -INF), torch.zeros(3, 3)], 1)
    logits[1, padding:] = torch.tensor(values)
    for options in ({}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match=message):
            sample(logits, temperature=0.5, backend=backend, **numbers(3), **options)
    if values[0] != 3e38:
        with pytest.raises(ValueError, match="row 1"):
            sample(logits, temperature=0.0, backend=backend)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": None}, TypeError, "sample: logits is a NoneType; give a torch.Tensor."),
        ({"logits": torch.ones(2, 8).long()}, TypeError, "logits has dtype int64; give a floating point"),
        ({"logits": torch.ones(8)}, ValueError, r"logits has shape \[8\]; give \[rows, vocab\]"),
        ({"logits": torch.ones(2, 0)}, ValueError, r"logits has shape \[2, 0\]; give \[rows, vocab\]"),
        ({"temperature": -1.0}, ValueError, r"temperature is -1.0; give a number from 0 \(greedy\)"),
        ({"temperature": NAN}, ValueError, "temperature is nan; give a number from 0"),
        ({"temperature": INF}, ValueError, "temperature is inf; give a number from 0"),
        ({"top_k": -1}, ValueError, "top_k is -1; give a number of tokens, or 0 for no limit"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5; give a probability from 0 to 1"),
        ({"top_p": NAN}, ValueError, "top_p is nan; give a probability from 0 to 1"),
        ({"min_p": -0.1}, ValueError, "min_p is -0.1; give a share from 0"),
        ({"seed": -1}, ValueError, "seed is -1; give a whole number from 0 to"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; give a whole number from 0 to"),
        ({"streams": None}, ValueError, "streams is None at temperature 1.0; give int64"),
        ({"positions": [0, 1]}, TypeError, "positions is a list; give a torch.Tensor"),
        ({"positions": torch.zeros(2).int()}, TypeError, "positions has dtype torch.int32; give torch.int64"),
        ({"streams": torch.zeros(3).long()}, ValueError, r"streams has shape \[3\]; give \[2\]"),
        (
            {"streams": torch.zeros(2).long().to("meta")},
            ValueError,
            "streams is on meta and the input on cpu",
        ),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; choose one of"),
        ({"logits": torch.ones(2, 8).half(), "backend": "cpu"}, ValueError, "not float16"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.ones(2, 8), **numbers(2), **change}
    with pytest.raises(error, match=message) as caught:
        sample(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
