"""DeepSpeed-Chat's bug ledger, B1 to B13: each has a test here that does what failed there, or the name of the one
that does. docs/distributed.md says what each was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import worker

from dschat.engine import HybridEngine, SamplingConfig
from dschat.engine import zero as module

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "B2": "engine/test_rollout.py::test_greedy_is_hf_generate_with_left_padding",
    "B3": "distributed/test_teams.py::test_rollouts_of_teams_are_those_of_one_process",
    "B4": "engine/test_rollout.py::test_a_row_is_the_same_whatever_is_around_it",
    "B13": "test_build.py::test_compile_error_is_readable_and_repeatable",
}
"""Row -> the test of another file that guards it."""


def test_every_row_is_guarded():
    own = set(re.findall(r'"""(B\d+):', Path(__file__).read_text()))
    assert own | ELSEWHERE.keys() == {f"B{i}" for i in range(1, 14)}
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), place
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert set(re.findall(r"^\| (B\d+) \|", page, re.MULTILINE)) == {f"B{i}" for i in range(1, 14)}


def test_llama_under_zero3_speaks_as_before(zero):
    """B1: Llama under ZeRO-3 gave gibberish, from a bias that nobody had written. Here the tokens are those of
    whole weights, before and after steps (test_zero.py compares the rest)."""
    own = worker.engine("full", None)
    before = own.generate(*worker.prompts(), worker.SAMPLING)
    assert torch.equal(before.completion_ids, zero["full/3"]["tokens"][0])
    assert torch.equal(before.logprobs, zero["full/3"]["logprobs"][0])


def test_memory_of_rollouts_is_given_back():
    """B11: what a rollout took stayed taken. The cache goes with the rollout that used it."""
    import gc
    import weakref

    from dschat.engine import rollout as rollouts

    made = []
    original = rollouts.RolloutRun.__init__

    def init(self, *args, **keywords):
        original(self, *args, **keywords)
        made.append(weakref.ref(self.cache))

    rollouts.RolloutRun.__init__ = init
    try:
        HybridEngine(worker.policy("lora")).generate(*worker.prompts(), worker.SAMPLING)
    finally:
        rollouts.RolloutRun.__init__ = original
    gc.collect()
    assert made and all(ref() is None for ref in made)


def test_lora_on_every_projection_is_fused(zero):
    """B5: fusing LoRA into q, k and v failed on sizes, or left it out without a word. Here the rollout's log-probs
    are those of a forward with the adapters, after they have been trained."""
    assert max(zero["lora/3"]["gap"]) < 1e-4 and max(zero["lora/2"]["gap"]) < 1e-4
    trained = [w for n, w in zero["lora/3"]["weights"].items() if "lora_B" in n]
    assert len(trained) == 35 and all(bool(w.any()) for w in trained)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_no_parameter_stays_gathered(zero, kind):
    """B6: parameters in flight, gathered twice, never let go. Nothing is whole after rollouts, forwards, backwards
    and steps, nor after a failure in the middle of a layer; and a layer at a time is whole, not the model."""
    assert zero[f"{kind}/3"]["left"] == []
    found = zero["full/3"]
    assert found["after_failure"] == []
    assert 0 < found["largest"] < 0.6 * found["total"]
    assert found["memory"]["weights"] < 0.6 * 4 * found["total"]


def test_a_parameter_is_gathered_once(monkeypatch):
    """B6: the same parameter twice in one gathering. Modules that share weights name each once."""
    head = torch.nn.Linear(4, 4)
    assert len(module.parameters_of([head, head, torch.nn.Sequential(head)])) == 2


def test_ranks_of_different_lengths_do_not_wait(zero):
    """B7: ranks that ended at different lengths hung. The two processes (rows 0 to 5, and 6 to 9) had rollouts of
    another number of steps, and both went on."""
    early = zero["lengths"]
    assert int(early[:6].max()) != int(early[6:].max()), "choose another seed"


def test_several_rollouts_and_backwards_a_step(zero):
    """B8: several generations and backwards before a step asserted in ZeRO-3. worker.train does three backwards a
    step, of unequal size, after generations and forwards without gradient."""
    assert len(zero["full/3"]["loss"]) == 2 and zero["full/3"]["tokens"][0].shape[0] == 10


def test_beams_are_refused():
    """B9: num_beams above 1 ran on a cache that could not be reordered. SamplingConfig has no beams."""
    with pytest.raises(TypeError, match="num_beams"):
        SamplingConfig(num_beams=2)  # type: ignore[call-arg]


def test_zero2_with_offload_and_all_weights_trains(folder):
    """B10: ZeRO-2 with offload and the hybrid engine, without LoRA, was blocked. One process of it here: the weights
    that are generated from are those that were stepped."""
    own = worker.engine("full", module.ZeroSettings(2, offload=True))
    found = worker.train(own, 2)
    alone = worker.train(worker.engine("full", None), 2)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found["tokens"], alone["tokens"], strict=True))


def test_too_long_a_sequence_is_refused():
    """B12: sequences above a limit read outside of an array. Above the model's context nothing runs."""
    own = HybridEngine(worker.policy("lora"))
    context = own.spec.context
    with pytest.raises(ValueError, match=f"more than the model's context of {context}"):
        own.generate(torch.full((1, context), 5), None, SamplingConfig(max_new_tokens=1))
