"""What a run tells: numbers (JSONL always, TensorBoard), a progress bar, phase times, memory, completions.

`metrics.jsonl` has one object a step, written with a single append, so a line is there whole or not at all.
Wall-clock keys start with `time/`; everything else is the same in a resumed run as in a straight one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

from .. import device as devices
from . import names
from .checkpoint import atomic_text, writing
from .trackers import Tracker

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as one line with a single write. Numbers that JSON lacks (nan, inf) become
    null.
    """
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    data = (json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with writing(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while data:  # all at once, but on a disk that fills up: the next write says so
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)


def read_log(folder: str | Path, stage: str) -> list[dict[str, Any]]:
    """The numbers that a stage logged in its folder, one object a step, with present names; [] without a log."""
    return [names.read(stage, line) for line in read_lines(Path(folder) / "metrics.jsonl")]


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a last line without its end (the writer was killed) is left out; [] without
    the file. Raises ValueError, one sentence, for a damaged line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    out = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is damaged, no JSON object; mend or delete that line")
            out.append(row)
    return out


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps later than `step`, and those of the table at the end (they compare with "before"): a
    resumed run writes them again."""
    if not path.is_file():
        return
    kept = [line for line in read_lines(path) if line.get("step", 0) <= step and "before" not in line]
    atomic_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def reset_peak_memory(device: torch.device = devices.CPU) -> None:
    """Start the peak anew, so that a stage does not report the one before. Where the system cannot, nothing
    happens.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass


def peak_memory_gib(device: torch.device = devices.CPU) -> float:
    """Largest resident memory of this process since `reset_peak_memory`, on a GPU what was allocated there, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Collects one step's numbers and hands them to every place that shows or keeps them.

    with metrics.phase("decode"): ...      seconds of a phase; several blocks of one name add up within a step
    metrics.log(step, {"loss": ...})       one line; Python numbers or one-element tensors
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        total_steps: int,
        *,
        tensorboard: bool = True,
        progress: bool = True,
        after_step: int = 0,
        console: Console | None = None,
        write: bool = True,
        device: torch.device = devices.CPU,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """write: False for a process that is not the lead of its run: nothing is kept or shown. device: where the
        phases' work is done. trackers: get the numbers of every step too.
        """
        self.device = device
        self.folder, self.name, self.total_steps = Path(folder), name, total_steps
        self.path, self.completions_path = self.folder / "metrics.jsonl", self.folder / "completions.jsonl"
        self._write = write
        self._trackers = list(trackers)
        tensorboard, progress = tensorboard and write, progress and write
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.completions_path):
                drop_after(path, after_step)
        self.console = console or Console()
        self.latest: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._step_start = time.perf_counter()
        self._last_plain = -math.inf
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=after_step + 1 if after_step else None
            )
        self._bar: Progress | None = None
        self._quiet = not progress
        if progress and self.console.is_terminal:
            columns = (
                *(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn()),
                *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}")),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(name, total=total_steps, completed=after_step, status="")
            self._bar.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            devices.synchronize(self.device)  # the work of a phase ends in it
            self.add_time(name, time.perf_counter() - start)

    def add_time(self, name: str, seconds: float) -> None:
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def log(
        self, step: int, values: Mapping[str, float | Tensor], show: Sequence[str] = ()
    ) -> dict[str, float]:
        """Write step's numbers with the phase times since the last call; `show` names those for the progress
        bar. Both have the trainers' names; returns the line as it is logged (see names.py).
        """
        now = time.perf_counter()
        line: dict[str, float] = {k: float(v) for k, v in names.read(self.name, values).items()}
        line |= {f"time/{name}_s": seconds for name, seconds in self._phases.items()}
        line |= {
            "time/step_s": now - self._step_start,
            "time/peak_memory_gib": peak_memory_gib(self.device),
            "time/unix": time.time(),
        }
        self._phases, self._step_start = {}, now
        self.latest = line
        if self._write:
            append_line(self.path, {"step": step} | line)
        if self._writer is not None:
            for key, value in line.items():
                if key != "time/unix":
                    with writing(self.folder / "tensorboard"):
                        self._writer.add_scalar(f"{self.name}/{key}", value, step)
        for tracker in self._trackers:
            tracker.log(step, {f"{self.name}/{k}": v for k, v in line.items() if k != "time/unix"})
        shown = [key for name in show if (key := names.logged(self.name, name)) in line]
        status = "  ".join(f"{key.replace('/', ' ')} {line[key]:.3g}" for key in shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif not self._quiet and (now - self._last_plain > PLAIN_EVERY or step >= self.total_steps):
            self._last_plain = now
            self.console.print(f"{self.name} {step}/{self.total_steps}  {status}", highlight=False)
        return line

    def say(self, text: str) -> None:
        """A line of text above the progress bar."""
        if not self._quiet:
            (self._bar.console if self._bar else self.console).print(escape(text), highlight=False)

    def completions(
        self, step: int, rows: Sequence[Mapping[str, Any]], show: int = 0, title: str = ""
    ) -> None:
        """Keep prompts and answers with their scores in completions.jsonl, and show the first `show` as a
        table.
        """
        for row in rows if self._write else ():
            append_line(self.completions_path, {"step": step} | dict(row))
        if show and not self._quiet and rows:
            (self._bar.console if self._bar else self.console).print(completions_table(rows[:show], title))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk has been said where it came up
                self._writer.close()
            self._writer = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def completions_table(rows: Sequence[Mapping[str, Any]], title: str = "", width: int = 70) -> Table:
    """A table with one column for each key of the rows; texts are cut to `width` characters, numbers
    rounded.
    """
    table = Table(title=title or None, show_lines=True, title_justify="left")
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(v, width) for v in row.values()))
    return table


def _cell(value: Any, width: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    text = str(value).strip()
    return escape(text if len(text) <= width else text[: width - 1] + "…")
