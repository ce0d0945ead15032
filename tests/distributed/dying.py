"""Reward functions that are called the DIE_AT-th time: one kills its process, one waits for Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

calls = 0


def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    global calls
    calls += 1
    if calls == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(c)) for c in completions]


def wait(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    global calls
    calls += 1
    if calls == int(os.environ["DIE_AT"]):
        Path(os.environ["DIED_MARK"] + ".asked").touch()
        time.sleep(300)
    return [float(len(c)) for c in completions]
