"""The CUDA kernels compiled for the CPU (csrc/cuda_emulation), and the only way to them: `with emulated_cuda():`.

Inside, `backend="cuda"` takes CPU tensors and really runs csrc/cuda, thread by thread. It is for tests: nothing in
dschat knows this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import dschat_kernels.cuda
from dschat_kernels import instruction_sets
from dschat_kernels.build import Compiler, KernelBuild
from dschat_kernels.cuda import CudaKernels
from dschat_kernels.ops._common import cuda_kernels

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
# As for the GPU: what is not written as fmaf is not fused. Kernels read elements of one type as words of another,
# which nvcc allows.
SEMANTICS = ("-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-DDSCHAT_EMULATE_CUDA")

# The compiler calls csrc/cuda_emulation/checker.cpp for every access of a kernel; no sanitizer's library is linked.
CHECKS = ("-fsanitize=thread,alignment,bounds",)


class Order(Enum):
    """The order in which the ready threads of a block take turns."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2


@dataclass
class EmulatedBuild(KernelBuild):
    """CUDA sources compiled by the host compiler as C++."""

    defines: tuple[str, ...] = ()
    checking: bool = False

    @property
    def compile_flags(self) -> tuple[str, ...]:
        given = (
            *FLAGS,
            *SEMANTICS,
            *instruction_sets.flags(self.isa),
            f"-DDSCHAT_MODULE={self.name}",
            *self.defines,
        )
        return (*given, "-O1", "-g1", "-DDSCHAT_EMULATION_CHECK") if self.checking else (*given, "-O2")

    def _compile_command(self, compiler: Compiler, name: str, copy: Path) -> list[str]:
        watched = CHECKS if self.checking and name.endswith(".cu") else ()
        return [*super()._compile_command(compiler, name, copy), *watched, "-x", "c++"]


def names(pattern: str) -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob(pattern))


RUNTIME = tuple(names("cuda_emulation/*.cpp"))
HEADERS = (*names("cuda/*.cuh"), *names("cuda/*.h"), *names("cuda_emulation/*.h"), *names("bindings/*.cuh"))


def isa() -> str:
    """AVX2 has fmaf as an instruction; without it the results are the same and the tests slower."""
    return "avx2" if "avx2" in instruction_sets.runnable() else "portable"


@functools.cache
def emulated_module(checking: bool = False) -> ModuleType:
    """csrc/cuda with its binding, on the CPU."""
    return EmulatedBuild(
        name="_dschat_cuda_emulated" + "_checking" * checking,
        root=CSRC,
        sources=[*names("cuda/*.cu"), *RUNTIME, "bindings/cuda.cpp"],
        headers=HEADERS,
        isa=isa(),
        label="emulated CUDA kernels",
        checking=checking,
    ).load()


@contextlib.contextmanager
def replacing(kernels: CudaKernels) -> Iterator[None]:
    """The cuda backend takes CPU tensors and launches with `kernels` within."""
    backend: Any = dschat_kernels.cuda
    held = backend.DEVICES, backend.launching, backend.unavailable
    backend.DEVICES, backend.launching, backend.unavailable = (
        {"cpu"},
        lambda device: cuda_kernels(kernels),
        lambda: None,
    )
    try:
        yield
    finally:
        backend.DEVICES, backend.launching, backend.unavailable = held


@contextlib.contextmanager
def emulated_cuda(order: Order = Order.ASCENDING, seed: int = 0) -> Iterator[ModuleType]:
    """`backend="cuda"` runs on the CPU within."""
    module = emulated_module()
    module.set_order(order.value, seed)
    with replacing(CudaKernels(module, 0)):
        yield module


class Recorder:
    """Knows the memory of every tensor whose address a kernel may get, and whether torch has written there yet."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.fresh: set[int] = set()
        for tensor in tensors:
            self.know(tensor)

    def know(self, tensor: torch.Tensor, fresh: bool = False) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place and place not in self.storages:
            self.storages[place] = storage  # kept, so that the place is not given to another
            if fresh:
                self.fresh.add(place)
        if tensor._version:  # torch has written into it
            self.fresh.discard(place)

    def place(self, address: int) -> int | None:
        """The beginning of the memory that an address lies in."""
        inside = (p for p, storage in self.storages.items() if p <= address < p + storage.nbytes())
        return next(inside, None)

    def tell(self, module: ModuleType, writable: Container[int | None] | None = None) -> None:
        """Tells the checking build what memory there is; only what begins at `writable` may be written, if given."""
        for place, storage in self.storages.items():
            read_only = writable is not None and place not in writable
            module.add_buffer(place, storage.nbytes(), "tensor", place not in self.fresh, read_only)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """torch.empty and Tensor.data_ptr, by which all memory comes and goes, report here."""
        empty, data_ptr = torch.empty, torch.Tensor.data_ptr

        def recorded_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = empty(*args, **kwargs)
            self.know(tensor, fresh=True)
            return tensor

        def recorded_data_ptr(tensor: torch.Tensor) -> int:
            self.know(tensor)
            return data_ptr(tensor)

        torch.empty, torch.Tensor.data_ptr = recorded_empty, recorded_data_ptr  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.empty, torch.Tensor.data_ptr = empty, data_ptr  # type: ignore[method-assign]


class _CheckedKernels(CudaKernels):
    """Tells the checking build before every launch what memory there is, and that only what the launcher takes through
    pointers to what is not const may be written."""

    def __init__(self, module: ModuleType, recorder: Recorder) -> None:
        super().__init__(module, 0)
        self.recorder = recorder
        self.traffic: list[tuple[str, dict[str, int]]] = []  # by launcher
        self.kernels: list[tuple[str, str, dict[str, int]]] = []  # by launcher and kernel

    def _launch(self, function: Callable[..., None], *arguments: Any) -> None:
        self.module.reset_traffic()
        pointers = zip(
            self.module.pointers[function.__name__], arguments, strict=False
        )  # the stream is no memory
        writable = {self.recorder.place(address) for letter, address in pointers if letter == "w"}
        self.recorder.tell(self.module, writable)
        super()._launch(function, *arguments)
        name = function.__name__
        self.traffic.append((name, self.module.traffic()))
        self.kernels += [(name, text, counts) for text, counts in self.module.traffic_by_launch()]


@contextlib.contextmanager
def checked_cuda(
    *tensors: torch.Tensor, order: Order = Order.ASCENDING, seed: int = 0
) -> Iterator[_CheckedKernels]:
    """`emulated_cuda` in the checking build: a race, an access to anything but the memory of `tensors` and of tensors
    made within, a write into an input, or a read of what nothing has written, is an error of the op."""
    module = emulated_module(checking=True)
    module.reset()
    module.set_order(order.value, seed)
    recorder = Recorder(tensors)
    checked = _CheckedKernels(module, recorder)
    with recorder.recording(), replacing(checked):
        yield checked
