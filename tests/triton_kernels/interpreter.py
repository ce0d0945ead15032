"""Runs the Triton kernels of this project on CPU tensors, in Triton's interpreter, inside one block of a test.

    with interpreter():
        rms_norm(x, weight, backend="triton")

The switch is for tests only: the package has none, and TRITON_INTERPRET need not be set, so one process can interpret
kernels and compile them. Inside the block the backend takes CPU tensors, launches are interpreted, and functions of
`triton.jit` can be called from interpreted kernels. Triton's interpreter has flaws of its own, repaired here and
tested in test_interpreter.py: bfloat16 casts truncate, tl.dot multiplies the bit patterns of bfloat16, and a scalar
comparison that is broadcast turns into an integer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as ti
from triton.runtime.jit import JITFunction

import dschat_kernels.triton
from dschat_kernels.triton import _launch


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint64(0x7FC0), rounded).astype(np.uint16)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            wide = ti.TensorHandle(bfloat16_to_float32(source.data), tl.float32)
            return wide if after == tl.float32 else original(self, wide, target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return ti.TensorHandle(float32_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, target)

    return cast


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Products of widened operands, summed in the accumulator's dtype."""

    def widen(x: Any) -> np.ndarray:
        data = bfloat16_to_float32(x.data) if x.dtype.scalar == tl.bfloat16 else x.data
        return data.astype(d.data.dtype)

    return ti.TensorHandle(np.matmul(widen(a), widen(b)) + d.data, d.dtype.scalar)


def _splat(self: Any, target: Any, scalar: Any) -> Any:
    return ti.TensorHandle(
        np.full(target.shape, scalar.data.reshape(-1)[0], scalar.data.dtype), target.scalar
    )


_REWRITTEN: dict[Any, Any] = {}


def _interpreted(function: JITFunction) -> Any:
    if function.fn not in _REWRITTEN:
        _REWRITTEN[function.fn] = ti.InterpretedFunction(function.fn)
    return _REWRITTEN[function.fn]


def _launch_interpreted(this: _launch.Launch) -> None:
    executor = ti.GridExecutor(
        _interpreted(this.kernel).rewrite(), [p.name for p in this.kernel.params], this.grid
    )
    with np.errstate(all="ignore"):
        executor(**this.arguments, **this.config.blocks)


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Inside the block the triton backend takes CPU tensors and is interpreted."""
    dschat_kernels.triton.implementations()  # imported as what is to be compiled, before the language is patched
    with contextlib.ExitStack() as undo:

        def replace(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        # A launch leaves the language patched where a kernel calls another function; this outer patch takes it back.
        language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        undo.callback(ti._patch_lang(language).restore)
        replace(triton.knobs.runtime, "interpret", True)
        replace(JITFunction, "__call__", lambda self, *a, **k: _interpreted(self).rewrite()(*a, **k))
        builder = ti.InterpreterBuilder
        cast = _cast(builder.cast_impl)
        for name in ("cast_impl", "create_fp_ext", "create_fp_trunc", "create_fp_to_si", "create_si_to_fp"):
            replace(builder, name, cast)
        replace(builder, "create_dot", _dot)
        replace(builder, "create_splat", _splat)
        replace(_launch, "run", _launch_interpreted)
        replace(dschat_kernels.triton, "DEVICES", {*dschat_kernels.triton.DEVICES, "cpu"})
        yield
