"""What the numbers of a log are called: one name each, TRL's where the meaning is TRL's; earlier logs go on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers_rlhf import numbers
from test_report import Page

from dschat.config import ConfigError, DPOConfig, GRPOConfig, PPOConfig
from dschat.rlhf import compare, dpo, grpo, headline, losses, names, online, ppo, report
from dschat.rlhf.metrics import append_line, read_lines

SMALL = {
    "lora_r": 2, "batch_size": 4, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6,
    "learning_rate": 1e-3, "lr_schedule": "constant",
}  # fmt: skip


def lengths(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [len(c) / 10 for c in completions]


@pytest.mark.parametrize("stage", names.TRL)
def test_every_number_has_one_name(stage):
    ours, theirs = names.TRL[stage].keys(), names.TRL[stage].values()
    assert len(set(theirs)) == len(theirs) and not ours & set(theirs)
    line = dict.fromkeys((*ours, "time/step_s", "step"), 1.0)
    once = names.read(stage, line)
    assert len(once) == len(line) and names.read(stage, once) == once


def test_held_out_numbers_and_other_stages():
    assert names.logged("dpo", "eval/margin") == "eval/rewards/margins"
    assert names.logged("reward", "eval/margin") == "eval/margin"
    assert names.logged("reinforce", "score/mean") == "score/mean"


def test_names_of_trl_mean_what_they_mean_there(base, tmp_path, monkeypatch):
    """PPO's numbers of the objective from the rollout itself, by TRL's formulas: a score less the penalty plus the
    KL's share, before rewards are whitened."""
    seen = []
    collect = online.Trainer.collect

    def watch(self: Any, *args: Any) -> Any:
        found = collect(self, *args)
        seen.append((found[0], self.source_scores["lengths"]))
        return found

    monkeypatch.setattr(online.Trainer, "collect", watch)
    more = {**SMALL, "max_steps": 2, "whiten_rewards": True, "missing_eos_penalty": 0.5, "kl_coef": 0.3}
    ppo.train(PPOConfig(**{**base, **more, "learning_rate": 1e-2}), rewards=(lengths,))
    for line, (experience, scores) in zip(numbers(tmp_path / "run"), seen, strict=True):
        k1 = losses.masked_sum(experience.old_logp - experience.ref_logp, experience.mask, dim=-1)
        assert line["objective/kl"] == pytest.approx(float(k1.mean()), abs=1e-6)
        less = scores - 0.5 * (~experience.rollout.finished).float()
        assert line["objective/rlhf_reward"] == pytest.approx(float((less - 0.3 * k1).mean()), rel=1e-4)
    assert abs(line["objective/kl"]) > 1e-4


def earlier(folder: Path, stage: str, **settings: Any) -> None:
    """Makes a run one of a version that had the trainers' names everywhere."""
    back = {
        names.logged(stage, ahead + old): ahead + old for old in names.TRL[stage] for ahead in ("", "eval/")
    }
    lines = read_lines(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    for line in lines:
        append_line(folder / "metrics.jsonl", {back.get(name, name): value for name, value in line.items()})
    about = json.loads((folder / "run.json").read_text())
    about["config"] |= settings
    (folder / "run.json").write_text(json.dumps(about))


def test_an_earlier_run_is_shown_and_compared(base, tmp_path):
    grpo.train(GRPOConfig(**{**base, **SMALL, "max_steps": 2}), rewards=(lengths,))
    folder = tmp_path / "run"
    before = report.gather(folder)[0].lines
    drawn, table = report.curves(report.gather(folder)), headline.tables([folder])
    (tmp_path / "now").mkdir()
    for name in ("metrics.jsonl", "completions.jsonl", "run.json"):
        (tmp_path / "now" / name).write_bytes((folder / name).read_bytes())
    earlier(folder, "grpo")
    assert "score/mean" in read_lines(folder / "metrics.jsonl")[0], "as such a version wrote it"
    assert report.gather(folder)[0].lines == before
    assert report.curves(report.gather(folder)) == drawn and len(drawn) >= 5
    assert headline.tables([folder]) == table
    found = compare.compare(folder, tmp_path / "now", 1e-9)
    assert found.good and "  reward: 0" in found.lines, found.lines
    page = Page(report.compare([folder], tmp_path / "page.html").read_text())
    assert "GRPO: score of the rollouts" in page.text


def test_an_earlier_run_goes_on(base, tmp_path):
    """Its best_metric had another name: the present one is said, and the best of the earlier steps stays the best."""
    more = {**base, **SMALL, "kl_coef": 0.0}
    straight = {
        **more,
        "output_dir": str(tmp_path / "straight"),
        "best_metric": "reward",
        "best_is": "lowest",
    }
    grpo.train(GRPOConfig(**straight, max_steps=4), rewards=(lengths,))
    half = more | {"best_metric": "reward", "best_is": "lowest"}
    grpo.train(GRPOConfig(**half, max_steps=2), rewards=(lengths,))
    earlier(tmp_path / "run", "grpo", best_metric="score/mean")
    old = half | {"best_metric": "score/mean"}
    with pytest.raises(
        ConfigError, match=r"^best_metric is score/mean, which grpo logs as reward now; set .* reward$"
    ):
        grpo.train(GRPOConfig(**old, max_steps=4), rewards=(lengths,))
    result = grpo.train(GRPOConfig(**half, max_steps=4), rewards=(lengths,))
    lines = report.gather(tmp_path / "run")[0].lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert result["best"]["value"] == min(line["reward"] for line in lines)
    assert compare.compare(tmp_path / "run", tmp_path / "straight", 0.0).good


def test_the_result_of_an_earlier_run_that_ended_unwritten(base, tmp_path):
    """Killed behind its last step: what it logged under the earlier names is the result."""
    config = DPOConfig(**{**base, "lora_r": 2, "max_steps": 2, "max_length": 64, "eval_data": base["data"]})
    whole = dpo.train(config)
    assert math.isfinite(whole["eval_margin"])
    earlier(tmp_path / "run", "dpo")
    (tmp_path / "run" / "result.json").unlink()
    again = dpo.train(config)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }
