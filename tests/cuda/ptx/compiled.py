"""The code that nvcc and Triton compile for a GPU, run on the CPU: `with compiled_cuda("sm_80"):`.

The launchers of csrc/cuda are those of the emulation; where they would run the kernel's source they run the kernel that
nvcc compiled, translated from PTX when it is first launched. Everything is kept in the build cache by its content.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from emulated import (
    CSRC,
    HEADERS,
    RUNTIME,
    EmulatedBuild,
    Order,
    Recorder,
    emulated_module,
    isa,
    names,
    replacing,
)

from dschat_kernels import build, instruction_sets
from dschat_kernels.cuda import CudaKernels
from tests.cuda.kept import kept
from tests.cuda.ptx.translate import Entry, entry_texts, translate

CXX = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
       "-fno-strict-aliasing", "-w", "-DDSCHAT_PTX_KERNEL")  # fmt: skip


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-4000:]}")


@functools.cache
def _sources(*patterns: str) -> str:
    return "".join((CSRC / name).read_text() for pattern in patterns for name in names(pattern))


@functools.cache
def cuda_ptx(stem: str, arch: str) -> str:
    """What nvcc makes of csrc/cuda/<stem>.cu, before the last step to machine code."""
    nvcc = build.find_nvcc()
    flags = [
        flag
        for flag in build.cuda_build("sm_80").compile_flags
        if not flag.startswith(("-gencode", "-DDSCHAT"))
    ]
    command = [*flags, f"-arch={arch}", "-ptx"]
    text = (CSRC / f"cuda/{stem}.cu").read_text() + _sources("cuda/*.cuh", "cuda/*.h")

    def make(path: Path) -> None:
        source = str(CSRC / f"cuda/{stem}.cu")
        _run([*nvcc.argv, *command, f"-I{CSRC}", source, "-o", str(path)], f"nvcc of {stem}.cu for {arch}")

    return kept(".ptx", nvcc.version, *command, text, make=make).read_text()


def library(entry: Entry) -> Path:
    """A translated kernel, compiled by the host's compiler."""
    compiler = build.find_compiler()
    flags = [*CXX, *instruction_sets.flags(isa())]
    headers = (
        CSRC / "cuda_emulation/ptx.h",
        CSRC / "cuda_emulation/float16.h",
        CSRC / "cuda_emulation/runtime.h",
    )

    def make(path: Path) -> None:
        source = path.with_suffix(".cpp")
        source.write_text(entry.source)
        _run([*compiler.argv, *flags, f"-I{CSRC}", str(source), "-o", str(path)], f"compiling {entry.name}")

    key = (compiler.version, *flags, *(h.read_text() for h in headers), entry.source)
    return kept(".so", *key, make=make)


# ------------------------------------------------------------------------------------------------- CUDA kernels


def _plain(name: str) -> str:
    """A mangled name without what the compilers do differently: unnamed namespaces, and marks of static functions."""
    while m := re.search(r"(\d+)_GLOBAL__N_(?!1)", name):
        end = m.end(1) + int(m[1])
        name = name[: m.start()] + "12_GLOBAL__N_1" + name[end:]
    return re.sub(r"^(_ZN6dschat4cuda)L(?=\d)", r"\1", name)


@functools.cache
def cuda_kernels(stem: str, arch: str) -> dict[str, str]:
    """The kernels of a .cu file: names in the PTX by names as `_plain` makes them."""
    return {_plain(name): name for name in entry_texts(cuda_ptx(stem, arch))}


@functools.cache
def cuda_library(stem: str, name: str, arch: str) -> Path:
    """The translated kernel of a .cu file."""
    return library(translate(cuda_ptx(stem, arch), name))


@functools.cache
def compiled_module() -> ModuleType:
    """The launchers of csrc/cuda, and the emulation's runtime."""
    return LaunchersBuild(
        name="_dschat_cuda_compiled",
        root=CSRC,
        sources=[*names("cuda/*.cu"), *RUNTIME, "bindings/cuda.cpp"],
        headers=HEADERS,
        isa=isa(),
        label="launchers of compiled CUDA kernels",
        defines=("-DDSCHAT_EMULATION_COMPILED",),
    ).load()


class LaunchersBuild(EmulatedBuild):
    """Not optimised, as the kernels in it never run: they must only stay apart and keep their names."""

    @property
    def compile_flags(self) -> tuple[str, ...]:
        return (*super().compile_flags, "-O0", "-fno-inline")


@functools.cache
def _functions() -> dict[int, tuple[str, str]]:
    """(source file, plain name) of the functions of the module by their place in it."""
    path = compiled_module().__file__
    assert path is not None
    listed = subprocess.run(["nm", "-ap", path], capture_output=True, text=True, check=True).stdout
    found, file = {}, ""
    for kind, place, name in re.findall(r"^(?=[0-9a-f ]{16} (\w))([0-9a-f]{16}) \w ?(.*)$", listed, re.M):
        if kind == "a":  # the local symbols behind it are this file's
            file = name
        elif kind in "tTwW":
            found[int(place, 16)] = (file if kind == "t" else "", _plain(name))
    return found


