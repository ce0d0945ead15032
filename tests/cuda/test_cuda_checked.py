"""Every op of csrc/cuda in the checking build: no race, nothing out of bounds, nothing uninitialised or misaligned.

The forward and backward results are those of the ordinary build, so that the checked code is the tested code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import Order, checked_cuda, emulated_cuda
from paged import make_batch, same_bits
from torch import Tensor

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops.attention import attention, packed_attention
from dschat_kernels.ops.attention_decode import attention_decode
from dschat_kernels.ops.bias_act import bias_act
from dschat_kernels.ops.gated_act import gated_act
from dschat_kernels.ops.layer_norm import layer_norm
from dschat_kernels.ops.linear import linear
from dschat_kernels.ops.lora_linear import fuse_lora, lora_linear, low_rank_grads
from dschat_kernels.ops.rms_norm import rms_norm
from dschat_kernels.ops.rope_append import rope, rope_append
from dschat_kernels.ops.sample import sample
from dschat_kernels.ops.token_logprobs import token_logprobs
from dschat_kernels.packing import PackedLinear, ResolvedLinear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def agree(
    run: Callable[..., Any], *inputs: Tensor, grads: bool = False, hold: tuple[Tensor, ...] = ()
) -> None:
    """`run(*inputs)`, and its gradients, in the checking build in every order, with the bits of the ordinary one."""

    def results() -> list[Tensor]:
        leaves = [t.clone().requires_grad_(grads and t.is_floating_point()) for t in inputs]
        out = run(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        if grads:
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
        return [o.detach() for o in outs] + [t.grad for t in leaves if t.grad is not None]

    with emulated_cuda():
        expected = results()
    for order in (Order.ASCENDING, Order.RANDOM):
        with checked_cuda(*inputs, *hold, order=order, seed=2) as checked:
            actual = results()
        assert checked.traffic, "no kernel ran"
        assert len(actual) == len(expected) > 0
        assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


@DTYPES
@pytest.mark.parametrize("hidden", [40, 111])
def test_norms(dtype: torch.dtype, hidden: int) -> None:
    x, r, w = (torch.randn(3, hidden).to(dtype) for _ in range(3))
    agree(lambda x, r, w: layer_norm(x, w, w, residual=r, backend="cuda"), x, r, w[0], grads=True)
    agree(lambda x, r, w: rms_norm(x, w, residual=r, backend="cuda"), x, r, w[0], grads=True)


@DTYPES
@pytest.mark.parametrize("n", [16, 21])
def test_activations(dtype: torch.dtype, n: int) -> None:
    x, u, b = (torch.randn(70, n).to(dtype) for _ in range(3))
    agree(lambda x, b: bias_act(x, b, "gelu", backend="cuda"), x, b[0], grads=True)
    agree(
        lambda x, u, b: gated_act(x, u, "silu", gate_bias=b, up_bias=b, backend="cuda"),
        x,
        u,
        b[0],
        grads=True,
    )


@DTYPES
def test_rope_append(dtype: torch.dtype) -> None:
    angle = torch.rand(80, 4)
    cos, sin = angle.cos(), angle.sin()
    x, where = torch.randn(3, 8, 20).to(dtype), torch.tensor([63, 64, 2])

    def append(x: Tensor, where: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        cache = PagedKVCache(1, 2, 20, 4, 2, 2, dtype)
        cache.prepare_append([0, 1], [65, 3])
        q, k, v = x.split([4, 2, 2], dim=1)
        table = cache.block_table.clone()
        out = rope_append(q, k, v, cos, sin, where, slots, cache.k[0], cache.v[0], table, backend="cuda")
        return out, cache.k, cache.v

    agree(lambda x: rope(x, cos, sin, where, backend="cuda"), x, grads=True, hold=(cos, sin))
    agree(append, x, where, torch.tensor([0, 0, 1]), hold=(cos, sin))


@DTYPES
@pytest.mark.parametrize("rows, n, k", [(3, 70, 40), (18, 20, 33)])
def test_linear_and_lora(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    x, w, b = torch.randn(rows, k).to(dtype), torch.randn(2 * n, k).to(dtype), torch.randn(2 * n)
    la, lb, r = torch.randn(3, k), torch.randn(n, 3), torch.randn(rows, n).to(dtype)

    def gated(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        parts = [ResolvedLinear(w[i * n : (i + 1) * n], b[i * n : (i + 1) * n], ()) for i in range(2)]
        packed = PackedLinear.from_parts(parts, gated=True, dense=True)
        return linear(x, packed, activation="silu", residual=r, backend="cuda")

    def integers(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        packed = PackedLinear.from_parts([ResolvedLinear(w, b, ())], dense=True, weights="int8")
        parts = [ResolvedLinear(w[i * n : (i + 1) * n], None, ()) for i in range(2)]
        pair = PackedLinear.from_parts(parts, gated=True, dense=True, weights="int8")
        return linear(x, packed, backend="cuda"), linear(x, pair, activation="silu", backend="cuda")

    agree(gated, x, w, b, r)
    agree(integers, x, w, b)
    agree(lambda x, w, b: lora_linear(x, w, b, la, lb, 0.5, backend="cuda"), x, w[:n], b[:n], hold=(la, lb))
    agree(lambda w: fuse_lora(w, la, lb, 0.5, backend="cuda"), w[:n], hold=(la, lb))
    many = 257 // rows + 1  # two blocks of rows
    agree(lambda x, dy: low_rank_grads(x, dy, la, lb, 0.5, backend="cuda"), x.repeat(many, 1), r.repeat(many, 1),
          hold=(la, lb))  # fmt: skip


@DTYPES
@pytest.mark.parametrize("dim", [20, 64])
def test_attention(dtype: torch.dtype, dim: int) -> None:
    batch = make_batch([1, 20, 0], [70, 20, 3], 4, 2, dim, dtype)
    options: dict[str, Any] = {"scale": 0.2, "window": 50, "softcap": 5.0, "backend": "cuda"}
    tensors = batch.arguments
    agree(lambda *a: attention(*a, **options), *tensors)
    agree(lambda *a: attention_decode(*a, **options), *tensors)
    qkv = [torch.randn(40, heads, dim).to(dtype) for heads in (4, 2, 2)]
    cu = torch.tensor([0, 35, 40], dtype=torch.int32)
    agree(lambda q, k, v: packed_attention(q, k, v, cu, **options), *qkv, grads=True, hold=(cu,))


@DTYPES
def test_sample_and_token_logprobs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, numbers = torch.randn(3, 700).to(dtype), torch.arange(3)
    options: dict[str, Any] = {"streams": numbers, "positions": numbers, "backend": "cuda"}
    for more in ({}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.8, "min_p": 0.01}):
        agree(lambda z, more=more: sample(z, **options, **more), logits, hold=(numbers,))
    hidden, weight, bias = torch.randn(3, 24).to(dtype), torch.randn(300, 24).to(dtype), torch.randn(300)
    agree(lambda h, w: token_logprobs(h, w, numbers, return_entropy=True, return_gap=True, backend="cuda"),
          hidden, weight, hold=(numbers,))  # fmt: skip
    monkeypatch.setattr("dschat_kernels.ops.token_logprobs.BLOCK", 128)
    for h in (hidden, hidden.repeat(23, 1)):  # 69 rows: two tiles
        targets = torch.arange(len(h))
        agree(lambda h, w, b, n=targets: token_logprobs(h, w, n, bias=b, return_entropy=True, backend="cuda"),
              h, weight, bias, grads=True, hold=(targets,))  # fmt: skip


def test_an_error_of_a_kernel_is_an_error_of_the_op() -> None:
    """Memory that is not in the list is out of bounds: here, all of it."""
    x = torch.randn(3, 40)
    with checked_cuda() as checked:
        checked.recorder.know = lambda *_, **__: None  # type: ignore[method-assign]
        with pytest.raises(
            RuntimeError, match="bias_act: CUDA reports error 719, out of bounds: 16-byte read"
        ):
            bias_act(x, None, "silu", backend="cuda")


def test_inputs_are_what_a_launcher_takes_as_const(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that writes what its launcher declares as an input is an error; in place it may be both."""
    x = torch.randn(3, 40)
    with checked_cuda(x) as checked:
        pointers = checked.module.pointers
        assert pointers["bias_act"] == "--rrw---w" and pointers["rope_append"].count("w") == 4
        y = torch.empty(3, 40)
        checked.bias_act(0, 4, x.data_ptr(), 0, y.data_ptr(), 3, 40, 40)
        checked.bias_act(0, 4, x.data_ptr(), 0, x.data_ptr(), 3, 40, 40)
        assert same_bits(x, y)
        monkeypatch.setitem(pointers, "bias_act", "--rrr---w")
        with pytest.raises(
            RuntimeError, match=r"bias_act: CUDA reports error 719, read-only: write to tensor\+0"
        ):
            checked.bias_act(0, 4, x.data_ptr(), 0, y.data_ptr(), 3, 40, 40)


