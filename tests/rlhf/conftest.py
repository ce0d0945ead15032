"""Tiny data and settings for the trainers. One thread: the model is so small that threads only wait for each
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_rlhf import Killed

PROMPTS = [
    "Once upon a time",
    "One day, a girl",
    "Tom and his dog",
    "There was a big cat",
    "The sun was",
    "Lily saw",
]
HAPPY = [" there was a happy dog.", " saw a nice bird.", " went to the park.", " that liked to play."]
SAD = [" there was a mad man.", " fell and cried.", " lost a toy.", " that was bad and sad."]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A JSONL file of 12 preference pairs about stories."""
    rows = [
        {"prompt": p, "chosen": HAPPY[(i + j) % 4], "rejected": SAD[i % 4], "number": i}
        for i, p in enumerate(PROMPTS)
        for j in (0, 1)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def base(stories_dir: Path, pairs: str, tmp_path: Path) -> dict[str, Any]:
    """Keys that every stage's config shares in these tests."""
    return {
        "model": str(stories_dir),
        "data": [pairs],
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "float32",  # auto is bfloat16 on machines with units for it
        "tensorboard": False,
        "progress": False,
    }


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """kill_after(n): the run dies after step n's numbers are logged, before its checkpoint is written."""
    from dschat.rlhf.run import Run

    original = Run.save

    def arm(n: int | None) -> None:
        def save(self: Run, step: int, *args: Any, **kw: Any) -> None:
            if step == n:
                raise Killed
            original(self, step, *args, **kw)

        monkeypatch.setattr(Run, "save", save)

    return arm
