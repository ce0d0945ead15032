"""A reward function that kills its process when it is called the DIE_AT-th time."""

from __future__ import annotations

import os
import signal
from typing import Any

calls = 0


def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    global calls
    calls += 1
    if calls == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(c)) for c in completions]
