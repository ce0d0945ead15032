"""`dschat compare`: two runs that are the same, and every way not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dschat import cli
from dschat.rlhf import compare

LINES = [
    {"step": 1, "loss": 2.0, "policy/loss": 1e-9, "grad_norm": None, "time/step_s": 3.0},
    {"step": 2, "loss": 1.5, "policy/loss": 2e-9, "grad_norm": 1.0, "time/step_s": 3.0},
]
ANSWERS = [{"step": 1, "prompt": "Once", "completion": " upon", "score": 0.5}]


def make(folder: Path, lines: list[dict[str, Any]] = LINES, answers: list[dict[str, Any]] = ANSWERS) -> str:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": "grpo", "device": "cpu", "processes": 2}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return str(folder)


def changed(step: int, **numbers: Any) -> list[dict[str, Any]]:
    return [line | numbers if line["step"] == step else line for line in LINES]


def test_equal_but_for_time_and_rounding(tmp_path, capsys):
    a = make(tmp_path / "a")
    lines = [
        line | {"loss": line["loss"] * (1 + 1e-4 / line["step"]), "policy/loss": -1e-9, "time/step_s": 9.0}
        for line in LINES
    ]
    b = make(tmp_path / "b", lines, [ANSWERS[0] | {"score": 0.5000001}])
    assert cli.main(["compare", a, b]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"grpo: {a} and {b} (2 x cpu, 2 x cpu)"
    assert out[1] == "  loss: 0.0001 (step 1)" and out[-2:] == [
        "  answers kept: 1 of 1 equal",
        "equal within 0.001",
    ]
    assert "  grad_norm: 0" in out and not any("time/" in line for line in out)
    assert cli.main(["compare", a, b, "--bound", "1e-5"]) == cli.EXIT_NOT_PASSED


@pytest.mark.parametrize(
    ("lines", "answers", "said"),
    [
        (changed(2, loss=1.6), ANSWERS, "  loss: 0.063 (step 2), beyond 0.001"),
        (changed(1, grad_norm=1.0), ANSWERS, "  grad_norm: inf (step 1), beyond 0.001"),
        (changed(1, entropy=1.0), ANSWERS, "  only in one: entropy"),
        (LINES[:1], ANSWERS, "  steps: 2 and 1 are logged, 1 in both"),
        (
            LINES,
            [ANSWERS[0] | {"completion": " a"}],
            "  answers kept: 0 of 1 equal, the first unlike one of step 1",
        ),
        (LINES, ANSWERS * 2, "  answers kept: 1 of 1 equal, the other has 2"),
    ],
)
def test_what_differs_is_named(tmp_path, capsys, lines, answers, said):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", lines, answers)
    assert cli.main(["compare", a, b]) == cli.EXIT_NOT_PASSED
    out = capsys.readouterr().out.splitlines()
    assert said in out and out[-1] == "NOT equal within 0.001"


def test_pipelines_and_bad_input(tmp_path, capsys):
    for name in ("a", "b"):
        make(tmp_path / name / "sft")
    make(tmp_path / "b" / "ppo")
    found = compare.compare(tmp_path / "a", tmp_path / "b", 1e-3)
    assert not found.good and f"ppo: only in {tmp_path / 'b'}" in found.lines
    assert cli.main(["compare", str(tmp_path / "a")]) == cli.EXIT_BAD_INPUT
    assert "compare needs two runs: dschat compare runs/a runs/b" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path)]) == cli.EXIT_BAD_INPUT
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["compare", "a", "b", "--bound", "-1"]) == cli.EXIT_BAD_INPUT
