"""Bias and activation against PyTorch's two calls: GB/s of activations read and written.

pytest benchmarks/bench_bias_act.py --benchmark-group-by=group -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from dschat_kernels.ops.bias_act import bias_act

SHAPES = [(16, 3072), (2048, 3072)]  # rows, columns: GPT-2's MLP at a decode step and in a training batch
IDS = [f"{rows}x{columns}" for rows, columns in SHAPES]
DTYPES = [torch.float32, torch.bfloat16]
DTYPE_IDS = ["fp32", "bf16"]
TORCH = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def report(benchmark: Any, x: torch.Tensor, what: str, passes: int) -> None:
    """`passes`: how often an activation of the size of x must at least be read or written."""
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.group = f"bias_act {what} {x.shape[0]}x{x.shape[1]} {x.dtype}"
    rate = passes * x.numel() * x.element_size() / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GB/s"] = round(rate, 2)
    print(f"\n{benchmark.group} {benchmark.name}: {rate:.2f} GB/s")


def call(who: str, activation: str, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return bias_act(x, bias, activation, backend="cpu") if who == "ours" else TORCH[activation](x + bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("who", ["ours", "torch"])
@torch.no_grad()
def test_forward(
    benchmark: Any, who: str, activation: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, bias = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    benchmark(call, who, activation, x, bias)
    report(benchmark, x, activation, passes=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_training(benchmark: Any, who: str, activation: str, dtype: torch.dtype) -> None:
    """Forward and backward."""
    x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in (SHAPES[1], SHAPES[1][1:]))
    grad = torch.randn(SHAPES[1]).to(dtype)
    benchmark(lambda: call(who, activation, x, bias).backward(grad))
    report(benchmark, x, f"{activation} training", passes=5)
