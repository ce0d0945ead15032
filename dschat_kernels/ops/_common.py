"""What every op shares: argument checks, the choice of a backend, and the way to the native kernels.

A public op checks its arguments, asks `resolve_backend`, and then either runs its `*_reference` (plain
PyTorch, any dtype and device, differentiable by autograd) or calls `torch.ops.dschat.<op>`, whose CPU
implementation is native. On CUDA tensors the same implementation runs with the CUDA kernels (`on_cuda`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
# The numbers of csrc/cpu/simd.h DType (float16: of csrc/cuda only) and csrc/cpu/activation.h Activation.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CPU_DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4, "quick_gelu": 5}

LIBRARY = torch.library.Library("dschat", "FRAGMENT")


def check(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise `error(message)` unless `condition`. The message is one sentence: the value, then the fix."""
    if not condition:
        raise error(message)


def check_tensor(op: str, name: str, value: Any, *, floating: bool = True) -> None:
    check(
        isinstance(value, Tensor),
        f"{op}: {name} is a {type(value).__name__}; give a torch.Tensor.",
        TypeError,
    )
    if floating:
        check(
            value.dtype.is_floating_point,
            f"{op}: {name} has dtype {_name(value.dtype)}; give a floating point tensor.",
            TypeError,
        )


def check_vector(op: str, name: str, value: Any, like: Tensor, size: int) -> None:
    """`value` is a floating point vector [size] on the device of `like`."""
    check_tensor(op, name, value)
    check(
        value.dim() == 1 and value.shape[0] == size,
        f"{op}: {name} has shape {list(value.shape)}; give [{size}], the last dimension of the input.",
    )
    check_device(op, name, value, like)


def check_device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    check(
        value.device == like.device,
        f"{op}: {name} is on {value.device} and the input on {like.device}; move them to one device.",
    )


