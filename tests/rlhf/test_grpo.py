"""GRPO and RLOO on the shared skeleton: groups, their KL, what is dropped, rising rewards, exact resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from safetensors.torch import load_file

from dschat.config import ConfigError, GRPOConfig, PPOConfig, RLOOConfig
from dschat.engine import HybridEngine
from dschat.rlhf import conversations, data, grpo, losses, models, online, ppo, reading, rloo
from dschat.rlhf.metrics import Metrics
from dschat.rlhf.rewards import Rewards

ALGORITHMS = {"grpo": (GRPOConfig, grpo.train), "rloo": (RLOOConfig, rloo.train)}


def short(prompts, completions, **columns):
    """A reward that a policy can raise at once: few characters."""
    return [-len(c) / 10 for c in completions]


def keys(base: dict, **more) -> dict:
    small = {
        "lora_r": 4, "batch_size": 4, "prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 8,
        "max_steps": 3, "learning_rate": 1e-3, "dtype": "float32",
    }  # fmt: skip
    return {**base, **small, **more}


def run(name: str, base: dict, functions=(short,), **more):
    cls, train = ALGORITHMS[name]
    return train(cls(**keys(base, **more)), rewards=functions)


@pytest.fixture
def make(base, stories_tokenizer, tmp_path):
    """make(cls, **keys): (trainer, examples, collect) for tests of single pieces."""

    def build(cls=GRPOConfig, functions=(short,), **more):
        config = cls(**keys(base, **more))
        model = models.load_policy(config.model, torch.float32)
        model = models.make_trainable(model, config, "CAUSAL_LM")
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        encoder = conversations.Encoder(stories_tokenizer)
        engine = HybridEngine(
            model,
            optimizer,
            exact=config.exact,
            rollout_weights=config.rollout_weights,
            kv_cache=config.kv_cache,
        )
        trainer = grpo.GRPO.build(config, engine, encoder, None, functions, torch.float32)
        records, stats = reading.read(config.data)
        examples = data.prompt_examples(records, encoder, stats)[::2][:3]
        metrics = Metrics(tmp_path / "m", "grpo", 1, tensorboard=False, progress=False)
        return trainer, examples, lambda step=0: trainer.collect(examples, step, metrics)

    return build


# ---------------------------------------------------------------------------------------------- advantages


def test_advantages_are_the_groups(make):
    """Samples of a prompt are neighbours, and each is measured against its own group only."""

    def by_prompt(prompts, completions, **columns):
        return [len(str(p)) * 10 - len(c) for p, c in zip(prompts, completions, strict=True)]

    trainer, examples, collect = make(functions=(by_prompt,), kl_coef=0.0, reward_clip=0)
    experience, found = collect()
    texts = trainer.texts(experience.rollout)
    for i, example in enumerate(examples):
        scores = [len(str(example.prompt)) * 10 - len(t) for t in texts[4 * i : 4 * i + 4]]
        mean = sum(scores) / 4
        std = math.sqrt(sum((s - mean) ** 2 for s in scores) / 3)
        for j, score in enumerate(scores):
            row = experience.advantages[4 * i + j][experience.mask[4 * i + j]]
            torch.testing.assert_close(row, torch.full_like(row, (score - mean) / (std + 1e-4)))
    assert found["group/flat"] == 0 and set(found) >= {"score/total", "group/advantage_std"}
    assert (experience.advantages[~experience.mask] == 0).all()


def test_kl_in_the_reward_is_the_answers(make, monkeypatch):
    """checklist 2.1 #8: taken off the score before the baseline, summed over the answer."""
    trainer, _, collect = make(
        RLOOConfig, functions=(lambda prompts, completions, **k: [0.0] * len(completions),), kl_coef=0.5,
        missing_eos_penalty=0.0,
    )  # fmt: skip
    noise = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)) / 10
    monkeypatch.setattr(trainer, "reference_logprobs", lambda r: r.logprobs - noise[:, : r.logprobs.shape[1]])
    experience, found = collect()
    gap = losses.masked_sum(experience.old_logp - experience.ref_logp, experience.mask, dim=-1)
    expected = -0.5 * gap.view(3, 4)
    expected = expected - (expected.sum(1, keepdim=True) - expected) / 3
    torch.testing.assert_close(experience.advantages[:, 0], expected.reshape(-1), rtol=1e-4, atol=1e-6)
    assert found["score/total"] == pytest.approx(float((-0.5 * gap).mean()), rel=1e-4)


