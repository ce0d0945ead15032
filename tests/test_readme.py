"""The README's Python runs, its commands exist, and its tables are the measured ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dschat import config as configs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
MODEL = ROOT / "tests" / "data" / "stories260k"


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["patch", "engine"]
)
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    batch = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
    names = {
        "model": model,
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-4),
    }
    exec(block, names)


def test_commands_and_files_exist() -> None:
    known = {*configs.COMMANDS, "launch"}
    lines = re.findall(r"^dschat (.+?)(?:  | \.\.\. )", README, re.MULTILINE)
    for line in lines:
        words = line.split()
        assert words[0] in known or " ".join(words[:2]) in known, line
    short = set(re.findall(r'^"\$bin/dschat" ([a-z]+)|\| "\$bin/dschat" ([a-z]+)', CI, re.MULTILINE))
    tried = {word for pair in short for word in pair if word} | {
        "compare",
        "dpo",
        "replay",
        "serve",
    }  # these have tests of their own
    assert {line.split()[0] for line in lines} == tried, (
        "what the README lists runs in .ci/run in a short form"
    )
    for path in re.findall(r"`?((?:recipes|benchmarks|tests)/[\w/.-]+)", README):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_tables_show_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
