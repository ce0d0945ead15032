"""The CUDA kernels compiled for the CPU (csrc/cuda_emulation), and the only way to them: `with emulated_cuda():`.

Inside, `backend="cuda"` takes CPU tensors and really runs csrc/cuda, thread by thread. It is for tests: nothing in
dschat knows this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType

from dschat_kernels.build import KernelBuild, isa_flags, runnable_isas
from dschat_kernels.ops._common import CudaKernels, cuda_kernels

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
# As for the GPU: what is not written as fmaf is not fused. Kernels read elements of one type as words of another,
# which nvcc allows.
SEMANTICS = ("-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-DDSCHAT_EMULATE_CUDA")


class Order(Enum):
    """The order in which the ready threads of a block take turns."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2


@dataclass
class EmulatedBuild(KernelBuild):
    """CUDA sources compiled by the host compiler as C++."""

    defines: tuple[str, ...] = ()
    optimise: tuple[str, ...] = ("-O2",)

    @property
    def compile_flags(self) -> tuple[str, ...]:
        given = (*FLAGS, *SEMANTICS, *self.optimise, *isa_flags(self.isa), f"-DDSCHAT_MODULE={self.name}")
        return (*given, *self.defines, "-x", "c++")


def names(pattern: str) -> list[str]:
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob(pattern))


RUNTIME = tuple(names("cuda_emulation/*.cpp"))
HEADERS = (*names("cuda/*.cuh"), *names("cuda/*.h"), *names("cuda_emulation/*.h"), *names("bindings/*.cuh"))


def isa() -> str:
    """AVX2 has fmaf as an instruction; without it the results are the same and the tests slower."""
    return "avx2" if "avx2" in runnable_isas() else "portable"


@functools.cache
def emulated_module() -> ModuleType:
    """csrc/cuda with its binding, on the CPU."""
    return EmulatedBuild(
        name="_dschat_cuda_emulated",
        root=CSRC,
        sources=[*names("cuda/*.cu"), *RUNTIME, "bindings/cuda.cpp"],
        headers=HEADERS,
        isa=isa(),
        label="emulated CUDA kernels",
    ).load()


@contextlib.contextmanager
def emulated_cuda(order: Order = Order.ASCENDING, seed: int = 0) -> Iterator[ModuleType]:
    """`backend="cuda"` runs on the CPU within."""
    module = emulated_module()
    module.set_order(order.value, seed)
    with cuda_kernels(CudaKernels(module, 0)):
        yield module
