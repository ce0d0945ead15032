"""What nvcc makes of csrc/cuda: registers, spills and shared memory of every kernel on every architecture.

    python tests/cuda/resources.py        prints the table, and writes it to tests/cuda/resources.json

test_nvcc.py compares a fresh compilation with the file, so that a kernel that begins to spill or to grow is noticed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dschat_kernels.build import BuildError, Compiler, CudaBuild, cuda_build, find_nvcc, max_jobs

TABLE = Path(__file__).with_name("resources.json")
ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
Resources = dict[str, dict[str, int]]  # by "<file>: <kernel>"
FIELDS = ("registers", "stack", "spills", "shared")


def nvcc_or_reason() -> tuple[Compiler | None, str]:
    try:
        return find_nvcc(), ""
    except BuildError as error:
        return None, error.sentence


def sources() -> list[str]:
    return [name for name in cuda_build("sm_80").sources if name.endswith(".cu")]


def compile_source(build: CudaBuild, name: str) -> dict[str, Resources]:
    """The resources by architecture of a source's kernels."""
    codes = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    flags = [flag for flag in build.compile_flags if not flag.startswith("-gencode")]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *find_nvcc().argv,
            *flags,
            *codes,
            "-Xptxas=-v",
            f"-I{build.root}",
            "-c",
            str(build.root / name),
        ]
        done = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} does not compile:\n{done.stderr}")
    found: dict[str, Resources] = {arch: {} for arch in ARCHS}
    for arch, kernel, row in _parse(done.stderr):
        found[arch][f"{Path(name).stem}: {kernel}"] = row
    return found


def _parse(text: str) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel, resources) of ptxas' report."""
    entry = (
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    )
    for mangled, arch, stack, stores, loads, registers, rest in re.findall(entry, text, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = (int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0)
        yield arch, _readable(mangled), dict(zip(FIELDS, numbers, strict=True))


def _readable(mangled: str) -> str:
    """The kernel's name and template arguments."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|dschat::cuda::", "", text).removeprefix("void ")
    text = re.sub(r"\((int|bool)\)", "", text)
    return re.split(r"\((?!anonymous)", text)[0]


def measure() -> dict[str, Resources]:
    build = cuda_build("sm_80")
    table: dict[str, Resources] = {arch: {} for arch in ARCHS}
    with ThreadPoolExecutor(max_jobs()) as pool:
        for found in pool.map(lambda name: compile_source(build, name), sources()):
            for arch, rows in found.items():
                table[arch].update(rows)
    return {arch: dict(sorted(rows.items())) for arch, rows in table.items()}


def show(table: dict[str, Resources]) -> str:
    lines = [f"{'kernel':60s} " + " ".join(f"{arch:>18s}" for arch in ARCHS)]
    for kernel in table[ARCHS[0]]:
        cells = (table[arch][kernel] for arch in ARCHS)
        lines.append(
            f"{kernel:60s} " + " ".join(f"{c['registers']:4d} regs {c['spills']:3d} sp" for c in cells)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    nvcc, reason = nvcc_or_reason()
    if nvcc is None:
        sys.exit(reason)
    measured = measure()
    TABLE.write_text(json.dumps({"nvcc": nvcc.version, "kernels": measured}, indent=1) + "\n")
    print(show(measured))
