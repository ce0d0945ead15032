"""PPO: what has to be equal is equal, what has to be masked is masked, rewards rise, runs resume bit for
bit.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights

from dschat.config import ConfigError, PPOConfig, RewardConfig
from dschat.config_text import dump
from dschat.engine import HybridEngine
from dschat.engine.hybrid_engine import HybridEngine as Engine
from dschat.rlhf import conversations, data, evaluate, losses, models, online, ppo, reading, report, reward
from dschat.rlhf.checkpoint import latest
from dschat.rlhf.critic import build_rewards_and_critic
from dschat.rlhf.experience import shape_scores
from dschat.rlhf.metrics import Metrics, read_lines
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.run import Run, derive_seed


def short(prompts, completions, **columns):
    """A reward that a policy can raise at once: few characters."""
    return [-len(c) / 10 for c in completions]


def keys(base: dict, **more) -> dict:
    small = {
        "lora_r": 4, "batch_size": 4, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8,
        "max_steps": 3, "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "critic_update": "head",
    }  # fmt: skip
    return {**base, **small, **more}


def run(base: dict, functions=(short,), **more):
    return ppo.train(PPOConfig(**keys(base, **more)), rewards=functions)


@pytest.fixture(scope="module")
def reward_model(stories_dir, tmp_path_factory):
    """A reward model's folder: one pair is enough to give it moments."""
    folder = tmp_path_factory.mktemp("rm")
    row = {"prompt": "Once upon a time", "chosen": " a happy dog.", "rejected": " a sad man cried."}
    (folder / "d.jsonl").write_text(json.dumps(row) + "\n")
    config = RewardConfig(
        model=str(stories_dir), data=[str(folder / "d.jsonl")], output_dir=str(folder / "run"), lora_r=2,
        learning_rate=1e-2, epochs=3, tensorboard=False, progress=False,
    )  # fmt: skip
    reward.train(config)
    return str(folder / "run")


class Pieces:
    """A PPO object with its models, for tests of single pieces."""

    def __init__(self, base: dict, tokenizer, tmp_path: Path, functions=(short,), **more) -> None:
        self.config = PPOConfig(**keys(base, **more))
        model = models.make_trainable(
            models.load_policy(self.config.model, torch.float32), self.config, "CAUSAL_LM"
        )
        optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        self.engine = HybridEngine(model, optimizer, exact=self.config.exact)
        rewards, critic = build_rewards_and_critic(self.config, torch.float32, functions)
        encoder = conversations.Encoder(tokenizer)
        self.ppo = ppo.PPO(self.config, self.engine, encoder, rewards, critic, None)
        records, stats = reading.read(self.config.data)
        self.examples = data.prompt_examples(records, encoder, stats)[:4]
        self.metrics = Metrics(tmp_path / "m", "ppo", 1, tensorboard=False, progress=False)

    def collect(self, step: int = 0):
        return self.ppo.collect(self.examples, step, self.metrics)


@pytest.fixture
def pieces(base, stories_tokenizer, tmp_path):
    return lambda **more: Pieces(base, stories_tokenizer, tmp_path, **more)


# ------------------------------------------------------------------------------------- ratio, KL, temperature


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_exact_mode_has_ratio_one(base, tmp_path, temperature, lora_r):
    """checklist 2.1 #3, #5, #6, #10; 2.2 policy 1: bit for bit in every step, also after updates
    and away from temperature 1.
    """
    run(base, exact=True, temperature=temperature, lora_r=lora_r, ppo_epochs=2)
    lines = numbers(tmp_path / "run")
    assert [line["policy/first_ratio_deviation"] for line in lines] == [0.0] * 3
    assert any(line["policy/ratio"] != 1.0 for line in lines), "later minibatches are off-policy"


def test_without_exact_the_gap_is_small_and_bounds_the_ratio(base, tmp_path):
    """checklist 2.1 #5: the gap is in the metrics; the bound comes from it."""
    run(base)
    for line in numbers(tmp_path / "run"):
        assert 0 <= line["gap/mean"] <= line["gap/max"] < 1e-3 and 1 <= line["gap/mult"] < 1.001
        assert line["policy/first_ratio_deviation"] <= max(1e-4, 4 * math.expm1(line["gap/max"]))