def _stems() -> list[str]:
    return [Path(name).stem for name in names("cuda/*.cu")]


@contextlib.contextmanager
def compiled_cuda(arch: str = "sm_80", order: Order = Order.RANDOM, seed: int = 1) -> Iterator[set[str]]:
    """`backend="cuda"` takes CPU tensors within and runs what nvcc compiled; gives the kernels that ran."""
    module, ran = compiled_module(), set()

    def resolve(offset: int) -> str:
        file, name = _functions()[offset]
        for stem in [Path(file).stem] if file else _stems():
            if name in cuda_kernels(stem, arch):
                ran.add(name)
                return str(cuda_library(stem, cuda_kernels(stem, arch)[name], arch))
        raise RuntimeError(f"nvcc has compiled no kernel {name} of {file or 'csrc/cuda'}")

    module.set_order(order.value, seed)
    module.on_unknown_kernel(resolve)
    try:
        with replacing(CudaKernels(module, 0)):
            yield ran
    finally:
        module.forget_kernels()


# ----------------------------------------------------------------------------------------------- Triton kernels


def _packed(entry: Entry, values: list[Any]) -> bytes:
    """Values as a launch hands them over; the parameters behind them are Triton's own scratch memory, not used here."""
    out = b""
    for (_, at, size), value in zip(
        entry.parameters, values + [0] * (len(entry.parameters) - len(values)), strict=True
    ):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        code = "f" if isinstance(value, float) else {1: "b", 4: "i", 8: "q"}[size]
        out = out.ljust(at, b"\0") + struct.pack(f"<{code}", value)
    return out.ljust(entry.parameter_bytes, b"\0")


@functools.cache
def _translated(ptx: str, name: str) -> Entry:
    return translate(ptx, name)


Launcher = Callable[[Callable[..., Any], Entry, list[Any], list[int], int, int], None]
"""(kernel, its code, values of parameters, grid, threads, bytes of dynamic shared memory)"""


@contextlib.contextmanager
def _triton_launches(arch: str, launch: Launcher) -> Iterator[None]:
    """`backend="triton"` takes CPU tensors within and hands what Triton compiled to `launch`."""
    import triton
    from triton.backends.compiler import GPUTarget

    import dschat_kernels.triton as backend
    from benchmarks.gpu_static import source
    from dschat_kernels.triton import _launch

    def run(this: _launch.Launch) -> None:
        options = {"num_warps": this.config.num_warps, "num_stages": this.config.num_stages,
                   "enable_fp_fusion": this.config.fp_fusion}  # fmt: skip
        what = source(this)
        kernel = triton.compile(what, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
        [name] = entry_texts(kernel.asm["ptx"])
        values = {**this.arguments, **this.config.blocks}
        given = [values[p] for p, type_ in what.signature.items() if type_ != "constexpr"]
        grid = [*this.grid, 1, 1][:3]
        threads = 32 * this.config.num_warps
        entry = _translated(kernel.asm["ptx"], name)
        launch(this.kernel.fn, entry, given, grid, threads, kernel.metadata.shared)

    held = _launch.run, backend.DEVICES
    _launch.run, backend.DEVICES = run, {*backend.DEVICES, "cpu"}
    try:
        yield
    finally:
        _launch.run, backend.DEVICES = held


@contextlib.contextmanager
def compiled_triton(arch: str = "sm_80", order: Order = Order.RANDOM, seed: int = 1) -> Iterator[set[str]]:
    """`backend="triton"` takes CPU tensors within and runs what Triton compiled; gives the kernels that ran."""
    module, ran = compiled_module(), set()
    module.set_order(order.value, seed)

    def launch(
        kernel: Callable[..., Any], entry: Entry, given: list[Any], grid: list[int], threads: int, shared: int
    ) -> None:
        module.launch_library(str(library(entry)), grid, [threads, 1, 1], shared, _packed(entry, given))
        ran.add(kernel.__name__)

    with _triton_launches(arch, launch):
        yield ran


@contextlib.contextmanager
def counted_triton(arch: str = "sm_80") -> Iterator[list[tuple[str, dict[str, int]]]]:
    """`compiled_triton` in the checking build, which sees what the compiled code does with memory: a race, an access to
    anything but tensors, or a read of what nothing has written, is an error of the op. Gives each launch's kernel and
    what it moved."""
    module, recorder = emulated_module(checking=True), Recorder(())
    counted: list[tuple[str, dict[str, int]]] = []
    module.reset()
    module.set_order(Order.ASCENDING.value, 0)

    def launch(
        kernel: Callable[..., Any], entry: Entry, given: list[Any], grid: list[int], threads: int, shared: int
    ) -> None:
        parameters = _packed(entry, given)  # asks for the tensors' places, by which the recorder knows them
        recorder.tell(module)
        module.reset_traffic()
        module.launch_library(str(library(entry)), grid, [threads, 1, 1], shared, parameters)
        stem = kernel.__module__.rpartition(".")[2]
        counted.append((f"{stem}: {kernel.__name__}", module.traffic()))

    with recorder.recording(), _triton_launches(arch, launch):
        yield counted
