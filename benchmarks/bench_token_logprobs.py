"""token_logprobs against log_softmax and gather over a whole [T, V]: GFLOP/s, with and without the backward.

pytest benchmarks/bench_token_logprobs.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.ops.token_logprobs import token_logprobs

SHAPES = [(64, 576, 49152), (512, 576, 49152)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, size, vocab = shape
    return (
        torch.randn(tokens, size).to(dtype),
        torch.randn(vocab, size).to(dtype),
        torch.randint(0, vocab, (tokens,)),
    )


def torch_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["64x49152", "512x49152"])
@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_logprobs(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, who: str, backward: bool
) -> None:
    hidden, weight, targets = inputs(shape, dtype)
    op: Any = token_logprobs if who == "ours" else torch_logprobs
    if backward:
        hidden.requires_grad_()
        weight.requires_grad_()

    def step() -> None:
        out = op(hidden, weight, targets)
        if backward:
            out.sum().backward()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    benchmark.group = f"token_logprobs {shape} {dtype} {'training' if backward else 'forward'}"
    flops = 2 * shape[0] * shape[1] * shape[2] * (3 if backward else 1)
    benchmark.extra_info["GFLOP/s"] = round(flops / benchmark.stats.stats.median / 1e9, 1)
