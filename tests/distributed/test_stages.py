"""Runs of two and four processes against the same runs of one, and a run that goes on with another number of them."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
import worker
from safetensors.torch import load_file

from dschat.rlhf import checkpoint
from dschat.rlhf.metrics import read_lines

PLAIN = {"zero_stage": None}
CURVES = {
    "sft": ("loss", "grad_norm", "entropy", "mean_token_accuracy", "eval/loss", "eval/mean_token_accuracy"),
    "reward": ("loss", "accuracy", "grad_norm", "eval/loss"),
    "dpo": ("loss", "rewards/margins", "mean_token_accuracy", "grad_norm", "eval/loss"),
    "ppo": (
        "loss/policy_avg",
        "loss/value_avg",
        "objective/kl",
        "score/mean",
        "policy/grad_norm",
        "value/grad_norm",
    ),
    "ppo-full": ("loss/policy_avg", "loss/value_avg", "objective/kl", "score/mean", "policy/grad_norm"),
    "grpo": ("policy/loss", "kl/loss", "reward", "group/advantage_std", "grad_norm"),
    "rloo": ("policy/loss", "score/total", "reward", "group/advantage_std", "grad_norm"),
    "ppo-mixed": ("loss/policy_avg", "unsup/loss", "loss/value_avg", "score/mean", "policy/grad_norm"),
    "ppo-shared": ("loss/policy_avg", "loss/value_avg", "objective/kl", "score/mean", "value/grad_norm"),
    "ppo-f16": ("loss/policy_avg", "loss/value_avg", "objective/kl", "score/mean", "policy/grad_norm"),
    "ppo-frozen": ("loss/policy_avg", "loss/value_avg", "objective/kl", "score/mean", "policy/grad_norm"),
    "dpo-frozen": ("loss", "rewards/margins", "grad_norm", "eval/loss"),
}
FEW = [(2, name) for name in CURVES] + [(4, name) for name in worker.FOUR_STAGES]
REST = [(4, name) for name in CURVES if name not in worker.FOUR_STAGES]


def one(name: str, folder: Path, **more: object) -> list[dict[str, float]]:
    """The same run alone and without DeepSpeed."""
    keys = PLAIN | ({"critic_zero_stage": None} if "ppo" in name else {}) | more
    worker.run_stage(name, folder, "one", **keys)
    return read_lines(folder / f"{name}-one" / "metrics.jsonl")


@pytest.fixture
def many(spawned, folder):
    """many(world, name): the folder of a run of so many processes."""

    def get(world: int, name: str) -> Path:
        if world == 4 and name not in worker.FOUR_STAGES:
            spawned("stages", world, processes.NIGHTLY)
        else:
            spawned("four" if world == 4 else "stages", world)
        return folder / f"{name}-{world}"

    return get


@pytest.mark.parametrize(("world", "name"), FEW)
def test_curves_are_those_of_one_process(many, folder, world, name):
    """Every number within 1e-3 of its size (and 1e-4), in float16 5e-2 and 5e-3: data order, whitening, group
    baselines, normalisation by the whole batch and the rollouts' random streams do not depend on who computes a row."""
    found = read_lines(many(world, name) / "metrics.jsonl")
    alone = one(name, folder)
    assert len(found) == len(alone) == 3
    times = 50 if "f16" in name else 1
    for a, b in zip(found, alone, strict=True):
        for key in CURVES[name]:
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-3 * times, abs=1e-4 * times), (key, a["step"])
        for key in ("rollout/length", "completions/mean_length"):
            assert a.get(key) == b.get(key)
    assert any(key in alone[-1] for key in CURVES[name])


@pytest.mark.nightly
@pytest.mark.parametrize(("world", "name"), REST)
def test_curves_of_all_stages_in_four_processes(many, folder, world, name):
    test_curves_are_those_of_one_process(many, folder, world, name)


@pytest.mark.parametrize("world", [2, 4])
def test_the_exact_first_ratio_is_one_under_zero3(many, world):
    lines = read_lines(many(world, "ppo") / "metrics.jsonl")
    assert [line["policy/first_ratio_deviation"] for line in lines] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "ppo-mixed"])
def test_what_is_written_is_whole(many, folder, name):
    """Each model loads as that of one process, with the same shapes and nearly its weights; so does the average of
    the weights, which ZeRO-3 shards too."""
    found = _models(many(2, name))
    if not (folder / f"{name}-one" / "result.json").is_file():
        one(name, folder)
    alone = _models(folder / f"{name}-one")
    assert found.keys() == alone.keys() and any("ema" in str(f) for f in found) == (name == "ppo-mixed")
    for file, tensors in alone.items():
        assert found[file].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.allclose(found[file][key], value, rtol=1e-2, atol=2e-4), (file, key)


def _models(folder: Path) -> dict[Path, dict[str, torch.Tensor]]:
    """What is written, but for checkpoints: file -> tensors."""
    files = [f for f in folder.rglob("*.safetensors") if "checkpoints" not in f.parts]
    assert files
    return {f.relative_to(folder): load_file(f) for f in files}


@pytest.mark.parametrize("name", worker.HALF)
def test_a_run_goes_on_with_another_number_of_processes(many, folder, name):
    """Two processes ended after step 2; one process without ZeRO goes on where they were, and with it their average
    of the weights."""
    where = many(2, name)
    newest = checkpoint.latest(where / "checkpoints")
    assert newest is not None and newest.name == "step-000002" and not (where / "result.json").exists()
    worker.run_stage(name, folder, "2", zero_stage=None)
    goes_on = read_lines(where / "metrics.jsonl")
    straight = one(name, folder)
    key = "loss" if name.startswith("sft") else "grad_norm"
    assert [line["step"] for line in goes_on] == [1, 2, 3]
    assert goes_on[-1][key] == pytest.approx(straight[-1][key], rel=1e-3, abs=1e-5)
    for file, tensors in _models(folder / f"{name}-one").items():
        for key, value in tensors.items():
            assert torch.allclose(_models(where)[file][key], value, rtol=1e-2, atol=2e-4), (file, key)
