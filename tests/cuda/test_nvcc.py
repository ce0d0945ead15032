"""csrc/cuda for real: it compiles for every architecture without spills, and the library without a GPU says so."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from resources import ARCHS, FIELDS, INSTRUCTIONS, TABLE, compile_source, nvcc_or_reason, sources

from benchmarks.gpu_sources import cuda_code
from dschat_kernels import build
from dschat_kernels.cuda import CudaKernels

ROOT = Path(__file__).resolve().parents[2]
NVCC, REASON = nvcc_or_reason()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=REASON)


def stem(name: str) -> str:
    return Path(name).stem


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Future[Any]]]:
    """What every source compiles to, begun for all at once: nvcc works on one core, and takes minutes."""
    target = build.cuda_build("sm_80")
    pool = ThreadPoolExecutor(build.max_jobs())
    try:
        yield {name: pool.submit(compile_source, target, name) for name in sources()}
    finally:
        pool.shutdown(cancel_futures=True)


@needs_nvcc
@pytest.mark.parametrize("name", sources(), ids=stem)
def test_compiles_without_spills(name: str, compiled: dict[str, Future[Any]]) -> None:
    """On every architecture; with the table's nvcc also with no more registers or shared memory, no lower occupancy,
    and the kinds of instructions that it says."""
    table = json.loads(TABLE.read_text())
    found = compiled[name].result()
    assert set(found) == set(ARCHS)
    for arch, rows in found.items():
        listed = {k: v for k, v in table["kernels"][arch].items() if k.startswith(f"{stem(name)}: ")}
        assert rows.keys() == listed.keys(), "kernels came or went: run tests/cuda/resources.py"
        for kernel, row in rows.items():
            assert row["spills"] == 0, f"{kernel} spills on {arch}: {row}"
            if NVCC is not None and table["nvcc"] == NVCC.version:
                worse = worse_fields(row, listed[kernel])
                assert not worse, f"{kernel} on {arch} is worse in {worse}: {row}, was {listed[kernel]}"


def worse_fields(row: dict[str, int], listed: dict[str, int]) -> list[str]:
    """Fewer wide accesses are only worse where there are none left: a compiler may unroll less. Rows made without a
    disassembler have no instructions."""
    worse = [field for field in FIELDS if row[field] > listed[field]]
    worse += [field for field in INSTRUCTIONS if field in row and listed.get(field) and not row[field]]
    return worse + ["occupancy"] * (row["occupancy"] < listed["occupancy"])


def test_a_worse_kernel_is_noticed() -> None:
    good = {"registers": 40, "stack": 0, "spills": 0, "shared": 128, "threads": 256, "occupancy": 75, "wide": 4,
            "tensor": 8}  # fmt: skip
    assert worse_fields(good, good) == []
    for change in (
        {"registers": 41},
        {"stack": 8},
        {"shared": 256},
        {"occupancy": 50},
        {"wide": 0},
        {"tensor": 0},
    ):
        assert worse_fields({**good, **change}, good) == list(change)


def test_the_table_has_no_spills_and_uses_the_hardware() -> None:
    """Streaming kernels have 128-bit accesses and leave room for half the threads; products in 16 bits use the tensor
    cores."""
    for arch, rows in json.loads(TABLE.read_text())["kernels"].items():
        for kernel, row in rows.items():
            assert row["spills"] == row["stack"] == 0, f"{kernel} on {arch}"
            source, _, name = kernel.partition(": ")
            streaming = source in ("rms_norm", "layer_norm", "bias_act", "gated_act")
            if streaming and name.startswith(("forward", "backward")):
                assert row["wide"] and row["occupancy"] >= 50, f"{kernel} on {arch}: {row}"
            kinds = ("attention_tiles", "linear_tiles", "chunk_sums", "logit_gradients", "product_tiles")
            products = name.startswith(kinds)
            if products and "<float" not in name and "tensor" in row:
                assert row["tensor"], f"{kernel} on {arch}: {row}"


GLOBAL = re.compile(r"__global__ void ?(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\))? ?(\w+)\(")


@pytest.mark.parametrize("name", sources(), ids=stem)
def test_the_table_has_the_kernels_of_the_sources(name: str) -> None:
    """Without nvcc too: those that a file defines, and none that neither it nor its headers define."""
    code = cuda_code(ROOT, stem(name))
    own, known = GLOBAL.findall(code[name]), GLOBAL.findall("\n".join(code.values()))
    for arch, rows in json.loads(TABLE.read_text())["kernels"].items():
        listed = {key.split(": ")[1].split("<")[0] for key in rows if key.startswith(f"{stem(name)}: ")}
        assert set(own) <= listed <= set(known), f"{arch}: run python -m tests.cuda.resources"


def test_the_table_has_no_files_that_are_gone() -> None:
    for rows in json.loads(TABLE.read_text())["kernels"].values():
        assert {key.split(": ")[0] for key in rows} <= {stem(name) for name in sources()}


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


@needs_nvcc
@pytest.mark.slow
def test_a_library_from_setup_py_needs_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What setup.py leaves is a module and its meta.json, as the cache has them; neither nvcc nor the permission to
    compile is needed then, and other sources do without it."""
    shutil.copytree(build.cuda_build("sm_80").build(), tmp_path / "sm_80")
    monkeypatch.setattr(build, "ahead_of_time_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "_cuda_modules", {})
    monkeypatch.setattr(build, "find_nvcc", no_nvcc)
    monkeypatch.setenv("DSCHAT_DISABLE_JIT", "1")
    assert build.load_cuda((8, 0)).row_block == 64

    monkeypatch.setattr(build, "_cuda_modules", {})
    monkeypatch.setattr(build, "_NVCC_FLAGS", (*build._NVCC_FLAGS, "-DOTHER"))
    with pytest.raises(build.BuildError, match="DSCHAT_DISABLE_JIT is set and no compiled kernels lie ready"):
        build.load_cuda((8, 0))


def no_nvcc() -> Any:
    raise build.BuildError("No nvcc was found.")


SETUP = """
import runpy, sys
import setuptools
setuptools.setup = lambda **_: None
space = runpy.run_path("setup.py")["levels"].__globals__
build, made = space["build_module"](), []
def compile_into(self, folder, **_):
    cuda = sum(name.endswith(".cu") for name in self.sources)
    made.append((self.name, folder.parent.name, folder.name, len(self.sources), cuda))
build.KernelBuild.compile_into = compile_into
space["build_module"] = lambda: build
command = space["CompileKernels"](setuptools.Distribution())
command.inplace, command.build_lib = False, "somewhere"
command.run()
print(made)
"""


def test_setup_py_compiles_by_the_same_list() -> None:
    """DSCHAT_AOT names architectures beside ISA levels; build_ext puts each into a folder of its own, from the list of
    the JIT. Nothing is compiled here."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "DSCHAT_AOT": "portable, sm_80,sm_120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = ast.literal_eval(done.stdout)
    count = len(build.cuda_build("sm_80").sources)
    assert [row[:3] for row in made] == [
        ("_dschat_cpu_portable", "_native", "portable"),
        ("_dschat_cuda_sm_80", "_native", "sm_80"),
        ("_dschat_cuda_sm_120", "_native", "sm_120"),
    ]
    assert made[0][4] == 0 and made[1][3:] == made[2][3:] == (count, count - 1)


def test_setup_py_refuses_an_unknown_architecture() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "DSCHAT_AOT": "sm_70"},
    )  # fmt: skip
    assert done.returncode != 0 and "DSCHAT_AOT has 'sm_70': give 1, cuda, or some of portable" in done.stderr


def test_a_gpu_before_ampere_is_refused() -> None:
    with pytest.raises(build.BuildError, match=r"need a GPU from sm_80 .*, and this one is sm_75"):
        build.load_cuda((7, 5))


def test_without_nvcc_the_reason_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(build.BuildError, match="No nvcc was found: install the CUDA toolkit"):
        build.find_nvcc()
