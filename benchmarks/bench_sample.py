"""Sampling a token a row against what HF's generate does: warpers, float32 softmax, multinomial.

pytest benchmarks/bench_sample.py --benchmark-group-by=group -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dschat_kernels.ops.sample import sample

ROWS, VOCAB = (1, 64), 49152
OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
]
# The spread of the logits: a trained model's, and one that has learned nothing (every token is a candidate).
SPREADS = {"peaked": 4.0, "flat": 0.3}


def hf(logits: torch.Tensor, options: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """HF's sampling with the log-prob of the sampled token, which RLHF needs."""
    scores = logits.float()
    if options.get("temperature") == 0.0:
        tokens = scores.argmax(-1)
        return tokens, scores.log_softmax(-1).gather(1, tokens[:, None])
    warpers = LogitsProcessorList()
    if "temperature" in options:
        warpers.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    tokens = torch.multinomial(warpers(None, scores).softmax(-1), 1)
    return tokens, (scores / options.get("temperature", 1.0)).log_softmax(-1).gather(1, tokens)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("who", ["ours", "hf"])
@torch.no_grad()
def test_sample(benchmark: Any, who: str, rows: int, options: dict[str, Any], spread: str) -> None:
    logits = SPREADS[spread] * torch.randn(rows, VOCAB)
    streams, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    if who == "ours":
        benchmark(sample, logits, streams=streams, positions=positions, backend="cpu", **options)
    else:
        benchmark(hf, logits, options)
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.group = f"sample {options} {rows}x{VOCAB} {spread}"
    seconds = benchmark.stats.stats.median
    rate = logits.numel() * logits.element_size() / seconds / 1e9
    benchmark.extra_info.update({"GB/s": round(rate, 2), "us/row": round(seconds / rows * 1e6, 1)})
    print(f"\n{benchmark.group} {who}: {seconds / rows * 1e6:.1f} us a row, {rate:.2f} GB/s of logits")
