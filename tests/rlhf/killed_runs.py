"""A run that is killed (SIGKILL) again and again at random moments, and the same run left alone; no test by itself.

The children come from a fork server that has imported everything and started no thread, so that a start costs a
fraction of a second and a moment may fall anywhere: start-up, rollout, update, a checkpoint's write, the end.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dschat.rlhf.metrics import read_lines

CONTEXT = multiprocessing.get_context("forkserver")
LIMIT = 240.0  # seconds that one life of a run may take


def _live(stage: str, keys: dict[str, Any]) -> None:
    """One life of a run."""
    import importlib

    import torch

    from dschat.config import COMMANDS

    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    module = importlib.import_module(f"dschat.rlhf.{stage}")
    module.train(COMMANDS[stage](**keys))


def preload() -> None:
    """Once, before the first child is started."""
    names = ["torch", "transformers", "peft", "dschat.rlhf.ppo", "dschat.rlhf.grpo", "dschat.rlhf.reward"]
    CONTEXT.set_forkserver_preload([*names, "dschat.rlhf.sft", "dschat.rlhf.dpo"])


def start(stage: str, keys: dict[str, Any]) -> BaseProcess:
    process = CONTEXT.Process(target=_live, args=(stage, keys), daemon=True)
    process.start()
    return process


def finish(stage: str, keys: dict[str, Any]) -> None:
    """Let a run live to its end."""
    process = start(stage, keys)
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{stage} took more than {LIMIT} s")
    assert process.exitcode == 0, f"{stage} ended with {process.exitcode}"


def progress(folder: Path) -> int:
    """How often something was written in a run's folder, roughly: grows while it runs."""
    try:
        return sum(1 for _ in open(folder / "metrics.jsonl", "rb"))
    except OSError:
        return 0


def step_seconds(folder: Path) -> float:
    """Seconds of a step of a finished run, so that moments fall alike on fast and slow machines."""
    ends = [line["time/unix"] for line in read_lines(folder / "metrics.jsonl") if "time/unix" in line]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def kill_at_random(stage: str, keys: dict[str, Any], seed: int, longest: float) -> bool:
    """Start a run and kill it at a random moment, at most `longest` seconds on; whether it was still alive then.

    Two lives of three get as far as one more step before the clock of the moment starts, so that the run gets on.
    """
    chance = random.Random(seed)
    folder = Path(keys["output_dir"])
    before = progress(folder)
    process = start(stage, keys)
    until = time.monotonic() + LIMIT
    if chance.random() < 2 / 3:
        while progress(folder) <= before and process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
    time.sleep(chance.uniform(0, longest))
    alive = process.is_alive()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL) if alive else None
    process.join()
    assert process.exitcode in ((-signal.SIGKILL, 0) if alive else (0,))
    return alive
