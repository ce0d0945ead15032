"""What the numbers of a log are called.

The trainers have one name for a number whatever the algorithm, such as `policy/clip_fraction`. A log, and everything
that shows or asks for a number of it (tables, trackers, pages, `best_metric`), calls it `logged`: TRL's name where
TRL's trainer of that stage means the same by it (docs/trl.md), else the trainers' own. Logs of versions that had the
trainers' names everywhere become present ones through `read`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")

RATE = {"lr": "learning_rate"}
GROUPS = {
    **RATE,
    "score/mean": "reward",
    "group/flat": "frac_reward_zero_std",
    "policy/entropy": "entropy",
    "policy/grad_norm": "grad_norm",
    "rollout/length": "completions/mean_length",
}
TRL: dict[str, dict[str, str]] = {
    "sft": RATE,
    "reward": RATE,
    "dpo": {**RATE, "accuracy": "rewards/accuracies", "margin": "rewards/margins"},
    "ppo": {
        "kl/sequence": "objective/kl",
        "score/total": "objective/rlhf_reward",
        "policy/loss": "loss/policy_avg",
        "policy/clip_fraction": "policy/clipfrac_avg",
        "value/loss": "loss/value_avg",
        "value/clip_fraction": "val/clipfrac_avg",
    },
    "grpo": {
        **GROUPS,
        "policy/clip_fraction": "clip_ratio/region_mean",
        "gap/mean": "sampling/sampling_logp_difference/mean",
        "gap/max": "sampling/sampling_logp_difference/max",
    },
    "rloo": {**GROUPS, "kl/token": "kl"},
}
"""Stage -> the trainers' name -> TRL's; stages and names that are not here have the trainers'."""

HELD_OUT = "eval/"


def logged(stage: str, name: str) -> str:
    """What a log of `stage` calls the number that the trainers call `name`."""
    ahead = HELD_OUT if name.startswith(HELD_OUT) else ""
    return ahead + TRL.get(stage, {}).get(name.removeprefix(HELD_OUT), name.removeprefix(HELD_OUT))


def read(stage: str, line: Mapping[str, V]) -> dict[str, V]:
    """A line of a log with present names."""
    return {logged(stage, name): value for name, value in line.items()}
