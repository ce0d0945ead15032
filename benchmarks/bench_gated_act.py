"""The gate of a gated MLP against PyTorch's two calls: GB/s of activations read and written.

pytest benchmarks/bench_gated_act.py --benchmark-group-by=group -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from dschat_kernels.ops.gated_act import gated_act

SHAPES = [(16, 1536), (2048, 1536), (512, 11008)]  # rows, columns: SmolLM2-135M and a 7B model
IDS = [f"{rows}x{columns}" for rows, columns in SHAPES]
DTYPES = [torch.float32, torch.bfloat16]
DTYPE_IDS = ["fp32", "bf16"]
TORCH = {"silu": functional.silu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}


def report(benchmark: Any, x: torch.Tensor, what: str, passes: int) -> None:
    """`passes`: how often an activation of the size of x must at least be read or written."""
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.group = f"gated_act {what} {x.shape[0]}x{x.shape[1]} {x.dtype}"
    rate = passes * x.numel() * x.element_size() / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["GB/s"] = round(rate, 2)
    print(f"\n{benchmark.group} {benchmark.name}: {rate:.2f} GB/s")


def call(who: str, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gated_act(gate, up, activation, backend="cpu") if who == "ours" else TORCH[activation](gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("activation", TORCH)
@pytest.mark.parametrize("who", ["ours", "torch"])
@torch.no_grad()
def test_forward(
    benchmark: Any, who: str, activation: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    benchmark(call, who, activation, gate, up)
    report(benchmark, gate, activation, passes=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=IDS[1:])
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_training(benchmark: Any, who: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Forward and backward of SwiGLU."""
    gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(shape).to(dtype)
    benchmark(lambda: call(who, "silu", gate, up).backward(grad))
    report(benchmark, gate, "silu training", passes=8)
