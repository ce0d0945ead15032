"""`dschat report --table`: sizes, times and phases against what the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dschat import cli
from dschat.config import ConfigError
from dschat.rlhf import headline


def make(folder: Path, stage: str, steps: list[float], weights: int = 0, done: bool = True, **about) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for i, whole in enumerate(steps, 1):
        line = {"step": i, "time/step_s": whole}
        if stage in ("ppo", "grpo"):
            line |= {"time/decode_s": 0.5, "time/prefill_s": 0.25, "time/score_s": 0.5, "time/update_s": 0.5}
            line |= {"rollout/length": 20.0 + i}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    config = {"model": "nowhere", "prompts_per_step": 4, "samples_per_prompt": 2, **about.pop("config", {})}
    (folder / "run.json").write_text(
        json.dumps({"stage": stage, "device": "cpu", "processes": 1, "config": config, **about})
    )
    if done:
        (folder / "result.json").write_text(json.dumps({"steps": len(steps)}))
    if weights:
        (folder / "model").mkdir()
        save_file({"a": torch.zeros(weights // 2, 2)}, folder / "model" / "model.safetensors")
    return folder


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line]


def test_a_pipeline(tmp_path, capsys):
    root = tmp_path / "pipeline"
    make(root / "sft", "sft", [1.0, 2.0])
    make(root / "reward", "reward", [30.0] * 4, weights=2_000_000)
    make(root / "ppo", "ppo", [100.0, 2.0, 3.0], weights=500_000)
    out = tmp_path / "t.md"
    assert cli.main(["report", str(root), "--table", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    head, _, row, phases, _, step = cells(text)
    assert head == ["Model Sizes", "Machine", "Step 1", "Step 2", "Step 3", "Total"]
    assert row == [
        "Actor: 0.5M, Reward: 2M", "1 x CPU", "3 s", "2 min", "1.75 min", "3.8 min",
    ]  # fmt: skip
    assert phases[0] == "Step 3 of"
    # 8 answers of 22.5 tokens in steps of 2.5 s; the first step is left out
    assert step == ["pipeline/ppo", "8", "0.75", "0.5", "0.5", "2.5", "3.2", "72"]


def test_runs_of_their_own(tmp_path):
    """Together until a step comes twice; GPUs and processes are named, and what is not finished."""
    gpu = {"device": "NVIDIA A100", "processes": 8}
    sft = make(tmp_path / "sft", "sft", [7200.0], **gpu)
    ppo = make(tmp_path / "ppo", "ppo", [90000.0], done=False, config={"model": "facebook/opt-13b"}, **gpu)
    other = make(tmp_path / "grpo", "grpo", [3.0], weights=2_000)
    rows = cells(headline.tables([sft, ppo, other]))[2:4]
    assert rows[0] == ["Actor: 12.9B", "8 x NVIDIA A100", "2 h", "-", "25 h so far", "27 h"]
    assert rows[1][1:] == ["1 x CPU", "-", "-", "3 s (GRPO)", "3 s"]
    with pytest.raises(ConfigError, match="is no folder"):
        headline.tables([tmp_path / "none"])


def test_a_run_as_it_is_written(base):
    """The table of a real one has its time and the model's own size."""
    from dschat.config import SFTConfig
    from dschat.rlhf import sft

    sft.train(SFTConfig(**{**base, "max_length": 64, "response": "chosen", "max_steps": 2}))
    row = cells(headline.tables([base["output_dir"]]))[2]
    count = headline.numbers_in(Path(base["output_dir"]) / "model")
    assert 0.2e6 < count < 0.3e6 and row[0] == f"Actor: {count / 1e6:.3g}M"
    assert row[2].endswith(" s") and row[3] == row[4] == "-" and row[5] == row[2]


def test_durations():
    said = {
        0.123: "0.123 s",
        89.0: "89 s",
        90.0: "1.5 min",
        5399.0: "90 min",
        41760.0: "11.6 h",
        155520.0: "1.8 d",
    }
    assert {s: headline.duration(s) for s in said} == said