def test_what_one_launch_left_out_the_next_may_not_read() -> None:
    x = torch.randn(3, 40)
    with checked_cuda(x) as checked:
        half, y = torch.empty(3, 40), torch.empty(3, 40)
        checked.bias_act(0, 4, x.data_ptr(), 0, half.data_ptr(), 2, 40, 40)
        checked.bias_act(0, 4, half.data_ptr(), 0, y.data_ptr(), 2, 40, 40)
        with pytest.raises(
            RuntimeError, match=r"uninitialised: read of tensor\+320, which nobody has written"
        ):
            checked.bias_act(0, 4, half.data_ptr(), 0, y.data_ptr(), 3, 40, 40)
        half[2] = 1.0
        checked.bias_act(0, 4, half.data_ptr(), 0, y.data_ptr(), 3, 40, 40)


# -------------------------------------------------------------------------------------------------- memory traffic


ROWS, HIDDEN = 16, 512
# The op, and how many matrices [rows, hidden] and float32 vectors [hidden] it reads, and matrices it writes.
STREAMING: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, int, int]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, backend="cuda"), 1, 1, 1),
    "rms_norm + residual": (lambda x, w: rms_norm(x, w, residual=x, backend="cuda"), 2, 1, 2),
    "layer_norm": (lambda x, w: layer_norm(x, None, None, backend="cuda"), 1, 0, 1),
    "layer_norm, affine": (lambda x, w: layer_norm(x, w, w, backend="cuda"), 1, 2, 1),
    "bias_act": (lambda x, w: bias_act(x, None, "gelu", backend="cuda"), 1, 0, 1),
    "bias_act + bias": (lambda x, w: bias_act(x, w, "gelu", backend="cuda"), 1, 1, 1),
    "gated_act": (lambda x, w: gated_act(x, x, "silu", backend="cuda"), 2, 0, 1),
}


