"""Critic and reward model as adapters on the policy's frozen weights: one base in memory, the numbers of models that
have bases of their own, and what cannot share.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dschat.config import ConfigError, GRPOConfig, PPOConfig, RewardConfig
from dschat.rlhf import data, grpo, models, online, ppo, reward
from dschat.rlhf.trunk import Trunk, digest
from tests.tiny_models import build

SMALL = {
    "lora_r": 4, "batch_size": 4, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8,
    "max_steps": 3, "learning_rate": 1e-2,
}  # fmt: skip
PPO = {**SMALL, "critic_learning_rate": 1e-2, "critic_lora_r": 2, "ppo_epochs": 2}


def short(prompts, completions, **columns):
    return [-len(c) / 10 for c in completions]


def run(base: dict[str, Any], folder: Path, functions: Any = (), **more: Any) -> Path:
    ppo.train(PPOConfig(**{**base, **PPO, **more, "output_dir": str(folder)}), rewards=functions)
    return folder


def reward_run(model: str, pairs: str, folder: Path, **more: Any) -> str:
    config = {"lora_r": 3, "learning_rate": 1e-2, "epochs": 2, "dtype": "float32", "device": "cpu", **more}
    reward.train(
        RewardConfig(
            model=model, data=[pairs], output_dir=str(folder), tensorboard=False, progress=False, **config
        )
    )
    return str(folder)


@pytest.fixture
def scored(base, pairs, tmp_path):
    """A reward run with an adapter on the policy's model."""
    return reward_run(base["model"], pairs, tmp_path / "rm")


def assembled(base: dict[str, Any], tokenizer: Any, functions: Any = (), **more: Any) -> Any:
    """The trainer of a PPO config, before its first step."""
    config = PPOConfig(**{**base, **PPO, **more})
    return online.assemble(config, ppo.PPO.build, data.Encoder(tokenizer), torch.float32, None, functions)


def modules_of(trainer: Any) -> list[nn.Module]:
    scorers = [s.scorer if hasattr(s, "scorer") else s for _, s in trainer.rewards.sources]
    held = [s.model for s in scorers if isinstance(s, models.Scorer)]
    found = [trainer.engine.model, trainer.critic.scorer.model, trainer.critic.module, *held]
    return list({id(m): m for m in found}.values())


def stored(modules: list[nn.Module]) -> dict[int, Tensor]:
    """The memory behind parameters, each once."""
    return {p.untyped_storage().data_ptr(): p for m in modules for p in m.parameters()}


def rollout_of(trainer: Any, base: dict[str, Any]) -> Any:
    records, stats = data.read(base["data"])
    examples = data.prompt_examples(records, trainer.encoder, stats)[:4]
    return trainer.generate(examples, 2, 5)


# ------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize("update", ["lora", "head"])
@pytest.mark.parametrize(
    "more",
    [{}, {"exact": True, "gradient_checkpointing": True}, {"dtype": "bfloat16"}],
    ids=["plain", "exact", "bfloat16"],
)
def test_a_critic_from_scratch_is_the_same_on_the_policys_base(base, tmp_path, update, more):
    """Numbers, checkpoints, policy and critic of the run are those of a critic with a base of its own, bit for bit."""
    folders = [
        run(base, tmp_path / trunk, (short,), critic_trunk=trunk, critic_update=update, **more)
        for trunk in ("own", "policy")
    ]
    assert numbers(folders[0]) == numbers(folders[1])
    for part in ("model", "adapter", "critic"):
        assert same_weights(*(f / part for f in folders)), part
    kept, again = (load_file(f / "checkpoints" / "step-000003" / "tensors.safetensors") for f in folders)
    own = {k for k in kept if not k.startswith("rng.")}  # loading a model draws numbers that nothing uses
    assert own == {k for k in again if not k.startswith("rng.")}
    assert all(torch.equal(kept[k], again[k]) for k in own)


def test_a_reward_adapter_scores_as_in_its_own_run(base, pairs, tmp_path, monkeypatch, stories_tokenizer):
    """On the policy's base: the bits of the model that was trained, which `model/` rounds once more."""
    kept: dict[str, Any] = {}
    save = models.save_model

    def remember(model: Any, tokenizer: Any, folder: Any, merge: bool, about: Any = None) -> Any:
        if "scores" not in kept:
            kept["scores"] = models.Scorer(model).rate(kept["rollout"])
        return save(model, tokenizer, folder, merge, about)

    plain = assembled(base, stories_tokenizer, (short,))
    kept["rollout"] = rollout = rollout_of(plain, base)
    monkeypatch.setattr(models, "save_model", remember)
    name = reward_run(base["model"], pairs, tmp_path / "rm")
    trainer = assembled(base, stories_tokenizer, reward=[name], reward_trunk="policy", critic_trunk="policy")
    ((_, source),) = trainer.rewards.sources
    assert torch.equal(source.rate(rollout), kept["scores"])
    fused = models.Scorer(models.load_scorer(name, torch.float32)).rate(rollout)
    torch.testing.assert_close(source.rate(rollout), fused, rtol=1e-4, atol=1e-5)
    assert float(fused.std()) > 0.1


