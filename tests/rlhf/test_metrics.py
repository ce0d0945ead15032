"""Metrics: whole lines, phase times, dropped steps on resume, tables; the report's picture."""

from __future__ import annotations

import io
import json
import time

import pytest
import torch
from rich.console import Console

from dschat.rlhf import metrics as M


def quiet(**kw) -> Console:
    return Console(file=io.StringIO(), width=120, **kw)


def test_lines_phases_and_memory(tmp_path):
    with M.Metrics(tmp_path, "sft", 2, console=quiet()) as metrics:
        with metrics.phase("update"):
            time.sleep(0.01)
        with metrics.phase("update"):
            time.sleep(0.01)
        metrics.log(1, {"loss": torch.tensor(0.5), "bad": float("nan")}, show=["loss"])
        metrics.log(2, {"loss": 0.25})
    first, second = M.read_lines(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["bad"]) == (1, 0.5, None) and second["loss"] == 0.25
    assert first["time/update_s"] >= 0.02 and "time/update_s" not in second
    assert first["time/step_s"] >= first["time/update_s"] and first["time/peak_memory_gib"] > 0
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_resume_writes_no_step_twice(tmp_path):
    """checklist 2.1 #25: what a killed run wrote after its checkpoint disappears before it is written
    again.
    """
    with M.Metrics(tmp_path, "sft", 4, tensorboard=False, progress=False) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"loss": float(step)})
            metrics.completions(step, [{"prompt": "p", "completion": "c", "reward": 1.0}])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    with M.Metrics(tmp_path, "sft", 4, tensorboard=False, progress=False, after_step=2) as metrics:
        metrics.log(3, {"loss": 30.0})
    assert [(v["step"], v["loss"]) for v in M.read_lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert [v["step"] for v in M.read_lines(tmp_path / "completions.jsonl")] == [1, 2]
    assert M.read_lines(tmp_path / "nothing.jsonl") == []


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_and_table(tmp_path, terminal):
    console = quiet(force_terminal=terminal)
    with M.Metrics(tmp_path, "ppo", 3, tensorboard=False, console=console) as metrics:
        metrics.say("hello [brackets]")
        metrics.log(1, {"score/mean": 0.1234}, show=["score/mean"])
        metrics.log(3, {"score/mean": 0.5}, show=["score/mean"])
        rows = [{"prompt": "[bold]x " * 30, "completion": "answer", "reward": 1.23456}]
        metrics.completions(3, rows, show=1, title="after")
    text = console.file.getvalue()
    assert (
        "hello [brackets]" in text
        and "mean 0.5" in text
        and "answer" in text
        and "1.23" in text
        and "after" in text
    )
    assert json.loads((tmp_path / "completions.jsonl").read_text())["prompt"] == rows[0]["prompt"], (
        "the file keeps all"
    )


def test_peak_memory_starts_anew():
    M.reset_peak_memory()
    before = M.peak_memory_gib()
    x = torch.ones(50_000_000)
    assert M.peak_memory_gib() >= before + 0.1
    del x


def test_report(tmp_path):
    from dschat.rlhf import report

    assert report.plot(tmp_path, tmp_path / "x.png") is None
    for stage, keys in (("sft", ["loss"]), ("ppo", ["score/mean", "kl/sequence"])):
        with M.Metrics(tmp_path / stage, stage, 3, tensorboard=False, progress=False) as metrics:
            for step in range(1, 31):
                metrics.log(step, dict.fromkeys(keys, 1.0 / step))
    rows = [{"prompt": "a|b\nc", "before": "<x>", "reward": 1.0}]
    page = report.write(tmp_path, "A run", ["It went <well>."], rows)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "- It went <well>." in page.read_text() and "a\\|b c" in page.read_text()
    assert "&lt;well&gt;" in (tmp_path / "report.html").read_text()
    assert report.stage_folders(tmp_path) == {"sft": tmp_path / "sft", "ppo": tmp_path / "ppo"}
