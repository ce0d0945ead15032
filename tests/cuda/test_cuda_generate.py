"""Whole rollouts through the engine and through patched `generate`, on every backend that a machine without a GPU can
execute: PyTorch, the CUDA sources on the CPU, and Triton's interpreter. One code, HF's greedy tokens."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import Order, emulated_cuda

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig, bench

NEW = 5
PROMPTS = (
    [1, 403, 407, 261, 378],
    [1, 410],
    [1] + [403, 407, 261] * 21,
)  # the last ends a page, and its row begins one
BACKENDS = ("reference", "cuda", "triton")


@contextlib.contextmanager
def running(backend: str) -> Iterator[None]:
    """`backend` takes CPU tensors within."""
    with contextlib.ExitStack() as stack:
        if backend == "cuda":
            stack.enter_context(emulated_cuda(Order.RANDOM, seed=3))
        elif backend == "triton":
            if importlib.util.find_spec("triton") is None:
                pytest.skip("Triton is not installed")
            from tests.triton_kernels.interpreter import interpreter

            stack.enter_context(interpreter())
        yield


def new(backend: str) -> int:
    """Tokens to generate; the interpreter is slow."""
    return 3 if backend == "triton" else NEW


def batch(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts, left-padded: ids and mask. The interpreter gets the short ones."""
    prompts = PROMPTS[:2] if backend == "triton" else PROMPTS
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@pytest.fixture(scope="module")
def expected(stories_model: Any) -> torch.Tensor:
    """HF's own greedy tokens, prompt by prompt."""
    rows = [
        stories_model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0]
        for p in PROMPTS
    ]
    return torch.stack([row[-NEW:] for row in rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_generates_hfs_greedy_tokens(
    backend: str, stories_model: Any, expected: torch.Tensor
) -> None:
    """Of three rows on two slots one waits, and takes the place of one that is done."""
    ids, mask = batch(backend)
    with running(backend):
        engine = HybridEngine(stories_model, backend=backend, max_slots=2)
        rollout = engine.generate(ids, mask, SamplingConfig(max_new_tokens=new(backend), temperature=0.0))
        logprobs = engine.logprobs(rollout).detach()
    assert engine.decoder.backend == backend
    assert torch.equal(rollout.completion_ids, expected[: len(ids), : new(backend)])
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_sampling_draws_what_the_cpu_draws(backend: str, stories_model: Any) -> None:
    """Two samples of a prompt share its pages; filters and random streams are those of the CPU kernels."""
    sampling = SamplingConfig(max_new_tokens=new(backend), n=2, top_k=20, top_p=0.9, seed=7)
    ids = torch.tensor([[1, 403, 407]])
    cpu = HybridEngine(stories_model, backend="cpu").generate(ids, None, sampling)
    with running(backend):
        ours = HybridEngine(stories_model, backend=backend).generate(ids, None, sampling)
    assert torch.equal(ours.completion_ids, cpu.completion_ids)
    torch.testing.assert_close(ours.logprobs, cpu.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patched_model_generates_hfs_greedy_tokens(
    backend: str, new_stories_model: Any, expected: torch.Tensor
) -> None:
    model = new_stories_model()
    ids, mask = batch(backend)
    with running(backend), dk.patch(model, backend=backend) as patch:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new(backend),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        report = str(patch.report())
    assert torch.equal(out[:, ids.shape[1] :], expected[: len(ids), : new(backend)])
    assert f"fused decoder ({backend})" in report and "own code" not in report


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_int8_rollouts_are_the_cpus(backend: str, new_stories_model: Any) -> None:
    """Tokens and log-probs of the CPU's int8 kernels; after an update the packs are others, and where they were."""
    model = new_stories_model()
    ids, mask = batch(backend)
    sampling = SamplingConfig(max_new_tokens=new(backend), temperature=0.0)
    cpu = HybridEngine(model, backend="cpu", rollout_weights="int8")
    with running(backend):
        ours = HybridEngine(model, backend=backend, rollout_weights="int8")
        for _ in range(2):
            expected, rollout = cpu.generate(ids, mask, sampling), ours.generate(ids, mask, sampling)
            assert rollout.stats.weights == "int8" and ours.decoder.backend == backend
            assert torch.equal(rollout.completion_ids, expected.completion_ids)
            torch.testing.assert_close(rollout.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
            packs = [group.packed for group in ours.decoder.groups.values()]
            assert all(p is not None and p.dense is not None and p.dense.dtype == torch.int8 for p in packs)
            with torch.no_grad():
                before = ours.decoder.addresses()
                for parameter in model.parameters():
                    parameter.mul_(1.1)
            assert ours.flip().changed >= len(packs) and ours.decoder.addresses() == before


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_bench_generate_on_int8(backend: str, stories_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dschat bench generate --weights int8 --backend ...`: its rows, and how far the log-probs are."""
    monkeypatch.setattr(bench, "machine_facts", lambda *_: {})  # they ask CUDA for the GPU's name
    monkeypatch.setattr(bench, "read_bandwidth", lambda *_, **__: 1e9)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_, **__: 1e9)
    with running(backend):
        report = bench.generate(
            stories_model, [(1, 3, 3)], repeats=1, compare_hf=False, weights="int8", backend=backend
        )
    assert report.model["weights"] == "int8" and 0 < report.model["logprob_gap"]["mean"] < 0.1
    assert report.rows[0].ours.median > 0


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_exact_mode_has_the_rollouts_hidden_states(backend: str, stories_model: Any) -> None:
    """The projections of an exact forward are those of the decoder's backend, bit for bit."""
    from dschat_kernels.forward import packed_hidden

    ids = torch.tensor([1, 403, 407, 261])
    with running(backend):
        engine = HybridEngine(stories_model, backend=backend)
        engine.flip()
        bounds = torch.tensor([0, 4], dtype=torch.int32)
        hidden = packed_hidden(engine.spec, ids, bounds, exact=engine.decoder, backend=backend).detach()
        cache = engine.decoder.new_cache(1, 4)
        logits = engine.decoder.step(ids, cache, [0], [4], "all")
        head = engine.decoder.packed("lm_head")
        again = dk.linear(hidden, head, float_output=True, backend=backend)
    assert torch.equal(again, logits)