@DTYPES
@pytest.mark.parametrize("name", STREAMING)
def test_streaming_ops_move_the_least(name: str, dtype: torch.dtype) -> None:
    """Each matrix goes over the bus once, in whole sectors, and shared memory is used without conflicts.

    A float32 vector beside rows of 16 bits is the one exception: a thread's 8 elements of it are two 16-byte loads,
    each of which uses one half of its sectors; the other half is the next load's, from the first-level cache.
    """
    call, read, vectors, written = STREAMING[name]
    x, w = torch.randn(ROWS, HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype)
    with checked_cuda(x, w) as checked:
        call(x, w)
    [(_, traffic)] = checked.traffic
    matrix, vector = ROWS * HIDDEN * x.element_size(), ROWS * HIDDEN * 4
    statistics = 2 * ROWS * 4  # mean and rstd, for the backward
    assert read * matrix <= traffic["bytes_read"] <= 1.05 * (read * matrix + vectors * vector)
    assert written * matrix <= traffic["bytes_written"] <= 1.05 * written * matrix + statistics
    halves = vectors * vector / 32 if dtype != torch.float32 else 0.0
    sectors = traffic["sectors"] - halves
    assert traffic["used_bytes"] >= 0.9 * 32 * sectors
    assert traffic["shared_passes"] == traffic["shared_requests"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_reads_the_cache_once(dtype: torch.dtype) -> None:
    """Four heads share a kv head: keys and values are read once for all, in whole sectors, and lie in shared memory
    so that matrix loads do not conflict."""
    batch = make_batch([1, 1], [256, 256], 8, 2, 64, dtype)
    with checked_cuda() as checked:
        attention_decode(*batch.arguments, scale=0.1, num_splits=4, backend="cuda")
    [(_, traffic)] = checked.traffic
    cache = 2 * 2 * 256 * 2 * 64 * 2
    partials = 2 * 8 * 4 * (64 + 2) * 4
    assert cache <= traffic["bytes_read"] <= 1.25 * cache + 2 * partials * 4
    assert traffic["shared_passes"] <= 1.5 * traffic["shared_requests"]
