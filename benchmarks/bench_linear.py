"""Packed linear against torch's, weights cold: GB/s of weights and GFLOP/s.

pytest benchmarks/bench_linear.py --benchmark-group-by=group -s

`int8` and `int8_dynamic` are ours with such weights.

Weights rotate through enough copies to leave the caches, as in a decode step, where each is read once.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dschat_kernels.ops.linear import linear
from dschat_kernels.packing import PackedLinear, ResolvedLinear

SHAPES = [(576, 960), (576, 3072), (1536, 576), (576, 49152)]  # k, n of SmolLM2: qkv, gate and up, down, head
ROWS = [1, 16, 64, 1024]
DTYPES = [torch.float32, torch.bfloat16]
COLD_BYTES = 128 * 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=[f"{k}x{n}" for k, n in SHAPES])
@pytest.mark.parametrize("who", ["ours", "int8", "int8_dynamic", "torch"])
@torch.no_grad()
def test_forward(benchmark: Any, who: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    k, n = shape
    copies = max(2, COLD_BYTES // (k * n * dtype.itemsize))
    weights = [torch.randn(n, k).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, k).to(dtype)
    size = dtype.itemsize if who in ("ours", "torch") else 1
    if who != "torch":
        kind = "model" if who == "ours" else who
        packs = itertools.cycle([PackedLinear.from_weight(w, weights=kind) for w in weights])
        benchmark(lambda: linear(x, next(packs), backend="cpu"))
    else:
        plain = itertools.cycle(weights)
        benchmark(lambda: torch.nn.functional.linear(x, next(plain)))
    benchmark.group = f"linear {rows} rows {k}x{n} {dtype}"
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(k * n * size / seconds / 1e9, 2)
    benchmark.extra_info["GFLOP/s"] = round(2 * rows * k * n / seconds / 1e9, 1)
    print(f"\n{benchmark.group} {who}: {benchmark.extra_info}")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_packing(benchmark: Any, dtype: torch.dtype) -> None:
    """Packing one matrix in place: bytes read and written."""
    weight = torch.randn(3072, 576).to(dtype)
    packed = PackedLinear.from_weight(weight)
    benchmark(packed.fill, [ResolvedLinear(weight, None, ())])
    rate = 2 * weight.numel() * dtype.itemsize / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GB/s"] = round(rate, 2)
    print(f"\npacking {dtype}: {rate:.2f} GB/s")
