"""token_logprobs against float64 log_softmax, against the bits of sample and linear, its gradients and its
memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_close_to_fp64, non_contiguous
from hypothesis import example, given
from hypothesis import strategies as st
from paged import same_bits, threads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dschat_kernels.ops.sample import sample
from dschat_kernels.ops.token_logprobs import token_logprobs, token_logprobs_reference
from tests.helpers import cuda_refusal


def problem(
    tokens: int, size: int, vocab: int, dtype: torch.dtype, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, size).to(dtype)
    weight = (torch.randn(vocab, size) * spread / size**0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,))


@given(
    tokens=st.integers(0, 40),
    size=st.one_of(st.integers(1, 40), st.sampled_from([256, 300, 577])),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 3000])),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    cap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 999),
)
def test_matches_float64(
    tokens: int,
    size: int,
    vocab: int,
    dtype: torch.dtype,
    with_bias: bool,
    temperature: float,
    cap: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    hidden, weight, targets = problem(tokens, size, vocab, dtype)
    bias = torch.randn(vocab) if with_bias else None
    options: dict[str, Any] = {"temperature": temperature, "logit_softcap": cap, "return_entropy": True}
    got = token_logprobs(hidden, weight, targets, bias=bias, backend="cpu", **options)
    own = token_logprobs_reference(hidden, weight, targets, bias=bias, **options)
    exact = token_logprobs_reference(
        hidden.double(), weight.double(), targets, bias=bias if bias is None else bias.double(), **options
    )
    only = token_logprobs(
        hidden, weight, targets, bias=bias, backend="cpu", temperature=temperature, logit_softcap=cap
    )
    assert same_bits(only, got[0])
    for a, e, t in zip(got, exact, own, strict=True):
        # Near 0 they are differences of sums of the size of the logits.
        assert_close_to_fp64(a, e, t, size=8.0)


@given(
    tokens=st.integers(0, 40),
    size=st.sampled_from([1, 24, 33, 300]),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 3000])),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    cap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 999),
)
def test_gaps_are_zero_where_the_target_is_float64s_argmax(
    tokens: int,
    size: int,
    vocab: int,
    dtype: torch.dtype,
    with_bias: bool,
    temperature: float,
    cap: float | None,
    seed: int,
) -> None:
    """The same bits whatever has a gradient and whether entropies are asked for."""
    torch.manual_seed(seed)
    hidden, weight, targets = problem(tokens, size, vocab, dtype)
    bias = torch.randn(vocab) if with_bias else None
    wide = hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    right = torch.rand(tokens) < 0.5
    targets[right] = wide.argmax(1)[right]
    options: dict[str, Any] = {"temperature": temperature, "logit_softcap": cap, "return_gap": True}
    logprob, gap = token_logprobs(hidden, weight, targets, bias=bias, backend="cpu", **options)
    _, own = token_logprobs_reference(hidden, weight, targets, bias=bias, **options)
    _, exact = token_logprobs_reference(
        hidden.double(), weight.double(), targets, bias=bias if bias is None else bias.double(), **options
    )
    assert_close_to_fp64(gap, exact, own, size=8.0)
    near = (wide.amax(1) - wide.gather(1, targets[:, None])[:, 0]).abs()
    clear = (near == 0) | (near > 1e-3)
    clear &= wide.topk(2)[0].diff()[:, 0] < -1e-3 if vocab > 1 else clear
    if cap is None or not tokens or wide.abs().max() < 2 * cap:  # else tanh brings logits together
        assert torch.equal((gap == 0)[clear], (near == 0)[clear])
    plain = token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, logit_softcap=cap, backend="cpu"
    )
    assert same_bits(logprob, plain)
    for trained in ((True, False), (True, True)):
        h, w = (t.clone().requires_grad_(on) for t, on in zip((hidden, weight), trained, strict=True))
        found = token_logprobs(h, w, targets, bias=bias, backend="cpu", return_entropy=True, **options)
        assert same_bits(found[0], logprob) and same_bits(found[2], gap) and not found[2].requires_grad


def test_gaps_of_given_logits() -> None:
    """With a one-hot weight the logits are the hidden values: whole numbers, of which many tie."""
    logits = torch.randint(-9, 9, (40, 1500)).float()
    targets = torch.randint(0, 1500, (40,))
    _, gap = token_logprobs(logits, torch.eye(1500), targets, return_gap=True, backend="cpu")
    assert torch.equal(gap, logits.amax(1) - logits.gather(1, targets[:, None])[:, 0]) and (gap == 0).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gaps_are_nan_where_log_probs_are(backend: str) -> None:
    bias = torch.zeros(4, 1100)
    bias[0, 7], bias[1, 1050], bias[2] = float("nan"), float("inf"), float("-inf")
    for row, targets in enumerate(([0, 7], [0, 1050], [0, 1050], [0, 1])):
        logprob, gap = token_logprobs(
            torch.zeros(2, 3), torch.ones(1100, 3), torch.tensor(targets), bias=bias[row], return_gap=True,
            backend=backend,
        )  # fmt: skip
        assert logprob.isnan().tolist() == gap.isnan().tolist() == [row < 3] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_or_threads(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(131, 96, 5000, dtype)
    options: dict[str, Any] = {
        "temperature": 0.8, "return_entropy": True, "return_gap": True, "backend": "cpu"
    }  # fmt: skip
    together = token_logprobs(hidden, weight, targets, **options)
    for n, rows in (
        (1, slice(0, 131)),
        (2, slice(7, 8)),
        (3, slice(100, 131)),
        (5, slice(0, 13)),
        (7, slice(0, 131)),
    ):
        with threads(n):
            part = token_logprobs(hidden[rows], weight, targets[rows], **options)
        for a, b in zip(part, together, strict=True):
            assert same_bits(a, b[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bits_of_linear_and_sample(dtype: torch.dtype, temperature: float, with_bias: bool) -> None:
    """What the rollout computes: logits by the packed head, a token and its log-prob by sample."""
    from dschat_kernels.ops.linear import linear
    from dschat_kernels.packing import PackedLinear

    hidden, weight, _ = problem(29, 100, 2500, dtype)
    bias = torch.randn(2500).to(dtype) if with_bias else None
    logits = linear(hidden, PackedLinear.from_weight(weight, bias), float_output=True)
    streams = torch.arange(29)
    tokens, logprobs = sample(logits, temperature=temperature, seed=5, streams=streams, positions=streams)
    assert same_bits(
        token_logprobs(hidden, weight, tokens, temperature=temperature, bias=bias, backend="cpu"), logprobs
    )


def test_bits_of_sample_on_exact_logits() -> None:
    """With a one-hot weight the logits are the hidden values themselves, whatever computes them."""
    vocab = 1500
    logits = torch.randn(12, vocab) * 4
    streams = torch.arange(12)
    for temperature in (1.0, 0.7, 2.5):
        tokens, logprobs = sample(logits, temperature=temperature, seed=1, streams=streams, positions=streams)
        assert same_bits(
            token_logprobs(logits, torch.eye(vocab), tokens, temperature=temperature, backend="cpu"), logprobs
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_softcap": 4.0}])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients(
    dtype: torch.dtype, options: dict[str, Any], with_entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dschat_kernels.ops.token_logprobs.BLOCK", 100)
    hidden, weight, targets = problem(37, 24, 333, dtype)
    bias = torch.randn(333)
    weights = torch.randn(2, 37)

    def gradients(op: Any, wide: torch.dtype | None = None, **more: Any) -> list[Tensor]:
        inputs = [x.to(wide or x.dtype).clone().requires_grad_() for x in (hidden, weight, bias)]
        out = op(
            inputs[0], inputs[1], targets, bias=inputs[2], return_entropy=with_entropy, **options, **more
        )
        terms = zip(out, weights, strict=True) if with_entropy else [(out, weights[0])]
        sum((x * w).sum() for x, w in terms).backward()
        return [x.grad for x in inputs]

    ours = gradients(token_logprobs, backend="cpu")
    theirs = gradients(token_logprobs_reference)
    exact = gradients(token_logprobs_reference, torch.float64)
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert_close_to_fp64(a, e, t)


@given(
    tokens=st.integers(0, 230),
    size=st.sampled_from([1, 24, 33, 577]),
    vocab=st.sampled_from([1, 70, 1024, 1025, 2600]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    cap=st.sampled_from([None, 5.0]),
    with_entropy=st.booleans(),
    spread=st.sampled_from([0.1, 2.0, 12.0]),
    seed=st.integers(0, 999),
)
@example(230, 33, 2600, torch.float32, False, 1.0, None, False, 2.0, 0)
@example(230, 577, 2600, torch.bfloat16, False, 0.7, None, False, 12.0, 0)
@example(97, 24, 2600, torch.float32, True, 0.7, 5.0, False, 12.0, 0)
@example(97, 24, 1025, torch.bfloat16, True, 0.7, 5.0, True, 2.0, 0)
def test_gradient_of_a_frozen_head(
    tokens: int,
    size: int,
    vocab: int,
    dtype: torch.dtype,
    with_bias: bool,
    temperature: float,
    cap: float | None,
    with_entropy: bool,
    spread: float,
    seed: int,
) -> None:
    """One more product in the forward instead of two in the backward: the bits of the forward stay, and the gradient is
    as exact as the one that recomputes the logits."""
    torch.manual_seed(seed)
    hidden, weight, targets = problem(tokens, size, vocab, dtype, spread)
    bias = torch.randn(vocab) if with_bias else None
    options: dict[str, Any] = {"temperature": temperature, "logit_softcap": cap}
    scales = torch.randn(2, tokens)

    def run(op: Any, wide: torch.dtype | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        h, w, b = (None if x is None else x.to(wide or x.dtype) for x in (hidden, weight, bias))
        h = h.clone().requires_grad_()
        out = op(h, w, targets, bias=b, return_entropy=with_entropy, **options, **more)
        terms = zip(out, scales, strict=True) if with_entropy else [(out, scales[0])]
        sum((x * s).sum() for x, s in terms).backward()
        return (out[0] if with_entropy else out).detach(), h.grad

    (logprob, ours), (_, theirs) = run(token_logprobs, backend="cpu"), run(token_logprobs_reference)
    (_, exact) = run(token_logprobs_reference, torch.float64)
    plain = token_logprobs(hidden, weight, targets, bias=bias, backend="cpu", **options)
    assert same_bits(logprob, plain)
    assert_close_to_fp64(ours, exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_frozen_head_does_not_depend_on_batch_or_threads(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(231, 96, 3000, dtype)

    def gradient(rows: slice) -> Tensor:
        h = hidden[rows].clone().requires_grad_()
        token_logprobs(h, weight, targets[rows], backend="cpu").sum().backward()
        return h.grad

    together = gradient(slice(0, 231))
    for n, rows in ((1, slice(0, 231)), (2, slice(7, 8)), (3, slice(100, 231)), (7, slice(0, 231))):
        with threads(n):
            assert same_bits(gradient(rows), together[rows])


def test_gradient_of_a_frozen_head_where_the_target_is_certain() -> None:
    """1 - p is far below the rounding of p: the gradient is still exact to the last digits of bfloat16."""
    hidden = torch.full((4, 2), 4.0, dtype=torch.bfloat16).requires_grad_()
    weight = torch.tensor([[2.0, 1.0], [0.5, 0.25], [-1.0, 0.5]], dtype=torch.bfloat16)
    targets = torch.zeros(4, dtype=torch.int64)
    token_logprobs(hidden, weight, targets, backend="cpu").sum().backward()
    exact = hidden.detach().double().requires_grad_()
    token_logprobs_reference(exact, weight.double(), targets).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=2**-7, atol=0)


class Calls(TorchDispatchMode):
    """The names of the ops that torch's dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("looked_at", [True, False])
