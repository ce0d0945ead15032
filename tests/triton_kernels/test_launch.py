"""Launches: which configuration, when it is tuned, and how tensors are handed over."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dschat_kernels.triton import _launch, linear, rms_norm
from dschat_kernels.triton._launch import Config, Launch, aligned, as_rows, launch
from tests.helpers import CPU_ONLY

DEFAULT, OTHER = Config({"BLOCK": 64}, num_warps=4), Config({"BLOCK": 64}, num_warps=8)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    seen: list[Launch] = []
    monkeypatch.setattr(_launch, "run", seen.append)
    monkeypatch.setattr(_launch, "_FASTEST", {})
    return seen


def test_the_default_runs_unless_tuning_is_asked_for_on_a_gpu(
    runs: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(rms_norm._forward, (3,), {"x": torch.zeros(4)}, DEFAULT, [OTHER])
    monkeypatch.setenv("DSCHAT_TRITON_AUTOTUNE", "1")
    launch(rms_norm._forward, (3,), {"x": torch.zeros(4)}, DEFAULT, [OTHER])  # not on a GPU
    assert [run.config for run in runs] == [DEFAULT, DEFAULT]


def test_tuning_keeps_the_fastest_whatever_the_number_of_rows(
    runs: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def time(this: Launch) -> float:
        timed.append(this.config)
        return 1.0 if this.config is OTHER else 2.0

    monkeypatch.setattr(_launch, "_tuning", lambda arguments: True)
    monkeypatch.setattr(_launch, "_time", time)
    for rows, hidden in ((3, 64), (5, 64), (7, 32)):
        arguments = {"dy": torch.zeros(4), "rows": rows, "hidden": hidden}
        launch(rms_norm._backward, (rows,), arguments, DEFAULT, [OTHER])
    assert [run.config for run in runs] == [OTHER] * 3
    assert timed == [DEFAULT, OTHER] * 2, "once for each width"


def test_a_tuned_product_covers_its_result(runs: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rows chooses the tile: what was fastest for one tile must not run on the grid of another."""
    monkeypatch.setattr(_launch, "_tuning", lambda arguments: True)
    monkeypatch.setattr(_launch, "_time", lambda this: this.config.num_stages)
    weight = torch.zeros(1024, 256, dtype=torch.bfloat16)
    for rows in (3, 4096, 100, 3):
        linear.linear(torch.zeros(rows, 256).bfloat16(), weight, None, 1024, 256, False, "none", None, False)
        values = {**runs[-1].arguments, **runs[-1].config.blocks}
        assert runs[-1].grid == (-(-rows // values["M"]), -(-1024 // values["N"]))
    assert len({values["M"] * values["N"] for values in (run.arguments for run in runs)}) == 3, (
        "tiles of their own"
    )


def test_an_empty_grid_runs_nothing(runs: list[Launch]) -> None:
    launch(rms_norm._forward, (0,), {"x": torch.zeros(4)}, DEFAULT)
    assert runs == []


def test_tensors_are_handed_over_aligned() -> None:
    x = torch.randn(9, 5)
    for part in (x, x[1:], x[:, 1:], x[:0], x[3]):
        assert aligned(part).data_ptr() % 16 == 0 and torch.equal(aligned(part), part)
        rows, stride = as_rows(part)
        assert rows.data_ptr() % 16 == 0 and torch.equal(rows.reshape(part.shape), part)
        assert stride == part.shape[-1]
    assert aligned(x).data_ptr() == x.data_ptr()
    wide = torch.randn(9, 64)
    assert as_rows(wide[:, 16:32])[1] == 64 and as_rows(wide[:, :40])[1] == 40


def test_every_op_has_the_schema_of_the_others() -> None:
    from dschat_kernels import triton
    from dschat_kernels.ops import _common

    _common.offered("triton")
    for op in triton.implementations():
        ours = str(getattr(torch.ops.dschat_triton, op).default._schema).removeprefix("dschat_triton::")
        assert ours == str(getattr(torch.ops.dschat, op).default._schema).removeprefix("dschat::")
    assert set(triton.implementations()) == set(_common._OPS) - CPU_ONLY, "an op is missing on triton"


def test_importing_the_backend_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, dschat_kernels.triton as backend, dschat_kernels as dk
assert not backend.installed() and "Triton is not installed" in backend.why_not("rms_norm", [])
dk.rms_norm(torch.randn(2, 4), torch.ones(4), backend="reference")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
