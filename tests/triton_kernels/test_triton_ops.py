"""Every op of the triton backend against float64, by the criterion of tests/helpers.py, in Triton's interpreter.

Sizes are small because the interpreter is slow: odd ones, one, none, and around the blocks of the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close_to_fp64, check_gradients, non_contiguous
from paged import same_bits
from torch import Tensor

from dschat_kernels.ops import bias_act, gated_act, layer_norm, rms_norm, rope_append
from dschat_kernels.ops._common import ACTIVATIONS
from dschat_kernels.triton._rows import ROWS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("interpreted")


def on_triton(op: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        return op(*args, **options, backend="triton")

    return call


# ------------------------------------------------------------------------------------------------------ norms


def norm_inputs(rows: int, hidden: int, dtype: torch.dtype, *names: str) -> dict[str, Tensor | None]:
    made = {
        "x": torch.randn(rows, hidden).to(dtype),
        "weight": (torch.randn(hidden) + 1).to(dtype),
        "bias": torch.randn(hidden).to(dtype),
        "residual": torch.randn(rows, hidden).to(dtype),
    }
    return {name: made[name] if name in names else None for name in ("x", "weight", "bias", "residual")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [("x", "weight", "bias"), ("x", "weight", "bias", "residual"), ("x",)])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 111), (3, 1030), (ROWS + 1, 64), (0, 8)])
def test_layer_norm(rows: int, hidden: int, names: tuple[str, ...], dtype: torch.dtype) -> None:
    inputs = norm_inputs(rows, hidden, dtype, *names)
    check_gradients(on_triton(layer_norm.layer_norm), layer_norm.layer_norm_reference, inputs)


def test_layer_norm_of_one_column_is_its_bias() -> None:
    inputs = norm_inputs(3, 1, torch.float32, "x", "weight", "bias")
    y = layer_norm.layer_norm(**inputs, backend="triton")
    torch.testing.assert_close(y, inputs["bias"].expand(3, 1), rtol=0, atol=1e-3)


def test_layer_norm_far_from_zero() -> None:
    x = torch.randn(4, 577) + 1000
    exact = layer_norm.layer_norm_reference(x.double(), None, None)
    own = layer_norm.layer_norm_reference(x, None, None)
    assert_close_to_fp64(layer_norm.layer_norm(x, None, None, backend="triton"), exact, own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rounding", "weight_offset"), [("llama", 0.0), ("gemma", 1.0), ("llama", 1.0)])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (1, 111), (3, 1030), (ROWS + 1, 64), (0, 8)])
def test_rms_norm(rows: int, hidden: int, rounding: str, weight_offset: float, dtype: torch.dtype) -> None:
    for names in (("x", "weight"), ("x", "weight", "residual")):
        inputs = norm_inputs(rows, hidden, dtype, *names)
        del inputs["bias"]
        check_gradients(
            on_triton(rms_norm.rms_norm), rms_norm.rms_norm_reference, inputs, weight_offset=weight_offset,
            rounding=rounding,
        )  # fmt: skip


def test_rms_norm_promotes_the_weight() -> None:
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(40)
    y = rms_norm.rms_norm(x, weight, backend="triton")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rms_norm.rms_norm_reference(x, weight))


# ------------------------------------------------------------------------------------------------ elementwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act(activation: str, dtype: torch.dtype) -> None:
    for rows, columns, with_bias in ((1, 1, True), (2, 1025, False), (ROWS + 1, 31, True), (0, 3, True)):
        inputs = {
            "x": (3 * torch.randn(rows, columns)).to(dtype),
            "bias": torch.randn(columns).to(dtype) if with_bias else None,
        }
        check_gradients(
            on_triton(bias_act.bias_act), bias_act.bias_act_reference, inputs, activation=activation
        )


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu", "quick_gelu", "gelu"])
def test_bias_act_of_what_is_not_finite(activation: str) -> None:
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 0.0, -0.0, 1e-40]])
    y = bias_act.bias_act(x, None, activation, backend="triton")
    expected = bias_act.bias_act_reference(x, None, activation)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("packed", [False, True])
def test_gated_act(packed: bool, activation: str, dtype: torch.dtype) -> None:
    for rows, columns, biases in ((1, 1, True), (2, 1025, False), (ROWS + 1, 31, True), (0, 3, True)):
        gate, up = (torch.randn(rows, columns).to(dtype) for _ in range(2))
        inputs = {
            "gate": torch.cat([gate, up], -1) if packed else gate,
            "up": None if packed else up,
            "gate_bias": torch.randn(columns).to(dtype) if biases else None,
            "up_bias": torch.randn(columns).to(dtype) if biases else None,
        }
        check_gradients(
            on_triton(gated_act.gated_act), gated_act.gated_act_reference, inputs, activation=activation
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm.rms_norm(x, torch.ones(40), residual=x, backend="triton")[0],
        lambda x: layer_norm.layer_norm(x, None, None, backend="triton"),
        lambda x: bias_act.bias_act(x, torch.ones(40), backend="triton"),
        lambda x: gated_act.gated_act(x, backend="triton"),
        lambda x: gated_act.gated_act(x, x, backend="triton"),
    ],
    ids=["rms_norm", "layer_norm", "bias_act", "gated_packed", "gated"],
)
def test_rows_alone_and_strided(call: Any) -> None:
    """A row's bits are those of the batch, and other layouts change nothing."""
    x = torch.randn(7, 40)
    y = call(x)
    for begin, end in ((0, 1), (3, 5), (6, 7)):
        assert same_bits(call(x[begin:end]), y[begin:end])
    for view in non_contiguous(x):
        assert same_bits(call(view), y)