def test_wrong_old_log_probs_are_caught(base, monkeypatch):
    """checklist 2.1 #3, #10: a temperature left out somewhere is an error, not a slightly worse run."""
    original = Engine.logprobs

    def without_temperature(self, rollout, **kw):
        return original(self, rollout, **{**kw, "temperature": 1.0})

    monkeypatch.setattr(Engine, "logprobs", without_temperature)
    with pytest.raises(
        online.RatioError, match=r"ratio is off by .* at step 1, more than 0; rollout and training disagree"
    ):
        run(base, exact=True, temperature=0.7)


def test_ratio_tolerance_is_a_field(base, monkeypatch, pieces):
    p = pieces(ratio_tolerance=0.01)
    experience, _ = p.collect()
    assert experience.tolerance == 0.01
    experience.old_logp = experience.old_logp + 0.1
    with pytest.raises(online.RatioError, match=r"more than 0\.01"):
        p.ppo.update(experience, 0, 1)


def test_reference_is_the_start_and_stays(base, pieces):
    """checklist 2.1 #9, #19: KL 0 at the start, positive after training, and the reference has not moved by
    a bit.
    """
    p = pieces()
    first, before = p.collect()
    assert abs(before["kl/sequence"]) < 1e-4 and abs(before["kl/sequence_k3"]) < 1e-6
    reference = p.ppo.reference_logprobs(first.rollout)
    for step in range(3):
        p.ppo.update(p.collect(step)[0], step, 4)
    assert torch.equal(p.ppo.reference_logprobs(first.rollout), reference)
    assert not torch.equal(p.ppo.logprobs(first.rollout), first.old_logp)
    _, after = p.collect(5)
    assert after["kl/sequence_k3"] > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_r", [4, 0])
def test_kl_of_the_first_step_is_zero_when_exact(base, stories_dir, tmp_path, dtype, lora_r):
    """checklist 2.1 #9: policy and reference run the same kernels on the same packs, so their KL is 0 bit for bit, with
    an adapter (switched off) and without (a frozen copy), before the first update and only then.
    """
    more = {"lora_r": lora_r, "dtype": dtype, "exact": True, "learning_rate": 1e-2, "max_steps": 2}
    more |= {"critic_update": "head", "samples_per_prompt": 2, "prompts_per_step": 2, "max_new_tokens": 8}
    config = PPOConfig(**{**base, **more, "output_dir": str(tmp_path / "run")})
    ppo.train(config, rewards=(lambda prompts, completions, **k: [len(c) / 10 for c in completions],))
    first, second = numbers(tmp_path / "run")
    assert first["objective/kl"] == 0.0 and first["kl/sequence_k3"] == 0.0 and first["kl/token"] == 0.0
    assert second["kl/sequence_k3"] > 0


def test_generator_sees_every_update(pieces):
    """checklist 2.1 #21, #22: after an update the rollout's log-probs are those of the new weights."""
    p = pieces(exact=True)
    experience, _ = p.collect()
    p.ppo.update(experience, 0, 1)
    fresh = p.ppo.generate(p.examples, 2, 11)
    assert torch.equal(p.engine.logprobs(fresh).detach(), fresh.logprobs)


# ------------------------------------------------------------------------------------------ rewards and masks


