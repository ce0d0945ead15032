"""What every op shares: argument checks, the choice of a backend, and the way to the native kernels.

A public op checks its arguments, asks `resolve_backend`, and then either runs its `*_reference` (plain
PyTorch, any dtype and device, differentiable by autograd) or what `implementation` gives for the backend.

Every backend has the same ops with the same schemas in a torch.library namespace of its own: `dschat` is the
CPU's, `dschat_<backend>` another's. So a choice of backend lasts through torch.compile and into the backward.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

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
    """The compiled kernels of the backend that runs: within `cuda_kernels` those, else the CPU's; raises RuntimeError
    where there are none."""
    if (active := _cuda_kernels.get()) is not None:
        return active
    module = native()
    if module is None:
        raise RuntimeError(_why_no_native())
    return module


_cuda_kernels: ContextVar[Any] = ContextVar("cuda_kernels", default=None)


@contextmanager
def cuda_kernels(kernels: Any) -> Iterator[None]:
    """`kernels()` are these within."""
    token = _cuda_kernels.set(kernels)
    try:
        yield
    finally:
        _cuda_kernels.reset(token)


def runs_on_cuda() -> bool:
    """Whether `kernels()` are CUDA's, which take some arguments more (scratch memory)."""
    return _cuda_kernels.get() is not None


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Within, no gradients, and no inference tensors even where the caller is in `torch.inference_mode`: what is made
    can be kept, written to and trained with afterwards."""
    with torch.inference_mode(False), torch.no_grad():  # the first alone would switch gradients on
        yield


_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


@contextmanager
def capturing() -> Iterator[None]:
    """Within, calls become part of a graph: their results cannot be looked at."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


def is_capturing(tensor: Tensor) -> bool:
    """Whether calls on `tensor` become part of a graph: of `capturing`, or of the caller's own torch.cuda.graph."""
    return _capturing.get() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _why_no_native() -> str:
    from dschat_kernels import build

    reason = build.status()["reason"] or "they have not been built"
    return f"The native CPU kernels are not available: {reason}"


def constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which imports all of torch._dynamo (1.5 s) to set this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def _have_native() -> bool:
    return native() is not None


PLAIN: tuple[type, ...] = (Tensor, torch.nn.Parameter)


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether kernels may take it for what it looks like: a tensor, no subclass that acts in its own way."""
    return type(value) in PLAIN


def is_transformed() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit.trace wants to see every operation:
    kernels have no rule for them."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def runs_directly(*tensors: Tensor | None) -> bool:
    """Nothing of torch needs to see this call: no gradient, no trace, no fake or wrapped tensor.

    Then an op may call its CPU implementation itself; the dispatcher's way through Python costs more than a
    small kernel does.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or is_transformed():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if not is_plain(tensor) or (grad and tensor.requires_grad):
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