def test_flat_groups_are_counted_and_dropped(make):
    def one_group(prompts, completions, **columns):
        return [float(i % 2) if i < 4 else 1.0 for i in range(len(completions))]

    for how, rows in (("keep", 12), ("drop", 4)):
        trainer, _, collect = make(functions=(one_group,), flat_groups=how)
        experience, found = collect()
        assert found["group/flat"] == pytest.approx(2 / 3)
        assert int(experience.mask.any(1).sum()) == rows
        assert (experience.advantages[4:] == 0).all() and (experience.advantages[:4, 0] != 0).all()
        assert all(math.isfinite(v) for v in trainer.update(experience, 0, 1).values())
    flat = lambda prompts, completions, **k: [1.0] * len(completions)  # noqa: E731
    trainer, _, collect = make(functions=(flat,), flat_groups="drop")
    before = [p.clone() for p in models.trainable(trainer.engine.model)]
    trainer.update(collect()[0], 0, 1)
    after = models.trainable(trainer.engine.model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (
        "nothing to learn, nothing moved"
    )


def test_answers_without_a_score_are_no_part_of_the_baseline(make):
    odd = lambda prompts, completions, **k: [None if i % 4 == 3 else float(i % 4) for i in range(12)]  # noqa: E731
    _, _, collect = make(functions=(odd,), scale="none", kl_coef=0.0)
    experience, found = collect()
    assert experience.advantages[:4, 0].tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])
    assert not experience.mask[3::4].any() and found["score/valid"] == 0.75


def test_truncated_answers_can_be_masked(make):
    """checklist 2.1 #14: they count for the baseline, not for the loss."""
    trainer, examples, collect = make(mask_truncated=True, flat_groups="keep")
    ids = trainer.generate(examples, 4, 1).completion_ids[:, 3]
    trainer.encoder.end_id = int(ids.mode().values)  # a token that some answers hold
    experience, _ = collect()
    finished = experience.rollout.finished
    assert 0 < int(finished.sum()) < 12
    assert torch.equal(experience.mask.any(1), finished)


def test_importance_weights_are_those_of_the_gap(make, monkeypatch):
    """checklist 2.1 #5: what the rollout says against what the training forward says, capped and logged."""
    trainer, _, collect = make(importance_cap=1.05)
    original = trainer.logprobs
    monkeypatch.setattr(trainer, "logprobs", lambda r: original(r) + torch.where(r.logprobs < -1, 0.1, -0.1))
    experience, found = collect()
    raw = (experience.old_logp - experience.rollout.logprobs).exp()
    expected = torch.where(experience.mask, raw.clamp(max=1.05), torch.ones_like(raw))
    torch.testing.assert_close(experience.weights, expected)
    assert 0 < found["importance/truncated"] < 1 and found["importance/weight"] < 1.05
    _, _, plain = make()
    assert plain()[0].weights is None


