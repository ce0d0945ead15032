"""What is special to the triton backend's ops, in Triton's interpreter (the cases of every op: tests/backends).

Sizes are small because the interpreter is slow: odd ones, one, none, and around the blocks of the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close_to_fp64
from paged import Batch, cumulative, int_tensor, make_batch, same_bits
from torch import Tensor

from dschat_kernels.ops import (
    attention,
    attention_decode,
    bias_act,
    gated_act,
    layer_norm,
    linear,
    lora_linear,
    rms_norm,
    sample,
)
from dschat_kernels.ops._common import implementation, native
from dschat_kernels.packing import PackedLinear, ResolvedLinear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("interpreted")


def on_triton(op: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        return op(*args, **options, backend="triton")

    return call


# ------------------------------------------------------------------------------------------------------ norms


def test_layer_norm_far_from_zero() -> None:
    x = torch.randn(4, 577) + 1000
    exact = layer_norm.layer_norm_reference(x.double(), None, None)
    own = layer_norm.layer_norm_reference(x, None, None)
    assert_close_to_fp64(layer_norm.layer_norm(x, None, None, backend="triton"), exact, own)


def test_rms_norm_promotes_the_weight() -> None:
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(40)
    y = rms_norm.rms_norm(x, weight, backend="triton")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rms_norm.rms_norm_reference(x, weight))


# ------------------------------------------------------------------------------------------------ elementwise


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu", "quick_gelu", "gelu"])
def test_bias_act_of_what_is_not_finite(activation: str) -> None:
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1e30, -1e30, 0.0, -0.0, 1e-40]])
    y = bias_act.bias_act(x, None, activation, backend="triton")
    expected = bias_act.bias_act_reference(x, None, activation)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("op", ["rms_norm", "bias_act", "gated_act", "layer_norm", "linear", "lora_linear"])
def test_opcheck(op: str) -> None:
    """Schemas, fakes and gradients of this backend's own ops, under tracing too."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    matrix = torch.randn(5, 8)
    arguments = {
        "rms_norm": (x, weight, None, 1e-6, 0.0, "llama"),
        "layer_norm": (x, weight, None, x.detach().clone(), 1e-6),
        "bias_act": (x, weight, "gelu"),
        "gated_act": (x, None, None, None, "silu"),
        "linear": (x.detach(), matrix, None, 5, 8, False, "relu", None, False),
        "lora_linear": (x, matrix, None, torch.randn(2, 8, requires_grad=True), torch.randn(5, 2), 0.5),
    }
    implementation(op, "triton")
    torch.library.opcheck(getattr(torch.ops.dschat_triton, op).default, arguments[op])


# ------------------------------------------------------------------------------------------------------- rope


# ----------------------------------------------------------------------------------------------------- linear


def part(n: int, k: int, dtype: torch.dtype, bias: bool = True) -> ResolvedLinear:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    return ResolvedLinear(weight, torch.randn(n).to(dtype) if bias else None, ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_fused_epilogues_have_the_bits_of_separate_ops(activation: str, dtype: torch.dtype) -> None:
    parts = [part(83, 40, dtype, bias) for bias in (True, False)]
    x, residual = torch.randn(9, 40).to(dtype), torch.randn(9, 83).to(dtype)
    gate, up = (PackedLinear.from_parts([p], dense=True) for p in parts)
    z = linear.linear(x, gate, backend="triton")
    fused = linear.linear(x, gate, activation=activation, residual=residual, backend="triton")
    assert torch.equal(fused, residual + bias_act.bias_act(z, None, activation, backend="triton"))
    pair = PackedLinear.from_parts(parts, gated=True, dense=True)
    gated = linear.linear(x, pair, activation=activation, backend="triton")
    other = linear.linear(x, up, backend="triton")
    assert torch.equal(gated, gated_act.gated_act(z, other, activation, backend="triton"))
    for ours, alone in zip(linear.linear_sums(x, pair, "triton"), (z, other), strict=True):
        assert torch.equal(ours, alone)


def test_linear_wants_a_dense_pack() -> None:
    if native() is None:
        pytest.skip("without the native kernels every pack is dense")
    packed = PackedLinear.from_weight(torch.randn(4, 3))
    with pytest.raises(ValueError, match="pack with dense=True"):
        linear.linear(torch.randn(2, 3), packed, backend="triton")


def test_lora_linear_gradients() -> None:
    p = part(20, 31, torch.float32)
    inputs = {"x": torch.randn(5, 31), "lora_a": torch.randn(8, 31), "lora_b": torch.randn(20, 8)}
    got = {}
    for backend in ("triton", "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y = lora_linear.lora_linear(
            leaves["x"], p.weight, p.bias, leaves["lora_a"], leaves["lora_b"], 0.5, backend=backend
        )
        y.square().sum().backward()
        got[backend] = {name: t.grad for name, t in leaves.items()}
    for name in inputs:
        torch.testing.assert_close(got["triton"][name], got["reference"][name], rtol=1e-4, atol=1e-3)


# -------------------------------------------------------------------------------------------------- attention


SLOPES = torch.tensor([0.5, -0.25, 0.1, -0.03])  # negative: biases rounded to bfloat16


def check_attention(batch: Batch, **options: Any) -> Tensor:
    y = attention.attention(*batch.arguments, backend="triton", **options)
    arguments = list(batch.arguments)
    own = attention.attention_reference(*arguments, **options)
    arguments[:3] = [t.double() for t in arguments[:3]]
    assert_close_to_fp64(y, attention.attention_reference(*arguments, **options), own)
    return y


ATTENTION_OPTIONS = [
    {"scale": 0.25},
    {"scale": 0.25, "window": 33},
    {"scale": 1.0, "softcap": 10.0},
    {"scale": 0.25, "alibi_slopes": SLOPES},
    {"scale": 0.3, "window": 300, "softcap": 3.0, "alibi_slopes": SLOPES},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (5, 1, 1), (40, 1, 130)])
