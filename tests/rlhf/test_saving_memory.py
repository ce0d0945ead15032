"""What saves memory changes no result: gradient checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_rlhf import numbers, same_weights
from test_float16 import STAGES

from dschat_kernels import forward


def short(prompts, completions, **columns):
    return [-len(c) / 10 for c in completions]


MODES = {
    "sft": {"lora_r": 0},
    "reward": {"lora_r": 4},
    "dpo": {"lora_r": 4},
    "grpo": {"lora_r": 4, "exact": True},
    "ppo": {"lora_r": 0, "critic_update": "lora"},
}


@pytest.mark.parametrize("stage", MODES)
def test_gradient_checkpointing_changes_no_bit(stage, base, tmp_path, monkeypatch):
    """Two steps with and without: the same numbers and weights, layers computed again where it is on."""
    again: list[int] = []
    original = forward.checkpoint

    def counted(*args, **keywords):
        again.append(1)
        return original(*args, **keywords)

    monkeypatch.setattr(forward, "checkpoint", counted)
    train, cls, keys = STAGES[stage]
    more = {"rewards": (short,)} if stage in ("grpo", "ppo") else {}
    folders = []
    for on in (False, True):
        folder = str(tmp_path / f"{stage}-{on}")
        config = cls(
            **{**base, **keys, **MODES[stage], "max_steps": 2, "learning_rate": 1e-3, "output_dir": folder,
               "gradient_checkpointing": on}
        )  # fmt: skip
        train(config, **more)
        folders.append(folder)
        assert bool(again) == on
    assert numbers(folders[0]) == numbers(folders[1])
    assert same_weights(Path(folders[0]) / "model", Path(folders[1]) / "model")
    if stage == "ppo":
        assert same_weights(Path(folders[0]) / "critic", Path(folders[1]) / "critic")