@pytest.mark.parametrize(("key", "stat"), [("rollout_weights", "weights"), ("kv_cache", "kv_cache")])
def test_int8_rollouts_learn_with_importance_weights(make, key, stat):
    """checklist 2.1 #5: rollouts on int8, updates not; the weights of the loss are the ratio between them."""
    trainer, _, collect = make(**{key: "int8"}, importance_cap=2.0)
    experience, found = collect()
    assert getattr(experience.rollout.stats, stat) == "int8" and found["gap/mean"] > 1e-4
    ratio = (experience.old_logp - experience.rollout.logprobs).exp()
    torch.testing.assert_close(experience.weights[experience.mask], ratio.clamp(max=2.0)[experience.mask])
    assert found["importance/weight"] != 1.0
    weights = [p.detach().clone() for p in trainer.engine.model.parameters()]
    trainer.update(experience, 0, 4)
    assert any(not torch.equal(p, w) for p, w in zip(trainer.engine.model.parameters(), weights, strict=True))


def test_kl_loss_pulls_back(make):
    """The KL in the loss holds the policy near the reference."""
    gaps = {}
    for coef in (0.0, 5.0):
        trainer, _, collect = make(kl_coef=coef, learning_rate=1e-2, max_grad_norm=0)
        for step in range(4):
            experience, _ = collect(step)
            found = trainer.update(experience, step, 8)
        assert ("kl/loss" in found) == bool(coef)
        gaps[coef] = collect(9)[1]["kl/sequence_k3"]
    assert gaps[5.0] < 0.5 * gaps[0.0]