def test_logits_are_computed_anew_only_for_a_gradient_of_entropies(looked_at: bool) -> None:
    hidden, weight, targets = problem(5, 8, 50, torch.float32)
    hidden.requires_grad_()
    logprob, entropy = token_logprobs(hidden, weight, targets, return_entropy=True, backend="cpu")
    loss = logprob.sum() + (entropy.detach() if looked_at else entropy).sum()
    with Calls() as calls:
        loss.backward()
    assert any("token_logprobs_backward" in name for name in calls.names) is not looked_at


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, targets = problem(5, 8, 50, torch.float32)
    hidden.requires_grad_()
    token_logprobs(hidden, weight, targets, backend="cpu").sum().backward()
    assert hidden.grad is not None and weight.grad is None
    weight.requires_grad_()
    token_logprobs(hidden.detach(), weight, targets, backend="cpu").sum().backward()
    exact = token_logprobs_reference(
        hidden.detach().double(), w := weight.detach().double().requires_grad_(), targets
    )
    exact.sum().backward()
    torch.testing.assert_close(weight.grad.double(), w.grad, atol=1e-5, rtol=1e-5)


def test_masked_vocabulary() -> None:
    """A bias of -inf forbids a token: finite results elsewhere, -inf for it, gradients finite."""
    hidden, weight, _ = problem(4, 8, 2100, torch.float32)
    bias = torch.zeros(2100)
    bias[1024:2048] = float("-inf")
    bias[7] = float("-inf")
    targets = torch.tensor([0, 2050, 7, 1500])
    hidden.requires_grad_()
    logprob, entropy = token_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, backend="cpu")
    exact = token_logprobs_reference(hidden.detach().double(), weight.double(), targets, bias=bias.double())
    assert torch.equal(logprob[2:], torch.full((2,), float("-inf")))
    torch.testing.assert_close(logprob[:2].double(), exact[:2], atol=1e-5, rtol=0)
    assert entropy.isfinite().all()
    (logprob[:2].sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_extreme_logits() -> None:
    hidden = torch.tensor([[300.0], [-300.0], [1e-30]])
    weight = torch.linspace(-1, 1, 3000)[:, None]
    targets = torch.tensor([2999, 2999, 0])
    got = token_logprobs(hidden, weight, targets, return_entropy=True, backend="cpu")
    exact = token_logprobs_reference(hidden.double(), weight.double(), targets, return_entropy=True)
    for a, e in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-4, rtol=1e-6)