def test_shaped_scores():
    """checklist 2.1 #14, #20; 2.2 policy 5, 2.2 plus 2: scale, clip, then the penalty for answers that did not end."""
    scores, finished = torch.tensor([1.0, 2.0, 3.0, 100.0]), torch.tensor([True, False, True, True])
    valid = torch.ones(4, dtype=torch.bool)
    moments = losses.RunningMoments()

    def shape(**kw):
        return shape_scores(scores, finished, PPOConfig(**kw), moments, valid).tolist()

    assert shape() == [1.0, 1.0, 3.0, 10.0]
    assert shape(reward_clip=0, missing_eos_penalty=0.5) == [1.0, 1.5, 3.0, 100.0]
    batch = shape(reward_norm="batch", missing_eos_penalty=0)
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    assert batch == pytest.approx([(float(s) - mean) / std for s in scores], rel=1e-5)
    assert moments.count == 0
    group = shape(reward_norm="group", samples_per_prompt=2, missing_eos_penalty=0, reward_clip=40)
    assert group == [-0.5, 0.5, -40.0, 40.0]
    assert moments.count == 0
    with pytest.raises(ConfigError, match="samples_per_prompt 1, so every score would become 0; sample 2"):
        PPOConfig(reward_norm="group").validate()
    shape(reward_norm="running")
    shape(reward_norm="running")
    assert moments.count == 8 and moments.mean == pytest.approx(mean)


def test_a_critic_head_that_starts_at_zero_values_everything_at_zero(pieces):
    p = pieces(functions=(lambda prompts, completions, **k: [3.0] * len(completions),), critic_head="zero",
               critic_update="head")  # fmt: skip
    experience, _ = p.collect()
    assert float(experience.values.abs().max()) == 0.0
    update = p.ppo.update(experience, 0, 10)
    assert update["value/loss"] > 0
    assert float(p.ppo.critic.values(experience.rollout, experience.features).detach().abs().max()) > 0


def test_penalty_and_score_reach_the_last_token(pieces, monkeypatch):
    """checklist 2.1 #13, #14: with gamma = lambda = 1 and values 0 every return is the shaped score."""
    p = pieces(functions=(lambda prompts, completions, **k: [2.0] * len(completions),), lam=1.0, kl_coef=0.0)
    monkeypatch.setattr(
        p.ppo.critic, "values", lambda batch, features=None: torch.zeros(batch.completion_mask.shape)
    )
    experience, found = p.collect()
    expected = 2.0 - (~experience.rollout.finished).float()
    for row, mask, value in zip(experience.returns, experience.mask, expected, strict=True):
        torch.testing.assert_close(row[mask], value.expand(int(mask.sum())))
    assert (experience.returns[~experience.mask] == 0).all()
    assert found["score/mean"] == 2.0, "the raw score is what is reported"


