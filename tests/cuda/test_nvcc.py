"""csrc/cuda for real: it compiles for every architecture without spills, and the library without a GPU says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from resources import ARCHS, TABLE, compile_source, nvcc_or_reason, sources

from dschat_kernels import build
from dschat_kernels.cuda import CudaKernels

NVCC, REASON = nvcc_or_reason()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=REASON)


def stem(name: str) -> str:
    return Path(name).stem


@needs_nvcc
@pytest.mark.parametrize("name", sources(), ids=stem)
def test_compiles_without_spills(name: str) -> None:
    """On every architecture; with the table's nvcc also with no more registers or shared memory than it says."""
    table = json.loads(TABLE.read_text())
    found = compile_source(build.cuda_build("sm_80"), name)
    assert set(found) == set(ARCHS)
    for arch, rows in found.items():
        listed = {k: v for k, v in table["kernels"][arch].items() if k.startswith(f"{stem(name)}: ")}
        assert rows.keys() == listed.keys(), "kernels came or went: run tests/cuda/resources.py"
        for kernel, row in rows.items():
            assert row["spills"] == 0, f"{kernel} spills on {arch}: {row}"
            if NVCC is not None and table["nvcc"] == NVCC.version:
                worse = [field for field in row if row[field] > listed[kernel][field]]
                assert not worse, f"{kernel} on {arch} grew in {worse}: {row}, was {listed[kernel]}"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the ops themselves are tested")
def test_the_real_library_without_a_gpu_says_so() -> None:
    """It builds and loads; a launch is an error of CUDA's, not a crash."""
    kernels = CudaKernels(build.cuda_build("sm_80").load(), 0)
    with pytest.raises(
        RuntimeError, match="bias_act: CUDA reports error 35, CUDA driver version is insufficient"
    ):
        kernels.bias_act(0, 4, 16, 0, 16, 1, 8, 8)


def test_a_gpu_before_ampere_is_refused() -> None:
    with pytest.raises(build.BuildError, match=r"need a GPU from sm_80 .*, and this one is sm_75"):
        build.load_cuda((7, 5))


def test_without_nvcc_the_reason_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(build.BuildError, match="No nvcc was found: install the CUDA toolkit"):
        build.find_nvcc()
