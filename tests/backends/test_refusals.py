"""What an op refuses before it launches anything, on every backend: an argument that lies elsewhere, a head too large.

The other device is PyTorch's meta device, which has no memory: whoever reads such a tensor fails in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dschat_kernels import linear
from dschat_kernels.ops import _common
from dschat_kernels.ops.attention import attention, packed_attention
from dschat_kernels.ops.attention_decode import attention_decode
from dschat_kernels.ops.rope_append import rope, rope_append
from dschat_kernels.ops.sample import sample
from dschat_kernels.packing import PackedLinear
from tests.backends.backends import BACKENDS, Backend
from tests.paged import cumulative, make_batch

ON_CPU = [b for b in BACKENDS if b.name in ("reference", "cpu", "cuda-source", "triton-source")]
EACH = pytest.mark.parametrize("backend", ON_CPU, ids=lambda b: b.name)


def cached(dim: int = 8) -> dict[str, Any]:
    """Arguments of attention."""
    names = ("q", "k_cache", "v_cache", "block_table", "cu_seqlens", "kv_lens")
    batch = make_batch([1, 2], [70, 3], 4, 2, dim)
    slots = torch.arange(2, dtype=torch.int32)
    return {**dict(zip(names, batch.arguments, strict=True)), "slots": slots, "scale": 0.2}


def rotation() -> dict[str, Any]:
    return {"cos": torch.rand(80, 4), "sin": torch.rand(80, 4), "positions": torch.tensor([69, 1, 2])}


def appended() -> dict[str, Any]:
    found = cached()
    q, k, v = (torch.randn(3, heads, 8) for heads in (4, 2, 2))
    cache = {name: found[name] for name in ("k_cache", "v_cache", "block_table")}
    return {"q": q, "k": k, "v": v, **rotation(), **cache, "slots": torch.tensor([0, 1, 1])}


def packed(dim: int = 8) -> dict[str, Any]:
    q, k, v = (torch.randn(3, heads, dim) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "cu_seqlens": cumulative([1, 2]), "scale": 0.2}


def drawn() -> dict[str, Any]:
    return {"logits": torch.randn(3, 5), "streams": torch.arange(3), "positions": torch.arange(3)}


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "attention": (attention, cached, ("block_table", "cu_seqlens", "kv_lens", "slots", "k_cache", "v_cache")),
    "attention_decode": (attention_decode, cached, ("block_table", "cu_seqlens", "kv_lens", "slots")),
    "packed_attention": (packed_attention, packed, ("cu_seqlens", "k", "v")),
    "rope": (rope, lambda: {"x": torch.randn(3, 2, 8), **rotation()}, ("positions", "cos", "sin")),
    "rope_append": (rope_append, appended, ("positions", "slots", "block_table", "k_cache", "v_cache", "v")),
    "sample": (sample, drawn, ("streams", "positions")),
}  # fmt: skip


@EACH
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, _, names) in OPS.items() for name in names])
def test_an_argument_on_another_device(op: str, name: str, backend: Backend) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    call, make, _ = OPS[op]
    arguments = make()
    call(**arguments, backend="reference")
    with backend.within():
        arguments[name] = arguments[name].to("meta")
        with pytest.raises(
            ValueError, match=rf"^{op}: {name} is on meta and the .* on cpu; move them to one device"
        ):
            call(**arguments, backend=backend.backend)


@EACH
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_a_pack_on_another_device(dense: bool, backend: Backend) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    pack = PackedLinear.from_weight(torch.randn(4, 8), dense=dense)
    name = "dense" if dense else "panels"
    held: Tensor | None = getattr(pack, name)
    if held is None:
        pytest.skip("there are no native kernels")
    setattr(pack, name, held.to("meta"))
    with (
        backend.within(),
        pytest.raises(ValueError, match=r"^linear: packed is on meta and the input on cpu; move"),
    ):
        linear(torch.randn(3, 8), pack, backend=backend.backend)


@EACH
def test_activations_are_quantised_on_the_cpu_only(backend: Backend) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    x, pack = (
        torch.randn(3, 8),
        PackedLinear.from_weight(torch.randn(4, 8), dense=True, weights="int8_dynamic"),
    )
    with backend.within():
        if backend.backend in ("cpu", "reference"):
            assert linear(x, pack, backend=backend.backend).isfinite().all()
            return
        said = f"int8_dynamic weights run on .* not on '{backend.backend}'; pack with weights='int8'"
        with pytest.raises(ValueError, match=said):
            linear(x, pack, backend=backend.backend)


@EACH
@pytest.mark.parametrize("op", ["attention", "attention_decode"])
def test_a_query_without_keys(op: str, backend: Backend) -> None:
    """Its own key is one: kv_lens counts it. A row without keys has no queries, which the cases have."""
    if backend.missing:
        pytest.skip(backend.missing)
    arguments = cached()
    arguments["kv_lens"] = torch.tensor([0, 3], dtype=torch.int32)
    with (
        backend.within(),
        pytest.raises(
            ValueError, match=rf"^{op}: row 0 has 1 query tokens and kv_lens 0; kv_lens counts the query"
        ),
    ):
        OPS[op][0](**arguments, backend=backend.backend)


@EACH
@pytest.mark.parametrize("op", ["attention", "attention_decode", "packed_attention"])
def test_a_head_too_large_names_the_backend(op: str, backend: Backend) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    arguments = packed(300) if op == "packed_attention" else cached(300)
    call = OPS[op][0]
    if backend.backend == "reference":
        assert call(**arguments, backend="reference").isfinite().all()
        return
    _common.offered(backend.backend)
    with (
        backend.within(),
        pytest.raises(ValueError, match=f"{op}: head_dim is 300, the {backend.backend} backend goes to 256"),
    ):
        call(**arguments, backend=backend.backend)
