"""The ARM levels without Python: their vector functions and products, compiled by a cross compiler and run in an
emulator of the processor; by this machine's compiler, as they are, where it is an ARM one. `.ci/arm` has PyTorch there
too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dschat_kernels import build

HERE = Path(__file__).parent
BY_DOTS = {"bfloat16", "int8_bfloat16"}  # BFDOT rounds otherwise
NAMES = {"arithmetic", "compare", "rounding", "functions", "ldexp", "pairs", "integers", "quantise"}


def compile_and_run(level: str, folder: Path) -> list[tuple[str, str]]:
    """(name, digest) of every line of bits.cpp under a level."""
    if "neon" in build.isa_levels():
        if level not in build.runnable_isas():
            pytest.skip(f"this machine does not run {level}")
        compiler, options, emulator = build.find_compiler().argv, [], []
    else:
        cross, qemu = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
        if cross is None or qemu is None:
            pytest.skip("no ARM machine, and no aarch64-linux-gnu-g++ with qemu-aarch64 in its place")
        compiler, options, emulator = (cross,), ["-static"], [qemu, "-cpu", "max"]
    kernels = build.cpu_build(level)
    sources = [HERE / "bits.cpp", kernels.root / "cpu/gemm.cpp", kernels.root / "cpu/gemm_int8.cpp"]
    flags = [*kernels.compile_flags, "-Werror", f"-I{kernels.root}", f"-I{kernels.root / 'cpu'}", *options]
    program = folder / level
    made = subprocess.run(
        [*compiler, *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return [(name, digest) for name, digest in map(str.split, done.stdout.splitlines())]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    lines = compile_and_run("portable", tmp_path_factory.mktemp("portable"))
    assert {name for name, _ in lines} > NAMES | BY_DOTS
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("level", ["neon", "neon_bf16"])
def test_a_level_has_the_bits_of_portable_code(
    level: str, portable: list[tuple[str, str]], tmp_path: Path
) -> None:
    """Every function and product, but for bfloat16 ones by BFDOT, which bits.cpp holds to float64 only. It holds all
    products of 1 to 13 rows to float64, and each row to its bits in every batch."""
    lines = compile_and_run(level, tmp_path)
    assert len(lines) == len(portable)
    free = BY_DOTS if level == "neon_bf16" else set()
    wrong = [name for (name, bits), expected in zip(lines, portable, strict=True) if (name, bits) != expected]
    assert set(wrong) <= free
    assert bool(wrong) == bool(free), "the dots were not used"
