"""What an op can run on here, and what its having run is evidence of."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dschat_kernels.build import BuildError, find_nvcc

ALL = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = os.environ.get("DSCHAT_TEST_ALL_KERNELS") == "1"
"""The nightly run: every size and dtype, a newer architecture, and the kernels' source in the checking build."""


@dataclass(frozen=True)
class Backend:
    """`name`: what a test is called; `backend`: what the ops are told; `within`: the context they run in."""

    name: str
    backend: str
    evidence: str
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    dtypes: tuple[torch.dtype, ...] = ALL  # in every run of the tests; none: only nightly
    nightly: tuple[torch.dtype, ...] = ALL  # then
    thorough: bool = True  # every size in every run, or only nightly
    device: str = "cpu"
    missing: str = ""  # why it cannot run here

    def runs(self) -> tuple[torch.dtype, ...]:
        return self.nightly if EVERYTHING else self.dtypes

    def parameter(self, *others: Any, id: str | None = None) -> Any:
        """Itself and the others as the parameters of a test, which `make gpu-check` runs where a GPU is needed."""
        marks = [pytest.mark.gpu] if self.device == "cuda" else []
        return pytest.param(self, *others, marks=marks, id=id or self.name)


def _cuda_source() -> contextlib.AbstractContextManager[Any]:
    from tests.cuda.emulated import Order, emulated_cuda

    return emulated_cuda(Order.RANDOM, seed=1)


def _cuda_checked() -> contextlib.AbstractContextManager[Any]:
    from tests.cuda.emulated import Order, checked_cuda

    return checked_cuda(order=Order.RANDOM, seed=2)


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
CPU_DTYPES, ONE, NONE = (torch.float32, torch.bfloat16), (torch.bfloat16,), ()

BACKENDS = (
    Backend("reference", "reference", "the specification"),
    Backend("cpu", "cpu", "ran", dtypes=CPU_DTYPES, nightly=CPU_DTYPES),
    Backend("cuda-source", "cuda", SOURCE, _cuda_source),
    Backend("cuda-checked", "cuda", SOURCE, _cuda_checked, NONE, thorough=False),
    Backend(
        "cuda-sm_80", "cuda", COMPILED, _cuda_compiled("sm_80"), ONE, thorough=EVERYTHING, missing=_no_nvcc()
    ),
    Backend(
        "cuda-sm_120",
        "cuda",
        COMPILED,
        _cuda_compiled("sm_120"),
        NONE,
        nightly=ONE,
        thorough=False,
        missing=_no_nvcc(),
    ),
    Backend("triton-source", "triton", SOURCE, _triton_source, missing=NO_TRITON),
    Backend(
        "triton-sm_80",
        "triton",
        COMPILED,
        _triton_compiled("sm_80"),
        ONE,
        thorough=EVERYTHING,
        missing=NO_TRITON,
    ),
    Backend(
        "triton-sm_120",
        "triton",
        COMPILED,
        _triton_compiled("sm_120"),
        NONE,
        nightly=ONE,
        thorough=False,
        missing=NO_TRITON,
    ),
    Backend("cuda-gpu", "cuda", RAN, device="cuda", missing=NO_GPU),
    Backend("triton-gpu", "triton", RAN, device="cuda", missing=NO_GPU or NO_TRITON),
)
