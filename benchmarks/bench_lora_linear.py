"""Linear with a LoRA side path, and fusing LoRA into a weight, against the same in PyTorch.

pytest benchmarks/bench_lora_linear.py --benchmark-group-by=group -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.ops.lora_linear import fuse_lora, lora_linear

K, N, RANK, SCALE = 576, 1536, 16, 2.0
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [64, 2048])
@pytest.mark.parametrize("who", ["ours", "torch"])
@torch.no_grad()
def test_forward(benchmark: Any, who: str, rows: int, dtype: torch.dtype) -> None:
    """Ours packs the weight in every call, as in training; `torch` is what PEFT runs."""
    x, w = torch.randn(rows, K).to(dtype), torch.randn(N, K).to(dtype)
    a, b = torch.randn(RANK, K), torch.randn(N, RANK)
    if who == "ours":
        benchmark(lora_linear, x, w, None, a, b, SCALE, backend="cpu")
    else:
        benchmark(lambda: torch.nn.functional.linear(x, w) + (x.float() @ a.t() @ b.t() * SCALE).to(dtype))
    benchmark.group = f"lora_linear {rows} rows {K}x{N} {dtype}"
    rate = 2 * rows * (K * N + RANK * (K + N)) / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GFLOP/s"] = round(rate, 1)
    print(f"\n{benchmark.group} {who}: {rate:.1f} GFLOP/s")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("who", ["ours", "torch"])
@torch.no_grad()
def test_fuse(benchmark: Any, who: str, dtype: torch.dtype) -> None:
    w, a, b = torch.randn(N, K).to(dtype), torch.randn(RANK, K), torch.randn(N, RANK)
    if who == "ours":
        benchmark(fuse_lora, w, a, b, SCALE, backend="cpu")
    else:
        benchmark(lambda: (w.float() + SCALE * (b @ a)).to(dtype))
    benchmark.group = f"fuse_lora {K}x{N} {dtype}"
    rate = 2 * w.numel() * dtype.itemsize / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GB/s"] = round(rate, 2)
    print(f"\n{benchmark.group} {who}: {rate:.2f} GB/s")