@pytest.mark.parametrize("update", ["lora", "head"])
@pytest.mark.parametrize("critic_trunk", ["own", "policy"])
@pytest.mark.parametrize("reward_trunk", ["own", "policy"])
def test_where_policy_critic_and_reward_model_begin_and_what_moves(
    base, scored, stories_tokenizer, update, critic_trunk, reward_trunk
):
    """Values begin at the reward model's output; updates move policy and critic, and neither the base nor the scores.
    What is on the policy's base adds no more than adapters and heads."""
    how = {"critic_trunk": critic_trunk, "reward_trunk": reward_trunk, "critic_update": update}
    trainer = assembled(base, stories_tokenizer, reward=[scored], **how)
    records, stats = data.read(base["data"])
    examples = data.prompt_examples(records, trainer.encoder, stats)[:4]
    rollout = trainer.generate(examples, 2, 5)
    alone = models.Scorer(models.load_scorer(scored, torch.float32))
    scores, values = alone.rate(rollout), alone.values(rollout).detach()
    critic, source = trainer.critic, trainer.rewards.sources[0][1]
    found = critic.values(rollout, critic.features(rollout)).detach()
    torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(source.rate(rollout), scores, rtol=1e-4, atol=1e-5)

    everything = modules_of(trainer)
    trained = {id(p) for p in models.trainable(trainer.engine.model)}
    assert trained.isdisjoint(id(p) for p in models.trainable(critic.module))
    assert {id(p) for g in trainer.policy_optimizer.param_groups for p in g["params"]} == trained
    frozen = [p for m in everything for p in m.parameters() if not p.requires_grad]
    before = [p.detach().clone() for p in frozen]
    embed: Any = trainer.engine.spec.embed
    bases = sum(p.shape == embed.weight.shape for p in stored(everything).values())
    assert bases == 1 + ("own" in (critic_trunk, reward_trunk))

    metrics = online.Metrics(Path(base["output_dir"]) / "m", "ppo", 1, tensorboard=False, progress=False)
    for step in range(2):
        experience, _ = trainer.collect(examples, step, metrics)
        trainer.update(experience, step, 4)
    trainer.forget()
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    torch.testing.assert_close(source.rate(rollout), scores, rtol=1e-4, atol=1e-5)
    moved = critic.values(rollout, critic.features(rollout)) - values
    assert moved.abs().max() > 1e-4
    assert (trainer.engine.logprobs(rollout) - rollout.logprobs).abs().max() > 1e-4


def test_the_base_is_held_once(base, scored, stories_tokenizer):
    """Three models, one base: what is beside the policy are adapters and heads."""
    policy = assembled(base, stories_tokenizer, (short,)).engine.model
    alone = sum(p.numel() for p in stored([policy]).values())
    trainer = assembled(
        base,
        stories_tokenizer,
        reward=[scored],
        reward_trunk="policy",
        critic_trunk="policy",
        critic_update="lora",
    )
    everything = modules_of(trainer)
    assert len(everything) == 3
    together = sum(p.numel() for p in stored(everything).values())
    own = [p for m in everything[1:] for n, p in m.named_parameters() if "lora_" in n or "score" in n]
    assert together - alone == sum(p.numel() for p in own) < alone / 2
    buffers = [{b.data_ptr() for b in m.buffers()} for m in everything]
    assert buffers[0] == buffers[1] == buffers[2]


@pytest.mark.parametrize("update", ["lora", "head"])
def test_a_killed_run_is_the_straight_run(base, scored, tmp_path, update, kill_after):
    more = {"reward": [scored], "reward_trunk": "policy", "critic_trunk": "policy", "critic_update": update}
    straight = run(base, tmp_path / "straight", **more)
    kill_after(2)
    with pytest.raises(Killed):
        run(base, tmp_path / "again", **more)
    kill_after(None)
    again = run(base, tmp_path / "again", **more)
    assert numbers(straight) == numbers(again)
    for part in ("model", "adapter", "critic", "checkpoints"):
        assert same_weights(straight / part, again / part), part
