"""`dschat launch`: refusals, and what happens when a process dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
import worker

from dschat import launch, parallel
from dschat.config import ConfigError
from dschat.rlhf import checkpoint
from tests.interrupts import as_in_a_terminal


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_processes", "2"], "there is no command to launch; write dschat launch"),
        (["--num_processes", "2", "pppo"], "'pppo' is no command; write dschat launch"),
        (["--num_processes", "0", "ppo"], "num_processes is '0', but it must be a whole number of 1 or more"),
        (
            ["--num_gpus", "2", "ppo"],
            "--num_gpus is no flag of dschat launch; put flags of the command behind",
        ),
        (["--hostfile", "nowhere", "ppo"], "hostfile nowhere does not exist; give a file with lines such as"),
    ],
)
def test_refusals(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        launch.main(words)


def test_a_hostfile_is_handed_to_deepspeeds_launcher():
    words = launch.hand_over_words("hosts", ["ppo", "--config", "x.yaml"])
    assert words[1:] == [
        "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_local_rank", "--module", "dschat", "ppo",
        "--config", "x.yaml",
    ]  # fmt: skip


def test_an_incomplete_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)  # whatever ran here before
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE is 2, but RANK .* is not set: start the run with dschat launch"
    ):
        parallel.start(torch.device("cpu"))


def test_a_death_ends_all_and_leaves_a_good_checkpoint(folder: Path):
    """The reward function kills its process in step 3: the other ends too, soon, with a sentence; nothing is left
    running; the newest checkpoint is whole, and one process goes on from it."""
    output = folder / "died"
    command = _grpo(folder, output, "dying:reward")
    environment = processes.environment(DIE_AT="3", DIED_MARK=str(output))
    start = time.monotonic()
    done = subprocess.run(
        command, env=environment, cwd=processes.ROOT, capture_output=True, text=True, timeout=processes.LIMIT
    )
    assert done.returncode == 137, done.stderr
    assert "process 0 of 2 was killed by signal 9; the others are stopped" in done.stderr
    assert time.monotonic() - start < 200, "the other waited for a time limit"
    assert not _left(output), "a process is left"
    newest = checkpoint.latest(output / "checkpoints")
    assert newest is not None and newest.name == "step-000002"
    checkpoint.load(newest)
    assert not (output / "result.json").exists()


def _grpo(folder: Path, output: Path, reward: str) -> list[str]:
    """Three steps of GRPO in two processes."""
    keys = {
        "model": worker.STORIES, "data": folder / "pairs.jsonl", "output_dir": output, "dtype": "float32",
        "reward": reward, "max_new_tokens": 6, "max_prompt_length": 16, "prompts_per_step": 3,
        "samples_per_prompt": 2, "batch_size": 4, "lora_r": 4, "max_steps": 3, "tensorboard": "false",
        "progress": "false", "learning_rate": "1e-3",
    }  # fmt: skip
    command = [sys.executable, "-m", "dschat", "launch", "--num_processes", "2", "grpo"]
    for key, value in keys.items():
        command += [f"--{key}", str(value)]
    return command


def test_ctrl_c_ends_all_with_one_sentence(folder: Path):
    """In step 3, while one process scores and the other waits for it; as from a terminal all get it, and the launcher
    passes it on besides."""
    output = folder / "interrupted"
    environment = processes.environment(DIE_AT="3", DIED_MARK=str(output))
    with subprocess.Popen(
        _grpo(folder, output, "dying:wait"), env=environment, cwd=processes.ROOT, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=as_in_a_terminal,
    ) as launcher:  # fmt: skip
        try:
            until = time.monotonic() + processes.LIMIT
            while not Path(f"{output}.asked").exists():
                assert launcher.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            os.killpg(launcher.pid, signal.SIGINT)
            start = time.monotonic()
            _, said = launcher.communicate(timeout=processes.LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert time.monotonic() - start < 200, "it waited for a time limit"
    lines = [line for line in said.splitlines() if not line.startswith("dschat: note: ")]
    assert lines == [f"dschat: interrupted; the same command goes on after step-000002 ({output})"]
    assert launcher.returncode == 130
    assert not _left(output), "a process is left"
    checkpoint.load(output / "checkpoints" / "step-000002")


def test_deepspeeds_own_launcher_starts_a_run(folder: Path):
    """As documented: `deepspeed --num_gpus 2 --module dschat ...`. Two processes, one run, none left behind."""
    bin_folder = str(Path(sys.executable).parent)
    launcher = shutil.which("deepspeed", path=os.pathsep.join([bin_folder, os.environ.get("PATH", "")]))
    assert launcher is not None, "DeepSpeed's launcher is not installed beside this Python"
    output = folder / "by-deepspeed"
    keys = {
        "model": worker.STORIES, "dtype": "float32", "data": folder / "pairs.jsonl", "response": "chosen",
        "batch_size": 4, "max_steps": 2, "zero_stage": 2, "tensorboard": "false", "output_dir": output,
    }  # fmt: skip
    command = [launcher, "--num_gpus", "2", "--master_port", str(processes.free_port())]
    command += ["--module", "dschat", "sft"]
    for key, value in keys.items():
        command += [f"--{key}", str(value)]
    path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    environment = processes.environment(DIED_MARK=str(output), PATH=path)
    done = _run(command, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"Process \d+ exits successfully", done.stdout + done.stderr)) == 2
    assert not _left(output), "a process is left"
    result = json.loads((output / "result.json").read_text())
    about = json.loads((output / "run.json").read_text())
    assert result["steps"] == 2 and about["processes"] == 2
    assert sorted(p.name for p in (output / "model").glob("*.safetensors")) == ["model.safetensors"]


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command with a time limit, after which its whole group of processes is ended."""
    with subprocess.Popen(
        command, env=environment, cwd=processes.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=processes.LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _left(output: Path) -> list[Path]:
    """Processes that were started with output as their mark."""
    return [p for p in Path("/proc").glob("[0-9]*/environ") if _mentions(p, str(output))]


def _mentions(environ: Path, text: str) -> bool:
    try:
        return f"DIED_MARK={text}".encode() in environ.read_bytes() and environ.parent.name != str(
            os.getpid()
        )
    except OSError:
        return False
