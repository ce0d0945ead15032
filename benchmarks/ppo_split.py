"""Where the time of a PPO iteration goes: prefill, decode, score, log-probs, update, flip.

    python benchmarks/ppo_split.py --model smollm2-135m-instruct --output benchmarks/results/ppo.json

Runs real PPO iterations (LoRA policy, the reward model's trunk shared with the critic's head) on prompts of
recipes/data/polite and reads the phase times that every run logs. The reward is a fresh score head on the same model:
its values do not matter for the time, its cost does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from dschat.config import PPOConfig
from dschat.rlhf import metrics, models, ppo

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("flip", "prefill", "decode", "sample", "score", "logprobs", "reference", "values", "update")


def run(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The metrics lines of `args.steps` PPO iterations after one to warm up."""
    dtype = models.pick_dtype(args.dtype)
    reward = folder / "reward"
    scorer = models.load_scorer(args.model, dtype, 0)
    scorer.save_pretrained(reward)
    models.load_tokenizer(args.model).save_pretrained(reward)
    config = PPOConfig(
        model=args.model, reward=[str(reward)], data=[str(args.data)], output_dir=str(folder / "run"), dtype=args.dtype,
        critic_update="head", lora_r=8, prompts_per_step=args.batch, max_new_tokens=args.new_tokens,
        max_steps=args.steps + 1, save_every=0, tensorboard=False, progress=False,
    )  # fmt: skip
    ppo.train(config)
    return metrics.read_lines(folder / "run" / "metrics.jsonl")[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=ROOT / "recipes" / "data" / "polite" / "train.jsonl.gz")
    parser.add_argument("--batch", type=int, default=32, help="prompts in an iteration")
    parser.add_argument("--new-tokens", type=int, default=32, help="most tokens in an answer")
    parser.add_argument("--steps", type=int, default=3, help="iterations measured, after one to warm up")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = run(args, Path(folder))
    phases = {p: statistics.median(line.get(f"time/{p}", 0.0) for line in lines) for p in PHASES}
    rate = statistics.median(line["time/rollout_tokens_per_s"] for line in lines)
    length = statistics.median(line["rollout/length"] for line in lines)
    caption = (
        f"PPO on {args.model} ({models.pick_dtype(args.dtype)}, LoRA), {args.batch} prompts an iteration, answers of "
        f"{length:.0f} tokens on average (at most {args.new_tokens}), {torch.get_num_threads()} threads, median of "
        f"{args.steps} iterations; the rollout makes {rate:.0f} tokens/s."
    ).replace("torch.", "")
    total = sum(phases.values())
    for name, seconds in phases.items():
        print(f"{name:10} {seconds:7.2f} s  {100 * seconds / total:3.0f} %")
    print(caption)
    if args.output:
        args.output.write_text(json.dumps({"phases": phases, "caption": caption}, indent=2) + "\n")


if __name__ == "__main__":
    main()
