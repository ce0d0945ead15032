"""Rows of different lengths through a fixed number of slots, and samples that share their prompt's prefill.

    python benchmarks/ragged.py --output benchmarks/results/ragged.json

*Ragged*: every answer ends at a length of its own, log-normal and drawn by a seed, the same on both sides. Ours takes
the next prompt when a row ends and knows no length beforehand. Hugging Face, in a process of its own, gets the batches
that suit it best: sorted by the lengths of the answers, which nobody knows before generating, so that little of a batch
is wasted. Prompts have one length, so neither side pads. Our tokens and log-probs are compared, bit for bit, with those
of one prompt at a time.

*Samples*: n answers a prompt, the prompt prefilled once and its cache shared, against the same prompts given n times.
Both give the same answers, since the random streams of a prompt's samples are numbered.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dschat import HybridEngine, Rollout, SamplingConfig, bounds, peers
from dschat.bench import Spread, machine_facts, model_facts
from dschat.rlhf import models
from dschat_kernels.backends import matmul_peak, read_bandwidth
from dschat_kernels.limits import use_threads


def drawn_lengths(count: int, low: int, high: int, seed: int) -> list[int]:
    """Log-normal around sqrt(low high), two deviations to either end, cut there."""
    middle, deviation = math.log(low * high) / 2, math.log(high / low) / 4
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (middle + deviation * normal).exp().round().clamp(low, high).int().tolist()


def prompts_of(vocabulary: int, count: int, length: int, seed: int) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows in batches of `size`, the shortest first: each batch runs as long as its longest row."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[i : i + size] for i in range(0, len(order), size)]


def plain(side: peers.Peer, prompts: Tensor, lengths: Sequence[int], slots: int) -> float:
    """Seconds that the other side takes for all rows."""
    total = 0.0
    for rows in sorted_batches(lengths, slots):
        total += side.run(prompts[rows].tolist(), max(lengths[row] for row in rows))[0]
    return total


def same_alone(
    engine: HybridEngine, prompts: Tensor, lengths: Sequence[int], out: Rollout, count: int
) -> int:
    """How many of the first `count` rows have the bits that they have when generated alone."""
    same = 0
    for i in range(count):
        alone = engine.generate(prompts[i : i + 1], None, out.sampling, limits=[lengths[i]])
        n = lengths[i]
        same += torch.equal(alone.completion_ids[0], out.completion_ids[i, :n]) and torch.equal(
            alone.logprobs[0], out.logprobs[i, :n]
        )
    return same


def ragged(engine: HybridEngine, side: peers.Peer, args: argparse.Namespace) -> dict[str, Any]:
    lengths = drawn_lengths(args.rows, args.shortest, args.longest, args.seed)
    prompts = prompts_of(engine.spec.vocab_size, args.rows, args.prompt, args.seed)
    sampling = SamplingConfig(max_new_tokens=args.longest, temperature=0.0)
    engine.generate(prompts[: args.slots], None, sampling, limits=[2] * min(args.slots, args.rows))
    side.run(prompts[: args.slots].tolist(), 2)
    ours, theirs = [], []
    for _ in range(args.repeats):
        out = engine.generate(prompts, None, sampling, limits=lengths)
        if out.completion_mask.sum(1).tolist() != lengths:
            raise SystemExit("the answers do not have the lengths that were drawn")
        ours.append(out.stats.total)
        theirs.append(plain(side, prompts, lengths, args.slots))
        print(f"ragged: dschat {ours[-1]:.1f} s, hf {theirs[-1]:.1f} s", flush=True)
    checked = min(args.check, args.rows)
    same = same_alone(engine, prompts, lengths, out, checked)
    if same != checked:
        raise SystemExit(f"{checked - same} of {checked} rows differ from the same prompt alone")
    tokens = sum(lengths)
    padded = sum(len(b) * max(lengths[row] for row in b) for b in sorted_batches(lengths, args.slots))
    result = {
        "tokens": tokens,
        "hf_tokens_with_padding": padded,
        "ours": vars(Spread.of([tokens / t for t in ours])),
        "hf": vars(Spread.of([tokens / t for t in theirs])),
        "rows_compared_alone": checked,
        "steps": out.stats.steps,
        "phases": {p: getattr(out.stats, p) for p in ("prefill", "decode", "sample")},
    }
    return result | {"ratio": result["ours"]["median"] / result["hf"]["median"]}


def samples(engine: HybridEngine, args: argparse.Namespace) -> dict[str, Any]:
    prompts = prompts_of(engine.spec.vocab_size, args.sample_prompts, args.sample_prompt, args.seed + 1)
    repeated = prompts.repeat_interleave(args.n, 0)
    many = SamplingConfig(max_new_tokens=args.sample_new, n=args.n, seed=args.seed)
    one = SamplingConfig(max_new_tokens=args.sample_new, n=1, seed=args.seed)
    shared, unshared = [], []
    warm = SamplingConfig(max_new_tokens=2, n=args.n)
    engine.generate(prompts[: max(1, args.slots // args.n)], None, warm)
    for _ in range(args.repeats):
        together = engine.generate(prompts, None, many)
        apart = engine.generate(repeated, None, one)
        if not torch.equal(together.completion_ids, apart.completion_ids):
            raise SystemExit("shared and unshared prompts gave different answers")
        shared.append(together.stats.total)
        unshared.append(apart.stats.total)
        print(f"samples: shared {shared[-1]:.1f} s, unshared {unshared[-1]:.1f} s", flush=True)
    result = {
        "tokens": together.stats.completion_tokens,
        "prefilled": [together.stats.prefilled_tokens, apart.stats.prefilled_tokens],
        "shared": vars(Spread.of(shared)),
        "unshared": vars(Spread.of(unshared)),
    }
    return result | {"ratio": result["unshared"]["median"] / result["shared"]["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rows", type=int, default=256, help="prompts")
    parser.add_argument("--slots", type=int, default=32, help="rows at a time, on both sides")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--shortest", type=int, default=16, help="tokens of the shortest answer")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest answer")
    parser.add_argument("--check", type=int, default=32, help="rows generated alone too, and compared")
    parser.add_argument("--n", type=int, default=8, help="samples a prompt")
    parser.add_argument("--sample_prompts", type=int, default=32)
    parser.add_argument(
        "--sample_prompt", type=int, default=256, help="tokens of a prompt that is sampled n times"
    )
    parser.add_argument("--sample_new", type=int, default=64, help="tokens of each sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    threads = use_threads(args.threads)
    dtype = models.pick_dtype(args.dtype)
    name = str(dtype).removeprefix("torch.")
    engine = HybridEngine(models.load_policy(args.model, dtype), max_slots=args.slots)
    with peers.start(["hf"], models.resolve(args.model), dtype=name, threads=threads) as (side,):
        first = ragged(engine, side, args)
    machine = bounds.Machine(read_bandwidth(), matmul_peak(dtype))
    result = {
        "kind": "ragged",
        "machine": machine_facts(machine.read) | {"gflops": round(machine.flops / 1e9)},
        "model": model_facts(engine),
        "workload": {k: v for k, v in vars(args).items() if k not in ("output", "model")},
        "ragged": first,
        "samples": samples(engine, args),
    }
    print(f"ragged: {first['ratio']:.2f} times Hugging Face in its best batches; "
          f"n={args.n} samples share their prompt: {result['samples']['ratio']:.2f} times the unshared")  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
