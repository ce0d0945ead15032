"""What training with an adapter holds: bytes of the base, of the rollout's packs, and the peak of a step.

    python benchmarks/training_memory.py

Each line is a process of its own: the model with LoRA of rank 8, a flip, then a forward and a backward of `--rows` rows
of `--length` tokens. The peak is what the step adds to the resident memory before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", default="", help="write the numbers as JSON to this file too")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, json.loads(args.one))))
        return
    rows = []
    print(
        "| base | rollout | gradient checkpointing | base, MiB | packs, MiB | a step's peak, MiB |\n"
        + "| --- " * 6
        + "|"
    )
    for settings in SETTINGS:
        command = [sys.executable, __file__, "--one", json.dumps(settings), *sys.argv[1:]]
        found = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        rows.append(settings | found)
        numbers = " | ".join(f"{found[k]:.0f}" for k in ("weights", "packs", "step"))
        again = "yes" if settings["gradient_checkpointing"] else "no"
        print(
            f"| {settings['base_weights']} | {settings['rollout_weights']} | {again} | {numbers} |",
            flush=True,
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump({"model": args.model, "dtype": args.dtype, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
