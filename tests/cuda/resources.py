"""What nvcc makes of csrc/cuda: registers, spills, shared memory, occupancy and instructions of every kernel on every
architecture.

    python -m tests.cuda.resources        prints the table, and writes it to tests/cuda/resources.json

test_nvcc.py compares what nvcc makes of the present sources with the file, so that a kernel that begins to spill or to
grow, or loses its wide accesses or its matrix instructions, is noticed. `occupancy` is the share, in percent, of a
multiprocessor's threads that registers, block size and static shared memory allow; dynamic shared memory, which the
launch decides, can lower it. `wide` counts 128-bit accesses of global memory, `tensor` matrix instructions.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import gpu_static
from benchmarks.gpu_static import nvidia_tool, occupancy, sass_counts
from dschat_kernels.build import BuildError, Compiler, CudaBuild, cuda_build, find_nvcc, max_jobs
from tests.cuda.kept import kept

TABLE = Path(__file__).with_name("resources.json")
ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
Resources = dict[str, dict[str, int]]  # by "<file>: <kernel>"
FIELDS = ("registers", "stack", "spills", "shared")
INSTRUCTIONS = ("wide", "tensor")


def nvcc_or_reason() -> tuple[Compiler | None, str]:
    try:
        return find_nvcc(), ""
    except BuildError as error:
        return None, error.sentence


def sources() -> list[str]:
    return [name for name in cuda_build("sm_80").sources if name.endswith(".cu")]


def compile_source(build: CudaBuild, name: str) -> dict[str, Resources]:
    """The resources by architecture of a source's kernels; kept in the build cache by all that they depend on."""
    nvcc, tool = find_nvcc(), nvidia_tool("cuobjdump")
    codes = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    flags = [flag for flag in build.compile_flags if not flag.startswith("-gencode")]
    command = [*nvcc.argv, *flags, *codes, "-Xptxas=-v", "-fatbin", "--keep"]
    texts = [(build.root / file).read_text() for file in (name, *build.headers)]
    code = [Path(file).read_text() for file in (__file__, gpu_static.__file__)]
    disassembler = "" if tool is None else hashlib.sha256(tool.read_bytes()).hexdigest()

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, out = str(build.root / name), f"{folder}/out.fatbin"
            report = _run([*command, f"--keep-dir={folder}", f"-I{build.root}", source, "-o", out])
            threads = _block_sizes(Path(folder, f"{Path(name).stem}.compute_80.ptx").read_text())
            instructions = _instructions(tool, out)
        found: dict[str, Resources] = {arch: {} for arch in ARCHS}
        for arch, mangled, row in _parse(report):
            row["threads"] = threads[mangled]
            row["occupancy"] = round(100 * occupancy(arch, row["registers"], row["threads"], row["shared"]))
            row.update(instructions.get((arch, mangled), {}))
            found[arch][f"{Path(name).stem}: {_readable(mangled)}"] = row
        path.write_text(json.dumps(found))

    key = (nvcc.version, *command, disassembler, name, *texts, *code)
    return json.loads(kept(".json", *key, make=make).read_text())


def _run(command: list[str]) -> str:
    """What it writes to its error output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stderr


def _block_sizes(ptx: str) -> dict[str, int]:
    """What __launch_bounds__ says; every kernel has them."""
    return {name: int(n) for name, n in re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, re.S)}


def _instructions(tool: Path | None, path: str) -> dict[tuple[str, str], dict[str, int]]:
    """Counts of INSTRUCTIONS by architecture and kernel; none without Triton, whose wheel has the disassembler."""
    if tool is None:
        return {}
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^\s*code for ", text, flags=re.M)[1:]:
        arch = part.split(None, 1)[0]
        for function in re.split(r"^\s*Function : ", part, flags=re.M)[1:]:
            counts = sass_counts(function)
            found[arch, function.split(None, 1)[0]] = {name: counts[name] for name in INSTRUCTIONS}
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
        yield arch, mangled, dict(zip(FIELDS, numbers, strict=True))


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


def dump(table: dict[str, Any]) -> str:
    """JSON with a line a kernel."""
    text = json.dumps(table, indent=1)
    return (
        re.sub(r"\{\s*(\"registers\"[^}]*?)\s*\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n"
    )


def show(table: dict[str, Resources]) -> str:
    lines = [f"{'kernel':60s} " + " ".join(f"{arch:>22s}" for arch in ARCHS)]
    for kernel in table[ARCHS[0]]:
        cells = (table[arch][kernel] for arch in ARCHS)
        lines.append(
            f"{kernel:60s} "
            + " ".join(f"{c['registers']:4d} regs {c['spills']:2d} sp {c['occupancy']:3d} %" for c in cells)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    nvcc, reason = nvcc_or_reason()
    if nvcc is None:
        sys.exit(reason)
    measured = measure()
    TABLE.write_text(dump({"nvcc": nvcc.version, "kernels": measured}))
    print(show(measured))
