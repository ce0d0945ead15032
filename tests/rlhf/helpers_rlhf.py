"""What the tests of the trainers compare runs by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dschat.rlhf.metrics import read_lines


def numbers(folder: Any) -> list[dict[str, Any]]:
    """The metrics of a run without what the clock says."""
    lines = read_lines(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def same_weights(a: Any, b: Any) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    files = [sorted(Path(f).rglob("*.safetensors")) for f in (a, b)]
    assert [f.relative_to(a) for f in files[0]] == [f.relative_to(b) for f in files[1]] and files[0]
    for x, y in zip(*files, strict=True):
        left, right = load_file(x), load_file(y)
        if set(left) != set(right) or not all(torch.equal(left[k], right[k]) for k in left):
            return False
    return True


class Killed(BaseException):
    """Ends a run at once, as a signal would: nothing in the trainers catches it."""
