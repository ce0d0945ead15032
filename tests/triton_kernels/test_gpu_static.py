"""Compiled code of the kernels against benchmarks/results/gpu_static.json: registers, spills, shared memory, wide
accesses and tensor-core instructions.

Here a few kernels are compiled for two architectures; `DSCHAT_TEST_ALL_KERNELS=1` compiles every kernel for all five.
The compiler runs in a process of its own, as another test's interpreter must not be in its way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_static

REPO = Path(__file__).resolve().parents[2]
FEW = ("rms_norm.bfloat16", "attention_decode.bfloat16", "sample_all.bfloat16", "linear.float16")


def compare(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_static", "--check", *arguments],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("only", FEW)
def test_compiled_code_is_no_worse_than_the_table(only: str) -> None:
    compare("--only", only, "--arch", "sm_80", "--arch", "gfx942")


@pytest.mark.skipif(
    os.environ.get("DSCHAT_TEST_ALL_KERNELS") != "1", reason="DSCHAT_TEST_ALL_KERNELS=1 compiles all"
)
def test_all_compiled_code_is_no_worse_than_the_table() -> None:
    compare()


def test_the_table_has_every_kernel_and_no_spills() -> None:
    table = json.loads(gpu_static.TABLE.read_text())
    assert gpu_static.strangers(table) == []
    for key, row in table.items():
        assert row["spills"] == 0 and row["shared"] <= gpu_static.SHARED_LIMIT[key.rpartition("/")[2]], key
        multiplies = any(name in key for name in ("attention", "linear/")) and not key.split("/")[1] == "join"
        if multiplies and ("bfloat16" in key or "float16" in key):
            assert row["tensor"], f"{key} uses no tensor core"


def test_a_worse_kernel_is_noticed() -> None:
    good = {"registers": 40, "spills": 0, "shared": 1024, "wide": 4, "tensor": 8, "warps": 4}
    table = {"op/kernel/sm_80": good}
    assert gpu_static.problems("op/kernel/sm_80", good, table) == []
    for change in ({"registers": 49}, {"spills": 1}, {"shared": 2048}, {"wide": 0}, {"tensor": 0}):
        assert len(gpu_static.problems("op/kernel/sm_80", {**good, **change}, table)) == 1, change
    assert gpu_static.problems("op/other/sm_80", good, table)


def test_rows_too_many_and_too_few_are_named_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of what nothing launches, and rows that are missing; writing another op's rows drops the first, and still
    demands the others."""
    table = json.loads(gpu_static.TABLE.read_text())
    gone, new = "rms_norm.bfloat16/former/sm_80", "rope.bfloat16/rope/sm_80"
    wrong = {**table, gone: table[new]}
    del wrong[new]
    found = gpu_static.strangers(wrong)
    assert [line.split(" ")[0] for line in found] == [gone, new]
    assert found[1].endswith("--write --only rope.bfloat16")

    monkeypatch.setattr(gpu_static, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(gpu_static, "compile_for", lambda launch, arch: {**table[new], "registers": 1})
    monkeypatch.setattr(sys, "argv", ["gpu_static", "--write", "--only", "bias_act.float16"])
    gpu_static.write(wrong)
    assert gpu_static.main() == 1
    written = json.loads(gpu_static.TABLE.read_text())
    changed = {key for key in table if written.get(key) != table[key]}
    assert changed == {new, *(key for key in table if key.startswith("bias_act.float16/"))}
    assert gone not in written


def test_the_bound_is_the_data_sheets() -> None:
    reading = gpu_static.Specimen("copy", lambda: None, 2039 * 10**6, 0, "bfloat16")
    assert gpu_static.bound(reading, gpu_static.GPUS[0]) == pytest.approx(1000)
    multiplying = gpu_static.Specimen("product", lambda: None, 0, 312 * 10**9, "bfloat16")
    assert gpu_static.bound(multiplying, gpu_static.GPUS[0]) == pytest.approx(1000)
