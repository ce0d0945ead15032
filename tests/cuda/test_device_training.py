"""The trainers and commands on a device that is not the CPU: on a pretended one here, on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dschat import cli
from dschat import device as devices
from dschat.config import ConfigError, GenerateConfig, SFTConfig
from dschat.rlhf.metrics import read_lines
from tests.conftest import STORIES
from tests.cuda.training import STAGES, compare, compare_evaluations, compare_offloads, compare_replays

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object, gpu: bool = False) -> subprocess.CompletedProcess[str]:
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, **hidden, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip


@pytest.mark.parametrize("stage", [*STAGES, "evaluations", "replays", "offloads"])
def test_a_stage_there_and_here_agree(stage: str, tmp_path: Path) -> None:
    """Two steps and what goes around them, the tasks of `dschat eval`, failed steps computed again: nothing mixes
    devices, the numbers are the CPU's, and a run that was begun on one goes on on the other. Frozen models in the
    host's memory: the numbers, bit for bit, of those that stay on the device, which has a part of them at a time."""
    done = run("tests.cuda.training", tmp_path / "runs", stage)
    assert done.returncode == 0, done.stderr[-3000:]
    compared = {"evaluations": 5, "offloads": 6}.get(stage, 2)  # tasks; models; steps; failed steps
    assert done.stdout.splitlines()[-1] == f"{stage}: {compared} agree"


# ---------------------------------------------------------------------------------------------- which device it is


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """gpus(2): PyTorch says that there are two."""

    def there(count: int, **processes: str) -> None:
        for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in processes.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return there


