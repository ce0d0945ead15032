"""How kernels are launched: with a fixed configuration, or with the fastest of a few on a GPU.

`launch` passes the arguments of a kernel through `run`, which is the one place that everything goes through: the tests
put the interpreter there, and the static gates a recorder that compiles exactly what would have run.

Tuning is off unless DSCHAT_TRITON_AUTOTUNE=1. It then times the alternatives of a launch once for each kernel, dtype
and all arguments that are specialised on (widths, strides of rows, which tensors are there) on the GPU at hand, and
keeps the fastest for this process. The number of rows is no part of that key, so that tuning cannot make a row's bits
depend on its batch. The alternatives of a norm sum a row in other orders, so that another process, a strided view, or a
norm with a residual beside one without may get other last bits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: pointers are handed to kernels at multiples of it, or else rows would differ in how they are read."""


@dataclass(frozen=True)
class Config:
    """Block sizes and compile options of a launch. fp_fusion: products and sums may be contracted to one rounding."""

    blocks: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel of `triton.jit`, its grid, arguments and constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: Config


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    config: Config,
    alternatives: Sequence[Config] = (),
) -> None:
    """Runs `kernel` over `grid`; nothing happens for an empty grid.

    Only kernels whose second run leaves what the first left may have alternatives. What the grid depends on, and
    whatever anything but the widths chooses, is among the arguments and not in `config.blocks`: what is fastest is kept
    by the arguments.
    """
    if 0 in grid:
        return
    if alternatives and _tuning(arguments):
        config = _fastest(kernel, grid, arguments, (config, *alternatives))
    run(Launch(kernel, grid, arguments, config))


def _run(this: Launch) -> None:
    with _device(this.arguments):
        this.kernel[this.grid](
            **this.arguments, **this.config.blocks, num_warps=this.config.num_warps,
            num_stages=this.config.num_stages, enable_fp_fusion=this.config.fp_fusion,
        )  # fmt: skip


run = _run


def _device(arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors'."""
    for value in arguments.values():
        if isinstance(value, Tensor) and value.device.type == "cuda":
            return torch.cuda.device(value.device)
    return contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------- tuning

_FASTEST: dict[Any, Config] = {}


def _tuning(arguments: Mapping[str, Any]) -> bool:
    return os.environ.get("DSCHAT_TRITON_AUTOTUNE", "") == "1" and any(
        isinstance(value, Tensor) and value.device.type == "cuda" for value in arguments.values()
    )


def _fastest(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], configs: Sequence[Config]
) -> Config:
    varying = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    key = (
        kernel,
        tuple(
            (name, (value.dtype, value.device) if isinstance(value, Tensor) else value)
            for name, value in arguments.items()
            if name not in varying
        ),
    )
    if key not in _FASTEST:
        _FASTEST[key] = min(configs, key=lambda config: _time(Launch(kernel, grid, arguments, config)))
    return _FASTEST[key]


def _time(this: Launch) -> float:
    """Median milliseconds, or infinity where the configuration does not fit the GPU."""
    import triton

    try:
        return float(triton.testing.do_bench(lambda: run(this), return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


# --------------------------------------------------------------------------------------------------- tensors


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def aligned(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, contiguous and at an aligned address; copied only if it must."""
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """`tensor` [..., n] as [rows, n] at an aligned address, with the stride of its rows; copied only if it must.

    Strides other than n are kept only where they are as good as it for wide accesses, so that a strided view and its
    copy are read alike.
    """
    n = tensor.shape[-1]
    tensor = tensor.detach()
    rows = tensor.reshape(-1, n) if tensor.numel() else tensor.reshape(0, n)
    stride = rows.stride(0) if rows.shape[0] > 1 else n
    good = rows.stride(1) == 1 or n == 1
    wide = stride == n or (stride > n and stride % ALIGNMENT == 0 and n % ALIGNMENT == 0)
    if not good or not wide or rows.data_ptr() % ALIGNMENT:
        rows = rows.contiguous()
        rows = rows.clone() if rows.data_ptr() % ALIGNMENT else rows
        stride = n
    return rows, stride


def float32(vector: Tensor | None) -> Tensor | None:
    """A weight or bias as the contiguous float32 that kernels take; exact for the narrower dtypes."""
    return None if vector is None else aligned(vector.detach().to(torch.float32))


def no_tensor(like: Tensor) -> Tensor:
    """Stands in an op's tuple of results for one that was not asked for."""
    return like.new_empty(0)