def test_reference_gradcheck() -> None:
    hidden, weight, targets = problem(3, 4, 7, torch.float64)
    inputs = [
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randn(7, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(
            h,
            w,
            targets,
            bias=b,
            temperature=0.7,
            logit_softcap=3.0,
            return_entropy=True,
            backend="reference",
        ),
        inputs,
    )


def test_takes_any_strides() -> None:
    hidden, weight, targets = problem(9, 12, 40, torch.float32)
    y = token_logprobs(hidden, weight, targets, backend="cpu")
    for view in non_contiguous(hidden):
        assert same_bits(token_logprobs(view, weight, targets, backend="cpu"), y)
    for view in non_contiguous(weight):
        assert same_bits(token_logprobs(hidden, view, targets.int(), backend="cpu"), y)


def _memory(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
def test_peak_memory_is_far_below_the_logits() -> None:
    tokens, size, vocab = 1024, 16, 262144
    hidden, weight, targets = problem(tokens, size, vocab, torch.float32)
    hidden.requires_grad_()
    # Warm: threads, their working memory, MKL.
    token_logprobs(hidden[:2], weight, targets[:2], backend="cpu").sum().backward()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # resets the peak
    before = _memory("VmRSS")
    token_logprobs(hidden, weight, targets, backend="cpu").sum().backward()
    logits = tokens * vocab * 4
    assert _memory("VmHWM") - before < logits // 8


def test_opcheck() -> None:
    hidden, weight, targets = problem(4, 6, 20, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    bias = torch.randn(20, requires_grad=True)
    op = torch.ops.dschat.token_logprobs.default
    torch.library.opcheck(op, (hidden, weight, targets, bias, 0.8, 5.0, True))
    torch.library.opcheck(op, (hidden, weight.detach(), targets, None, 1.0, None, False))
    frozen = torch.ops.dschat.token_logprobs_gradient.default
    torch.library.opcheck(frozen, (hidden, weight.detach(), targets, bias.detach(), 0.8, 5.0, True))
    torch.library.opcheck(frozen, (hidden, weight.detach(), targets, None, 1.0, None, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(3, 5)}, r"give \[T, H\] and \[V, H\]"),
        ({"hidden": torch.randn(3, 2, 4)}, r"give \[T, H\] and \[V, H\]"),
        ({"weight": torch.randn(10, 4).bfloat16()}, "weight is torch.bfloat16"),
        ({"targets": torch.tensor([0, 1])}, r"targets has shape \[2\]"),
        ({"targets": torch.tensor([0.0, 1, 2])}, "give int64"),
        ({"targets": torch.tensor([0, 1, 10])}, "target 10 is outside the vocabulary of 10"),
        ({"targets": torch.tensor([0, -100, 1])}, "target -100 is outside"),
        ({"bias": torch.zeros(9)}, r"bias has shape \[9\]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"backend": "triton"}, "needs tensors on a GPU, not on cpu"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(10, 4),
        "targets": torch.arange(3),
        **change,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        token_logprobs(**arguments)


def test_cuda_refuses_cpu_tensors() -> None:
    error, message = cuda_refusal()
    with pytest.raises(error, match=f"token_logprobs: {message}"):
        token_logprobs(torch.randn(3, 4), torch.randn(10, 4), torch.arange(3), backend="cuda")
