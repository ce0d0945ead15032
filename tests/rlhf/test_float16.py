"""Training in float16: every stage learns, overflows are left out by all that trains and counted, and the scale goes
through a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights

from dschat import config as C
from dschat.engine.stepper import Stepper
from dschat.engine.zero import ZeroStepper, whole
from dschat.rlhf import dpo, grpo, online, ppo, replay, report, reward, sft


def short(prompts, completions, **columns):
    """A reward that a policy can raise at once: few characters."""
    return [-len(c) / 10 for c in completions]


SMALL = {"max_new_tokens": 8, "prompts_per_step": 3, "samples_per_prompt": 2, "batch_size": 3}
# (trainer, config, keys): the first step overflows at the initial scale, the last one does not.
STAGES = {
    "sft": (sft.train, C.SFTConfig, {"max_length": 64, "response": "chosen", "initial_scale_power": 16}),
    "reward": (reward.train, C.RewardConfig, {"max_length": 64, "initial_scale_power": 18}),
    "dpo": (dpo.train, C.DPOConfig, {"max_length": 64, "lora_r": 4, "initial_scale_power": 22}),
    "grpo": (grpo.train, C.GRPOConfig, SMALL),
    "ppo": (ppo.train, C.PPOConfig, {**SMALL, "critic_update": "all", "initial_scale_power": 13}),
}  # fmt: skip


def run(stage: str, base: dict, **more):
    train, cls, keys = STAGES[stage]
    defaults = {"dtype": "float16", "max_steps": 4, "learning_rate": 1e-3, "hysteresis": 1}
    config = cls(**{**base, **defaults, **keys, **more})
    return train(config, rewards=(short,)) if stage in ("grpo", "ppo") else train(config)


ZERO = {  # through DeepSpeed
    "sft": {"zero_stage": 2, "offload": True},
    "reward": {"zero_stage": 1},
    "dpo": {"zero_stage": 0},
    "ppo": {"zero_stage": 3, "critic_zero_stage": 2},
}


@pytest.mark.parametrize(("stage", "zero"), [(s, z) for s in ZERO for z in ({}, ZERO[s])])
def test_every_stage_leaves_out_overflows_and_resumes(stage, zero, base, tmp_path, kill_after):
    """checklist 2.1 #25: killed after an overflow and resumed = straight, the scale and its count included."""
    base |= zero
    result = run(stage, base)
    lines = numbers(base["output_dir"])
    key = "policy/" if stage == "ppo" else ""
    skipped = [line[f"{key}skipped_steps"] for line in lines]
    assert skipped[0] >= 1 and skipped[-1] == skipped[-2], skipped
    assert result["float16"]["skipped"][0] == skipped[-1]
    assert any("left out" in s for s in report.sentences(stage, result))
    started = json.loads((Path(base["output_dir"]) / "run.json").read_text())
    assert started["dtype"] == "float16" and started["rollout_dtype"] == "float32"
    again = {**base, "output_dir": str(tmp_path / "again")}
    kill_after(2)
    with pytest.raises(Killed):
        run(stage, again)
    kill_after(None)
    run(stage, again)
    assert numbers(again["output_dir"]) == lines
    assert same_weights(Path(base["output_dir"]) / "model", Path(again["output_dir"]) / "model")


def test_it_learns_as_float32_does(base):
    wide = run("sft", {**base, "output_dir": base["output_dir"] + "32"}, dtype="float32", max_steps=12)
    half = run("sft", base, max_steps=12, initial_scale_power=10)
    assert half["float16"]["skipped"] == [0]
    assert half["loss"] == pytest.approx(wide["loss"], rel=2e-2)
    first = numbers(base["output_dir"])[0]["loss"]
    assert half["loss"] < first - 0.5


def test_rollout_and_training_are_near(base):
    """The rollout is float32 on the CPU, training float16: the gap is logged, and the first ratio is within it."""
    run("grpo", base, max_steps=2, initial_scale_power=8)
    for line in numbers(base["output_dir"]):
        assert 0 < line["sampling/sampling_logp_difference/max"] < 0.05
        assert line["policy/first_ratio_deviation"] < 6e-3


