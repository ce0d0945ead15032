"""Triton kernels for GPUs: one file an op, with the stems and the contracts of `dschat_kernels.ops`.

This module imports nothing of Triton; the kernels' modules do, and need no driver for it. `implementations` is the
backend table that `ops` reads, `why_not` says why the backend cannot run a call.

Rules of every kernel here: sums are float32 and in an order that depends on the widths of a call only, never on the
number of rows or on how the work is split, so a row has the same bits in every batch; what varies with the batch is
never specialised on, because another specialisation may sum in another order; rounding is where the reference
rounds. A launch uses a fixed configuration (see `_launch` for tuning).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dschat_kernels.ops import _common

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = {"cuda"}
"""Device types whose tensors the kernels take. Tests add "cpu" and run the kernels in Triton's interpreter."""

_TABLE: dict[str, tuple[str, ...]] = {
    "layer_norm": ("layer_norm", "layer_norm_backward"),
    "rms_norm": ("rms_norm", "rms_norm_backward"),
    "bias_act": ("bias_act", "bias_act_backward"),
    "gated_act": ("gated_act", "gated_act_backward"),
    "rope_append": ("rope", "rope_append"),
    "attention": ("attention", "packed_attention", "packed_attention_backward"),
    "attention_decode": ("attention_decode",),
    "linear": ("linear", "linear_int8"),
    "lora_linear": ("lora_linear", "fuse_lora", "low_rank_grads"),
    "sample": ("sample",),
    "token_logprobs": ("token_logprobs", "token_logprobs_backward"),
}
"""Ops by the module (here and in `ops`) that has them; each is a function of that name."""


def implementations() -> dict[str, Callable[..., Any]]:
    """Every op of this backend by name, with the arguments of its torch.library schema."""
    importlib.import_module("dschat_kernels.triton._digest")  # what is no op is loaded with them
    return {
        op: getattr(importlib.import_module(f"dschat_kernels.triton.{stem}"), op)
        for stem, ops in _TABLE.items()
        for op in ops
    }


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


CAPABILITY = (8, 0)
"""The compute capability that the kernels need of an NVIDIA GPU: bfloat16, and asynchronous copies."""


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@_common.constant_result
def too_old(index: int | None = None) -> str | None:
    """Why the kernels cannot run on the GPU `index` (None: the current one), or None."""
    if torch.version.hip or not torch.cuda.is_available() or _capability(index) >= CAPABILITY:
        return None
    (major, minor), needed = _capability(index), ".".join(map(str, CAPABILITY))
    return f"Triton's kernels need a GPU of compute capability {needed}, and this one has {major}.{minor}"


def why_not(op: str, tensors: Iterable[Tensor | None]) -> str | None:
    """Why the backend cannot run `op` on these tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in DEVICES:
            return f"{op}: the triton backend needs tensors on a GPU, not on {tensor.device.type}"
        if tensor.dtype not in DTYPES:
            name = str(tensor.dtype).removeprefix("torch.")
            return f"{op}: the triton backend has float32, float16 and bfloat16, not {name}"
        if tensor.device.type == "cuda" and (reason := too_old(tensor.device.index)):
            return f"{op}: {reason}"
    if not installed():
        return f"{op}: Triton is not installed (pip install 'dschat[triton]')"
    return None


def digest(words: Tensor) -> int:
    """Sum modulo 2^64 of the int32 `words` times odd factors of their places: `dschat_kernels.packing.digests`, in one
    reading."""
    return int(importlib.import_module("dschat_kernels.triton._digest").digest(words))
