"""The CUDA kernels compiled for the CPU (csrc/cuda_emulation), and the only way to them: `with emulated_cuda():`.

Inside, `backend="cuda"` takes CPU tensors and really runs csrc/cuda, thread by thread. It is for tests: nothing in
dschat knows this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dschat_kernels.build import Compiler, KernelBuild, isa_flags, runnable_isas
from dschat_kernels.ops._common import CudaKernels, cuda_kernels

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
        given = (*FLAGS, *SEMANTICS, *isa_flags(self.isa), f"-DDSCHAT_MODULE={self.name}", *self.defines)
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
    return "avx2" if "avx2" in runnable_isas() else "portable"


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
def emulated_cuda(order: Order = Order.ASCENDING, seed: int = 0) -> Iterator[ModuleType]:
    """`backend="cuda"` runs on the CPU within."""
    module = emulated_module()
    module.set_order(order.value, seed)
    with cuda_kernels(CudaKernels(module, 0)):
        yield module


class _Recorder(TorchFunctionMode):
    """Knows every piece of memory that torch has handed out, and whether anything was written there yet."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.fresh: set[int] = set()
        for tensor in tensors:
            self._know(tensor, fresh=False)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._know(tensor, fresh=name in ("empty", "new_empty", "empty_like"))
        written = kwargs.get("out")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            written = args[0]
        if isinstance(written, torch.Tensor):
            self.fresh.discard(written.untyped_storage().data_ptr())
        return result

    def _know(self, tensor: torch.Tensor, fresh: bool) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place and place not in self.storages:
            self.storages[place] = storage  # kept, so that the place is not given to another
            if fresh:
                self.fresh.add(place)


class _CheckedKernels(CudaKernels):
    """Tells the checking build before every launch what memory there is."""

    def __init__(self, module: ModuleType, recorder: _Recorder) -> None:
        super().__init__(module, 0)
        self.recorder = recorder
        self.traffic: list[tuple[str, dict[str, int]]] = []

    def _launch(self, function: Callable[..., None], *arguments: Any) -> None:
        self.module.reset()
        for place, storage in self.recorder.storages.items():
            written = place not in self.recorder.fresh
            self.module.add_buffer(place, storage.nbytes(), "tensor", written, False)
        super()._launch(function, *arguments)
        self.recorder.fresh.clear()
        self.traffic.append((function.__name__, self.module.traffic()))


@contextlib.contextmanager
def checked_cuda(
    *tensors: torch.Tensor, order: Order = Order.ASCENDING, seed: int = 0
) -> Iterator[_CheckedKernels]:
    """`emulated_cuda` in the checking build: a race, or an access to anything but the memory of `tensors` and of
    tensors made within, is an error of the op."""
    module = emulated_module(checking=True)
    module.set_order(order.value, seed)
    recorder = _Recorder(tensors)
    checked = _CheckedKernels(module, recorder)
    with recorder, cuda_kernels(checked):
        yield checked
