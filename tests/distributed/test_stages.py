"""Runs of two processes against the same runs of one, and a run that goes on with another number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import worker
from safetensors.torch import load_file

from dschat.rlhf import checkpoint
from dschat.rlhf.metrics import read_lines

PLAIN = {"zero_stage": None}
CURVES = {
    "sft": ("loss", "grad_norm", "eval/loss"),
    "reward": ("loss", "accuracy", "grad_norm", "eval/loss"),
    "dpo": ("loss", "margin", "grad_norm", "eval/loss"),
    "ppo": ("policy/loss", "value/loss", "kl/sequence", "score/mean", "policy/grad_norm", "value/grad_norm"),
    "ppo-full": ("policy/loss", "value/loss", "kl/sequence", "score/mean", "policy/grad_norm"),
    "grpo": ("policy/loss", "kl/loss", "score/mean", "group/advantage_std", "policy/grad_norm"),
}


def one(name: str, folder: Path, **more: object) -> list[dict[str, float]]:
    """The same run alone and without DeepSpeed."""
    keys = PLAIN | ({"critic_zero_stage": None} if "ppo" in name else {}) | more
    worker.run_stage(name, folder, "one", **keys)
    return read_lines(folder / f"{name}-one" / "metrics.jsonl")


@pytest.mark.parametrize("name", CURVES)
def test_curves_of_two_processes_are_those_of_one(stages, folder, name):
    """Every number within 1e-3 of its size (and 1e-4): data order, whitening, group baselines, normalisation by the
    whole batch and the rollouts' random streams do not depend on who computes a row."""
    many = read_lines(folder / f"{name}-many" / "metrics.jsonl")
    alone = one(name, folder)
    assert len(many) == len(alone) == 3
    for a, b in zip(many, alone, strict=True):
        for key in CURVES[name]:
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (key, a["step"])
        if "rollout/length" in b:
            assert a["rollout/length"] == b["rollout/length"]


def test_the_exact_first_ratio_is_one_under_zero3(stages, folder):
    lines = read_lines(folder / "ppo-many" / "metrics.jsonl")
    assert [line["policy/first_ratio_deviation"] for line in lines] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_what_is_written_is_whole(stages, folder, name):
    """Each model loads as that of one process, with the same shapes and nearly its weights."""
    many = {p.relative_to(folder / f"{name}-many"): load_file(p) for p in _models(folder / f"{name}-many")}
    if not (folder / f"{name}-one" / "result.json").is_file():
        one(name, folder)
    alone = {p.relative_to(folder / f"{name}-one"): load_file(p) for p in _models(folder / f"{name}-one")}
    assert many.keys() == alone.keys() and many
    for file, tensors in alone.items():
        assert many[file].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.allclose(many[file][key], value, rtol=1e-2, atol=2e-4), key


def _models(folder: Path) -> list[Path]:
    return sorted(p for part in ("model", "adapter") for p in (folder / part).glob("*.safetensors"))


@pytest.mark.parametrize("name", ["half", "half-grpo"])
def test_a_run_goes_on_with_another_number_of_processes(stages, folder, name):
    """Two processes (one with ZeRO-3) ended after step 2; one process without it goes on where they were."""
    where = folder / f"{name}-many"
    newest = checkpoint.latest(where / "checkpoints")
    assert newest is not None and newest.name == "step-000002" and not (where / "result.json").exists()
    worker.run_stage(name, folder, "many", zero_stage=None)
    goes_on = read_lines(where / "metrics.jsonl")
    straight = one(name, folder)
    key = "loss" if name == "half" else "policy/grad_norm"
    assert [line["step"] for line in goes_on] == [1, 2, 3]
    assert goes_on[-1][key] == pytest.approx(straight[-1][key], rel=1e-3, abs=1e-5)
