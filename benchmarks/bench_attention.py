"""Prefill attention against PyTorch's sdpa: GFLOP/s of the causal half, SmolLM2-135M's heads and others.

pytest benchmarks/bench_attention.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops.attention import attention, packed_attention

SHAPES = [
    (16, 128, 9, 3, 64),
    (4, 512, 9, 3, 64),
    (1, 2048, 9, 3, 64),
    (4, 512, 12, 12, 64),
    (2, 512, 8, 2, 128),
]
DTYPES = [torch.float32, torch.bfloat16]
IDS = [f"{b}x{n}-{hq}/{hkv}x{d}" for b, n, hq, hkv, d in SHAPES]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    batch, tokens, q_heads, kv_heads, dim = shape
    return tuple(torch.randn(batch, tokens, heads, dim).to(dtype) for heads in (q_heads, kv_heads, kv_heads))


def report(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, what: str, passes: float = 1.0
) -> None:
    batch, tokens, q_heads, _, dim = shape
    benchmark.group = f"attention {IDS[SHAPES.index(shape)]} {dtype}{what}"
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GFLOP/s"] = round(passes * 2 * batch * tokens**2 * q_heads * dim / seconds / 1e9, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_ours(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, tokens, _, kv_heads, dim = shape
    q, k, v = inputs(shape, dtype)
    pages = -(-tokens // 64)
    cache = PagedKVCache(1, kv_heads, dim, batch * pages, batch, pages, dtype)
    cache.prepare_append(range(batch), tokens)
    for row in range(batch):
        cache.write(row, 0, 0, k[row].transpose(0, 1), v[row].transpose(0, 1))
    cu = torch.arange(batch + 1, dtype=torch.int32) * tokens
    lens = torch.full((batch,), tokens, dtype=torch.int32)
    arguments = (q.flatten(0, 1), cache.k[0], cache.v[0], cache.block_table, cu, lens)
    benchmark(attention, *arguments, scale=dim**-0.5)
    report(benchmark, shape, dtype, "")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_torch(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(shape, dtype))
    group = shape[2] // shape[3]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # as HF does, not timed
    benchmark(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
    report(benchmark, shape, dtype, "")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=IDS[:2])
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_training(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, who: str) -> None:
    """Forward and backward."""
    batch, tokens, _, _, dim = shape
    q, k, v = inputs(shape, dtype)
    grad = torch.randn_like(q)
    if who == "ours":
        q, k, v, grad = (x.flatten(0, 1) for x in (q, k, v, grad))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    cu = torch.arange(batch + 1, dtype=torch.int32) * tokens

    def step() -> None:
        if who == "ours":
            out = packed_attention(*leaves, cu, scale=dim**-0.5)
        else:
            heads = (x.transpose(1, 2) for x in leaves)
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2)
        out.backward(grad)

    benchmark(step)
    report(benchmark, shape, dtype, " training", passes=3.5)
