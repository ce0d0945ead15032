"""What an op can run on here, and what its having run is evidence of."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dschat_kernels.build import BuildError, find_nvcc

ALL = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = os.environ.get("DSCHAT_TEST_ALL_KERNELS") == "1"
"""The nightly run: every size, dtype and architecture, and the kernels' source in the checking build."""


@dataclass(frozen=True)
class Backend:
    """`name`: what a test is called; `backend`: what the ops are told; `within`: the context they run in."""

    name: str
    backend: str
    evidence: str
    dtypes: tuple[torch.dtype, ...] = ALL
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    thorough: bool = True
    nightly: bool = False  # only then, or in more dtypes then
    device: str = "cpu"
    missing: str = ""  # why it cannot run here


def _cuda_source() -> contextlib.AbstractContextManager[Any]:
    from tests.cuda.emulated import Order, emulated_cuda

    return emulated_cuda(Order.RANDOM, seed=1)


def _cuda_compiled(arch: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    def within() -> contextlib.AbstractContextManager[Any]:
        from tests.cuda.ptx.compiled import compiled_cuda

        return compiled_cuda(arch)

    return within


def _triton_source() -> contextlib.AbstractContextManager[Any]:
    from tests.triton_kernels.interpreter import interpreter

    return interpreter()


def _triton_compiled(arch: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    def within() -> contextlib.AbstractContextManager[Any]:
        from tests.cuda.ptx.compiled import compiled_triton

        return compiled_triton(arch)

    return within


def _no_nvcc() -> str:
    try:
        return find_nvcc() and ""
    except BuildError as error:
        return error.sentence


NO_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed"
NO_GPU = "" if torch.cuda.is_available() else "there is no GPU"
RAN, COMPILED, SOURCE = "ran on a GPU", "compiled code executed on the CPU", "source executed on the CPU"
CPU_DTYPES = (torch.float32, torch.bfloat16)

BACKENDS = (
    Backend("reference", "reference", "the specification"),
    Backend("cpu", "cpu", "ran", CPU_DTYPES),
    Backend("cuda-source", "cuda", SOURCE, within=_cuda_source),
    Backend("cuda-sm_80", "cuda", COMPILED, within=_cuda_compiled("sm_80"), thorough=EVERYTHING, missing=_no_nvcc()),
    Backend("cuda-sm_120", "cuda", COMPILED, within=_cuda_compiled("sm_120"), thorough=EVERYTHING, nightly=True,
            missing=_no_nvcc()),
    Backend("triton-source", "triton", SOURCE, within=_triton_source, missing=NO_TRITON),
    Backend("triton-sm_80", "triton", COMPILED, within=_triton_compiled("sm_80"), thorough=EVERYTHING,
            missing=NO_TRITON),
    Backend("triton-sm_120", "triton", COMPILED, within=_triton_compiled("sm_120"), nightly=True,
            thorough=EVERYTHING, missing=NO_TRITON),
    Backend("cuda-gpu", "cuda", RAN, device="cuda", missing=NO_GPU),
    Backend("triton-gpu", "triton", RAN, device="cuda", missing=NO_GPU or NO_TRITON),
)  # fmt: skip
