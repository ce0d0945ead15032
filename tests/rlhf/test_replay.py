"""Numbers that are not finite stop a run before anything steps, and `dschat replay` finds where they begin."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers_rlhf import numbers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat import cli
from dschat.config import ConfigError, DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from dschat.rlhf import dpo, grpo, online, ppo, replay, reward, sft

SMALL = {"lora_r": 2, "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3}
ONLINE = {**SMALL, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6}


def poisoned(stories_dir: Path, folder: Path, name: str, value: float) -> str:
    """The tiny model with one weight that is no number (or a huge one)."""
    model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories_dir).save_pretrained(folder)
    return str(folder)


def failed(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "run").glob("failed-step-*")
    return found


def files_are_plain(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "batch.json", "batch.safetensors", "weights.safetensors",
    ]  # fmt: skip
    json.loads((folder / "batch.json").read_text())
    load_file(folder / "batch.safetensors"), load_file(folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("cls", "train", "more"),
    [
        (SFTConfig, sft.train, {"response": "chosen", "max_length": 64}),
        (RewardConfig, reward.train, {"max_length": 64}),
        (DPOConfig, dpo.train, {"max_length": 64}),
    ],
)
def test_a_broken_model_is_found_module_by_module(base, stories_dir, tmp_path, cls, train, more, capsys):
    """Layer 2's down projection is nan: the run stops at step 1, and replay names the module, the row, the place."""
    name = "model.layers.2.mlp.down_proj.weight"
    model = poisoned(stories_dir, tmp_path / "bad", name, math.nan)
    with pytest.raises(
        ConfigError, match=r"gradient is nan at step 1 of .*failed-step-000001, see dschat replay"
    ):
        train(cls(**{**base, **SMALL, **more, "model": model}))
    folder = failed(tmp_path)
    files_are_plain(folder)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert all(torch.isfinite(w).all() for w in load_file(folder / "weights.safetensors").values()), (
        "nothing stepped"
    )
    found = replay.replay(str(folder))
    assert "row 0: " in found.lines[-1] and "layers.2.mlp.down_proj" in found.lines[-1]
    assert "gives nan at [0, 0, 0]" in found.lines[-1] and "largest number that went in" in found.lines[-1]
    assert cli.main(["replay", str(folder / "batch.json")]) == 1
    assert "layers.2.mlp.down_proj" in capsys.readouterr().out


def test_a_reward_that_is_no_number(base, tmp_path):
    """Completions, prompts and columns are kept, and replay asks the function again."""
    file = tmp_path / "bad.py"
    file.write_text(
        "def odd(completions, **c):\n    return [0.0, float('inf'), *[1.0] * (len(completions) - 2)]\n"
    )
    with pytest.raises(ConfigError, match=r"odd returned inf for completion 1.*failed-step-000001"):
        grpo.train(GRPOConfig(**{**base, **ONLINE, "reward": [f"{file}:odd"]}))
    files_are_plain(failed(tmp_path))
    found = replay.replay(str(failed(tmp_path)))
    assert found.where == "rewards" and "odd returned inf for completion 1" in found.lines[-1]
    file.write_text("def odd(completions, **c):\n    return [0.0] * len(completions)\n")
    mended = replay.replay(str(failed(tmp_path)))
    assert not mended.where and "may depend on something else" in mended.lines[-1]


def test_held_out_rewards_are_kept_too(base, tmp_path):
    def odd(prompts, completions, **columns):
        return [math.nan] * len(completions)

    with pytest.raises(ConfigError, match=r"odd returned nan for completion 0.*failed-step-000000"):
        grpo.train(GRPOConfig(**{**base, **ONLINE, "eval_data": base["data"]}), rewards=(odd,))
    assert "were not called" in replay.replay(str(failed(tmp_path))).lines[-1]