def test_attention_shapes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check_attention(make_batch([2, 3], [66, 3], heads, kv_heads, dim, dtype), scale=dim**-0.5)


@pytest.mark.parametrize("options", ATTENTION_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_decode_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The queries of a row at once, one at a time, alone, or in a batch whose other rows come first."""
    batch = make_batch([9, 0, 2], [300, 5, 270], 4, 2, 20, dtype)
    q, k_cache, v_cache, table, cu, _ = batch.arguments
    together = attention.attention(*batch.arguments, backend="triton", **options)
    whole = attention_decode.attention_decode(*batch.arguments, backend="triton", **options)
    assert same_bits(whole, together)
    for row, tokens in ((0, (0, 8)), (2, (0, 1))):
        begin, end = cu[row : row + 2].tolist()
        for i in tokens:
            left = batch.kv_lens[row] - (end - begin) + i + 1
            alone = (q[begin + i : begin + i + 1], k_cache, v_cache, table[row : row + 1], cumulative([1]))
            for op in (attention.attention, attention_decode.attention_decode):
                y = op(*alone, int_tensor([left]), backend="triton", **options)
                assert same_bits(y, together[begin + i : begin + i + 1])


def test_attention_slots_and_memory_of_another_call() -> None:
    batch = make_batch([1, 2], [700, 300], 4, 2, 24)
    options = {"scale": 0.3, "softcap": 8.0, "alibi_slopes": SLOPES, "slots": torch.tensor([1, 0])}
    swapped = (*batch.arguments[:5], torch.tensor([300, 290]))
    y = attention.attention(*swapped, backend="triton", **options)
    assert same_bits(attention_decode.attention_decode(*swapped, backend="triton", **options), y)
    torch.testing.assert_close(y, attention.attention_reference(*swapped, **options))


def test_attention_of_nothing() -> None:
    for lens in ([], [0], [0, 0]):
        batch = make_batch(lens, [3] * len(lens), 2, 1, 8)
        for op in (attention.attention, attention_decode.attention_decode):
            assert op(*batch.arguments, scale=1.0, backend="triton").shape == (0, 2, 8)


# ----------------------------------------------------------------------------------------------------- sample


def test_sample_draws_many_numbers() -> None:
    """As the distribution says: 400 draws from three tokens."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(400, 3)
    numbers = {"streams": torch.arange(400), "positions": torch.zeros(400).long(), "seed": 3}
    tokens, _ = sample.sample(logits, backend="triton", **numbers)
    assert torch.equal(tokens, sample.sample_reference(logits, **numbers)[0])
    assert (tokens.bincount().float() / 400 - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.08


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), "row 1 of logits has a NaN"),
        (float("inf"), "row 1 of logits"),
        (float("-inf"), "every logit of row 1"),
    ],
)
def test_sample_bad_rows(bad: float, message: str) -> None:
    logits = torch.zeros(2, 1100)
    if bad == float("-inf"):
        logits[1] = bad
    else:
        logits[1, 1050] = bad
    with pytest.raises(ValueError, match=message):
        sample.sample(logits, temperature=0.0, backend="triton")


# --------------------------------------------------------------------------------------------- token_logprobs
