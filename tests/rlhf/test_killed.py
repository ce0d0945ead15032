"""kill -9 at random moments: the run that goes on ends with the same bits as the one that was left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import killed_runs
import pytest
from helpers_rlhf import numbers, same_weights

from dschat.rlhf.checkpoint import TEMPORARY
from dschat.rlhf.metrics import read_lines

SMALL = {"lora_r": 2, "batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "keep_checkpoints": 2}
ONLINE = {
    **SMALL, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6, "ema_decay": 0.9,
    "kl_control": "adaptive", "reward_norm": "running", "exact": True, "max_eval_rows": 2, "eval_every": 2,
    "best_metric": "eval/score",
}  # fmt: skip
STAGES = {
    "sft": {**SMALL, "response": "chosen", "max_length": 64, "best_metric": "eval/loss", "best_is": "lowest"},
    "reward": {**SMALL, "max_length": 64},
    "dpo": {**SMALL, "max_length": 64},
    "ppo": {**ONLINE, "critic_update": "head"},
    "grpo": ONLINE,
}


def run_killed(stage: str, base: dict, tmp_path: Path, kills: int, seed: int) -> int:
    """Kill a run `kills` times, let it end, compare with the straight one; how often it was alive when killed."""
    (tmp_path / "mine.py").write_text(
        "def f(completions, **c):\n    return [len(x) / 9 for x in completions]\n"
    )
    keys = {**base, **STAGES[stage], "eval_data": base["data"]}
    if "prompts_per_step" in keys:
        keys["reward"] = [f"{tmp_path}/mine.py:f"]
    killed_runs.preload()
    folders = {name: tmp_path / name for name in ("straight", "killed")}
    killed_runs.finish(stage, {**keys, "output_dir": str(folders["straight"])})
    keys["output_dir"] = str(folders["killed"])
    longest = killed_runs.step_seconds(folders["straight"])
    alive = sum(killed_runs.kill_at_random(stage, keys, 100 * seed + i, longest) for i in range(kills))
    killed_runs.finish(stage, keys)

    ours, theirs = folders["killed"], folders["straight"]
    assert numbers(ours) == numbers(theirs) and len(numbers(ours)) == 6
    assert same_weights(ours, theirs), "models, adapters and checkpoints"
    assert read_lines(ours / "completions.jsonl") == read_lines(theirs / "completions.jsonl")
    results = [json.loads((f / "result.json").read_text()) for f in (ours, theirs)]
    for result in results:
        result.pop("seconds"), result.pop("written")
    assert results[0] == results[1]
    assert not [f for f in os.listdir(ours / "checkpoints") if f.startswith(TEMPORARY)]
    return alive


def test_killed_five_times(base, tmp_path):
    assert run_killed("ppo", base, tmp_path, kills=5, seed=0) >= 3, "most moments fall into the run"


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_fifty_times(base, tmp_path, stage, seed):
    """With 2 seeds and 5 stages: 50 moments."""
    assert run_killed(stage, base, tmp_path, kills=5, seed=seed) >= 2


def test_the_comparison_sees_a_difference(base, tmp_path):
    """A run that loses its optimizer's moments on the way does not end with the same numbers."""
    keys = {**base, **STAGES["sft"], "eval_data": base["data"]}
    killed_runs.preload()
    for name, steps in (("straight", 4), ("broken", 2)):
        killed_runs.finish(
            "sft", {**keys, "max_steps": steps, "lr_schedule": "constant", "output_dir": str(tmp_path / name)}
        )
    (tmp_path / "broken" / "result.json").unlink()
    state = next((tmp_path / "broken" / "checkpoints").glob("step-000002")) / "state.json"
    content = json.loads(state.read_text())
    for group in content["state"]["optimizers"]["policy"]["groups"]:
        group["betas"] = [0.5, 0.5]
    state.write_text(json.dumps(content))
    run = json.loads((tmp_path / "broken" / "run.json").read_text())
    run["config"]["max_steps"] = 4
    (tmp_path / "broken" / "run.json").write_text(json.dumps(run))
    killed_runs.finish(
        "sft", {**keys, "max_steps": 4, "lr_schedule": "constant", "output_dir": str(tmp_path / "broken")}
    )
    broken, straight = ([n["loss"] for n in numbers(tmp_path / name)] for name in ("broken", "straight"))
    assert broken[:2] == straight[:2] and broken[3] != straight[3]
