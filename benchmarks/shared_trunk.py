"""What PPO's models hold: policy, critic and reward model with bases of their own, and on the policy's.

    python benchmarks/shared_trunk.py

A reward model with an adapter is trained for a step; then each line is a process of its own, which assembles a PPO run
with it: bytes of all weights, each counted once, and how far the scores of `--rows` random answers of `--length` tokens
are from those of the whole reward model, `model/`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import own_process

SETTINGS = (
    {"reward_trunk": "own", "critic_trunk": "own", "critic_update": "lora"},
    {"reward_trunk": "policy", "critic_trunk": "policy", "critic_update": "lora"},
    {"reward_trunk": "own", "critic_trunk": "own", "critic_update": "head"},
    {"reward_trunk": "policy", "critic_trunk": "policy", "critic_update": "head"},
)
COMMON: dict[str, Any] = {"lora_r": 8, "device": "cpu", "tensorboard": False, "progress": False}


def train_reward(args: Any, folder: str) -> str:
    """The folder of a reward run of one step."""
    from dschat.config import RewardConfig
    from dschat.rlhf import reward

    rows = [
        {"prompt": f"Say {i}.", "chosen": f"Gladly: {i}, thank you.", "rejected": f"No. {i}?"}
        for i in range(8)
    ]
    data = Path(folder, "pairs.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = str(Path(folder, "reward"))
    reward.train(
        RewardConfig(
            model=args.model, dtype=args.dtype, data=[str(data)], output_dir=out, max_steps=1, batch_size=8,
            learning_rate=1e-3, **COMMON,
        )
    )  # fmt: skip
    return out


def measure(args: Any, settings: dict[str, Any]) -> dict[str, float]:
    """Numbers of one setting, in this process."""
    import torch

    from dschat.config import PPOConfig
    from dschat.rlhf import batching, conversations, models, online, ppo
    from dschat_kernels.limits import use_threads

    use_threads()
    config = PPOConfig(model=args.model, dtype=args.dtype, reward=[args.reward], **COMMON, **settings)
    dtype = models.pick_dtype(config.dtype)
    encoder = conversations.Encoder(models.load_tokenizer(config.model), "", config.model)
    trainer: Any = online.assemble(config, ppo.PPO.build, encoder, dtype)
    source = trainer.rewards.sources[0][1]
    scorers = [trainer.critic.scorer, getattr(source, "scorer", source)]
    modules = [trainer.engine.model, trainer.critic.module, *(s.model for s in scorers)]
    weights = {p.untyped_storage().data_ptr(): p.nbytes for m in modules for p in m.parameters()}
    ids = torch.randint(
        10, 1000, (args.rows, args.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    batch: Any = batching.Sequences.of([row[:8] for row in ids], [row[8:] for row in ids], 0)
    whole = models.Scorer(models.load_scorer(args.reward, dtype, new_head=None))
    scores, expected = source.rate(batch), whole.rate(batch)
    return {
        "weights": sum(weights.values()) / 2**20,
        "difference": float((scores - expected).abs().max()),
        "deviation": float(expected.std()),
    }


def line(row: dict[str, Any]) -> str:
    """A setting and its numbers as a row of the table."""
    return (
        f"| {row['critic_update']} | {row['critic_trunk']} | {row['weights']:.0f} | {row['difference']:.2f} "
        f"(deviation {row['deviation']:.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    own_process.arguments(parser)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--reward", default="", help="a reward run with an adapter; empty: one is trained")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, json.loads(args.one))))
        return
    with tempfile.TemporaryDirectory() as folder:
        name = args.reward or train_reward(args, folder)
        print("| critic trains | bases of critic and reward model | weights, MiB | scores differ by |")
        print("| --- " * 4 + "|")
        own_process.each(__file__, SETTINGS, args, line, "--reward", name)


if __name__ == "__main__":
    main()