def check_choice(op: str, name: str, value: Any, choices: Any) -> None:
    check(value in choices, f"{op}: {name} is {value!r}; choose one of {', '.join(choices)}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- native


def native() -> ModuleType | None:
    """The compiled CPU kernels (built on the first call), or None; `dschat_kernels.build.status()` says
    why."""
    from dschat_kernels import build

    return build.try_load()


def kernels() -> Any:
    """The compiled kernels of the backend that runs: inside `on_cuda` the CUDA ones on the current stream, else
    the CPU ones; raises RuntimeError where there are none."""
    if (active := _cuda_kernels.get()) is not None:
        return active
    module = native()
    if module is None:
        raise RuntimeError(_why_no_native())
    return module


def _why_no_native() -> str:
    from dschat_kernels import build

    reason = build.status()["reason"] or "they have not been built"
    return f"The native CPU kernels are not available: {reason}"


@torch.compiler.assume_constant_result
def _have_native() -> bool:
    return native() is not None


def runs_directly(*tensors: Tensor | None) -> bool:
    """Nothing of torch needs to see this call: no gradient, no trace, no fake or wrapped tensor.

    Then an op may call its CPU implementation itself; the dispatcher's way through Python costs more than a
    small kernel does.
    """
    if (
        torch.compiler.is_compiling()
        or any(tensor is not None and not tensor.is_cpu for tensor in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or (grad and tensor.requires_grad):
            return False
    return True


def ptr(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None and for what has no elements."""
    return 0 if tensor is None else tensor.data_ptr()


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """`tensor` [..., n] as [rows, n] with a stride between rows and elements side by side; copies only if it
    must."""
    n = tensor.shape[-1]
    if tensor.is_contiguous():
        return tensor.view(-1, n) if tensor.numel() else tensor.reshape(0, n), n
    if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= n:
        return tensor, tensor.stride(0)
    return tensor.reshape(-1, n).contiguous(), n


def widen(vector: Tensor | None) -> Tensor | None:
    """A weight or bias as the contiguous float32 that kernels take; exact for bfloat16."""
    return None if vector is None else vector.detach().to(torch.float32).contiguous()


def row_scratch(module: Any, rows: int, columns: int, gradients: int) -> Tensor:
    """Working memory of a backward that sums `gradients` vectors over rows."""
    blocks = -(-rows // module.row_block)
    return torch.empty(gradients * blocks * columns, dtype=torch.float32)


def no_tensor(like: Tensor) -> Tensor:
    """Stands in an op's tuple of results for one that was not asked for."""
    return like.new_empty(0)


# ----------------------------------------------------------------------------------------------------- cuda

_cuda_kernels: ContextVar[Any] = ContextVar("cuda_kernels", default=None)


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


def runs_on_cuda() -> bool:
    """Whether `kernels()` are the CUDA ones."""
    return _cuda_kernels.get() is not None


@contextmanager
def cuda_kernels(kernels: Any) -> Iterator[None]:
    """`kernels()` are these within."""
    token = _cuda_kernels.set(kernels)
    try:
        yield
    finally:
        _cuda_kernels.reset(token)


def on_cuda(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An op's native implementation for CUDA tensors: new tensors and kernels go to their device and its current
    stream."""

    def run(*arguments: Any) -> Any:
        from dschat_kernels import build

        device = next(a.device for a in arguments if isinstance(a, Tensor))
        module = build.load_cuda(torch.cuda.get_device_capability(device))
        stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device), device, cuda_kernels(CudaKernels(module, stream)):
            return implementation(*arguments)

    return run


@torch.compiler.assume_constant_result
def why_not_cuda() -> str | None:
    """Why no CUDA kernel can run in this process, or None."""
    from dschat_kernels import build

    if runs_on_cuda():
        return None
    if not torch.cuda.is_available():
        built = (
            ""
            if torch.backends.cuda.is_built()
            else f", and PyTorch {torch.__version__} is built without CUDA"
        )
        return f"this machine has no CUDA GPU{built}"
    try:
        build.load_cuda(torch.cuda.get_device_capability())
    except build.BuildError as error:
        return error.sentence.rstrip(".")
    return None


# ---------------------------------------------------------------------------------------------- the choice


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn once in this process."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    warnings.warn(message, stacklevel=3)


def _why_not_cpu(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{op}: the cpu backend needs tensors on the CPU, not on {tensor.device.type}"
        if tensor.dtype not in CPU_DTYPES:
            return f"{op}: the cpu backend has float32 and bfloat16, not {_name(tensor.dtype)}"
    if not _have_native():
        return _why_no_native() if not torch.compiler.is_compiling() else "no native kernels"
    return None


def _why_not_cuda(op: str, tensors: tuple[Tensor | None, ...]) -> tuple[str | None, bool]:
    """(why the cuda backend cannot run `op`, or None; whether that is the machine's fault)."""
    if reason := why_not_cuda():
        return f"{op}: the cuda backend cannot run, because {reason}", True
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            have = "float32, bfloat16 and float16"
            return f"{op}: the cuda backend has {have}, not {_name(tensor.dtype)}", False
        if not tensor.is_cuda and not runs_on_cuda():
            return f"{op}: the cuda backend needs tensors on a CUDA GPU, not on {tensor.device.type}", False
    return None, False


def resolve_backend(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that runs `op` on these tensors: "reference", "cpu" or "cuda".

    None chooses: "cpu" for float32 and bfloat16 on the CPU where the native kernels can be had, "cuda" for
    float32, bfloat16 and float16 on a CUDA GPU likewise, otherwise "reference", with one warning a process and
    reason. A named backend that cannot run raises ValueError (or RuntimeError where the GPU or the native
    kernels are missing) with the reason.
    """
    if backend == "reference":
        return "reference"
    check(
        backend is None or backend in BACKENDS,
        f"{op}: backend is {backend!r}; choose one of {', '.join(BACKENDS)}, or None for automatic.",
    )
    if backend == "triton":
        raise ValueError(f"{op}: the {backend} backend is not in this version; use backend='cpu' or None.")
    on_gpu = any(tensor is not None and tensor.is_cuda for tensor in tensors)
    if backend == "cuda" or (backend is None and on_gpu):
        reason, missing = _why_not_cuda(op, tensors)
        if reason is None:
            return "cuda"
        if backend == "cuda":
            raise (RuntimeError if missing else ValueError)(f"{reason}; use backend=None or 'reference'.")
        say_once(f"{reason}; the PyTorch reference runs instead.")
        return "reference"
    reason = _why_not_cpu(op, tensors)
    if reason is None:
        return "cpu"
    if backend == "cpu":
        error: type[Exception] = ValueError if _have_native() else RuntimeError
        raise error(f"{reason.rstrip('.')}; use backend=None or 'reference'.")
    say_once(f"{reason.rstrip('.')}; the PyTorch reference runs instead.")
    return "reference"