def test_kl_penalty_in_the_reward(pieces, monkeypatch):
    """checklist 2.1 #8; 2.2 policy 8: the return of the first token is the score less beta times the KL of the whole
    answer.
    """
    zero = lambda prompts, completions, **k: [0.0] * len(completions)  # noqa: E731
    p = pieces(functions=(zero,), lam=1.0, kl_coef=0.5, kl_kind="k2", missing_eos_penalty=0.0)
    monkeypatch.setattr(
        p.ppo.critic, "values", lambda batch, features=None: torch.zeros(batch.completion_mask.shape)
    )
    monkeypatch.setattr(p.ppo, "reference_logprobs", lambda rollout: rollout.logprobs - 0.1)
    experience, _ = p.collect()
    d = experience.old_logp - (experience.rollout.logprobs - 0.1)
    expected = -0.5 * losses.masked_sum(0.5 * d.square(), experience.mask, dim=-1)
    torch.testing.assert_close(experience.returns[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_completions_without_a_reward_are_left_out(pieces):
    """None from every source: the row has no say in whitening or losses."""
    odd = lambda prompts, completions, **k: [None if i % 2 else 1.0 for i in range(len(completions))]  # noqa: E731
    p = pieces(functions=(odd,))
    experience, found = p.collect()
    assert found["score/valid"] == 0.5 and found["score/mean"] == 1.0
    assert not experience.mask[1::2].any() and (experience.advantages[1::2] == 0).all()
    p.ppo.update(experience, 0, 1)
    p = pieces(functions=(lambda prompts, completions, **k: [None] * len(completions),))
    experience, _ = p.collect()
    assert all(math.isfinite(v) for v in p.ppo.update(experience, 0, 1).values())


def test_columns_reach_the_reward(pieces):
    seen = {}

    def fn(prompts, completions, **columns):
        seen.update(columns, prompts=prompts)
        return [0.0] * len(completions)

    p = pieces(functions=(fn,))
    p.collect()
    beside = {"completion_ids", "trainer_state", "log_metric", "log_extra"}
    assert set(seen) - beside == {"chosen", "rejected", "number", "prompts"} and beside < set(seen)
    assert len(seen["number"]) == len(seen["completion_ids"]) == 8
    assert seen["number"][0] == seen["number"][1] == p.examples[0].columns["number"], (
        "samples of a prompt are neighbours"
    )


def test_padding_of_a_rollout_changes_nothing(pieces, stories_tokenizer):
    """checklist 2.1 #1: garbage in masked places of the rollout gives the same gradients."""
    grads = []
    for tamper in (False, True):
        p = pieces()
        p.ppo.encoder.end_id = stories_tokenizer("little", add_special_tokens=False)["input_ids"][-1]
        experience, _ = p.collect()
        if tamper:
            r, mask = experience.rollout, experience.mask
            assert not bool(mask.all())
            r.completion_ids = torch.where(r.completion_mask, r.completion_ids, 7)
            for name in ("old_logp", "values", "advantages", "returns"):
                x = getattr(experience, name)
                setattr(experience, name, torch.where(mask, x, torch.full_like(x, float("nan"))))
        ends = experience.rollout.completion_mask.sum(1).cumsum(0)
        p.ppo.minibatch(experience, range(8), ends)
        grads.append(
            [q.grad for q in models.trainable(p.engine.model)] + [q.grad for q in p.ppo.critic_parameters]
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_accumulation_in_a_minibatch(pieces):
    """checklist 2.1 #16: one piece of 8 rows or four of 2: the same gradients but for rounding."""
    grads = []
    for size in (8, 2):
        p = pieces(batch_size=size)
        experience, _ = p.collect()
        p.ppo.minibatch(experience, range(8), experience.rollout.completion_mask.sum(1).cumsum(0))
        grads.append(
            [q.grad for q in models.trainable(p.engine.model)] + [q.grad for q in p.ppo.critic_parameters]
        )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- critic


@pytest.mark.parametrize("update", ["head", "lora", "all"])
def test_critic_starts_from_the_reward_model(
    reward_model, stories_dir, base, stories_tokenizer, tmp_path, update
):
    """checklist 2.1 #17; 2.2 plus 3: the value before the token is the reward model's own output there; training it
    leaves the reward model's scores as they were, though head and lora share its weights."""
    p = Pieces(base, stories_tokenizer, tmp_path, functions=(), reward=[reward_model], critic_update=update)
    experience, _ = p.collect()
    rollout = experience.rollout
    alone = models.Scorer(models.load_scorer(reward_model, torch.float32))
    expected = alone.values(rollout).detach()
    torch.testing.assert_close(experience.values, expected, rtol=1e-4, atol=1e-5)
    texts = p.ppo.texts(rollout)
    scores, _ = p.ppo.score(rollout, p.examples, texts)
    torch.testing.assert_close(scores, alone.rate(rollout), rtol=1e-4, atol=1e-5)
    p.ppo.update(experience, 0, 4)
    p.ppo.update(p.collect(1)[0], 1, 4)
    rollout = p.ppo.generate(p.examples, 2, 5)
    scores, _ = p.ppo.score(rollout, p.examples, p.ppo.texts(rollout))
    torch.testing.assert_close(scores, alone.rate(rollout), rtol=1e-4, atol=1e-5)
    features = p.ppo.critic.features(rollout)
    assert (features is not None) == (update == "head")
    moved = p.ppo.critic.values(rollout, features) - alone.values(rollout)
    assert moved.abs().max() > 1e-4


def test_critic_without_a_reward_model_starts_at_zero(pieces):
    """checklist 2.1 #17: value head 0 where there is nothing to start from."""
    experience, _ = pieces(critic_update="all").collect()
    assert (experience.values == 0).all()


def test_several_rewards(reward_model, pieces, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def two(prompts, completions, **c):\n    return [2.0] * len(completions)\n"
    )
    sources = [reward_model, f"{tmp_path}/mine.py:two"]
    p = pieces(functions=(), reward=sources, reward_weights=[0.5, 3.0])
    rollout = p.ppo.generate(p.examples, 2, 5)
    scores, _ = p.ppo.score(rollout, p.examples, p.ppo.texts(rollout))
    alone = models.Scorer(models.load_scorer(reward_model, torch.float32)).rate(rollout)
    torch.testing.assert_close(scores, 0.5 * alone + 6, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the run


def test_reward_rises(base, tmp_path):
    """An easy reward goes up, and the run says so: before and after, interval, KL, speed, table, page."""
    result = run(
        base, eval_data=base["data"], max_eval_rows=6, eval_samples=4, max_steps=12, learning_rate=1e-2, kl_coef=0.01,
        max_new_tokens=12, samples_per_prompt=4, missing_eos_penalty=0.0, compare_hf=4, eval_every=6,
    )  # fmt: skip
    held = result["held_out"]
    assert held["low"] > 0 and held["after"] > held["before"] and held["kl"] > 0
    assert held["change"] == pytest.approx(held["after"] - held["before"])
    assert result["speed"]["tokens_per_s"] > 0 and result["speed"]["hf_tokens_per_s"] > 0
    lines = numbers(tmp_path / "run")
    assert [line["step"] for line in lines if "eval/score" in line] == [6, 12]
    assert lines[-1]["eval/score"] == pytest.approx(held["after"])
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Reward on 6 held-out prompts" in page and "Once upon a time" in page
    assert (tmp_path / "run" / "curves.png").exists() and (tmp_path / "run" / "report.html").exists()
    timed = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    phases = (
        "flip",
        "prefill",
        "decode",
        "sample",
        "score",
        "logprobs",
        "reference",
        "values",
        "update",
        "checkpoint",
    )
    assert (
        all(f"time/{p}_s" in timed for p in phases if p != "checkpoint") and timed["time/peak_memory_gib"] > 0
    )
    rows = read_lines(tmp_path / "run" / "completions.jsonl")
    assert {"prompt", "completion", "score"} <= set(rows[0]) and "before" in rows[-1]
    final = models.load_policy(str(tmp_path / "run"), torch.float32)
    assert not models.is_peft(final)


@pytest.mark.parametrize(
    "more",
    [
        {"exact": True, "ppo_epochs": 2, "kl_control": "adaptive", "reward_norm": "running"},
        {"lora_r": 0, "critic_update": "all", "whiten_rewards": True},
        {"critic_update": "lora", "entropy_coef": 0.01, "aggregation": "sequence", "dual_clip": 3.0},
    ],
    ids=["head", "full", "lora"],
)
def test_resumed_equals_straight(base, tmp_path, kill_after, more):
    """checklist 2.1 #24, #25: killed between numbers and checkpoint, twice, and resumed: the same run bit
    for bit.
    """
    more = {**more, "eval_data": base["data"], "max_eval_rows": 2, "max_steps": 4}
    straight = run(base, **more, output_dir=str(tmp_path / "straight"))
    for at in (1, 3):
        kill_after(at)
        with pytest.raises(Killed):
            run(base, **more)
    newest = latest(tmp_path / "run" / "checkpoints")
    assert newest and newest.name == "step-000002"
    kill_after(None)
    resumed = run(base, **more)
    ignored = ("seconds", "written")
    assert {k: v for k, v in resumed.items() if k not in ignored} == {
        k: v for k, v in straight.items() if k not in ignored
    }
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    assert read_lines(tmp_path / "run" / "completions.jsonl") == read_lines(
        tmp_path / "straight" / "completions.jsonl"
    )
    for folder in ("model", "checkpoints"):
        assert same_weights(tmp_path / "run" / folder, tmp_path / "straight" / folder)


def test_killed_by_a_signal(base, tmp_path):
    """A real SIGKILL at some moment; the next start goes on and ends."""
    source = "def f(prompts, completions, **c):\n    return [len(x) / 9 for x in completions]\n"
    (tmp_path / "mine.py").write_text(source)
    config = PPOConfig(**keys(base, reward=[f"{tmp_path}/mine.py:f"], max_steps=200, prompts_per_step=2))
    (tmp_path / "c.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "dschat.cli", "ppo", "--config", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    until = time.monotonic() + 120
    while latest(checkpoints) is None and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    newest = latest(checkpoints)
    assert newest is not None, error
    done = int(newest.name.removeprefix("step-"))
    logged = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert done <= logged <= done + 1, "at most the running step is lost"
    with Run(config, "ppo") as again:
        assert again.step == done and again.tensors


def test_bad_settings(base):
    with pytest.raises(ConfigError, match="reward is empty; name a reward model folder or a function"):
        run(base, functions=())
    with pytest.raises(ConfigError, match="data is empty"):
        run(base, data=[])
    with pytest.raises(ConfigError, match="full distribution"):
        run(base, top_p=0.9)


def test_paired_bootstrap():
    """The interval is about the paired difference: a constant gain has none, noise around 0 holds 0."""
    before = [float(i) for i in range(50)]
    assert evaluate.paired_bootstrap(before, [b + 1 for b in before]) == (1.0, 1.0, 1.0)
    mean, low, high = evaluate.paired_bootstrap(before, [b + (-1) ** i for i, b in enumerate(before)])
    assert mean == 0 and low < 0 < high
    assert evaluate.paired_bootstrap(before, [0.0] * 50) == evaluate.paired_bootstrap(before, [0.0] * 50)


def test_held_out_prompts_that_nothing_judges_are_left_out():
    common = {"kl": 0.5, "length": 3.0, "finished": 1.0}
    before = {"scores": [1.0, None, 3.0, 0.0], **common}
    after = {"scores": [2.0, 7.0, 5.0, None], **common}
    held = evaluate.held_out(before, after, 0)
    assert (held["prompts"], held["before"], held["after"], held["change"]) == (2, 2.0, 3.5, 1.5)
    assert evaluate.held_out(before, {"scores": [None, 1.0, None, None], **common}, 0) == {}


def test_answers_that_nothing_judges_do_not_count_as_zero(pieces):
    p = pieces(functions=[lambda completions, **_: [4.0, None] * (len(completions) // 2)], eval_samples=2)
    found = evaluate.evaluate(p.ppo, p.examples, 3)
    assert found["scores"] == [4.0] * len(p.examples)
    p = pieces(functions=[lambda completions, **_: [None] * len(completions)], eval_samples=2)
    with pytest.warns(UserWarning):
        assert evaluate.evaluate(p.ppo, p.examples, 3)["scores"] == [None] * len(p.examples)


def test_a_language_model_is_no_reward_model(base, stories_dir, tmp_path):
    """Its head would be a random one."""
    with pytest.raises(ConfigError, match=r"no trained reward model, as it has no score\.weight; train one"):
        run(base, reward=[str(stories_dir)])
    assert not (tmp_path / "run").exists()


def test_seeds_are_a_function_of_purpose_and_step():
    """checklist 2.1 #24; 2.2 general 6."""
    seeds = [
        derive_seed(s, what, step) for s in (0, 1) for what in ("rollout", "minibatch") for step in range(3)
    ]
    assert len(set(seeds)) == 12 and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, "rollout", 1) == derive_seed(0, "rollout", 1)


def test_rewards_of_a_class_instance_are_shared_only_with_the_critic(reward_model, base):
    config = PPOConfig(**keys(base, reward=[reward_model, reward_model], critic_update="all"))
    rewards, critic = build_rewards_and_critic(config, torch.float32)
    assert isinstance(rewards, Rewards) and critic.scorer.model is not rewards.sources[0][1].model


def test_every_phase_of_a_step_is_drawn(base, tmp_path):
    """The picture of a step's seconds shows all that a step's time is made of."""
    run(base, max_steps=1)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    phases = {k for k in line if k.startswith("time/") and k.endswith("_s")}
    panels = dict(report.PANELS["ppo"])
    drawn = {key for key, _ in panels["PPO: seconds of a step"]}
    other = {"time/step_s", "time/rollout_tokens_per_s", "time/eval_s", "time/checkpoint_s"}
    assert phases - other == drawn - other and "time/update_s" in phases
