"""Decode attention (one query token a row) against PyTorch's sdpa: GB/s of keys and values read.

pytest benchmarks/bench_attention_decode.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops.attention_decode import attention_decode

SHAPES = [
    (1, 1024, 9, 3, 64),
    (1, 8192, 9, 3, 64),
    (16, 256, 9, 3, 64),
    (32, 512, 9, 3, 64),
    (16, 512, 12, 12, 64),
]
LAYERS = (
    8  # different memory at every call, so that keys and values come from where they come in a decoder step
)
IDS = [f"{b}x{n}-{hq}/{hkv}x{d}" for b, n, hq, hkv, d in SHAPES]


def report(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, tokens, _, kv_heads, dim = shape
    benchmark.group = f"decode {IDS[SHAPES.index(shape)]} {dtype}"
    size = 2 * batch * tokens * kv_heads * dim * torch.finfo(dtype).bits // 8
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_ours(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, tokens, q_heads, kv_heads, dim = shape
    pages = -(-tokens // 64)
    cache = PagedKVCache(LAYERS, kv_heads, dim, batch * pages, batch, pages, dtype)
    cache.prepare_append(range(batch), tokens)
    cache.k.normal_()
    cache.v[..., :dim] = torch.randn(cache.v[..., :dim].shape)
    q = torch.randn(batch, q_heads, dim).to(dtype)
    cu = torch.arange(batch + 1, dtype=torch.int32)
    lens = torch.full((batch,), tokens, dtype=torch.int32)
    layer = 0

    def step() -> None:
        nonlocal layer
        layer = (layer + 1) % LAYERS
        attention_decode(q, cache.k[layer], cache.v[layer], cache.block_table, cu, lens, scale=dim**-0.5)

    benchmark(step)
    report(benchmark, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_torch(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, tokens, q_heads, kv_heads, dim = shape
    k, v = torch.randn(2, LAYERS, batch, kv_heads, tokens, dim).to(dtype)
    q = torch.randn(batch, q_heads, 1, dim).to(dtype)
    layer = 0

    def step() -> None:
        nonlocal layer
        layer = (layer + 1) % LAYERS
        torch.nn.functional.scaled_dot_product_attention(q, k[layer], v[layer], enable_gqa=True)

    benchmark(step)
    report(benchmark, shape, dtype)
