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

from dschat.config import ConfigError, GRPOConfig, PPOConfig, RewardConfig, TrainConfig
from dschat.config import build as build_config
from dschat.engine import HybridEngine
from dschat.rlhf import batching, conversations, data, grpo, models, online, ppo, reading, reward
from dschat.rlhf import train as pipeline
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
    return online.assemble(
        config, ppo.PPO.build, conversations.Encoder(tokenizer), torch.float32, None, functions
    )


def modules_of(trainer: Any) -> list[nn.Module]:
    scorers = [s.scorer if hasattr(s, "scorer") else s for _, s in trainer.rewards.sources]
    held = [s.model for s in scorers if isinstance(s, models.Scorer)]
    found = [trainer.engine.model, trainer.critic.scorer.model, trainer.critic.module, *held]
    return list({id(m): m for m in found}.values())


def stored(modules: list[nn.Module]) -> dict[int, Tensor]:
    """The memory behind parameters, each once."""
    return {p.untyped_storage().data_ptr(): p for m in modules for p in m.parameters()}


def rollout_of(trainer: Any, base: dict[str, Any]) -> Any:
    records, stats = reading.read(base["data"])
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
    records, stats = reading.read(base["data"])
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
    assert not any(f".{models.UNDER}." in n for n, p in critic.module.named_parameters() if p.requires_grad)
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


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("update", ["lora", "head"])
@pytest.mark.parametrize("start", ["model", "reward"])
def test_what_is_written_is_what_was_trained(base, pairs, tmp_path, monkeypatch, update, start, weights):
    """Policy and critic on disk, each from plain folders: log-probs and values of the end of the run, though policy and
    critic merge their adapters into what was one base."""
    kept: dict[str, Any] = {}
    conclude = online._conclude

    def remember(run: Any, trainer: Any, *args: Any) -> Any:
        kept["rollout"] = rollout = rollout_of(trainer, base)
        critic = trainer.critic
        with torch.no_grad():
            kept["logp"] = trainer.engine.logprobs(rollout)
            kept["values"] = critic.values(rollout, critic.features(rollout))
        return conclude(run, trainer, *args)

    more = {"critic_trunk": "policy", "critic_update": update, "base_weights": weights}
    if start == "reward":
        name = reward_run(base["model"], pairs, tmp_path / "rm", base_weights=weights)
        more |= {"reward": [name], "reward_trunk": "policy"}
    monkeypatch.setattr(online, "_conclude", remember)
    folder = run(base, tmp_path / "ppo", () if start == "reward" else (short,), **more)
    rollout = kept["rollout"]
    policy = HybridEngine(models.load_policy(str(folder), torch.float32))
    torch.testing.assert_close(policy.logprobs(rollout).detach(), kept["logp"], rtol=1e-4, atol=1e-4)
    critic = models.Scorer(models.load_scorer(str(folder / "critic"), torch.float32, new_head=None))
    torch.testing.assert_close(critic.values(rollout).detach(), kept["values"], rtol=1e-4, atol=1e-4)
    assert kept["values"].abs().max() > 1e-3
    assert (folder / "critic" / "adapter").exists() == (update == "lora")
    vouching = [f for f in folder.rglob(models.BASE) if "digest" in json.loads(f.read_text())]
    assert not vouching, "only a reward run vouches for a base"
    if (
        update == "lora" and weights == "model"
    ):  # on what adapter_config.json names, as from a base of its own
        again = models.Scorer(models.load_scorer(str(folder / "critic" / "adapter"), torch.float32))
        again.mean, again.std = critic.mean, critic.std
        torch.testing.assert_close(again.values(rollout).detach(), kept["values"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox", "gemma3", "falcon", "bloom"])
@pytest.mark.parametrize("weights", ["model", "int8"])
def test_other_families_share_too(name, weights, base, tmp_path, stories_tokenizer):
    """A critic from scratch: the values of one with a base of its own; the policy's tensors and no others."""
    folder = tmp_path / name
    build(name).save_pretrained(folder)
    config = PPOConfig(
        **{**base, **PPO, "model": str(folder), "base_weights": weights, "critic_trunk": "policy"}
    )
    policy = models.hold_base(models.load_policy(str(folder), torch.float32), config)
    base_of = Trunk(policy, config)
    policy = models.make_trainable(policy, config, "CAUSAL_LM")
    shared = base_of.critic(str(folder), "critic_trunk", 2, ["all-linear"], 0, 7)
    own = models.hold_base(models.load_scorer(str(folder), torch.float32, new_head="zero"), config)
    own = models.add_lora(own, 2, 0.0, ["all-linear"], "SEQ_CLS", 7)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    batch: Any = batching.Sequences.of(
        [row[:4] for row in ids.tolist()], [row[4:] for row in ids.tolist()], 0
    )
    for model in (shared, own):
        nn.init.constant_(models.score_head(model).modules_to_save["default"].weight, 0.1)
    found, expected = (models.Scorer(m).values(batch) for m in (shared, own))
    assert torch.equal(found, expected) and expected.abs().max() > 0
    theirs = stored([policy])
    assert all("lora_" in n or "score" in n or p.untyped_storage().data_ptr() in theirs
               for n, p in shared.named_parameters())  # fmt: skip


def test_grpo_takes_a_reward_model_on_the_policys_base(base, scored, tmp_path):
    """The same run as with a whole reward model, but for rounding."""
    scores = []
    for trunk in ("own", "policy"):
        keys = {
            **base,
            **SMALL,
            "reward": [scored],
            "reward_trunk": trunk,
            "output_dir": str(tmp_path / trunk),
        }
        grpo.train(GRPOConfig(**keys))
        scores.append([line["reward"] for line in numbers(tmp_path / trunk)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_base_is_known_by_its_weights(base, scored, pairs, tmp_path, stories_tokenizer):
    """Another folder with the same weights is the same base; one number changed in place is another."""
    copied = tmp_path / "copied"
    shutil.copytree(base["model"], copied)
    on_copy = {**base, "model": str(copied)}
    assembled(on_copy, stories_tokenizer, reward=[scored], reward_trunk="policy")
    file = copied / "model.safetensors"
    weights = load_file(file)
    before = digest(models.load_policy(str(copied), torch.float32))
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert digest(models.load_policy(str(copied), torch.float32)) != before
    with pytest.raises(
        ConfigError, match=r"rm was trained on other weights than those of .*copied .digest .*, not"
    ):
        run(on_copy, tmp_path / "ppo", reward=[scored], reward_trunk="policy")
    assert not (tmp_path / "ppo").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"critic_trunk": "policy", "lora_r": 0}, "critic_trunk is policy and lora_r 0, which trains the weights"),
        ({"reward_trunk": "policy", "lora_r": 0}, "reward_trunk is policy and lora_r 0, which trains the weights"),
        ({"critic_trunk": "policy", "critic_update": "all"}, "critic_trunk is policy and critic_update all"),
        ({"critic_trunk": "policy", "zero_stage": 3}, "critic_trunk is policy with ZeRO-3, where each of two engines"),
        ({"reward_trunk": "policy", "zero_stage": 2, "critic_zero_stage": 3}, "reward_trunk is policy with ZeRO-3"),
        ({"reward_trunk": "policy", "offload_reward": True}, "reward_trunk is policy and offload_reward true"),
    ],
)  # fmt: skip
def test_settings_that_cannot_share(base, more, said):
    with pytest.raises(ConfigError, match=said):
        PPOConfig(**{**base, **PPO, **more})


