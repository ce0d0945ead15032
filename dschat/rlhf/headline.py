"""`dschat report RUN --table`: DeepSpeed-Chat's headline tables from the files of runs: model sizes, what they ran on,
the time of each step and of all, and where a step of reinforcement learning spends it.

Times are sums over the steps that the log has, so a run that was resumed counts whole; loading and writing models is
not in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .. import planning
from ..config import ConfigError
from . import names
from .report import RunFiles, gather

STEPS = {"sft": 1, "reward": 2, "ppo": 3, "grpo": 3, "rloo": 3, "dpo": 3}
GENERATION = ("flip", "prefill", "decode", "sample")
SCORING = ("score", "values", "logprobs", "reference")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def numbers_in(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold; 0 where there are none."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            total += sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())
    return total


def size(written: Path, name: str) -> str:
    """Size of the model in the folder `written`, or, where none is there, of the one that is called `name`."""
    count = numbers_in(written)
    for folder in (Path(name), Path(name) / "model"):
        count = count or (numbers_in(folder) if name else 0)
    if not count:
        try:
            count = planning.shape_of(name).parameters
        except ConfigError:
            return name or "?"
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def seconds(run: RunFiles) -> float:
    """Of all steps of a run."""
    return sum(line.get("time/step_s") or 0.0 for line in run.lines)


def machine(run: RunFiles) -> str:
    """What it ran on."""
    device, count = run.about.get("device", "?"), int(run.about.get("processes", 1))
    return f"{count} x {device}" if count > 1 or device != "cpu" else "1 x CPU"


def rows(folders: Sequence[str | Path]) -> list[dict[int, RunFiles]]:
    """What belongs together: the stages of each pipeline by step, and runs of their own until a step comes twice."""
    out: list[dict[int, RunFiles]] = []
    loose: dict[int, RunFiles] = {}
    for folder in folders:
        found = gather(folder)
        if len(found) > 1:
            out.append({STEPS[run.stage]: run for run in found if run.stage in STEPS})
            continue
        step = STEPS.get(found[0].stage, 3)
        if step in loose or not loose:
            loose = {}
            out.append(loose)
        loose[step] = found[0]
    return out


def _names(steps: Mapping[int, RunFiles]) -> str:
    last = steps[max(steps)]
    actor = steps.get(3, steps.get(1))
    parts = []
    if actor is not None:
        parts.append(f"Actor: {size(actor.folder / 'model', str(actor.settings.get('model', '')))}")
    if 2 in steps:
        parts.append(f"Reward: {size(steps[2].folder / 'model', str(steps[2].settings.get('model', '')))}")
    elif named := [r for r in last.settings.get("reward") or [] if ":" not in str(r)]:
        parts.append(f"Reward: {size(Path(named[0]) / 'model', str(named[0]))}")
    return ", ".join(parts)


def tables(folders: Sequence[str | Path]) -> str:
    """Both tables as Markdown; the second only where a run generated. Raises ConfigError for a folder without a run."""
    found = rows(folders)
    lines = ["| Model Sizes | Machine | Step 1 | Step 2 | Step 3 | Total |", "| --- " * 6 + "|"]
    for steps in found:
        cells = []
        for i in (1, 2, 3):
            run = steps.get(i)
            name = f" ({run.stage.upper()})" if run is not None and i == 3 and run.stage != "ppo" else ""
            open_end = " so far" if run is not None and not run.result else ""
            cells.append("-" if run is None else f"{duration(seconds(run))}{name}{open_end}")
        machines = ", ".join(dict.fromkeys(machine(run) for run in steps.values()))
        total = duration(sum(map(seconds, steps.values())))
        lines.append(f"| {_names(steps)} | {machines} | {' | '.join(cells)} | {total} |")
    online = [s[3] for s in found if 3 in s and any("time/decode_s" in line for line in s[3].lines)]
    if online:
        heads = (
            "Step 3 of",
            "Answers a step",
            "Generation, s",
            "Scoring, s",
            "Training, s",
            "Step, s",
            "Answers/s",
        )
        lines += ["", f"| {' | '.join(heads)} | Tokens/s |", "| --- " * 8 + "|"]
        lines += [_phases(run) for run in online]
    return "\n".join(lines) + "\n"


def _phases(run: RunFiles) -> str:
    """One line of the second table: means over the steps, the first (warm-up) left out if there are more."""
    lines = run.lines[1:] or run.lines

    def mean(*phases: str) -> float:
        return sum(line.get(f"time/{p}_s") or 0.0 for line in lines for p in phases) / len(lines)

    answers = int(run.settings.get("prompts_per_step", 0)) * int(run.settings.get("samples_per_prompt", 1))
    length_name = names.logged(run.stage, "rollout/length")
    length = sum(line.get(length_name) or 0.0 for line in lines) / len(lines)
    whole = mean("step")
    each: list[Any] = [answers]
    each += [f"{v:.3g}" for v in (mean(*GENERATION), mean(*SCORING), mean("update"), whole)]
    each += [f"{v / whole:.3g}" if whole else "-" for v in (answers, answers * length)]
    return f"| {run.name} | {' | '.join(map(str, each))} |"