def test_names_of_devices(gpus) -> None:
    gpus(0)
    assert devices.resolve("auto") == devices.resolve("cpu") == torch.device("cpu")
    gpus(2)
    assert devices.resolve("cpu") == torch.device("cpu")
    assert devices.resolve("auto") == devices.resolve("cuda") == torch.device("cuda", 0)
    assert devices.resolve("cuda:1") == torch.device("cuda", 1)
    gpus(2, WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert devices.resolve("auto") == devices.resolve("cuda") == torch.device("cuda", 1)
    gpus(1, WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    with pytest.warns(UserWarning, match="2 processes and 1 GPU: they run on the CPU"):
        assert devices.resolve("auto") == torch.device("cpu")


def test_devices_that_are_not_there(gpus) -> None:
    gpus(0)
    with pytest.raises(ConfigError, match=r"device is cuda:1, but PyTorch .* here; set it to cpu"):
        devices.resolve("cuda:1")
    gpus(2)
    with pytest.raises(
        ConfigError, match="device is cuda:2, but this machine has 2 GPUs; use cuda:0, cuda:1 or cpu"
    ):
        devices.resolve("cuda:2")
    gpus(1, WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    with pytest.raises(
        ConfigError, match="device is cuda, but this machine has 1 GPU for 2 processes; start as many"
    ):
        devices.resolve("cuda")
    gpus(2, WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    with pytest.raises(
        ConfigError, match="device is cuda:0 for 2 processes, which cannot share it; set it to cuda"
    ):
        devices.resolve("cuda:0")
    for config in (SFTConfig, GenerateConfig):
        for name in ("gpu", "cuda:x", "cuda:", "cpu:0"):
            with pytest.raises(
                ConfigError, match=f"device is '{name}', but it must be auto, cpu, cuda or cuda:N"
            ):
                config(device=name)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "a"], ["chat"], ["verify"], ["bench", "generate"], ["serve"],
        ["eval", "--data", "rows.jsonl"], ["sft", "--data", "rows.jsonl"],
        ["train", "--config", "recipes/ci.yaml"],
    ],
)  # fmt: skip
def test_commands_say_so_before_anything_is_loaded(words, gpus, tmp_path, capsys, monkeypatch) -> None:
    gpus(0)
    monkeypatch.setattr("dschat.rlhf.models.load_tokenizer", lambda *_: pytest.fail("something is loaded"))
    monkeypatch.setattr("dschat.rlhf.models.load_policy", lambda *_: pytest.fail("something is loaded"))
    more = (
        ["--output_dir", str(tmp_path / "run")] if words[0] in ("sft", "train") else ["--model", str(STORIES)]
    )
    assert cli.main([*words, *more, "--device", "cuda:3"]) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "device is cuda:3, but PyTorch" in said
    assert not (tmp_path / "run").exists()


def test_seeded_draws_leave_no_trace() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with devices.seeded(3, torch.device("cpu")):
        first = torch.rand(4)
    with devices.seeded(3, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_gpu(stage: str, tmp_path: Path) -> None:
    """As on the pretended device, with the backend that is chosen there, which nothing falls back from."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert compare(stage, tmp_path / "runs", "cuda") == 2
    texts = [str(warning.message) for warning in said]
    assert not [text for text in texts if "runs instead" in text or "CUDA graph" in text]


@pytest.mark.gpu
def test_evaluations_and_replays_on_a_gpu(tmp_path: Path) -> None:
    assert compare_evaluations(tmp_path / "evaluations", "cuda") == 5
    assert compare_replays(tmp_path / "replays", "cuda") == 2
    assert compare_offloads(tmp_path / "offloads", "cuda") == 6


@pytest.mark.gpu
def test_the_pipeline_on_a_gpu(tmp_path: Path) -> None:
    """`dschat train` with the recipe of the tests: its first losses are the CPU's, the ratio of rollout and training is
    1 bit for bit (the recipe is exact), and everything is written."""
    folders = {}
    for device in ("cpu", "cuda"):
        folders[device] = tmp_path / device
        recipe = ("--config", "recipes/ci.yaml", "--output_dir", folders[device], "--device", device)
        done = run("dschat", "train", *recipe, gpu=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for stage, key in (("sft", "loss"), ("reward", "loss"), ("ppo", "score/mean")):
        here, there = (read_lines(folders[d] / stage / "metrics.jsonl") for d in ("cpu", "cuda"))
        assert len(here) == len(there)
        assert there[0][key] == pytest.approx(here[0][key], rel=1e-2 if stage == "ppo" else 1e-4, abs=1e-3)
        assert all(line["time/step_s"] > 0 for line in there)
        assert (folders["cuda"] / stage / "model" / "config.json").is_file()
    assert all(line["policy/first_ratio_deviation"] == 0.0 for line in there)


@pytest.mark.gpu
def test_commands_on_a_gpu(tmp_path: Path) -> None:
    """Greedy text is the CPU's; `verify` passes; `eval` and `bench generate` run."""
    prompt = (
        "--model",
        STORIES,
        "--dtype",
        "float32",
        "--prompt",
        "Once upon a time",
        "--max_new_tokens",
        "24",
    )
    texts = [run("dschat", "generate", *prompt, "--device", d, gpu=True).stdout for d in ("cpu", "cuda")]
    assert texts[0] == texts[1] and texts[0].strip()
    model = ("--model", STORIES, "--dtype", "float32", "--device", "cuda")
    data = ("--data", "recipes/data/stories/test.jsonl", "--rows", "8")
    bench = ("--workload", "2x8+8", "--repeats", "1", "--output", tmp_path / "bench.json")
    for words in (("verify", *model), ("eval", *model, *data), ("bench", "generate", *model, *bench)):
        done = run("dschat", *words, gpu=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert torch.cuda.get_device_name() in (tmp_path / "bench.json").read_text()


@pytest.mark.gpu
def test_seeded_draws_on_a_gpu_leave_no_trace() -> None:
    device = devices.use("cuda")
    before = torch.cuda.get_rng_state(device)
    draws = []
    for _ in range(2):
        with devices.seeded(3, device):
            draws.append(torch.rand(4, device=device))
    assert torch.equal(*draws) and torch.equal(torch.cuda.get_rng_state(device), before)
