"""PyTorch's default device and dtype are the caller's: an op makes its buffers where its tensors are, of the dtype that
its kernels read.

The cases of cases.py run as ever; only the ops, what packs their weights, and the backward run under the defaults.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dschat_kernels import linear
from dschat_kernels.ops import _common
from dschat_kernels.ops.linear import linear_input_grad, linear_sums
from dschat_kernels.ops.lora_linear import low_rank_grads
from dschat_kernels.packing import WEIGHTS, PackedLinear, ResolvedLinear
from tests.backends.backends import BACKENDS, Backend
from tests.backends.cases import CASES

CPU = [b for b in BACKENDS if b.name in ("reference", "cpu", "cuda-source", "triton-source")]
MODULES = {
    "attention": ("attention", "packed_attention"), "attention_decode": ("attention_decode",),
    "bias_act": ("bias_act",), "gated_act": ("gated_act",), "layer_norm": ("layer_norm",), "linear": ("linear",),
    "lora_linear": ("lora_linear", "fuse_lora", "low_rank_grads"), "rms_norm": ("rms_norm",),
    "rope_append": ("rope", "rope_append"), "sample": ("sample",), "token_logprobs": ("token_logprobs",),
}  # fmt: skip


@contextmanager
def meta_device() -> Iterator[None]:
    """Within itself nothing: what changes inside an op torch takes back when it ends, and the default would stay."""
    if _inside:
        yield
        return
    torch.set_default_device("meta")
    _inside.append(True)
    try:
        yield
    finally:
        _inside.clear()
        torch.set_default_device(None)


_inside: list[bool] = []


@contextmanager
def bfloat16() -> Iterator[None]:
    """As models are loaded: what counts on float32 would write past its end."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {"meta": meta_device, "bfloat16": bfloat16}


def under(defaults: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with defaults():
            return function(*arguments, **options)

    return call


@pytest.mark.parametrize("backend", CPU, ids=lambda b: b.name)
@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("op", CASES)
def test_op(op: str, defaults: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    within = DEFAULTS[defaults]
    _common.offered(backend.backend) if backend.backend != "reference" else None
    for stem, names in MODULES.items():
        module = importlib.import_module(f"dschat_kernels.ops.{stem}")
        for name in names:
            monkeypatch.setattr(module, name, under(within, getattr(module, name)))
    monkeypatch.setattr(PackedLinear, "from_parts", under(within, PackedLinear.from_parts))
    # What torch.autograd.backward and grad call; they themselves take a default device off while they run.
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", under(within, run))
    with backend.within():
        CASES[op](backend.backend, torch.float32, False)


def test_every_op_is_here() -> None:
    ops = {name for names in MODULES.values() for name in names} | {
        "linear_int8"
    }  # linear, over another pack
    assert {name.strip("_") for name in CASES} == ops


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_packs_and_what_only_the_cpu_has(dense: bool, dtype: torch.dtype, defaults: str) -> None:
    """int8 weights, gated packs, a pack's parts and their gradients, the gradients of LoRA's factors: the bits that
    they have under PyTorch's own defaults."""
    x, dy = torch.randn(5, 40).to(dtype), torch.randn(5, 24).to(dtype)
    a, b = torch.randn(3, 40), torch.randn(24, 3)
    parts = [ResolvedLinear(torch.randn(24, 40).to(dtype), torch.randn(24), ()) for _ in range(2)]
    parts[1] = ResolvedLinear(parts[1].weight, None, ())  # its place in the packed bias is zeros
    parts[0].weight[3] = 0.0  # a row without a scale

    def run() -> list[torch.Tensor]:
        found = []
        for weights in WEIGHTS:
            for gated in (False, True):
                packed = PackedLinear.from_parts(parts, gated=gated, weights=weights, dense=dense)
                found += [linear(x, packed, activation="silu" if gated else "none"), packed.to_dense()]
                found += [t for t in (packed.plain_bias(), packed.plain_scales()) if t is not None]
        packed = PackedLinear.from_parts(parts, dense=dense)
        found += [*linear_sums(x, packed), linear_input_grad([dy, dy], packed)]
        return found + list(low_rank_grads(x, dy, a, b, 0.7))

    expected = run()
    with DEFAULTS[defaults]():
        found = run()
    assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))
