"""Numbers of a run to experiment trackers that are installed: Weights & Biases and Trackio, whose calls are alike."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import TRACKERS, ConfigError


def chosen(names: Sequence[str]) -> list[str]:
    """The packages that `report_to` means. Raises ConfigError, one sentence, for one that is not installed."""
    there = {name for name in TRACKERS if importlib.util.find_spec(name) is not None}
    if "all" in names:
        return [name for name in TRACKERS if name in there]
    wanted = [name for name in TRACKERS if name in names]
    for name in wanted:
        if name not in there:
            raise ConfigError(
                f"report_to names {name}, which is not installed; run: pip install {name}, or leave it out"
            )
    return wanted


class Tracker:
    """One run of a tracker. number: what tells it from every other, so that a resumed run goes on in it."""

    def __init__(
        self, package: str, project: str, name: str, folder: Path, number: str, settings: Mapping[str, Any]
    ) -> None:
        self.module: Any = importlib.import_module(package)
        how: dict[str, Any] = {"project": project, "config": dict(settings), "resume": "allow"}
        if package == "wandb":
            how |= {"name": name, "id": number, "dir": str(folder)}
        else:  # whose runs are told apart by their names alone
            how["name"] = f"{name}-{number[:8]}"
        self.module.init(**how)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a step."""
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        """The end of the run, or of this process's part of it."""
        self.module.finish()
