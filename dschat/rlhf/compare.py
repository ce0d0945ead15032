"""`dschat compare A B`: whether two runs are the same, metric by metric and answer by answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import RunFiles, gather

SMALL = 0.1
"""Numbers nearer to 0 count as large as this: a loss of group advantages is 0 but for rounding."""


@dataclass
class Comparison:
    """lines: what was found. good: whether no difference is beyond the bound."""

    lines: list[str] = field(default_factory=list)
    good: bool = True

    def fail(self, text: str) -> None:
        self.lines.append(text)
        self.good = False


def difference(a: float | None, b: float | None) -> float:
    """How far two numbers of a log are apart, as a share of the larger (or of SMALL); None (nan or infinite) is like
    None alone."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b) / max(abs(a), abs(b), SMALL)


def numbers(line: Mapping[str, Any]) -> dict[str, float | None]:
    """What a step computed; not when, how fast and with how much memory."""
    return {
        k: v
        for k, v in line.items()
        if k != "step" and not k.startswith("time/") and (v is None or isinstance(v, (int, float)))
    }


def compare(first: str | Path, second: str | Path, bound: float) -> Comparison:
    """Two runs, or two pipelines stage by stage. Raises ConfigError for a folder without a run."""
    runs = [{run.stage: run for run in gather(folder)} for folder in (first, second)]
    out = Comparison()
    for stage in dict.fromkeys(s for found in runs for s in found):
        a, b = (found.get(stage) for found in runs)
        if a is None or b is None:
            out.fail(f"{stage}: only in {second if a is None else first}")
        else:
            _stage(out, a, b, bound)
    out.lines.append(f"{'equal' if out.good else 'NOT equal'} within {bound:g}")
    return out


def _stage(out: Comparison, a: RunFiles, b: RunFiles, bound: float) -> None:
    ours, theirs = ({line["step"]: line for line in run.lines} for run in (a, b))
    said = ", ".join(f"{run.about.get('processes', 1)} x {run.about.get('device', '?')}" for run in (a, b))
    out.lines.append(f"{a.stage}: {a.folder} and {b.folder} ({said})")
    if ours.keys() != theirs.keys():
        out.fail(
            f"  steps: {len(ours)} and {len(theirs)} are logged, {len(ours.keys() & theirs.keys())} in both"
        )
    worst: dict[str, tuple[float, int]] = {}
    alone: set[str] = set()
    for step in sorted(ours.keys() & theirs.keys()):
        x, y = numbers(ours[step]), numbers(theirs[step])
        alone |= x.keys() ^ y.keys()
        for name in x.keys() & y.keys():
            far = difference(x[name], y[name])
            if name not in worst or far > worst[name][0]:
                worst[name] = (far, step)
    for name, (far, step) in sorted(worst.items(), key=lambda item: (-item[1][0], item[0])):
        text = f"  {name}: {far:.2g}" + (f" (step {step})" if far else "")
        if far > bound:
            out.fail(f"{text}, beyond {bound:g}")
        else:
            out.lines.append(text)
    if alone:
        out.fail(f"  only in one: {', '.join(sorted(alone))}")
    _answers(out, a.completions, b.completions)


def _answers(out: Comparison, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> None:
    """The texts that the runs kept, in order."""
    if not a and not b:
        return
    texts = [
        [{k: v for k, v in row.items() if isinstance(v, str) or k == "step"} for row in rows]
        for rows in (a, b)
    ]
    unlike = [x for x, y in zip(*texts, strict=False) if x != y]
    text = f"  answers kept: {len(a) - len(unlike)} of {len(a)} equal"
    if unlike or len(a) != len(b):
        where = (
            f", the first unlike one of step {unlike[0]['step']}" if unlike else f", the other has {len(b)}"
        )
        out.fail(text + where)
    else:
        out.lines.append(text)
