"""One table of cases for every op, whatever runs it: `CASES[op](backend, dtype, thorough)`.

A check runs the op on sizes that are odd, one, none, and around the kernels' blocks, pages and chunks, compares it and
its gradients with float64 by the criterion of tests/helpers.py, and a part of the batch and other layouts bit for bit.
What is random, or only copied and rotated, is compared with the reference exactly. The short form, for backends that
are slow or must compile every new size first, leaves out sizes and options, never a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dschat_kernels.cache import PagedKVCache
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
from dschat_kernels.packing import PackedLinear, ResolvedLinear
from tests.backends.backends import EVERYTHING
from tests.helpers import assert_close_to_fp64, check_gradients, non_contiguous
from tests.paged import Batch, cumulative, int_tensor, make_batch, same_bits

Check = Callable[[str, torch.dtype, bool], None]
CASES: dict[str, Check] = {}


def case(check: Check) -> Check:
    CASES[check.__name__] = check
    return check


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape) * scale + shift).to(dtype)


def alone_and_strided(backend: str, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Rows have the bits that they have in the batch, and other layouts change nothing. The reference, which is
    PyTorch, promises neither."""
    if backend == "reference":
        return
    whole, rows = call(x), x.shape[0]
    for begin, end in ((0, 1), (rows // 2, rows)):
        assert same_bits(call(x[begin:end]), whole[begin:end]), f"rows {begin} to {end} of {rows} alone"
    for view in non_contiguous(x):
        assert same_bits(call(view), whole), f"strides {view.stride()}"


# ------------------------------------------------------------------------------------------------------------ norms


def _sizes(thorough: bool) -> tuple[tuple[int, int], ...]:
    """rows x columns."""
    return ((1, 111), (3, 1030), (70, 64), (1, 1), (0, 8)) if thorough else ((3, 111), (2, 64))


@case
def rms_norm_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    op = partial(rms_norm.rms_norm, backend=backend)
    for rows, hidden in _sizes(thorough):
        for with_residual, rounding, offset in ((False, "llama", 0.0), (True, "gemma", 1.0)):
            inputs = {"x": draw(rows, hidden, dtype=dtype), "weight": draw(hidden, dtype=dtype)}
            if with_residual:
                inputs["residual"] = draw(rows, hidden, dtype=dtype)
            check_gradients(
                op, rms_norm.rms_norm_reference, inputs, weight_offset=offset, rounding=rounding,
                cancelling=1.0 if hidden == 1 else 0.0,
            )  # fmt: skip
    weight = draw(40, dtype=dtype)
    alone_and_strided(backend, lambda x: op(x, weight, residual=x)[0], draw(7, 40, dtype=dtype))


@case
def layer_norm_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    op = partial(layer_norm.layer_norm, backend=backend)
    for rows, hidden in _sizes(thorough):
        if hidden == 1:  # the difference of equal numbers: its bias, but for a rounding divided by sqrt(eps)
            x, b = draw(3, 1, dtype=dtype), draw(1, dtype=dtype)
            torch.testing.assert_close(op(x, b, b), b.expand(3, 1), rtol=0, atol=1e-3)
            continue
        inputs = {"x": draw(rows, hidden, dtype=dtype), "weight": draw(hidden, dtype=dtype, shift=1.0),
                  "bias": draw(hidden, dtype=dtype)}  # fmt: skip
        check_gradients(op, layer_norm.layer_norm_reference, inputs)
        inputs["residual"] = draw(rows, hidden, dtype=dtype)
        check_gradients(op, layer_norm.layer_norm_reference, inputs)
    alone_and_strided(backend, lambda x: op(x, None, None), draw(7, 40, dtype=dtype))


# ------------------------------------------------------------------------------------------------------ elementwise


@case
def bias_act_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    op = partial(bias_act.bias_act, backend=backend)
    activations = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu") if thorough else ("gelu", "silu")
    for activation in activations:
        for rows, columns in _sizes(thorough):
            inputs: dict[str, Tensor | None] = {"x": draw(rows, columns, dtype=dtype, scale=3.0)}
            inputs["bias"] = None if columns == 64 else draw(columns, dtype=dtype)
            check_gradients(op, bias_act.bias_act_reference, inputs, activation=activation)
    bias = draw(40, dtype=dtype)
    alone_and_strided(backend, lambda x: op(x, bias, "gelu_tanh"), draw(7, 40, dtype=dtype))


@case
def gated_act_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    op = partial(gated_act.gated_act, backend=backend)
    for activation in (
        ("silu", "gelu_tanh", "gelu", "relu", "quick_gelu") if thorough else ("silu", "gelu_tanh")
    ):
        for rows, columns in _sizes(thorough):
            gate, up = (draw(rows, columns, dtype=dtype) for _ in range(2))
            packed = columns == 64
            biases = [None if packed else draw(columns, dtype=dtype) for _ in range(2)]
            inputs = {"gate": torch.cat([gate, up], -1) if packed else gate, "up": None if packed else up,
                      "gate_bias": biases[0], "up_bias": biases[1]}  # fmt: skip
            check_gradients(op, gated_act.gated_act_reference, inputs, activation=activation)
    alone_and_strided(backend, lambda x: op(x, None, "silu"), draw(7, 40, dtype=dtype))


# ------------------------------------------------------------------------------------------------------------- rope


def tables(positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequency
    return angles.cos().float(), angles.sin().float()


@case
def rope(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """The bits of the reference, from a slice of a packed qkv; gradients by the criterion."""
    few = ((3, 2, 10, 17),)
    many = ((5, 3, 16, 16), (3, 1, 10, 17), (1, 5, 2, 2), (0, 1, 4, 4), (2, 128, 8, 8))
    sizes = many if thorough else few
    for tokens, heads, rotary_dim, dim in sizes:
        for style in ("half", "interleaved"):
            cos, sin = tables(50, rotary_dim)
            positions = torch.randint(0, 50, (tokens,))
            arguments: dict[str, Any] = {"cos": cos, "sin": sin, "positions": positions, "style": style}
            x = draw(tokens, heads + 2, dim, dtype=dtype)[:, 1:-1]
            y = rope_append.rope(x, **arguments, backend=backend)
            assert same_bits(y, rope_append.rope_reference(x, **arguments))
            grads = []
            for op, leaf in (
                (partial(rope_append.rope, backend=backend), x.clone()),
                (rope_append.rope_reference, x.double()),
                (rope_append.rope_reference, x.clone()),
            ):
                out = op(leaf.requires_grad_(), **arguments)
                torch.manual_seed(tokens)
                grads.append(torch.autograd.grad(out, leaf, draw(*out.shape, dtype=dtype).to(out.dtype))[0])
            assert_close_to_fp64(*grads)


@case
def rope_append_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """q, and every byte of the cache: tokens on both sides of a page, none, and many heads."""
    few = ((6, 4, 2, 20), (0, 4, 2, 20))
    many = ((6, 4, 2, 16), (6, 3, 1, 20), (0, 4, 2, 16), (2, 128, 8, 16))
    for tokens, heads, kv_heads, dim in many if thorough else few:
        for style in ("half", "interleaved", None):
            cos, sin = tables(200, 12) if style else (None, None)
            qkv = draw(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            positions, slots = (
                torch.tensor([0, 63, 64, 5, 127, 17])[:tokens],
                int_tensor([0, 0, 0, 1, 1, 1])[:tokens],
            )
            results = []
            for name in (backend, "reference"):
                cache = PagedKVCache(1, kv_heads, dim, 6, 2, 3, dtype, torch.get_default_device())
                cache.prepare_append([1, 0], [128, 128])
                cache.sync()
                out = rope_append.rope_append(
                    q, k, v, cos, sin, positions, slots, cache.k[0], cache.v[0], cache.block_table, backend=name,
                    **({"style": style} if style else {}),
                )  # fmt: skip
                results.append((out, cache.k, cache.v))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------------ matrix products


def _part(n: int, k: int, dtype: torch.dtype) -> ResolvedLinear:
    return ResolvedLinear(draw(n, k, dtype=dtype, scale=k**-0.5), draw(n, dtype=dtype), ())


def _terms(x: Tensor, weight: Tensor) -> float:
    """The size that partial sums reach."""
    if not x.numel():
        return 0.0
    return float((x.double() ** 2 @ (weight.double() ** 2).t()).sqrt().max())


@case
def linear_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    dense = backend not in ("cpu",)
    op = partial(linear.linear, backend=backend)
    shapes = ((1, 1, 1), (3, 31, 7), (65, 65, 64), (2, 130, 65), (0, 5, 3), (33, 33, 129), (2, 40, 300))
    for rows, n, k in shapes if thorough else ((3, 65, 33), (18, 40, 64)):
        x, part = draw(rows, k, dtype=dtype), _part(n, k, dtype)
        packed = PackedLinear.from_parts([part], dense=dense)
        exact = torch.nn.functional.linear(x.double(), part.weight.double(), part.bias.double())
        y = op(x, packed)
        assert_close_to_fp64(
            y, exact, torch.nn.functional.linear(x, part.weight, part.bias), size=_terms(x, part.weight)
        )
        logits = op(x, packed, float_output=True)
        wide = torch.nn.functional.linear(x.float(), part.weight.float(), part.bias.float())
        assert_close_to_fp64(logits, exact, wide, size=_terms(x, part.weight))
        assert backend == "reference" or same_bits(y, logits.to(dtype)), "one rounding of the same sums"
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu") if thorough else ("silu",):
        parts = [_part(45, 24, dtype) for _ in range(2)]
        x, residual = draw(9, 24, dtype=dtype), draw(9, 45, dtype=dtype)
        gate, up = (PackedLinear.from_parts([p], dense=dense) for p in parts)
        z, other = op(x, gate), op(x, up)
        fused = op(x, gate, activation=activation, residual=residual)
        pair = op(x, PackedLinear.from_parts(parts, gated=True, dense=dense), activation=activation)
        # The epilogue is the separate op of the reference, up to its own last bit.
        for ours, expected in (
            (
                fused,
                residual.double()
                + bias_act.bias_act_reference(z.double(), None, activation).to(dtype).double(),
            ),
            (pair, gated_act.gated_act_reference(z.double(), other.double(), activation)),
        ):
            assert_close_to_fp64(ours, expected, expected.to(dtype), factor=4.0, size=4.0)
    packed = PackedLinear.from_parts([_part(70, 40, dtype)], dense=dense)
    alone_and_strided(backend, lambda x: op(x, packed), draw(35, 40, dtype=dtype))


@case
def linear_int8(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """Against float64 of scale (x Q^T) + b; epilogues from the very sums; and, where a kernel widens the integers, the
    sums that it has of the same integers in x's dtype, bit for bit."""
    op, options = partial(linear.linear, backend=backend), {"dense": backend != "cpu", "weights": "int8"}
    shapes = ((1, 1, 1), (3, 31, 7), (65, 65, 64), (2, 130, 65), (0, 5, 3), (33, 33, 144), (2, 40, 300))
    for rows, n, k in shapes if thorough else ((3, 65, 33), (18, 40, 144)):
        x, part = draw(rows, k, dtype=dtype), _part(n, k, dtype)
        sizes = torch.logspace(-2, 1, n).to(dtype)  # of rows, as trained matrices have them
        part = ResolvedLinear(part.weight * sizes[:, None], part.bias, ())
        packed = PackedLinear.from_parts([part], dtype, **options)
        integers, scales = packed.stored(), packed.plain_scales()
        assert scales is not None and int(integers.abs().max()) == 127
        exact = (x.double() @ integers.double().t()) * scales.double() + part.bias.double()
        wide = (x.float() @ integers.float().t()) * scales + part.bias.float()
        logits, y = op(x, packed, float_output=True), op(x, packed)
        assert_close_to_fp64(logits, exact, wide, size=_terms(x, packed.to_dense()))
        assert_close_to_fp64(y, exact, wide.to(dtype), size=_terms(x, packed.to_dense()))
        assert backend == "reference" or same_bits(y, logits.to(dtype)), "one rounding of the same sums"
        if backend == "cuda":
            plain = PackedLinear.from_weight(integers.to(dtype), dense=True)
            expected = op(x, plain, float_output=True) * scales + part.bias.float()
            assert same_bits(logits, expected), "the integers are widened exactly"
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu") if thorough else ("silu",):
        parts = [_part(45, 24, dtype) for _ in range(2)]
        x, residual = draw(9, 24, dtype=dtype), draw(9, 45, dtype=dtype)
        gate, up = (PackedLinear.from_parts([p], **options) for p in parts)
        z, other = op(x, gate), op(x, up)
        fused = op(x, gate, activation=activation, residual=residual)
        pair = op(x, PackedLinear.from_parts(parts, gated=True, **options), activation=activation)
        acted = bias_act.bias_act_reference(z.double(), None, activation).to(dtype).double()
        for ours, expected in (
            (fused, residual.double() + acted),
            (pair, gated_act.gated_act_reference(z.double(), other.double(), activation)),
        ):
            assert_close_to_fp64(ours, expected, expected.to(dtype), factor=4.0, size=4.0)
    packed = PackedLinear.from_parts([_part(70, 40, dtype)], **options)
    alone_and_strided(backend, lambda x: op(x, packed), draw(35, 40, dtype=dtype))


@case
def lora_linear_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    op = partial(lora_linear.lora_linear, backend=backend)
    reference = lora_linear.lora_linear_reference
    shapes = ((1, 1, 1, 1), (5, 33, 70, 8), (40, 20, 31, 17), (0, 3, 3, 2)) if thorough else ((5, 33, 70, 8),)
    for rows, n, k, rank in shapes:
        part, x = _part(n, k, dtype), draw(rows, k, dtype=dtype)
        a, b = torch.randn(rank, k) / k**0.5, torch.randn(n, rank)
        exact = reference(*(t.double() for t in (x, part.weight, part.bias, a, b)), 0.7)
        size = _terms(x, part.weight) + (float(exact.abs().max()) if rows else 0.0)
        y = op(x, part.weight, part.bias, a, b, 0.7)
        assert_close_to_fp64(y, exact, reference(x, part.weight, part.bias, a, b, 0.7), size=size)
        if backend != "reference":
            assert same_bits(op(x[:1], part.weight, part.bias, a, b, 0.7), y[:1])
        check_gradients(
            lambda x, a, b, p=part, s=op: s(x, p.weight.to(x.dtype), p.bias.to(x.dtype), a, b, 0.7),
            lambda x, a, b, p=part: reference(x, p.weight.to(x.dtype), p.bias.to(x.dtype), a, b, 0.7),
            {"x": x, "a": a, "b": b}, output_size=size,
        )  # fmt: skip


@case
def low_rank_grads(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """Around blocks of 256 rows and 8 of the rank; in any layout, and of factors in the inputs' dtype."""
    op = partial(lora_linear.low_rank_grads, backend=backend)
    shapes = (
        ((1, 1, 1, 1), (5, 33, 70, 8), (257, 20, 131, 17), (0, 3, 3, 2)) if thorough else ((5, 33, 70, 9),)
    )
    for rows, n, k, rank in shapes:
        x, dy = draw(rows, k, dtype=dtype), draw(rows, n, dtype=dtype)
        a, b = torch.randn(rank, k) / k**0.5, torch.randn(n, rank) / rank**0.5
        ours = op(x, dy, a, b, 0.7)
        exact = lora_linear.low_rank_grads_reference(*(t.double() for t in (x, dy, a, b)), 0.7)
        own = lora_linear.low_rank_grads_reference(x, dy, a, b, 0.7)
        sizes = (0.7 * (dy.double() ** 2 @ b.double() ** 2).t() @ x.double() ** 2,
                 0.7 * dy.double().t() ** 2 @ (x.double() ** 2 @ a.double().t() ** 2))  # fmt: skip
        for d, e, t, terms in zip(ours, exact, own, sizes, strict=True):
            assert_close_to_fp64(d, e, t, size=float(terms.max()) ** 0.5)
        if backend == "reference":
            continue
        for x_view, dy_view in zip(non_contiguous(x), non_contiguous(dy), strict=True):
            assert all(map(same_bits, op(x_view, dy_view, a, b, 0.7), ours)), f"strides {x_view.stride()}"
        narrow, wide = (op(x, dy, a, factor, 0.7) for factor in (b.to(dtype), b.to(dtype).float()))
        assert same_bits(narrow[0], wide[0]) and same_bits(narrow[1], wide[1].to(dtype)), "rounded at the end"


@case
def fuse_lora(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """One rounding, and the base stays as it is; weights of both orders of storage."""
    for n, k, rank in ((1, 1, 1), (7, 130, 3), (33, 65, 16)) if thorough else ((33, 65, 16),):
        plain, a, b = draw(n, k, dtype=dtype), torch.randn(rank, k) / k**0.5, torch.randn(n, rank)
        for weight in (plain, plain.t().contiguous().t()):
            fused = lora_linear.fuse_lora(weight, a, b, 0.3, backend=backend)
            exact = lora_linear.fuse_lora_reference(plain.double(), a.double(), b.double(), 0.3)
            assert_close_to_fp64(fused, exact, exact.to(dtype))
            assert torch.equal(weight, plain)


# -------------------------------------------------------------------------------------------------------- attention

SLOPES = torch.tensor([0.5, -0.25, 0.1, -0.03])  # negative: biases rounded to bfloat16
ATTENTION_OPTIONS: tuple[dict[str, Any], ...] = (
    {"scale": 0.25},
    {"scale": 0.25, "window": 33},
    {"scale": 0.25, "window": 1},
    {"scale": 1.0, "softcap": 10.0},
    {"scale": 0.25, "alibi_slopes": SLOPES},
    {"scale": 0.3, "window": 70, "softcap": 3.0, "alibi_slopes": SLOPES},
)


def _attention_options(thorough: bool) -> list[dict[str, Any]]:
    """ATTENTION_OPTIONS, or their last, on the device that tensors are made on."""
    device = torch.get_default_device()
    return [
        {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        for options in (ATTENTION_OPTIONS if thorough else ATTENTION_OPTIONS[-1:])
    ]


def _batches(dtype: torch.dtype, thorough: bool) -> list[Batch]:
    """Lengths 0 and 1, and around pages and chunks; rows without queries, and without keys; heads that share keys, and
    very many."""
    batches = [make_batch([5, 0, 1, 0, 20], [130, 3, 65, 0, 20], 4, 2, 20, dtype)]
    if thorough:
        for keys in (1, 63, 64, 255, 256, 257):
            batches.append(make_batch([1, min(keys, 3)], [keys, keys], 4, 2, 16, dtype))
        for dim in (64, 128):
            batches.append(make_batch([2, 3], [66, 3], 4, 1, dim, dtype))
        batches += [make_batch([0], [9], 4, 2, 16, dtype), make_batch([0, 0], [0, 0], 4, 2, 16, dtype)]
        batches += [make_batch([], [], 4, 2, 16, dtype), make_batch([1, 3], [70, 3], 128, 8, 16, dtype)]
    return batches


def _check_attention(
    batch: Batch, op: Callable[..., Tensor], backend: str, options: dict[str, Any]
) -> Tensor:
    y = op(*batch.arguments, backend=backend, **options)
    wide = [t.double() if t.is_floating_point() else t for t in batch.arguments]
    exact = attention.attention_reference(*wide, **options)
    assert_close_to_fp64(y, exact, attention.attention_reference(*batch.arguments, **options))
    return y


@case
def attention_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """Against float64, and the queries of a row at once or alone: the same bits."""
    for i, options in enumerate(_attention_options(thorough)):
        for batch in _batches(dtype, thorough and i == 0):
            y = _check_attention(batch, attention.attention, backend, options)
            q, k_cache, v_cache, table, cu, kv_lens = batch.arguments
            last = slice(int(cu[-1]) - 1, int(cu[-1]))
            if backend != "reference" and sum(batch.q_lens[-1:]):
                alone = (q[last], k_cache, v_cache, table[-1:], cumulative([1]), kv_lens[-1:])
                assert same_bits(attention.attention(*alone, backend=backend, **options), y[last])


@case
def attention_decode_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """The bits of attention, whatever the splits."""
    for i, options in enumerate(_attention_options(thorough)):
        for batch in _batches(dtype, thorough and i == 0):
            decode = attention_decode.attention_decode
            y = _check_attention(batch, decode, backend, options)
            for splits in (1, 2, 1000) if backend != "triton" else (2,):  # triton has one way to split
                assert same_bits(decode(*batch.arguments, num_splits=splits, backend=backend, **options), y)
            if backend != "reference":
                assert same_bits(attention.attention(*batch.arguments, backend=backend, **options), y)


@case
def packed_attention(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """Gradients, and the bits of attention over a cache that holds the same keys; a row's gradients do not depend on
    the rows beside it."""
    lens = [45, 0, 1, 20] if thorough else [9, 0, 1]
    problems = [(lens, 4, 2, 12, options) for options in _attention_options(thorough)]
    if thorough:
        problems.append(([3, 0, 1], 128, 8, 8, {"scale": 0.35}))
    slow = backend == "triton" and not EVERYTHING
    if thorough and not slow:  # several tiles
        problems += [([67, 0, 150], 4, 2, 64, options) for options in _attention_options(False)]
        problems += [([70, 3], 2, 1, dim, {"scale": 0.1}) for dim in (128, 200)]
    for lens, heads, kv_heads, dim, options in problems:
        batch = make_batch(lens, lens, heads, kv_heads, dim, dtype)
        inputs = {"q": batch.q, "k": torch.cat(batch.k), "v": torch.cat(batch.v)}
        op = partial(attention.packed_attention, cu_seqlens=cumulative(lens), backend=backend, **options)
        if backend != "reference":
            assert same_bits(op(**inputs), attention.attention(*batch.arguments, backend=backend, **options))
        check_gradients(
            op, partial(attention.packed_attention_reference, cu_seqlens=cumulative(lens), **options), inputs,
            # A value's gradient, a sum over queries, is added up by the cpu and cuda kernels in another order than
            # PyTorch's: in float32 its error is that of the terms, not of their sum.
            cancelling=2.0 * sum(lens) ** 0.5 if dtype == torch.float32 and backend in ("cpu", "cuda") else 0.0,
        )  # fmt: skip
        if backend != "reference" and not (slow and options is not problems[0][-1]):
            inputs["dout"] = torch.randn_like(batch.q)
            last = {name: t[-lens[-1] :] for name, t in inputs.items()}
            alone = _packed_gradients(**last, cu_seqlens=cumulative(lens[-1:]), backend=backend, **options)
            beside = _packed_gradients(**inputs, cu_seqlens=cumulative(lens), backend=backend, **options)
            assert all(same_bits(a, b[-lens[-1] :]) for a, b in zip(alone, beside, strict=True))


def _packed_gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(attention.packed_attention(*leaves, **options), leaves, dout)


# ------------------------------------------------------------------------------------------- sample and log-probs

FILTERS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.7, "top_k": 300, "top_p": 0.95, "min_p": 0.01},
    {},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 200, "top_p": 0.5},
)


@case
def sample_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """The reference's tokens, for flat and peaked rows, with ties and with entries that are masked. The sizes are such
    that no top_p cuts equal entries at a sum of exactly top_p, where the last bit of the sum would decide."""
    sizes = [(301, 0.0), (301, 0.01), (301, 3.0)]
    if thorough:  # triton is slow, and a launch of its own for every pass
        sizes = [(1, 0.0), (7, 3.0), (257, 0.01), (1033, 0.0), (1033, 3.0)]
        if backend == "cuda":
            sizes += [(257, 3.0), (1033, 0.01)]
        if backend in ("cpu", "reference") or (backend == "cuda" and EVERYTHING):
            sizes = list(product((1, 7, 257, 1033), (0.0, 0.01, 3.0)))
    for options in FILTERS if thorough else FILTERS[:3]:
        for vocab, spread in sizes:
            logits = draw(4, vocab, dtype=dtype, scale=spread)
            logits[1, : vocab // 2] = float("-inf")
            where = {
                "streams": torch.arange(4) + 2**40,
                "positions": torch.arange(4) * 7 + 3,
                "seed": 2**61 + 5,
            }
            tokens, log_probs = sample.sample(logits, backend=backend, **where, **options)
            expected = sample.sample_reference(logits, **where, **options)
            assert torch.equal(tokens, expected[0]), (options, vocab, spread)
            torch.testing.assert_close(log_probs, expected[1], rtol=1e-6, atol=3e-6)
            one = {**where, "streams": where["streams"][2:3], "positions": where["positions"][2:3]}
            alone = sample.sample(logits[2:3], backend=backend, **one, **options)
            assert torch.equal(alone[0], tokens[2:3]) and same_bits(alone[1], log_probs[2:3])


@case
def token_logprobs_(backend: str, dtype: torch.dtype, thorough: bool) -> None:
    """With entropy, gaps and gradients; and the log-probs of linear and sample, bit for bit."""
    problems = (
        ((3, 17, 1050), (2, 8, 7), (1, 1, 1), (0, 4, 5), (70, 33, 257)) if thorough else ((3, 17, 1050),)
    )
    for tokens, size, vocab in problems:
        inputs = {
            "hidden": draw(tokens, size, dtype=dtype),
            "weight": draw(vocab, size, dtype=dtype, scale=2 / size**0.5),
            # Every chunk of the vocabulary, of 256 or of 1024, outweighs the one before it.
            "bias": (torch.randn(vocab) + torch.arange(vocab) // 256 * 2.0).to(dtype),
        }
        for options in ({}, {"temperature": 0.7, "logit_softcap": 5.0}):
            check_gradients(
                partial(token_logprobs.token_logprobs, backend=backend),
                token_logprobs.token_logprobs_reference, inputs,
                targets=torch.randint(0, vocab, (tokens,)), return_entropy=True,
                cancelling=float(tokens) ** 0.5 * 4,
                # A log-prob is a difference of logits, and cuda's float32 rounds by their size.
                output_size=8.0 if dtype == torch.float32 and backend == "cuda" else 0.0,
                **options,
            )  # fmt: skip
            _close_gaps(backend, inputs, options)
    _frozen_or_without_bias(backend, dtype)
    _gaps_of_near_logits(backend, dtype)
    if backend == "reference":
        return
    part = _part(1100, 24, dtype)  # chunks of 256 or 1024
    packed, hidden = PackedLinear.from_parts([part], dense=backend != "cpu"), draw(5, 24, dtype=dtype)
    logits = linear.linear(hidden, packed, float_output=True, backend=backend)
    where = {"streams": torch.arange(5), "positions": torch.arange(5), "seed": 1, "temperature": 0.8}
    picked, expected = sample.sample(logits, backend=backend, **where)
    for rows in (slice(0, 5), slice(2, 3)):
        ours = token_logprobs.token_logprobs(
            hidden[rows], part.weight, picked[rows], bias=part.bias, temperature=0.8, backend=backend
        )
        assert same_bits(ours, expected[rows])
    z = logits * (1.0 / torch.tensor(0.8))
    for targets in (picked, z.argmax(1), z.argmin(1)):
        found = token_logprobs.token_logprobs(
            hidden, part.weight, targets, bias=part.bias, temperature=0.8, return_gap=True, backend=backend
        )
        assert same_bits(found[1], z.amax(1) - z.gather(1, targets[:, None])[:, 0])


def _close_gaps(backend: str, inputs: dict[str, Tensor], options: dict[str, float]) -> None:
    """Of every second row's likeliest token, and of others: 0 where float64's gap is, and nowhere else. The log-probs
    beside them have the bits of those alone."""
    op, reference = (
        partial(token_logprobs.token_logprobs, backend=backend),
        token_logprobs.token_logprobs_reference,
    )
    rows, vocab = inputs["hidden"].shape[0], inputs["weight"].shape[0]
    wide = {name: t.double() for name, t in inputs.items()}
    z = wide["hidden"] @ wide["weight"].t() + wide["bias"]
    targets = torch.where(torch.arange(rows) % 2 == 0, z.argmax(1), torch.randint(0, vocab, (rows,)))
    logprob, ours = op(**inputs, targets=targets, return_gap=True, **options)
    _, own = reference(**inputs, targets=targets, return_gap=True, **options)
    _, exact = reference(**wide, targets=targets, return_gap=True, **options)
    assert_close_to_fp64(ours, exact, own, size=8.0)
    clear = (exact == 0) | (exact > 1e-4)
    assert torch.equal((ours == 0)[clear], (exact == 0)[clear])
    assert same_bits(logprob, op(**inputs, targets=targets, **options))


def _gaps_of_near_logits(backend: str, dtype: torch.dtype) -> None:
    """Where the logits are the bias: ties, in whatever chunks, have gap 0, the number below has not, even where both
    have one log-prob, and a forbidden token's is infinite."""
    hidden, weight, bias = (
        torch.zeros(5, 24, dtype=dtype),
        draw(1100, 24, dtype=dtype),
        torch.randn(1100) * 0.1,
    )
    largest = torch.tensor(0.3)
    below = torch.nextafter(largest, torch.tensor(0.0))
    bias = bias.clamp(max=0.29)
    bias[3] = bias[1099] = largest
    bias[700], bias[40] = below, float("-inf")
    targets = torch.tensor([3, 1099, 700, 40, 0])
    logprob, gap = token_logprobs.token_logprobs(
        hidden, weight, targets, bias=bias, return_gap=True, backend=backend
    )
    assert gap.tolist() == (largest - bias[targets]).tolist() and logprob[0] == logprob[2]


def _frozen_or_without_bias(backend: str, dtype: torch.dtype) -> None:
    """Without a bias, whose gradient decides how the cpu backend rounds; and with a frozen head, and a frozen trunk."""
    tokens, size, vocab = 5, 24, 300
    inputs: dict[str, Tensor | None] = {
        "hidden": draw(tokens, size, dtype=dtype), "weight": draw(vocab, size, dtype=dtype, scale=2 / size**0.5)
    }  # fmt: skip
    targets = torch.randint(0, vocab, (tokens,))

    def some(op: Callable[..., Tensor], frozen: dict[str, Tensor | None], **trained: Tensor) -> Tensor:
        wide = next(iter(trained.values())).dtype
        return op(**trained, **{n: t.to(wide) for n, t in frozen.items() if t is not None}, targets=targets)

    ours = partial(token_logprobs.token_logprobs, backend=backend)
    for names in (("hidden", "weight"), ("hidden",), ("weight",)):
        frozen = {name: t for name, t in inputs.items() if name not in names}
        check_gradients(
            partial(some, ours, frozen), partial(some, token_logprobs.token_logprobs_reference, frozen),
            {name: inputs[name] for name in names}, cancelling=float(tokens) ** 0.5,
            output_size=8.0 if dtype == torch.float32 and backend == "cuda" else 0.0,
        )  # fmt: skip