def test_models_that_cannot_share(base, scored, pairs, tmp_path):
    """Said before anything is written, and where it can be before weights are read."""
    full = reward_run(base["model"], pairs, tmp_path / "full", lora_r=0)
    half = reward_run(base["model"], pairs, tmp_path / "half", dtype="bfloat16")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"reward": [base["model"]], "reward_trunk": "policy"},
            "is the policy's model and no trained reward model",
        ),
        (
            {"reward": [full], "reward_trunk": "policy"},
            "reward_trunk is policy, but .*full has no adapter beside it",
        ),
        (
            {"reward": [full], "critic_trunk": "policy"},
            "critic_trunk is policy, but .*full has no adapter beside it",
        ),
        (
            {"reward": [half], "reward_trunk": "policy"},
            "half was trained with dtype bfloat16 and this run has float32",
        ),
        (
            {"reward": [scored], "reward_trunk": "policy", "base_weights": "int8"},
            "rm was trained with base_weights model and this run has int8; set base_weights to model, or",
        ),
    ]
    for more, said in cases:
        with pytest.raises(ConfigError, match=said):
            run(base, tmp_path / "ppo", **more)
    stage3 = tmp_path / "deepspeed.json"
    stage3.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match="critic_trunk is policy with ZeRO-3"):
        run(base, tmp_path / "ppo", (short,), critic_trunk="policy", deepspeed=str(stage3))
    with pytest.raises(ConfigError, match="reward_trunk is policy and reward names no model"):
        run(base, tmp_path / "ppo", (short,), reward_trunk="policy")
    facts = Path(scored) / "adapter" / models.BASE
    about = json.loads(facts.read_text())
    facts.write_text(json.dumps({k: v for k, v in about.items() if k != "reward_std"}))
    with pytest.raises(ConfigError, match=r"base\.json is damaged \(it has no reward_std\); train it again"):
        run(base, tmp_path / "ppo", reward=[scored], reward_trunk="policy")
    facts.unlink()
    with pytest.raises(ConfigError, match=r"adapter has no base\.json that says what weights it is on"):
        run(base, tmp_path / "ppo", reward=[scored], reward_trunk="policy")
    assert not (tmp_path / "ppo").exists()


