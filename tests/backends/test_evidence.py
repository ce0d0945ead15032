"""docs/gpu.md says what the suite runs, and the suite has every op."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from benchmarks import gpu_sources
from dschat_kernels.ops import _common
from tests.backends import evidence
from tests.backends.backends import BACKENDS, Backend
from tests.backends.cases import CASES
from tests.backends.evidence import PAGE, README, REPO, page, readme, unchanged
from tests.helpers import CPU_ONLY

SINCE = {"linear_int8", "low_rank_grads"}
"""Ops that came after the run on a GPU."""


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.backends.evidence"
    assert README.read_text() == readme(), "run python -m tests.backends.evidence"


def test_a_kernel_whose_source_changed_has_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the tables nor in the README's, and its time gets an asterisk."""
    run = json.loads(evidence.RUN.read_text())
    cell = "| `rms_norm` | fp32, bf16, fp16 |  |"
    assert "rms_norm" in unchanged(run, "cuda") and page().count(cell) == 2
    for kind, place in (("cuda", 2), ("triton", 3)):
        with monkeypatch.context() as patch:
            changed = gpu_sources.fingerprints()
            changed[kind]["rms_norm"] = "another"
            patch.setattr(evidence, "_fingerprints", lambda changed=changed: changed)
            assert page().count(cell) == 1 and page().count("| `rms_norm` | - | fp32, bf16, fp16 |") == 1
            assert page().count("\\*") > evidence.PAGE.read_text().count("\\*")
            rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in evidence.table()[2:]]
            assert "\n".join(evidence.table()) in readme()
            column = {op: row[place] for row in rows for op in row[0].split(", ")}
            assert column["`rms_norm`"] == "compiled code: bf16; source: fp32, fp16"
            assert column["`layer_norm`"] == "GPU: fp32, bf16, fp16"


def test_every_op_has_a_fingerprint() -> None:
    found = gpu_sources.fingerprints()
    assert all(set(ops) == {name.strip("_") for name in CASES} for ops in found.values())
    recorded = json.loads(evidence.RUN.read_text())["sources"]
    assert {kind: set(ops) for kind, ops in recorded.items()} == {
        kind: set(ops) - SINCE for kind, ops in found.items()
    }


@pytest.mark.parametrize(
    ("file", "before", "after", "touched"),
    [
        ("csrc/cuda/row.cuh", "\n", "\n// A comment.\n\n", {}),
        ("csrc/cuda/row.cuh", "{", "{ int more = 0;", {"cuda": {"rms_norm", "layer_norm"}}),
        ("csrc/cuda/sample.cu", "1024", "512", {"cuda": {"sample"}}),
        ("dschat_kernels/triton/_rows.py", "import torch\n", "import torch\n\n# A comment.\n", {}),
        ("dschat_kernels/triton/linear.py", "\nimport torch\n", "\nimport torch\n\nMORE = 1\n",
         {"triton": {"linear", "linear_int8", "token_logprobs"}}),
        ("dschat_kernels/cache.py", "\nCHUNK = ", "\nCHUNK = 2 * ",
         {"triton": {"attention", "attention_decode", "packed_attention"}}),
    ],
)  # fmt: skip
def test_a_fingerprint_is_of_the_code_that_is_reached(
    file: str, before: str, after: str, touched: dict[str, set[str]], tmp_path: Path
) -> None:
    for folder in ("csrc/cuda", "dschat_kernels"):
        shutil.copytree(gpu_sources.ROOT / folder, tmp_path / folder)
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after, 1))
    now, then = gpu_sources.fingerprints(tmp_path), gpu_sources.fingerprints()
    changed = {kind: {op for op in ops if ops[op] != then[kind][op]} for kind, ops in now.items()}
    assert changed == {"cuda": set(), "triton": set(), **touched}


def test_every_op_has_a_case() -> None:
    """Gradients are part of an op's case. What has kernels for the CPU only is tested in tests/ops."""
    _common.offered("cuda")
    assert not CPU_ONLY & _common.offered("triton").keys()
    ops = {op for op in _common._OPS if not op.endswith("_backward")}
    assert ops - CPU_ONLY == {name.strip("_") for name in CASES}


def test_what_needs_a_gpu_is_marked() -> None:
    """`make gpu-check` runs the tests marked `gpu`: among them every case on a GPU's backends."""
    seen = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.backends.{path.stem}")
        for name, function in vars(module).items():
            for mark in getattr(function, "pytestmark", ()) if name.startswith("test_") else ():
                for given in mark.args[1] if mark.name == "parametrize" else ():
                    values = given.values if isinstance(given, ParameterSet) else [given]
                    marks = [m.name for m in given.marks] if isinstance(given, ParameterSet) else []
                    for backend in (value for value in values if isinstance(value, Backend)):
                        assert ("gpu" in marks) == (backend.device == "cuda"), (
                            f"{path.name}: {name}: {backend.name}"
                        )
                        seen.add((path.stem, backend.name))
    on_gpus = {b.name for b in BACKENDS if b.device == "cuda"}
    assert {("test_backends", name) for name in on_gpus} | {("test_tiles", "triton-gpu")} <= seen
    for path in (REPO / "tests").rglob("test_*.py"):
        skips = re.search(r"skip\w*\([^)]*not torch\.cuda\.is_available", path.read_text())
        assert not skips, f"{path.name}: give it the mark `gpu`, which skips where there is no GPU"


def test_every_backend_runs_by_night() -> None:
    assert all(set(b.dtypes) <= set(b.nightly) and b.nightly for b in BACKENDS)