@pytest.mark.parametrize("bad", ["advantages", "value", "gradient"])
def test_ppo_stops_before_either_optimizer_steps(base, tmp_path, monkeypatch, bad):
    """A loss or gradient that is no number, of the policy or of the critic: neither steps, and both are kept."""
    original = online.Trainer.collect
    before: dict[str, torch.Tensor] = {}

    def collect(self, *args):
        experience, found = original(self, *args)
        for name, module in self.modules().items():
            before.update(
                {f"{name}.{k}": p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}
            )
        if bad == "advantages":
            experience.advantages[0, 0] = math.nan
        elif bad == "value":
            experience.returns[0, 0] = math.inf
        else:
            experience.advantages[:] = 3e38  # a finite loss, and gradients that overflow
        return experience, found

    monkeypatch.setattr(online.Trainer, "collect", collect)
    more = {"critic_update": "lora", "critic_lora_r": 2, "cliprange_value": None}
    reward = {"rewards": (lambda prompts, completions, **k: [1.0] * len(completions),)}
    with pytest.raises(
        ConfigError, match=r"(loss/\w+|grad_norm) is -?(nan|inf) at step 1 of ppo.*failed-step-000001"
    ):
        ppo.train(PPOConfig(**{**base, **ONLINE, **more}), **reward)
    weights = load_file(failed(tmp_path) / "weights.safetensors")
    assert set(weights) == set(before) and all(torch.equal(weights[k], before[k]) for k in before)
    assert any(k.startswith("critic.") for k in weights)
    found = replay.replay(str(failed(tmp_path)))
    wanted = {"advantages": "the batch's advantages", "value": "the batch's returns"}.get(bad)
    if wanted:
        assert found.where == wanted
    else:
        assert found.where.startswith("loss/") or found.where.startswith("gradient of policy."), found.lines
    assert numbers(tmp_path / "run") == []


def test_a_batch_that_is_finite_is_said_to_be(base, tmp_path, monkeypatch):
    """Replay computes the loss that the run had: the same numbers as the failed step's."""
    seen = []
    original = online.Trainer.minibatch

    def minibatch(self, *args):
        found = original(self, *args)
        seen.append(dict(found))
        return {**found, "policy/loss": math.nan} if len(seen) == 2 else found

    monkeypatch.setattr(online.Trainer, "minibatch", minibatch)
    with pytest.raises(ConfigError, match="policy/loss is nan at step 2"):
        grpo.train(
            GRPOConfig(**{**base, **ONLINE, "exact": True}),
            rewards=(lambda prompts, completions, **k: [len(c) / 9 for c in completions],),
        )
    found = replay.replay(str(failed(tmp_path)))
    assert found.where == "" and len(seen) == 3 and "everything is finite this time" in found.lines[-1]
    assert seen[2]["policy/loss"] == seen[1]["policy/loss"] and seen[2]["kl/loss"] == seen[1]["kl/loss"]
    assert cli.main(["replay", str(failed(tmp_path))]) == 0


def test_a_weight_that_is_no_number_comes_first(base, tmp_path, monkeypatch):
    test_a_batch_that_is_finite_is_said_to_be(base, tmp_path, monkeypatch)
    file = failed(tmp_path) / "weights.safetensors"
    weights = load_file(file)
    name = sorted(weights)[5]
    weights[name].view(-1)[1] = -math.inf
    save_file(weights, file)
    found = replay.replay(str(failed(tmp_path)))
    assert found.where == f"weight {name}" and "-inf at [0, 1], 1 of " in found.lines[-1]


def test_what_is_no_failed_step_is_said(tmp_path, capsys):
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "is no failed step of a run" in capsys.readouterr().err
    assert cli.main(["replay"]) == 2
    assert "there is no batch to replay" in capsys.readouterr().err
    folder = tmp_path / "failed-step-000001"
    folder.mkdir()
    for name in ("batch.json", "batch.safetensors", "weights.safetensors", "../run.json"):
        (folder / name).write_text("{")
    assert cli.main(["replay", str(folder)]) == 2
    assert "cannot be read" in capsys.readouterr().err