class Begun(Exception):
    """The first stage of a pipeline would run now."""


def begin(base: dict[str, Any], **stages: dict[str, Any]) -> None:
    """A pipeline up to where its first stage would run."""

    def stop(config: Any) -> Any:
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TRAINERS", dict.fromkeys(pipeline.TRAINERS, stop))
        keys = base | {"lora_r": 2, "sft": {"response": "chosen"}, "reward": {}, "ppo": {}} | stages
        pipeline.train(build_config(TrainConfig, {k: v for k, v in keys.items() if v is not None}))


def test_a_pipeline_whose_stages_cannot_share_is_refused_at_the_start(base, tmp_path):
    """What a reward stage will train on is not what the policy starts from: known from the stages' settings."""
    sft = f"{base['output_dir']}/sft"
    copied, other = tmp_path / "copied", tmp_path / "other"
    for folder in (copied, other):
        shutil.copytree(base["model"], folder)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    shared = {"reward_trunk": "policy", "critic_trunk": "policy"}
    said_weights = (
        "the reward stage trains on .* and the policy is .*, which are other weights; give both stages one"
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"reward": {"model": base["model"]}}, said_weights),  # the policy is what SFT will make of it
        ({"sft": None, "ppo": {"model": str(other)}}, said_weights),
        ({"reward": {"lora_r": 0}}, "the reward stage has lora_r 0, so it will train all weights"),
        (
            {"reward": {"dtype": "bfloat16"}},
            "the reward stage will be trained with dtype bfloat16 and this run",
        ),
        (
            {"reward": {"base_weights": "int8"}},
            "the reward stage will be trained with base_weights int8 and this",
        ),
        (
            {"ppo": {"model": base["model"], "critic": sft, "reward_trunk": "own"}},
            "sft is what sft is to write, which",
        ),
        ({"ppo": {"critic": base["model"], "reward_trunk": "own"}}, "has no adapter beside it"),
    ]
    for stages, said in cases:
        with pytest.raises(ConfigError, match=said) as error:
            begin(base, **{**stages, "ppo": shared | stages.get("ppo", {})})
        assert "\n" not in str(error.value) and not Path(base["output_dir"]).exists()
    for stages in (
        {},
        {"sft": None},
        {"sft": None, "ppo": {"model": str(copied)}},
        {"ppo": {"critic": sft}},
        {"reward": {"model": base["model"]}, "ppo": {"reward_trunk": "own", "critic": sft}},
    ):
        with pytest.raises(Begun):
            begin(base, **{**stages, "ppo": shared | stages.get("ppo", {})})