def row_scratch(module: Any, like: Tensor, rows: int, columns: int, gradients: int) -> Tensor:
    """Working memory, on the device of `like`, of a backward that sums `gradients` vectors over rows."""
    blocks = -(-rows // module.row_block)
    return torch.empty(gradients * blocks * columns, dtype=torch.float32, device=like.device)


def no_tensor(like: Tensor) -> Tensor:
    """Stands in an op's tuple of results for one that was not asked for."""
    return like.new_empty(0)


# ------------------------------------------------------------------------------------------ torch.library


@dataclass(frozen=True)
class _Op:
    """What is the same on every backend: shapes and dtypes of the results, and the gradient."""

    fake: Callable[..., Any]
    save: Callable[..., None] | None
    grad: Callable[..., Any] | None
    reference: Callable[..., Any] | None


_OPS: dict[str, _Op] = {}
_IMPLEMENTATIONS: dict[str, Mapping[str, Callable[..., Any]]] = {"cpu": {}}
_LIBRARIES = {"cpu": LIBRARY}


def register(
    op: str,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    grad: Callable[..., Any] | None = None,
    reference: Callable[..., Any] | None = None,
) -> None:
    """Completes an op that LIBRARY defines: its CPU implementation, its fake, and what its gradient saves and
    computes. `grad` finds the ops of the forward's backend as `ctx.ops`. reference: `reference(ctx)` gives the op's
    results in plain PyTorch, and the inputs they were made of in the order of the schema (None: no tensor): what a
    gradient that is to be differentiated again is taken of."""
    _OPS[op] = _Op(fake, save, grad, reference)
    _IMPLEMENTATIONS["cpu"] = {**_IMPLEMENTATIONS["cpu"], op: cpu}
    LIBRARY.impl(op, cpu, "CPU")
    _describe(op, "dschat", LIBRARY)


def _describe(op: str, namespace: str, library: torch.library.Library) -> None:
    """Tells torch.library the fake and the gradient of an op."""
    parts = _OPS[op]
    torch.library.register_fake(f"{namespace}::{op}", parts.fake, lib=library)
    if parts.grad is None or parts.save is None:
        return
    save, grad = parts.save, parts.grad

    def backward(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grad(ctx, *grads)
        if parts.reference is None:  # create_graph=True
            raise NotImplementedError(
                f"{op} has no second derivative: call backward without create_graph, or use backend='reference'."
            )
        outputs, inputs = parts.reference(ctx)
        return _differentiable(outputs, inputs, grads)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ops = getattr(torch.ops, namespace)
        save(ctx, inputs, output)

    torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=setup_context, lib=library)


def _differentiable(
    outputs: Tensor | tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of an op as operations that can be differentiated themselves."""
    made = [
        (out, grad) for out, grad in zip(outputs if isinstance(outputs, tuple) else (outputs,), grads, strict=False)
        if grad is not None and out.requires_grad
    ]  # fmt: skip
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in made], wanted, [grad for _, grad in made], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def offered(backend: str) -> Mapping[str, Callable[..., Any]]:
    """The implementations of a backend by op; its namespace is made at the first call.

    The package dschat_kernels.<backend> lists them in `implementations()`, with the arguments of the schema.
    """
    if backend not in _IMPLEMENTATIONS:
        found = importlib.import_module(f"dschat_kernels.{backend}").implementations()
        namespace = f"dschat_{backend}"
        library = _LIBRARIES[backend] = torch.library.Library(namespace, "DEF")
        for op, function in found.items():
            importlib.import_module(f"dschat_kernels.ops.{function.__module__.rpartition('.')[2]}")
            schema = getattr(torch.ops.dschat, op).default._schema
            library.define(str(schema).removeprefix("dschat::"))
            library.impl(op, function, "CompositeExplicitAutograd")
            _describe(op, namespace, library)
        _IMPLEMENTATIONS[backend] = found
    return _IMPLEMENTATIONS[backend]


def implementation(op: str, backend: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """What runs `op` on `backend` (not "reference") for these tensors: the kernels' own function where torch need
    not see the call, else the op of torch.library."""
    functions = offered(backend)
    if runs_directly(*tensors):
        return functions[op]
    namespace = torch.ops.dschat if backend == "cpu" else getattr(torch.ops, f"dschat_{backend}")
    return getattr(namespace, op)


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


def _why_not_triton(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    from dschat_kernels import triton

    return triton.why_not(op, tensors)


def _why_not_cuda(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    from dschat_kernels import cuda

    return cuda.why_not(op, tensors)


def _why_not(backend: str, op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why `backend` cannot run `op` on these tensors, or None."""
    if backend == "cuda":
        return _why_not_cuda(op, tensors)
    return _why_not_triton(op, tensors) if backend == "triton" else _why_not_cpu(op, tensors)


def _is_missing(backend: str) -> bool:
    """Whether this machine cannot run `backend` at all."""
    from dschat_kernels import cuda

    return cuda.unavailable() is not None if backend == "cuda" else backend == "cpu" and not _have_native()


def resolve_backend(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that runs `op` on these tensors: "reference", "cpu", "triton" or "cuda".

    None chooses: on the CPU "cpu" for float32 and bfloat16 where the native kernels can be had; on a GPU, for float32,
    float16 and bfloat16, "triton" where Triton is installed (its kernels were the faster ones nearly everywhere on an
    H200), else "cuda" where the CUDA kernels can be had; otherwise "reference", with one warning a process and reason.
    A named backend that cannot run raises ValueError (or RuntimeError where the GPU or the native kernels are missing)
    with the reason.
    """
    if backend == "reference":
        return "reference"
    check(
        backend is None or backend in BACKENDS,
        f"{op}: backend is {backend!r}; choose one of {', '.join(BACKENDS)}, or None for automatic.",
    )
    if backend is not None:
        reason = _why_not(backend, op, tensors)
        if reason is None:
            return backend
        error: type[Exception] = RuntimeError if _is_missing(backend) else ValueError
        raise error(f"{reason.rstrip('.')}; use backend=None or 'reference'.")
    on_gpu = any(tensor is not None and tensor.device.type == "cuda" for tensor in tensors)
    reasons = []
    for name in ("triton", "cuda") if on_gpu else ("cpu",):
        reason = _why_not(name, op, tensors)
        if reason is None:
            return name
        reasons.append(reason.rstrip("."))
    say_once(f"{'; '.join(reasons)}; the PyTorch reference runs instead.")
    return "reference"
