"""Does it learn? One command a claim: a recipe over several seeds, held-out scores before and after, intervals.

    python benchmarks/evidence.py ppo grpo rloo    SmolLM2-135M against a reward model (recipes/data/polite)
    python benchmarks/evidence.py dpo              the same pairs without that model, which only judges the answers
    python benchmarks/evidence.py format           GRPO on instructions that a program checks (recipes/format.yaml)
    python benchmarks/evidence.py svamp            GRPO on arithmetic with exact answers (recipes/grpo_svamp.yaml)

Each run is kept under --output_dir and not run again, so an interrupted command goes on where it was. The first four
need an SFT and a reward model; they are trained first, once (the first two stages of recipes/quickstart.yaml, about
four minutes). What comes out is a table and benchmarks/results/evidence-NAME.json: the held-out score before and
after of every seed with a paired bootstrap over prompts, and over the seeds the mean change with Student's 95 %
interval, for which every seed is one observation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from dschat import config as configs
from dschat import config_base, config_text
from dschat.rlhf import conversations, dpo, evaluate, grpo, models, online, ppo, rloo
from dschat.rlhf import train as pipeline
from dschat.rlhf.run import derive_seed

ROOT = Path(__file__).resolve().parent.parent
TRAIN: dict[str, Callable[..., dict[str, Any]]] = {
    "ppo": ppo.train, "grpo": grpo.train, "rloo": rloo.train, "dpo": dpo.train,
}  # fmt: skip

# Against the reward model every algorithm gets the same answers: 48 of a step, 36 steps. PPO is the quickstart's.
SHARED = {
    "exact": True, "lora_r": 16, "lora_last": 10, "learning_rate": 7e-4, "batch_size": 16, "max_prompt_length": 96,
    "max_new_tokens": 40, "max_steps": 36, "kl_coef": 0.02, "kl_place": "reward", "kl_kind": "k1",
    "missing_eos_penalty": 1.0, "system_prompt": "Answer briefly.", "max_eval_rows": 64, "eval_samples": 4,
    "data": ["recipes/data/polite/train.jsonl.gz"], "eval_data": ["recipes/data/polite/test.jsonl.gz"],
}  # fmt: skip
AGAINST_MODEL: dict[str, dict[str, Any]] = {
    "ppo": {
        "prompts_per_step": 12, "samples_per_prompt": 4, "critic_update": "head", "critic_head": "zero",
        "critic_learning_rate": 1e-3, "reward_norm": "group", "save_critic": False,
    },
    "grpo": {"prompts_per_step": 6, "samples_per_prompt": 8},
    "rloo": {"prompts_per_step": 12, "samples_per_prompt": 4},
}  # fmt: skip
# DPO has their adapters, and meets every pair once. Rate and beta are the third of three tries with seed 0.
DPO: dict[str, Any] = {
    "lora_r": 16, "lora_last": 10, "learning_rate": 4e-4, "warmup_steps": 4, "beta": 0.3, "batch_size": 16,
    "max_length": 128, "epochs": 1, "system_prompt": "Answer briefly.",
    "data": ["recipes/data/polite/train.jsonl.gz"],
}  # fmt: skip
RECIPES = {"format": "recipes/format.yaml", "svamp": "recipes/grpo_svamp.yaml"}
# Sized so that a seed takes minutes; the recipe alone runs for as long as it says.
SHORTER = {"svamp": {"max_steps": 16, "eval_every": 0, "max_new_tokens": 64, "max_eval_rows": 100}}


def plan(
    name: str, seed: int, folder: Path, model: str, steps: int
) -> configs.OnlineConfig | configs.DPOConfig:
    """The config of one run."""
    extra: dict[str, Any] = {"seed": seed, "output_dir": str(folder / f"{name}-{seed}")}
    start = {"model": str(folder / "start" / "sft")}
    if name in RECIPES:
        cls: Any = configs.GRPOConfig
        keys = {**config_text.read_yaml(RECIPES[name]), **SHORTER.get(name, {}), "compare_hf": 0}
    elif name == "dpo":
        cls, keys = configs.DPOConfig, {**DPO, **start}
    else:
        cls = configs.COMMANDS[name]
        judge = {"reward": [str(folder / "start" / "reward")]}
        keys = {**SHARED, **AGAINST_MODEL[name], **start, **judge, "compare_hf": 0}
    if model:
        keys |= {"model": model, "lora_last": 0}
    if steps:
        keys["max_steps"] = steps
    return config_base.build(cls, {**keys, **extra})


def prepare(folder: Path, model: str, steps: int) -> None:
    """The SFT model and the reward model that the algorithms start from, once."""
    keys = config_text.read_yaml("recipes/quickstart.yaml")
    keys |= {"output_dir": str(folder / "start"), "ppo": None} | (
        {"model": model, "lora_last": 0} if model else {}
    )
    if steps:
        keys["max_steps"] = steps
    pipeline.train(config_base.build(configs.TrainConfig, keys))


def train(config: configs.OnlineConfig | configs.DPOConfig, folder: Path) -> dict[str, Any]:
    """Run it; the result has the change of the score of held-out prompts under `held_out`."""
    result = TRAIN[config.command](config)
    if not isinstance(config, configs.DPOConfig):
        return result
    before, after = (judged(config, name, folder) for name in (config.model, config.output_dir))
    return {**result, "held_out": evaluate.held_out(before, after, config.seed)}


def judged(config: configs.DPOConfig, name: str, folder: Path) -> dict[str, Any]:
    """Held-out answers of a model that DPO started from or wrote, scored as RLOO's of the same seed would be."""
    start = folder / "start"
    keys = {**SHARED, "model": name, "reference": config.model, "reward": [str(start / "reward")]}
    keys |= {"seed": config.seed, "lora_last": config.lora_last, "output_dir": config.output_dir}
    asked = config_base.build(configs.RLOOConfig, keys)
    encoder = conversations.Encoder(models.load_tokenizer(name), asked.system_prompt, name)
    trainer = online.assemble(asked, grpo.GRPO.build, encoder, models.pick_dtype(asked.dtype))
    prompts, _ = online.read_prompts(asked, encoder, "eval")
    return evaluate.evaluate(trainer, prompts, derive_seed(config.seed, "eval"))


