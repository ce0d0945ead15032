"""report_to: what a tracker gets, a package that is missing, a run that goes on."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
from helpers_rlhf import Killed

from dschat.config import ConfigError, SFTConfig
from dschat.rlhf import models, sft
from dschat.rlhf.metrics import read_lines


class Fake(types.ModuleType):
    """A module with the calls of wandb and trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **how: Any) -> None:
        self.begun.append(how)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.ended += 1


@pytest.fixture
def fake(monkeypatch):
    """fake(name): that package is installed."""

    def install(name: str) -> Fake:
        module = Fake(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    for name in ("wandb", "trackio"):  # whatever is installed where the tests run
        monkeypatch.setitem(sys.modules, name, None)
    return install


def keys(base: dict, **more: Any) -> dict:
    return {**base, "max_length": 64, "response": "chosen", "max_steps": 3, "learning_rate": 1e-3, **more}


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_gets_every_step(package, fake, base):
    module = fake(package)
    sft.train(SFTConfig(**keys(base, report_to=[package], project="p", run_name="n")))
    (how,) = module.begun
    assert (how["project"], how["config"]["max_steps"]) == ("p", 3)
    assert ("id" in how) == ("dir" in how) == (how["name"] == "n") == (package == "wandb")
    assert [step for step, _ in module.logged] == [1, 2, 3] and module.ended == 1
    lines = read_lines(f"{base['output_dir']}/metrics.jsonl")
    for line, (_, numbers) in zip(lines, module.logged, strict=True):
        assert numbers["sft/loss"] == line["loss"] and "sft/time/step_s" in numbers
        assert "sft/time/unix" not in numbers


@pytest.mark.parametrize(("package", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_goes_on_goes_on_in_the_tracker(package, key, fake, base, kill_after):
    """By what the package knows a run by; another run in a folder of the same name is another one."""
    module = fake(package)
    kill_after(2)
    with pytest.raises(Killed):
        sft.train(SFTConfig(**keys(base, report_to=["all"])))
    assert module.ended == 1
    kill_after(None)
    sft.train(SFTConfig(**keys(base, report_to=package)))
    sft.train(SFTConfig(**keys(base, report_to=[package], overwrite=True)))
    first, second, other = (how[key] for how in module.begun)
    assert first == second != other
    assert [how["name"].partition("-")[0] for how in module.begun] == ["run"] * 3
    assert [step for step, _ in module.logged] == [1, 2, 2, 3, 1, 2, 3]


def test_a_missing_package_is_said_before_a_model_is_loaded(fake, base, monkeypatch, tmp_path):
    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_policy", load)
    monkeypatch.setattr(models, "load_tokenizer", load)
    with pytest.raises(
        ConfigError, match="report_to names trackio, which is not installed; run: pip install trackio"
    ):
        sft.train(SFTConfig(**keys(base, report_to=["trackio"])))
    assert not (tmp_path / "run").exists()


def test_names(fake, base):
    with pytest.raises(
        ConfigError, match="report_to is 'mlflow', but it must be one of wandb, trackio, tensorboard"
    ):
        SFTConfig(**keys(base, report_to=["mlflow"]))
    with pytest.raises(ConfigError, match="leave none out, or everything else"):
        SFTConfig(**keys(base, report_to=["none", "wandb"]))
    assert SFTConfig(**keys(base, report_to=["tensorboard"])).tensorboard
    assert not SFTConfig(**keys(base, report_to="none")).tensorboard
