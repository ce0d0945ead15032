"""token_logprobs against log_softmax and gather over a whole [T, V]: GFLOP/s and peak memory, forward and backward.

    pytest benchmarks/bench_token_logprobs.py --benchmark-group-by=group
    python benchmarks/bench_token_logprobs.py --output benchmarks/results/token_logprobs.json

The second is the table: 2,048 tokens at vocabularies of 49,152 and 262,144, the sides in turn. Peak memory is what the
process holds at most during a call beyond what it held before and the gradients that the call leaves, as a share of
float32 logits [T, V]. *frozen head*: only the hidden states have a gradient, as with LoRA; *trained head*: both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dschat_kernels.ops.token_logprobs import token_logprobs

SHAPES = [(64, 576, 49152), (512, 576, 49152)]
MODES = {"forward": (False, False), "frozen head": (True, False), "trained head": (True, True)}
"""Mode -> whether hidden states and head have a gradient."""


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


OPS: dict[str, Any] = {"ours": token_logprobs, "torch": torch_logprobs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=["64x49152", "512x49152"])
@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_logprobs(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, who: str, backward: bool
) -> None:
    hidden, weight, targets = inputs(shape, dtype)
    op = OPS[who]
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


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def peak_bytes(step: Callable[[], None]) -> int:
    """Resident bytes at the worst moment of `step`, beyond those before it. What malloc kept of earlier calls is given
    back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step()
    return _status("VmHWM") - before


def measure(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, repeats: int) -> dict[str, Any]:
    """Median seconds and peak memory of both sides, which must agree."""
    tokens, size, vocab = shape
    hidden, weight, targets = inputs(shape, dtype)
    weight *= size**-0.5
    hidden.requires_grad_(MODES[mode][0])
    weight.requires_grad_(MODES[mode][1])
    times: dict[str, list[float]] = {who: [] for who in OPS}
    peaks: dict[str, int] = {}
    results: dict[str, torch.Tensor] = {}

    def step(who: str) -> None:
        hidden.grad = weight.grad = None
        out = OPS[who](hidden, weight, targets)
        if hidden.requires_grad:
            out.sum().backward()
        results[who] = out.detach()

    for who in OPS:
        step(who)
        hidden.grad = weight.grad = None
        peaks[who] = peak_bytes(lambda who=who: step(who))  # type: ignore[misc]
        peaks[who] -= sum(t.grad.nbytes for t in (hidden, weight) if t.grad is not None)
    for _ in range(repeats):
        for who, found in times.items():
            start = time.perf_counter()
            step(who)
            found.append(time.perf_counter() - start)
    gap = float((results["ours"] - results["torch"]).abs().max())
    if gap > (1e-3 if dtype == torch.float32 else 0.1):
        raise SystemExit(f"ours and torch differ by {gap} at {shape}, {dtype}, {mode}")
    logits = 4 * tokens * vocab
    medians = {who: sorted(found)[len(found) // 2] for who, found in times.items()}
    return {
        "tokens": tokens,
        "hidden": size,
        "vocabulary": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "seconds": medians,
        "low": {who: min(found) for who, found in times.items()},
        "high": {who: max(found) for who, found in times.items()},
        "speedup": medians["torch"] / medians["ours"],
        "peak_bytes": peaks,
        "peak_of_logits": {who: peak / logits for who, peak in peaks.items()},
    }


def main() -> None:
    from dschat.bench import machine_facts
    from dschat_kernels.backends import read_bandwidth
    from dschat_kernels.limits import use_threads

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabularies", default="49152,262144")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    use_threads()
    rows = []
    for vocab in map(int, args.vocabularies.split(",")):
        for name in args.dtypes.split(","):
            for mode in MODES:
                row = measure((args.tokens, args.hidden, vocab), getattr(torch, name), mode, args.repeats)
                rows.append(row)
                seconds, share = row["seconds"], row["peak_of_logits"]
                print(f"{vocab} {name} {mode}: {seconds['ours']:.2f} s, torch {seconds['torch']:.2f} s, "
                      f"{row['speedup']:.2f} times; peak {100 * share['ours']:.1f} % of the logits, torch "
                      f"{100 * share['torch']:.0f} %", flush=True)  # fmt: skip
    result = {"kind": "token_logprobs", "machine": machine_facts(read_bandwidth()), "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
