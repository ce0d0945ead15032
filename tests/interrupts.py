"""Ctrl-C before any line of our own code."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = (str(ROOT / "dschat") + "/", str(ROOT / "dschat_kernels") + "/")
CLEANING = ("_no_garbage_collection", "_kept_for_rollout")
"""Python lets no signal in between the end of a `try` and the first call of its `finally`, but a tracer would."""
Line = tuple[str, int, str]
"""File, number, function."""


def as_in_a_terminal() -> None:
    """For a process to start with: a background job inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _traced(work: Callable[[], Any], see: Callable[[Line], None]) -> None:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(OURS) or code.co_name in CLEANING:
            return None
        if event == "line":
            see((code.co_filename, frame.f_lineno, code.co_name))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)


def interrupted(work: Callable[[], Any], line: Line, time: int) -> bool:
    """Whether Ctrl-C ends `work`, pressed before it comes to `line` for the `time`-th time."""
    met = 0

    def see(where: Line) -> None:
        nonlocal met
        met += where == line
        if met == time:
            raise KeyboardInterrupt

    try:
        _traced(work, see)
    except KeyboardInterrupt:
        return True
    return False


def moments(work: Callable[[], Any], file: str = "", *functions: str) -> Iterator[tuple[Line, int]]:
    """Every line of a file, or of functions of whatever file, that `work` comes to, with one of the times that it
    does."""
    seen: dict[Line, int] = {}

    def see(where: Line) -> None:
        if where[2] in functions or (file and where[0].endswith(file)):
            seen[where] = seen.get(where, 0) + 1

    _traced(work, see)
    draw = random.Random(0)
    for line, times in seen.items():
        yield line, draw.randint(1, times)
