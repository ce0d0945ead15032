"""What training with an adapter holds: bytes of the base, of the rollout's packs, and the peak of a step.

    python benchmarks/training_memory.py

Each line is a process of its own: the model with LoRA of rank 8, a flip, then a forward and a backward of `--rows` rows
of `--length` tokens. The peak is what the step adds to the resident memory before it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import own_process

SETTINGS = (
    {"base_weights": "model", "rollout_weights": "model", "gradient_checkpointing": False},
    {"base_weights": "int8", "rollout_weights": "int8", "gradient_checkpointing": False},
    {"base_weights": "model", "rollout_weights": "model", "gradient_checkpointing": True},
    {"base_weights": "int8", "rollout_weights": "int8", "gradient_checkpointing": True},
)


def resident() -> float:
    """MiB of this process in memory."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS:"))


def measure(args: Any, settings: dict[str, Any]) -> dict[str, float]:
    """Numbers of one setting, in this process."""
    import gc

    import torch

    from dschat.config import GRPOConfig
    from dschat.engine import HybridEngine
    from dschat.rlhf import batching, models
    from dschat.rlhf.metrics import peak_memory_gib, reset_peak_memory
    from dschat_kernels.limits import use_threads

    use_threads()
    config = GRPOConfig(lora_r=8, importance_cap=2.0, **settings)
    model = models.load_policy(args.model, models.pick_dtype(args.dtype))
    model = models.make_trainable(model, config, "CAUSAL_LM")
    engine = HybridEngine(model, rollout_weights=config.rollout_weights)
    engine.flip()
    gc.collect()
    held = engine.memory()
    ids = torch.randint(
        10, 1000, (args.rows, args.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    batch: Any = batching.Sequences.of([row[:1] for row in ids], [row[1:] for row in ids], 0)
    engine.logprobs(batch.select(slice(0, 1)), temperature=1.0).sum().backward()  # what is made once
    before = resident()
    reset_peak_memory()
    engine.logprobs(batch, temperature=1.0).sum().backward()
    return {k: v / 2**20 for k, v in held.items()} | {"step": peak_memory_gib() * 1024 - before}


def line(row: dict[str, Any]) -> str:
    """A setting and its numbers as a row of the table."""
    numbers = " | ".join(f"{row[k]:.0f}" for k in ("weights", "packs", "step"))
    again = "yes" if row["gradient_checkpointing"] else "no"
    return f"| {row['base_weights']} | {row['rollout_weights']} | {again} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    own_process.arguments(parser)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, json.loads(args.one))))
        return
    print("| base | rollout | gradient checkpointing | base, MiB | packs, MiB | a step's peak, MiB |")
    print("| --- " * 6 + "|")
    own_process.each(__file__, SETTINGS, args, line)


if __name__ == "__main__":
    main()
