"""DeepSpeed-Chat's recipes, dry: every setting of theirs through a step, on random weights of their models' shapes
cut to two layers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import dry_run

RECIPES = sorted(p.stem for p in dry_run.RECIPES.glob("*.yaml"))


def dry(folder: Path, width: int, *names: str) -> dict[str, dict[str, Any]]:
    """What the runs printed, by recipe, in a process of its own (DeepSpeed's group stays in it)."""
    command = [sys.executable, "-m", "tests.dry_run", str(folder), str(width), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=dry_run.ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("DRY ")]
    return {one["recipe"]: one for one in found}


def check(found: dict[str, Any], lora: bool) -> None:
    """A step was made, of the policy and of the critic, and both were written."""
    assert found["steps"] == 1
    for key in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "value/grad_norm", "score/mean"):
        assert math.isfinite(found[key]), key
    assert found["policy/grad_norm"] > 0 and found["value/grad_norm"] > 0
    assert found["objective/kl"] == pytest.approx(0.0, abs=0.05)
    written = {Path(p).relative_to(f"{found['recipe']}/run").as_posix() for p in found["written"]}
    adapters = {"adapter"} if lora else set()
    if found["recipe"].startswith("llama") and lora:
        adapters |= {"critic/adapter"}
    assert written == {"model", "critic/model"} | adapters


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return dry(tmp_path_factory.mktemp("dry"), 16)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_recipe(narrow: dict[str, dict[str, Any]], name: str) -> None:
    """At a sixteenth of the width: ZeRO stage, LoRA, critic, learning rates and batch sizes are the recipe's."""
    check(narrow[name], lora="lora" in name or "mixed" in name)


STEPS = sorted(f"{p.parent.name}/{p.stem}" for p in dry_run.RECIPES.glob("*/*.yaml"))


@pytest.fixture(scope="module")
def narrow_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return dry(tmp_path_factory.mktemp("steps"), 16, *STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_every_recipe_of_steps_1_and_2(narrow_steps: dict[str, dict[str, Any]], name: str) -> None:
    """At a sixteenth of the width, through the recipe's ZeRO stage, adapter and accumulation."""
    found = narrow_steps[name]
    assert found["steps"] == 1 and math.isfinite(found["loss"]) and found["grad_norm"] > 0
    written = {Path(p).relative_to(f"{name}/run").as_posix() for p in found["written"]}
    assert written == {"model"} | ({"adapter"} if "lora" in name else set())


@pytest.mark.nightly
@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("opt")])
def test_a_step_at_the_published_width(tmp_path: Path, name: str) -> None:
    """Two layers as wide as the published ones (up to 0.9 G weights; Llama's critic and its optimizer need 24 GB)."""
    check(dry(tmp_path, 1, name)[name], lora="lora" in name)
