"""Frozen models of two processes under ZeRO-3: in shards, and what they score whole."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
import worker

from dschat.engine import HybridEngine
from dschat.rlhf import models


@pytest.fixture(scope="module")
def rollout():
    return HybridEngine(worker.policy("full")).generate(*worker.prompts(), worker.SAMPLING)


@pytest.mark.parametrize(
    ("name", "kind"), [*((kind, kind) for kind in ("full", "full-bf16", "full-f16")), ("exact", "full")]
)
def test_log_probs_are_those_of_whole_weights(spawned, rollout, name, kind):
    """Bit for bit, also by packs."""
    with torch.no_grad():
        dtype = worker.rollout_dtype(kind)
        alone = HybridEngine(worker.policy(kind), exact=name == "exact", dtype=dtype).logprobs(rollout)
    assert torch.equal(spawned("frozen")[name], alone)


def test_scores_are_those_of_whole_weights(spawned, folder, rollout):
    model = models.load_scorer(str(folder / "scorer"), torch.float32)
    assert torch.equal(spawned("frozen")["scores"], models.Scorer(model).rate(rollout))


def test_a_process_has_its_shard_and_a_layer_at_a_time(spawned):
    """And nothing stays gathered, also after a failure in a layer."""
    found = spawned("frozen")
    assert found["held"] == pytest.approx(0.5, abs=0.01)
    assert 0.0 < found["largest"] < 0.3
    assert found["left"] == []


def test_a_death_while_a_model_scores_ends_the_other(folder: Path):
    """Which says soon that it is alone."""
    with pytest.raises(AssertionError, match="exit -9"):
        processes.spawn("dies_scoring", folder, DIES="1", DSCHAT_TIMEOUT="60")
    assert (folder / "scoring-1.txt").read_text().startswith("True: ")
