"""Steps that teach nothing: equal scores, no scores, empty answers, prompts that are all too long."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_rlhf import numbers

from dschat import config as C
from dschat.engine.zero import held
from dschat.rlhf import grpo, names, online, ppo, reading, rloo, sft

TRAINERS = {"grpo": grpo.train, "rloo": rloo.train, "ppo": ppo.train}
SMALL = {
    "max_new_tokens": 6, "max_prompt_length": 16, "prompts_per_step": 2, "samples_per_prompt": 2, "batch_size": 2,
    "max_steps": 2, "lora_r": 4, "learning_rate": 1e-3,
}  # fmt: skip


def equal(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [5.0] * len(completions)


def nothing(prompts: Any, completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def one(prompts: Any, completions: list[str], **_: Any) -> list[float | None]:
    return [1.0] + [None] * (len(completions) - 1)


class Late:
    """A reward that has nothing to teach at first, then prefers later answers."""

    def __init__(self, first: Any) -> None:
        self.first, self.calls, self.__name__ = first, 0, "late"

    def __call__(self, prompts: Any, completions: list[str], **_: Any) -> Any:
        self.calls += 1
        return self.first(prompts, completions) if self.calls == 1 else list(range(len(completions)))


def run(base: dict[str, Any], command: str, reward: Any, **more: Any) -> list[dict[str, Any]]:
    """The metrics of a short run, all of them finite."""
    keys = {**base, **SMALL, **more}
    TRAINERS[command](C.COMMANDS[command](**keys), rewards=[reward])
    lines = numbers(keys["output_dir"])
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    return lines


@pytest.mark.parametrize("command", ["grpo", "rloo"])
def test_equal_scores_teach_a_group_nothing(base, command):
    lines = run(base, command, equal)
    found = [(line["frac_reward_zero_std"], line["grad_norm"], line["score/valid"]) for line in lines]
    assert found == [(1, 0, 1)] * 2


def test_equal_scores_teach_a_critic(base):
    lines = run(base, "ppo", equal)
    assert all(line["score/mean"] == 5.0 and line["loss/value_avg"] > 0 for line in lines)


@pytest.mark.parametrize("command", TRAINERS)
def test_no_scores_at_all(base, command):
    lines = run(base, command, nothing)
    norm = names.logged(command, "policy/grad_norm")
    assert [(line["score/valid"], line[norm]) for line in lines] == [(0, 0)] * 2


@pytest.mark.parametrize("command", TRAINERS)
def test_one_score_of_all(base, command):
    assert [line["score/valid"] for line in run(base, command, one)] == [0.25] * 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("command", "first", "more"),
    [
        ("grpo", equal, {"flat_groups": "drop"}),
        ("grpo", nothing, {"lora_r": 0}),
        ("ppo", nothing, {"critic_update": "all"}),
    ],
    ids=["flat", "full", "ppo"],
)
def test_a_step_without_a_backward_under_zero(base, tmp_path, stage, command, first, more):
    """The first step has no token that counts: DeepSpeed is not asked to step without gradients. The second, and what
    a checkpoint in between keeps, are those without DeepSpeed."""
    more = {**more, "save_every": 1, "keep_checkpoints": 9}
    plain = run(base, command, Late(first), **more)
    found = run(base | {"output_dir": str(tmp_path / "zero")}, command, Late(first), zero_stage=stage, **more)
    norm, *others = (
        names.logged(command, name)
        for name in ("policy/grad_norm", "score/mean", "kl/sequence", "rollout/length")
    )
    assert found[0][norm] == plain[0][norm] == 0.0 < plain[1][norm]
    for key in (norm, *others):
        assert found[1][key] == pytest.approx(plain[1][key], rel=1e-3, abs=1e-6), key


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory, stories_dir: Path) -> str:
    """The tiny model after it has learnt to say nothing."""
    where = tmp_path_factory.mktemp("silent")
    rows = [
        {"prompt": p, "completion": ""} for p in ("Once upon a time", "One day, a girl", "Tom", "Lily saw")
    ]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "model": str(stories_dir), "data": [str(where / "rows.jsonl")], "output_dir": str(where / "run"),
        "device": "cpu", "dtype": "float32", "tensorboard": False, "progress": False, "learning_rate": 5e-3,
        "max_steps": 40, "batch_size": 4,
    }  # fmt: skip
    assert sft.train(C.SFTConfig(**keys))["loss"] < 1e-3
    return str(where / "run" / "model")


@pytest.mark.parametrize("command", TRAINERS)
def test_empty_answers(base, command, silent):
    """The first token ends the answer: it is the one that counts, and the reward reads an empty text."""
    texts: list[str] = []

    def heard(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        texts.extend(completions)
        return [float(i) for i in range(len(completions))]

    more = {"model": silent, "data": [str(Path(silent).parents[1] / "rows.jsonl")]}
    lines = run(base, command, heard, **more)
    length = names.logged(command, "rollout/length")
    assert set(texts) == {""} and all(line[length] == 1 == line["rollout/finished"] for line in lines)


@pytest.mark.parametrize("command", TRAINERS)
def test_all_prompts_too_long(base, command, tmp_path):
    for stream in (False, True):
        base["output_dir"] = str(tmp_path / f"stream-{stream}")
        with pytest.raises(
            reading.DataError, match=r"over max_prompt_length 2; raise it, or set overlong to cut"
        ):
            run(base, command, equal, max_prompt_length=2, stream=stream)
        assert not Path(base["output_dir"]).exists()
    base["output_dir"] = str(tmp_path / "cut")
    assert len(run(base, command, equal, max_prompt_length=2, overlong="cut")) == 2


@pytest.mark.parametrize("stage", [None, 0, 1, 3])
def test_the_critic_waits_for_the_policys_gradient(base, monkeypatch, stage):
    """Losses that are finite, and a gradient of the policy's that is not: the run stops before either has stepped, and
    what it keeps are the weights that the batch met."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = online.Trainer._policy_loss

    def loss(self: Any, *args: Any) -> Any:
        if not seen:
            trained = [p for part in self.modules().values() for p in part.parameters() if p.requires_grad]
            seen.extend((held(p), held(p).detach().clone()) for p in trained)
        total, found = real(self, *args)
        return total + (total * 0.0).sqrt(), found  # 0, and its gradient 0 / 0

    monkeypatch.setattr(online.Trainer, "_policy_loss", loss)
    with pytest.raises(C.ConfigError, match=r"policy/grad_norm is nan at step 1 .*failed-step-000001"):
        run(base, "ppo", equal, critic_update="all", zero_stage=stage)
    assert len(seen) > 40 and all(torch.equal(now, before) for now, before in seen)
