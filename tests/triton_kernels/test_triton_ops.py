"""Every op of the triton backend against float64, by the criterion of tests/helpers.py, in Triton's interpreter.

Sizes are small because the interpreter is slow: odd ones, one, none, and around the blocks of the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close_to_fp64, check_gradients, non_contiguous
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
    rope_append,
    sample,
    token_logprobs,
)
from dschat_kernels.ops._common import ACTIVATIONS, implementation, native
from dschat_kernels.packing import PackedLinear, ResolvedLinear
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


# ----------------------------------------------------------------------------------------------------- linear


def part(n: int, k: int, dtype: torch.dtype, bias: bool = True) -> ResolvedLinear:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    return ResolvedLinear(weight, torch.randn(n).to(dtype) if bias else None, ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 1, 1), (3, 31, 7), (65, 65, 64), (2, 130, 65), (0, 5, 3), (33, 33, 129)]
)
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, p = torch.randn(rows, k).to(dtype), part(n, k, dtype)
    packed = PackedLinear.from_parts([p], dense=True)
    y = linear.linear(x, packed, backend="triton")
    exact = x.double() @ p.weight.double().t() + p.bias.double()
    assert_close_to_fp64(y, exact, torch.nn.functional.linear(x, p.weight, p.bias))
    logits = linear.linear(x, packed, float_output=True, backend="triton")
    assert logits.dtype == torch.float32
    assert_close_to_fp64(
        logits, exact, torch.nn.functional.linear(x.float(), p.weight.float(), p.bias.float())
    )


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_alone(dtype: torch.dtype) -> None:
    x, packed = torch.randn(70, 96).to(dtype), PackedLinear.from_parts([part(40, 96, dtype)], dense=True)
    whole = linear.linear(x, packed, backend="triton")
    for begin, end in ((0, 1), (3, 5), (10, 69), (69, 70)):
        assert same_bits(linear.linear(x[begin:end], packed, backend="triton"), whole[begin:end])
    strided = torch.randn(70, 200).to(dtype)
    strided[:, 10:106] = x
    assert same_bits(linear.linear(strided[:, 10:106], packed, backend="triton"), whole)


def test_linear_wants_a_dense_pack() -> None:
    if native() is None:
        pytest.skip("without the native kernels every pack is dense")
    packed = PackedLinear.from_weight(torch.randn(4, 3))
    with pytest.raises(ValueError, match="pack with dense=True"):
        linear.linear(torch.randn(2, 3), packed, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k", "rank"), [(1, 1, 1, 1), (5, 33, 70, 8), (40, 20, 31, 17), (0, 3, 3, 2)]
)
def test_lora_linear(rows: int, n: int, k: int, rank: int, dtype: torch.dtype) -> None:
    p = part(n, k, dtype)
    x, a, b = torch.randn(rows, k).to(dtype), torch.randn(rank, k), torch.randn(n, rank)
    y = lora_linear.lora_linear(x, p.weight, p.bias, a, b, 0.5, backend="triton")
    reference = lora_linear.lora_linear_reference
    wide = [t.double() for t in (x, p.weight, p.bias, a, b)]
    size = float(wide[3].abs().sum(-1).max() * wide[4].abs().sum(-1).max()) / max(1, k) ** 0.5
    assert_close_to_fp64(y, reference(*wide, 0.5), reference(x, p.weight, p.bias, a, b, 0.5), size=size)
    for begin, end in ((0, 1), (rows // 2, rows)):
        rows_alone = lora_linear.lora_linear(x[begin:end], p.weight, p.bias, a, b, 0.5, backend="triton")
        assert same_bits(rows_alone, y[begin:end])
    for weight in (p.weight, p.weight.t().contiguous().t()):
        fused = lora_linear.fuse_lora(weight, a, b, 0.5, backend="triton")
        exact = lora_linear.fuse_lora_reference(wide[1], wide[3], wide[4], 0.5)
        assert_close_to_fp64(fused, exact, lora_linear.fuse_lora_reference(p.weight, a, b, 0.5))


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


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.03])


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


@pytest.mark.parametrize("options", ATTENTION_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    batch = make_batch([5, 0, 1, 70], [200, 3, 257, 70], 4, 2, 20, dtype)
    check_attention(batch, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (5, 1, 1), (40, 1, 130)])
def test_attention_shapes(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check_attention(make_batch([2, 3], [66, 3], heads, kv_heads, dim, dtype), scale=dim**-0.5)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 255, 256, 257, 513])
def test_attention_lengths(keys: int) -> None:
    """One, and around pages and chunks; prefill is decode bit for bit, whole or split."""
    batch = make_batch([1, min(keys, 3)], [keys, keys], 4, 2, 16)
    options = {"scale": 0.25}
    y = check_attention(batch, **options)
    for splits in (None, 1, 3):
        split = attention_decode.attention_decode(
            *batch.arguments, num_splits=splits, backend="triton", **options
        )
        assert same_bits(split, y)


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


@pytest.mark.parametrize("options", ATTENTION_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    batch = make_batch([50, 0, 1, 20], [50, 0, 1, 20], 4, 2, 12, dtype)
    cu = cumulative([50, 0, 1, 20])
    inputs = {"q": batch.q, "k": torch.cat(batch.k), "v": torch.cat(batch.v)}
    y = attention.packed_attention(*inputs.values(), cu, backend="triton", **options)
    assert same_bits(y, attention.attention(*batch.arguments, backend="triton", **options))
    check_gradients(
        on_triton(attention.packed_attention),
        attention.packed_attention_reference,
        inputs,
        cu_seqlens=cu,
        **options,
    )


# ----------------------------------------------------------------------------------------------------- sample


FILTERS = (
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 200, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 300, "top_p": 0.95, "min_p": 0.01},
)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The CPU's random numbers and order: the reference's tokens, for every shape of distribution."""
    cases = {1: (0.0,), 7: (0.0, 1.0), 1030: (0.0, 0.01, 5.0)} if dtype == torch.float32 else {1030: (5.0,)}
    for vocab, spreads in cases.items():
        for spread in spreads:
            rows = 3
            logits = (spread * torch.randn(rows, vocab)).to(dtype)
            logits[1, : vocab // 2] = float("-inf")
            arguments = {
                "streams": torch.arange(rows) + 2**40, "positions": torch.arange(rows) * 7 + 3, "seed": 2**61 + 5,
                **options,
            }  # fmt: skip
            tokens, log_probs = sample.sample(logits, backend="triton", **arguments)
            expected, expected_log_probs = sample.sample_reference(logits, **arguments)
            assert tokens.tolist() == expected.tolist(), (vocab, spread)
            torch.testing.assert_close(log_probs, expected_log_probs, rtol=1e-6, atol=3e-6)
            if native() is not None and dtype != torch.float16:
                assert torch.equal(tokens, sample.sample(logits, backend="cpu", **arguments)[0])
            alone = {k: v[1:2] if isinstance(v, Tensor) else v for k, v in arguments.items()}
            token, log_prob = sample.sample(logits[1:2], backend="triton", **alone)
            assert token == tokens[1] and same_bits(log_prob, log_probs[1:2])


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size", "vocab", "options"),
    [
        (3, 17, 1050, {}),
        (2, 8, 7, {"temperature": 0.7, "logit_softcap": 5.0, "return_entropy": True}),
        (1, 1, 1, {"return_entropy": True}),
        (0, 4, 5, {"return_entropy": True}),
    ],
)
def test_token_logprobs(
    tokens: int, size: int, vocab: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    targets = torch.randint(0, vocab, (tokens,))
    inputs = {
        "hidden": torch.randn(tokens, size).to(dtype), "weight": torch.randn(vocab, size).to(dtype),
        "bias": (torch.randn(vocab) + 4.0 * (torch.arange(vocab) >= 1024)).to(dtype),  # the second chunk is larger
    }  # fmt: skip
    check_gradients(
        on_triton(token_logprobs.token_logprobs), token_logprobs.token_logprobs_reference, inputs, targets=targets,
        cancelling=float(tokens) ** 0.5 * 4, **options,
    )  # fmt: skip


def test_token_logprobs_are_those_of_sample() -> None:
    """A rollout's log-probabilities are the training's, bit for bit, in any block of rows."""
    hidden, weight = torch.randn(4, 24).bfloat16(), torch.randn(1100, 24).bfloat16()
    logits = linear.linear(
        hidden, PackedLinear.from_weight(weight, dense=True), float_output=True, backend="triton"
    )
    numbers = {"streams": torch.arange(4), "positions": torch.arange(4), "seed": 1, "temperature": 0.8}
    tokens, expected = sample.sample(logits, backend="triton", **numbers)
    y = token_logprobs.token_logprobs(hidden, weight, tokens, temperature=0.8, backend="triton")
    assert same_bits(y, expected)
    y = token_logprobs.token_logprobs(hidden[2:], weight, tokens[2:], temperature=0.8, backend="triton")
    assert same_bits(y, expected[2:])