# -------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_reward_rises(name, base, tmp_path):
    result = run(
        name, base, eval_data=base["data"], max_eval_rows=6, eval_samples=4, max_steps=10, learning_rate=1e-2,
        kl_coef=0.01, max_new_tokens=12, exact=True,
    )  # fmt: skip
    held = result["held_out"]
    assert held["low"] > 0 and held["after"] > held["before"]
    lines = numbers(tmp_path / "run")
    assert all(line["policy/first_ratio_deviation"] == 0.0 for line in lines), "checklist 2.1 #10"
    assert f"{name.upper()} run" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("grpo", {"ppo_epochs": 2, "ratio_level": "sequence", "aggregation": "sequence"}),
        (
            "grpo",
            {
                "scale": "none",
                "aggregation": "constant",
                "cliprange_high": 0.28,
                "importance_cap": 2.0,
                "rollout_weights": "int8",
                "kv_cache": "int8",
            },
        ),
        ("rloo", {"lora_r": 0, "kl_control": "adaptive", "reward_norm": "running"}),
    ],
    ids=["gspo", "dr-grpo", "rloo-full"],
)
def test_resumed_equals_straight(name, more, base, tmp_path, kill_after):
    """checklist 2.1 #24, #25: killed twice and resumed: the same run bit for bit."""
    more = {**more, "eval_data": base["data"], "max_eval_rows": 2, "max_steps": 3}
    straight = run(name, base, **more, output_dir=str(tmp_path / "straight"))
    for at in (1, 3):
        kill_after(at)
        with pytest.raises(Killed):
            run(name, base, **more)
    kill_after(None)
    resumed = run(name, base, **more)
    ignored = ("seconds", "written")
    assert {k: v for k, v in resumed.items() if k not in ignored} == {
        k: v for k, v in straight.items() if k not in ignored
    }
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    assert same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_accumulation_in_a_minibatch(make, mode):
    """checklist 2.1 #16: one piece of 12 rows or six of 2: the same gradients but for rounding."""
    grads = []
    for size in (12, 2):
        trainer, _, collect = make(batch_size=size, aggregation=mode)
        experience, _ = collect()
        trainer.minibatch(experience, range(12), torch.zeros(12))
        grads.append([q.grad for q in models.trainable(trainer.engine.model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("cls", "more", "message"),
    [
        (GRPOConfig, {"samples_per_prompt": 1}, "samples_per_prompt is 1, but GRPO compares .* such as 8"),
        (RLOOConfig, {"samples_per_prompt": 1}, "but RLOO compares"),
        (
            GRPOConfig,
            {"kl_kind": "k1"},
            "k1 has expected gradient 0; set kl_kind to k3, or kl_place to reward",
        ),
        (GRPOConfig, {"kl_correction": True, "kl_place": "reward"}, "set kl_place to loss"),
        (GRPOConfig, {"exact": True, "importance_cap": 2}, "nothing is left to correct"),
        (PPOConfig, {"rollout_weights": "int8"}, "set importance_cap to a number such as 2"),
        (GRPOConfig, {"rollout_weights": "int8", "exact": True}, "set rollout_weights to model"),
        (PPOConfig, {"kv_cache": "int8"}, "kv_cache is int8 and importance_cap none"),
        (RLOOConfig, {"kv_cache": "int8", "exact": True}, "set kv_cache to auto"),
        (GRPOConfig, {"kv_cache": "fp8"}, "kv_cache is 'fp8', but it must be one of auto, int8"),
        (PPOConfig, {"kl_control": "adaptive", "kl_coef": 0}, "set kl_coef to a start value such as 0.05"),
        (GRPOConfig, {"top_k": 3}, "top_k is 3, but GRPO uses log-probs of the full distribution"),
        (GRPOConfig, {"scale": "std"}, "scale is 'std', but it must be one of group, batch, none"),
    ],
)
def test_bad_settings(cls, more, message):
    with pytest.raises(ConfigError, match=message):
        cls(**more)


def test_a_broken_loss_stops_with_its_batch(base, tmp_path, monkeypatch):
    """Before the step is taken: the weights stay good, and the batch is on disk."""
    original, calls = losses.policy_loss, []

    def broken(*args, **kw):
        calls.append(1)
        loss, found = original(*args, **kw)
        return (loss * float("nan"), found) if len(calls) > 4 else (loss, found)

    monkeypatch.setattr(losses, "policy_loss", broken)
    with pytest.raises(ConfigError, match=r"policy/loss is nan at step 2 of grpo; .*failed-step-000002"):
        run("grpo", base)
    folder = tmp_path / "run" / "failed-step-000002"
    tensors = load_file(folder / "batch.safetensors")
    assert tensors["rollout.completion_ids"].shape == tensors["old_logp"].shape and len(tensors["mask"]) == 12
    saved = json.loads((folder / "batch.json").read_text())
    assert saved["stage"] == "grpo" and len(saved["minibatch"]) == 4
    assert not list(Path(tmp_path / "run" / "checkpoints").glob("step-000002"))


def test_a_broken_reward_stops_with_its_batch(base, tmp_path):
    def bad(prompts, completions, **columns):
        return [float("nan")] * len(completions)

    with pytest.raises(ConfigError, match=r"returned nan for completion 0; .* the batch is in .*step-000001"):
        run("grpo", base, functions=(bad,))
    saved = json.loads((tmp_path / "run" / "failed-step-000001" / "batch.json").read_text())
    assert len(saved["completions"]) == len(saved["prompts"]) == 12


def test_a_broken_reward_model_is_no_missing_score():
    """A reward model's nan is an error, not 'nothing to say'."""

    class Model:
        def rate(self, batch):
            return torch.tensor([1.0, float("nan")])

    from dschat.rlhf.rewards import RewardError

    with pytest.raises(RewardError, match="reward model rm gives nan for completion 1"):
        Rewards([("rm", Model())])(None, ["p"] * 2, ["a", "b"], {})


def test_an_algorithm_is_a_small_file():
    """Issue 6: adding one takes less than 150 lines; the skeleton is shared."""
    for module in (ppo, grpo, rloo):
        lines = Path(module.__file__).read_text().splitlines()
        assert len(lines) < 150, module.__name__
    assert issubclass(ppo.PPO, online.Trainer) and issubclass(grpo.GRPO, online.Trainer)


def test_an_algorithm_without_credit_cannot_be_made():
    """So it ends before its first rollout."""

    class Nothing(online.Trainer):
        pass

    with pytest.raises(TypeError, match=r"abstract.*credit"):
        Nothing(None, None, None, None, None)
