"""LayerNorm against torch's: GB/s of activations read and written.

pytest benchmarks/bench_layer_norm.py --benchmark-group-by=group -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dschat_kernels.ops.layer_norm import layer_norm

SHAPES = [(16, 768), (2048, 768), (16, 4096), (1024, 4096)]  # rows, hidden: a decode step, a training batch
IDS = [f"{rows}x{hidden}" for rows, hidden in SHAPES]
DTYPES = [torch.float32, torch.bfloat16]
DTYPE_IDS = ["fp32", "bf16"]


def report(benchmark: Any, x: torch.Tensor, what: str, passes: int) -> None:
    """`passes`: how often an activation of the size of x must at least be read or written."""
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.group = f"layer_norm {what} {x.shape[0]}x{x.shape[1]} {x.dtype}"
    rate = passes * x.numel() * x.element_size() / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GB/s"] = round(rate, 2)
    print(f"\n{benchmark.group} {benchmark.name}: {rate:.2f} GB/s")


def ours(module: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return layer_norm(x, module.weight, module.bias, module.eps, residual=residual, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("who", ["ours", "torch"])
@torch.no_grad()
def test_forward(benchmark: Any, who: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, module = torch.randn(shape).to(dtype), nn.LayerNorm(shape[1]).to(dtype)
    benchmark(*((ours, module, x) if who == "ours" else (module, x)))
    report(benchmark, x, "forward", passes=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("who", ["ours", "torch"])
@torch.no_grad()
def test_residual(benchmark: Any, who: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, r, module = (
        torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype),
        nn.LayerNorm(shape[1]).to(dtype),
    )
    if who == "ours":
        benchmark(ours, module, x, r)
    else:
        benchmark(lambda: module(x + r))
    report(benchmark, x, "add and norm", passes=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=IDS[1:])
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_training(benchmark: Any, who: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Forward and backward."""
    x, module = torch.randn(shape).to(dtype).requires_grad_(), nn.LayerNorm(shape[1]).to(dtype)
    grad = torch.randn(shape).to(dtype)
    benchmark(lambda: (ours(module, x) if who == "ours" else module(x)).backward(grad))
    report(benchmark, x, "training", passes=5)
