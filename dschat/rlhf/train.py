"""The pipeline: SFT, then a reward model, then PPO, each in its own folder, and one page about all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import config as configs
from .. import config_text, parallel
from .. import device as devices
from ..config import ConfigError, OnlineConfig, StageConfig, TrainConfig
from . import ppo, report, reward, sft
from .checkpoint import atomic_text
from .checks import origin, require_rewards
from .metrics import read_lines
from .run import Run

TRAINERS: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft.train,
    "reward": reward.train,
    "ppo": ppo.train,
}


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the stages that the config has; a finished stage is not run again. Returns each stage's result by
    name.

    Writes `config.yaml`, `result.json`, `curves.png`, `report.md` and `report.html` into `config.output_dir`.
    """
    folder = Path(config.output_dir)
    results: dict[str, Any] = {}
    made: dict[str, str] = {}
    stages = {name: found for name in configs.STAGES if (found := getattr(config, name)) is not None}
    for settings in stages.values():
        devices.resolve(settings.device)  # before any process group is joined for another one
    grown: dict[str, str] = {}
    for stage, settings in stages.items():  # a stage that cannot run ends the pipeline before it begins
        if isinstance(settings, OnlineConfig):
            require_rewards(settings)
        _require_anew(stage, settings, grown)
        with Run(settings, stage, made=made) as looked_at:
            if looked_at.longer:
                grown[settings.output_dir] = stage
            if looked_at.result is None:
                made[settings.output_dir] = origin(settings.model, made)
    for stage, settings in stages.items():
        results[stage] = TRAINERS[stage](settings)
    if parallel.lead():
        atomic_text(folder / "config.yaml", config_text.dump(config))
        atomic_text(folder / "result.json", json.dumps(results, indent=1) + "\n")
        table = _table(Path(config.ppo.output_dir)) if config.ppo else []
        report.write(folder, f"Run {folder.name}", sentences(results), table[:20])
    return results


def _require_anew(stage: str, settings: StageConfig, grown: Mapping[str, str]) -> None:
    """Raise ConfigError where a stage has begun from what another wrote that is to go on now."""
    names = [settings.model, *(getattr(settings, key, "") for key in ("reference", "critic"))]
    if settings.overwrite or not (Path(settings.output_dir) / "run.json").is_file():
        return
    for name in filter(None, [*names, *getattr(settings, "reward", ())]):
        before = origin(name, grown)
        if before != name:
            raise ConfigError(
                f"{before} is to go on, but {stage} in {settings.output_dir} has begun from what it wrote; add "
                f"--{stage}.overwrite, or name another output_dir"
            )


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the run did, stage by stage."""
    return [s for stage, result in results.items() for s in report.sentences(stage, result)]


def _table(folder: Path) -> list[dict[str, Any]]:
    """Held-out answers before and after, from the last rows that PPO kept."""
    rows = [r for r in read_lines(folder / "completions.jsonl") if "before" in r]
    return [{k: v for k, v in row.items() if k != "step"} for row in rows]
