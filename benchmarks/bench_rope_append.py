"""Rotary embedding and cache write against HF's rotation and a cat of the cache: GB/s of q, k and v.

pytest benchmarks/bench_rope_append.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops.rope_append import rope_append

SHAPES = [(1, 1), (16, 1), (16, 128)]  # rows, new tokens a row
HEADS, KV_HEADS, DIM, PAST = 9, 3, 64, 192


def report(benchmark: Any, rows: int, tokens: int, dtype: torch.dtype) -> None:
    benchmark.group = f"rope_append {rows}x{tokens} {dtype}"
    size = 2 * rows * tokens * (HEADS + 2 * KV_HEADS) * DIM * torch.finfo(dtype).bits // 8
    benchmark.extra_info["GB/s"] = round(size / benchmark.stats.stats.median / 1e9, 2)


def angles(tokens: int) -> torch.Tensor:
    return torch.arange(PAST, PAST + tokens)[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
def test_ours(benchmark: Any, rows: int, tokens: int, dtype: torch.dtype) -> None:
    cache = PagedKVCache(1, KV_HEADS, DIM, rows * 6, rows, 6, dtype)
    cache.prepare_append(range(rows), PAST + tokens)
    qkv = torch.randn(rows * tokens, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
    table = torch.cat((torch.zeros(PAST, DIM // 2), angles(tokens)))
    positions = torch.arange(PAST, PAST + tokens, dtype=torch.int32).repeat(rows)
    slots = torch.arange(rows, dtype=torch.int32).repeat_interleave(tokens)
    where = (positions, slots, cache.k[0], cache.v[0], cache.block_table)
    benchmark(rope_append, q, k, v, table.cos(), table.sin(), *where)
    report(benchmark, rows, tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "tokens"), SHAPES)
def test_hf(benchmark: Any, rows: int, tokens: int, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv = torch.randn(rows, tokens, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    past = torch.randn(2, rows, KV_HEADS, PAST, DIM).to(dtype)
    cos, sin = (torch.cat((t, t), -1)[None].to(dtype) for t in (angles(tokens).cos(), angles(tokens).sin()))

    def step() -> None:
        q, k, v = (x.transpose(1, 2) for x in qkv.split((HEADS, KV_HEADS, KV_HEADS), 2))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        torch.cat((past[0], k), 2)
        torch.cat((past[1], v), 2)

    benchmark(step)
    report(benchmark, rows, tokens, dtype)
