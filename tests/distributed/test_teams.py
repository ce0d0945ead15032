"""Rollouts of several processes: teams that hold one decoder in parts, and prompts that move to whoever is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import worker

from dschat import config as C
from dschat.engine import HybridEngine
from dschat.engine.sharing import check_teams
from dschat.engine.zero import ZeroSettings
from dschat.rlhf import grpo


@pytest.fixture
def four(spawned: Any) -> dict[str, Any]:
    return spawned("four", 4)


@pytest.mark.parametrize(("kind", "stage", "size"), worker.TEAMS)
def test_rollouts_of_teams_are_those_of_one_process(four, kind, stage, size):
    """The tokens and log-probs of one process with the same weights, bit for bit, before and after training, with the
    packs in parts, LoRA fused in them, and the weights in shards or not. A process packs its part and no more."""
    found = four[f"{kind}/{stage}/{size}"]
    own = worker.engine(kind, None)
    before = own.generate(*worker.prompts(), worker.SAMPLING)
    assert torch.equal(before.completion_ids, found["tokens"][0])
    assert torch.equal(before.logprobs, found["logprobs"][0])
    trained = {n: p for n, p in own.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found["weights"][name])
    after = own.generate(*worker.prompts(), worker.SAMPLING)
    assert torch.equal(after.completion_ids, found["final"][0])
    assert torch.equal(after.logprobs, found["final"][1])
    assert not torch.equal(before.completion_ids, after.completion_ids), "the steps changed something"
    share = found["packs"] / own.memory()["packs"]  # whole panels of 32 columns
    assert share < {2: 0.6, 4: 0.4}[size]


@pytest.mark.parametrize(("scenario", "world", "size"), [("zero", 2, 1), ("four", 4, 2)])
def test_who_is_done_takes_from_the_slowest(spawned, scenario, world, size):
    """Twelve prompts, two rows at a time; the first team's six are long, the other's short. The first one decodes the
    two that it began with, the other its own and then the four that wait: 18 steps at most, where the first alone needs
    27. Whoever decodes a row, it is the same."""
    found = spawned(scenario, world)[f"queue/{size}"]
    ids, sampling = worker.unequal()
    own = HybridEngine(worker.policy("full"), max_slots=2)
    alone = own.generate(ids[:6], None, sampling, limits=worker.LONG[:6])
    assert alone.stats.steps == 27
    assert found["steps"].tolist() == [9] * size + [18] * size
    whole = own.generate(ids, None, sampling, limits=worker.LONG)
    for tokens, logprobs, mask in found["rollouts"]:
        assert torch.equal(tokens, whole.completion_ids) and torch.equal(logprobs, whole.logprobs)
        assert torch.equal(mask, whole.completion_mask)
    assert found["keys"] == [False, False], "counters are removed"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_while_prompts_move_ends_the_others(folder: Path, victim: int):
    """The process that holds the store of the counters, and one that does not: the other says soon that it is alone."""
    with pytest.raises(AssertionError, match="exit -9"):
        processes.spawn("dies", folder, DIES=str(victim), DSCHAT_TIMEOUT="60")
    assert (folder / f"{victim}.txt").read_text().startswith("True: ")


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("size", "world", "sentence"),
    [
        (2, 1, "inference_tp_size is 2 and there is 1 process: set it to 1, or start 2 processes"),
        (3, 4, "inference_tp_size is 3 and there are 4 processes, .* set it to 2, or start 6 processes"),
        (8, 4, "inference_tp_size is 8 and there are 4 processes, .* set it to 4, or start 8 processes"),
        (0, 4, "inference_tp_size is 0: give at least 1"),
    ],
)
def test_processes_that_make_no_teams(size, world, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_teams(size, world)
    check_teams(2, 4)


def test_a_run_is_refused_before_a_model_is_loaded(folder: Path, monkeypatch, tmp_path: Path):
    def run(**keys: Any) -> None:
        grpo.train(
            C.GRPOConfig(
                model=str(worker.STORIES), data=[str(folder / "pairs.jsonl")], reward=["worker:short"],
                output_dir=str(tmp_path / "run"), progress=False, tensorboard=False, device="cpu", **keys,
            )
        )  # fmt: skip

    monkeypatch.setattr("dschat.rlhf.models.load_policy", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(C.ConfigError, match="inference_tp_size is 2 and there is 1 process: set it to 1"):
        run(inference_tp_size=2)
    monkeypatch.setattr("dschat.engine.sharing.check_teams", lambda *_: None)
    monkeypatch.setattr("dschat.rlhf.checks.check_teams", lambda *_: None)
    with pytest.raises(
        C.ConfigError, match=r"has 8 attention heads, which 3 processes .* inference_tp_size to 2"
    ):
        run(inference_tp_size=3)
    assert not (tmp_path / "run").exists()


def test_exact_mode_needs_whole_packs(monkeypatch):
    monkeypatch.setattr("dschat.engine.sharing.check_teams", lambda *_: None)
    with pytest.raises(ValueError, match="inference_tp_size is 2: exact mode trains on the whole packs"):
        HybridEngine(worker.policy("full"), exact=True, inference_tp_size=2)
    with pytest.raises(ValueError, match="inference_tp_size is 2 and there is 1 process"):
        monkeypatch.undo()
        worker.engine("full", ZeroSettings(1), inference_tp_size=2)