@pytest.mark.parametrize("who", ["policy", "value"])
@pytest.mark.parametrize(
    "zero",
    [
        {},
        {"zero_stage": 0},
        {"zero_stage": 1, "critic_zero_stage": 3},
        {"zero_stage": 3, "critic_zero_stage": 2},
    ],
    ids=str,
)
def test_actor_and_critic_leave_a_step_out_together(zero, who, base, monkeypatch):
    """An overflow of one is a step that neither makes; only its own scale falls."""
    seen: list[tuple[float, float]] = []
    original = online.Trainer._step, online.Trainer.minibatch

    def weights(self):
        found = {n: list(m.parameters()) for n, m in self.modules().items()}
        with whole([p for own in found.values() for p in own]):
            return {n: [p.detach().clone() for p in own] for n, own in found.items()}

    def minibatch(self, *args):
        if not seen:
            chosen = self.steppers()[who]
            plain = chosen.backward
            monkeypatch.setattr(chosen, "backward", lambda loss: plain(loss if seen else loss * torch.inf))
        return original[1](self, *args)

    def step(self, *args):
        before = weights(self)
        found = original[0](self, *args)
        if not seen:
            assert found == {}
            for name, own in weights(self).items():
                assert all(torch.equal(a, b) for a, b in zip(before[name], own, strict=True))
            assert not any(p.grad is not None for m in self.modules().values() for p in m.parameters())
        seen.append(tuple(s.loss_scale.value for s in self.steppers().values()))
        return found

    monkeypatch.setattr(online.Trainer, "minibatch", minibatch)
    monkeypatch.setattr(online.Trainer, "_step", step)
    run("ppo", base | zero, max_steps=2, initial_scale_power=8)
    fallen = {"policy": (128.0, 256.0), "value": (256.0, 128.0)}[who]
    assert seen[0] == fallen and set(seen) == {fallen}
    last = numbers(base["output_dir"])[-1]
    assert last["policy/skipped_steps"] == last["value/skipped_steps"] == 1


@pytest.mark.parametrize("zero", [{}, {"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_an_overflow_that_nothing_answers_stops_the_run(zero, base, monkeypatch):
    """At the smallest scale, and at a fixed one; the batch is kept, and replay computes it at that scale."""
    base |= zero
    with pytest.raises(
        C.ConfigError,
        match=r"the gradient at loss scale 1.67772e\+07, which cannot fall, is (inf|nan) at step 1 of sft",
    ) as error:
        run("sft", base, loss_scale=2.0**24)
    found = replay.replay(str(error.value).rpartition(" ")[2])
    assert found.where.startswith("gradient of policy."), found.lines
    base = {**base, "output_dir": base["output_dir"] + "2"}
    for cls in (Stepper, ZeroStepper):

        def backward(self, loss, original=cls.backward):
            original(self, loss * 1e12)

        monkeypatch.setattr(cls, "backward", backward)
    with pytest.raises(
        C.ConfigError,
        match=r"value/grad_norm at loss scale 4, which cannot fall, is (inf|nan) at step 1 of ppo",
    ) as error:
        run("ppo", base, initial_scale_power=2, min_loss_scale=4.0, max_steps=1)
    where = str(error.value).rpartition(" ")[2]
    found = replay.replay(where)
    assert found.where.startswith("gradient of policy."), found.lines
    monkeypatch.undo()
    found = replay.replay(where)
    assert not found.where, found.lines


def test_sums_in_16_bits_are_refused(base, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"communication_data_type": "fp16"}')
    with pytest.raises(
        C.ConfigError, match=r"ds.json has communication_data_type fp16, but float16's gradients are"
    ):
        run("sft", base, zero_stage=2, deepspeed=str(file))
    assert not Path(base["output_dir"]).exists()


def test_exact_mode_is_refused_on_the_cpu(base):
    with pytest.raises(C.ConfigError, match="dtype is float16 and exact is true, but rollouts on the CPU"):
        run("grpo", base, exact=True)
    assert not Path(base["output_dir"]).exists()