def reward_model(folder: Path) -> dict[str, float]:
    """How well the reward model that `prepare` trained judges held-out pairs, beside "the longer answer wins"."""
    found = json.loads((folder / "start" / "reward" / "result.json").read_text(encoding="utf-8"))
    return {name: found[f"eval_{name}"] for name in ("accuracy", "longer_wins", "pairs")}


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean change over the seeds, and Student's 95 % interval where there are several."""
    changes = [r["held_out"]["change"] for r in runs]
    found = {"mean": statistics.fmean(changes), "seeds": len(changes)}
    if len(changes) > 1:
        width = stats.t.ppf(0.975, len(changes) - 1) * statistics.stdev(changes) / len(changes) ** 0.5
        found |= {"low": found["mean"] - float(width), "high": found["mean"] + float(width)}
    return found


def table(name: str, seeds: Sequence[int], runs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"| {name}: seed | held-out prompts | before | after | change, 95 % | KL, nats | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seed, run in zip(seeds, runs, strict=True):
        h = run["held_out"]
        lines.append(
            f"| {seed} | {h['prompts']} | {h['before']:.3f} | {h['after']:.3f} | {h['change']:+.3f} "
            f"({h['low']:+.3f} to {h['high']:+.3f}) | {h['kl']:.2f} | {run['seconds']:.0f} |"
        )
    total = over_seeds(runs)
    if "low" in total:
        lines += [
            "",
            f"Over {total['seeds']} seeds: {total['mean']:+.3f} ({total['low']:+.3f} to {total['high']:+.3f}).",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="+", choices=[*AGAINST_MODEL, "dpo", *RECIPES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--model", default="", help="another model, for a quick try")
    parser.add_argument("--max_steps", type=int, default=0, help="fewer steps, for a quick try")
    args = parser.parse_args(argv)
    if set(args.claims) - set(RECIPES):
        prepare(args.output_dir, args.model, args.max_steps)
    for name in args.claims:
        planned = [plan(name, seed, args.output_dir, args.model, args.max_steps) for seed in args.seeds]
        runs = [train(config, args.output_dir) for config in planned]
        print(table(name, args.seeds, runs), flush=True)
        content = {
            "kind": "evidence",
            "name": name,
            "over_seeds": over_seeds(runs),
            "reward_model": None if name in RECIPES else reward_model(args.output_dir),
            "runs": [
                {"seed": c.seed, "held_out": r["held_out"], "seconds": r["seconds"], "config": c.to_dict()}
                for c, r in zip(planned, runs, strict=True)
            ],
        }
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"evidence-{name}.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
