"""CUDA kernels for GPUs (csrc/cuda), compiled by nvcc when first used, with the contracts of `dschat_kernels.ops`.

`implementations` is the backend table that `ops` reads, `why_not` says why the backend cannot run a call. An op's
Python side is that of the cpu backend, run where `launching` makes it allocate on the GPU and call csrc/cuda.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dschat_kernels import build
from dschat_kernels.ops import _common

DEVICES = {"cuda"}
"""Device types whose tensors the kernels take."""

STEMS = (
    "attention",
    "attention_decode",
    "bias_act",
    "gated_act",
    "layer_norm",
    "linear",
    "lora_linear",
    "rms_norm",
    "rope_append",
    "sample",
    "token_logprobs",
)
"""The modules of `ops` that define the ops."""


class CudaKernels:
    """The functions of a compiled CUDA module (csrc/bindings/cuda.cpp), launching on one stream."""

    def __init__(self, module: ModuleType, stream: int) -> None:
        self.module = module
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return partial(self._launch, value) if callable(value) else value

    def _launch(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments, self.stream)


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Within, new tensors and kernels go to `device` and its current stream."""
    module = build.load_cuda(torch.cuda.get_device_capability(device))
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device), device, _common.cuda_kernels(CudaKernels(module, stream)):
        yield


def _on_cuda(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def run(*arguments: Any) -> Any:
        with launching(next(a.device for a in arguments if isinstance(a, Tensor))):
            return implementation(*arguments)

    return run


def implementations() -> dict[str, Callable[..., Any]]:
    """Every op of this backend by name, with the arguments of its torch.library schema."""
    for stem in STEMS:
        importlib.import_module(f"dschat_kernels.ops.{stem}")
    return {op: _on_cuda(function) for op, function in _common.offered("cpu").items()}


def no_gpu() -> str:
    """Why PyTorch finds no GPU, as far as it can tell."""
    if not torch.backends.cuda.is_built():
        return f"PyTorch finds no CUDA GPU: version {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if "no NVIDIA driver" in str(error):
            return "PyTorch finds no NVIDIA driver on this machine, and without one no CUDA GPU"
        if "driver" in str(error) and "too old" in str(error):
            return f"the NVIDIA driver of this machine is too old for PyTorch {torch.__version__}"
    return "this machine has no CUDA GPU"


@_common.constant_result
def unavailable() -> str | None:
    """Why no CUDA kernel can run in this process (no GPU, driver or nvcc, an old GPU), or None."""
    if not torch.cuda.is_available():
        return no_gpu()
    try:
        build.load_cuda(torch.cuda.get_device_capability())
    except build.BuildError as error:
        return error.sentence.rstrip(".")
    return None


def why_not(op: str, tensors: Iterable[Tensor | None]) -> str | None:
    """Why the backend cannot run `op` on these tensors, or None."""
    if reason := unavailable():
        return f"{op}: the cuda backend cannot run, because {reason}"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in DEVICES:
            return f"{op}: the cuda backend needs tensors on a CUDA GPU, not on {tensor.device.type}"
        if tensor.dtype not in _common.DTYPES:
            name = str(tensor.dtype).removeprefix("torch.")
            return f"{op}: the cuda backend has float32, bfloat16 and float16, not {name}"
    return None