# ------------------------------------------------------------------------------------------------------- rope


def tables(positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequency
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("tokens", "heads", "rotary_dim", "dim"), [(5, 3, 16, 16), (3, 1, 10, 17), (1, 5, 2, 2), (0, 1, 4, 4)]
)
def test_rope(tokens: int, heads: int, rotary_dim: int, dim: int, style: str, dtype: torch.dtype) -> None:
    cos, sin = tables(50, rotary_dim)
    positions = torch.randint(0, 50, (tokens,))
    x = torch.randn(tokens, heads + 2, dim).to(dtype)[:, 1:-1]  # a slice of a packed qkv
    y = rope_append.rope(x, cos, sin, positions, style=style, backend="triton")
    assert same_bits(y, rope_append.rope_reference(x, cos, sin, positions, style=style))
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    theirs = x.clone().requires_grad_()
    grad = torch.randn(y.shape).to(dtype)
    rope_append.rope(ours, cos, sin, positions, style=style, backend="triton").backward(grad)
    rope_append.rope_reference(theirs, cos, sin, positions, style=style).backward(grad)
    rope_append.rope_reference(exact, cos, sin, positions, style=style).backward(grad.double())
    assert_close_to_fp64(ours.grad, exact.grad, theirs.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["half", "interleaved", "none"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 20)])
def test_rope_append(heads: int, kv_heads: int, dim: int, style: str, dtype: torch.dtype) -> None:
    from dschat_kernels.cache import PagedKVCache

    cos, sin = (None, None) if style == "none" else tables(200, 12)
    rotary = {} if style == "none" else {"style": style}
    caches = [PagedKVCache(1, kv_heads, dim, 6, 2, 3, dtype) for _ in range(2)]
    positions = torch.tensor([0, 63, 64, 5, 127, 17])
    slots = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    qkv = torch.randn(6, heads + 2 * kv_heads, dim).to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    outs = []
    for cache, backend in zip(caches, ("triton", "reference"), strict=True):
        cache.prepare_append([1, 0], [128, 128])
        outs.append(
            rope_append.rope_append(
                q,
                k,
                v,
                cos,
                sin,
                positions,
                slots,
                cache.k[0],
                cache.v[0],
                cache.block_table,
                backend=backend,
                **rotary,
            )
        )
    assert same_bits(outs[0], outs[1])
    assert same_bits(caches[0].k, caches[1].k) and same_bits(caches[0].v, caches[1].v)
