"""One spawn of each scenario for all tests of the session, whichever workers of pytest-xdist have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import worker

from tests.together import alone, session_folder

PROMPTS = [
    "Once upon a time",
    "One day, a girl",
    "Tom and his dog",
    "There was a cat",
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and a reward model for the runs."""
    from dschat.config import RewardConfig
    from dschat.rlhf import models, reward

    where = session_folder(tmp_path_factory) / "distributed"
    where.mkdir(exist_ok=True)
    with alone(where / "lock"):
        if (where / "pairs.jsonl").exists():
            return where
        scorer = models.load_scorer(str(worker.STORIES), torch.float32)
        scorer.save_pretrained(where / "scorer")
        models.load_tokenizer(str(worker.STORIES)).save_pretrained(where / "scorer")
        rows = [
            {"prompt": p, "chosen": HAPPY[(i + j) % 4], "rejected": SAD[i % 4]}
            for i, p in enumerate(PROMPTS)
            for j in (0, 1)
        ]
        (where / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        keys = {
            "model": str(worker.STORIES),
            "data": [str(where / "pairs.jsonl")],
            "output_dir": str(where / "adapted"),
        }
        plain = {"device": "cpu", "dtype": "float32", "tensorboard": False, "progress": False}
        reward.train(RewardConfig(**keys, **plain, lora_r=4, max_steps=4, learning_rate=1e-2, max_length=64))
    return where


@pytest.fixture(scope="session")
def spawned(folder: Path) -> Callable[..., dict[str, Any]]:
    """spawned(scenario, world): what a scenario of worker.py leaves, run in `world` processes by whoever asks first."""

    def get(scenario: str, world: int = 2, limit: int = processes.LIMIT) -> dict[str, Any]:
        found = folder / f"{scenario}-{world}.pt"
        with alone(folder / f"{scenario}-{world}.lock"):
            if not found.exists():
                processes.spawn(scenario, folder, world, limit)
        return torch.load(found)

    return get


@pytest.fixture(scope="session")
def zero(spawned: Any) -> dict[str, Any]:
    """Results of worker.zero in two processes."""
    return spawned("zero")
