"""A GRPO iteration of ours beside TRL's on equal work.

    python benchmarks/trl_step.py --trl_python envs/trl/bin/python --output benchmarks/results/trl-lora.json

The same model, prompt ids, samples a prompt, exact length of every answer (checked on both sides), minibatches, KL to a
reference in the loss, old log-probs of the rollout's policy, one epoch, AdamW. Each side samples its own answers. TRL
runs in a process and an environment of its own (`pip install trl peft`, torch as here), with gradient checkpointing off
and Hugging Face generate for its rollouts. The sides take turns; the first iteration of each is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dschat.bench import Spread, machine_facts
from dschat.config import GRPOConfig
from dschat.engine.hybrid_engine import HybridEngine
from dschat.rlhf import conversations, data, grpo, metrics, models
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.run import make_optimizer
from dschat_kernels.backends import read_bandwidth
from dschat_kernels.limits import use_threads

WORKER = Path(__file__).with_name("trl_worker.py")
PHASES = ("flip", "prefill", "decode", "sample", "score", "logprobs", "reference", "update")


class Endless(conversations.Encoder):
    """An encoder without stop tokens: every answer runs to its full length."""

    @property
    def stop_ids(self) -> list[int]:
        return []


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The share of letters in an answer, as in trl_worker.py."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


class Ours:
    """dschat's GRPO, step by step as its training loop runs it."""

    def __init__(self, config: GRPOConfig, dtype: torch.dtype, folder: Path):
        policy = models.load_policy(config.model, dtype)
        reference = None if config.lora_r else HybridEngine(copy.deepcopy(policy).requires_grad_(False))
        policy = models.make_trainable(policy, config, "CAUSAL_LM")
        self.trainable = sum(p.numel() for p in models.trainable(policy))
        engine = HybridEngine(
            policy, make_optimizer(policy, config, config.learning_rate), exact=config.exact
        )
        encoder = Endless(models.load_tokenizer(config.model))
        self.trainer = grpo.GRPO(config, engine, encoder, Rewards([("letters", reward)], []), reference)
        self.metrics = metrics.Metrics(folder, "benchmark", 1, tensorboard=False, progress=False)

    def iteration(self, prompts: Sequence[list[int]], step: int) -> dict[str, float]:
        examples = [data.Example(row, [], "") for row in prompts]
        start = time.perf_counter()
        experience, _ = self.trainer.collect(examples, step, self.metrics)
        with self.metrics.phase("update"):
            self.trainer.update(experience, step, 1000)
        total = time.perf_counter() - start
        lengths = set(experience.rollout.completion_mask.sum(1).tolist())
        if lengths != {self.trainer.config.max_new_tokens}:
            raise SystemExit(
                f"dschat generated answers of {lengths} tokens: the times would not be of the same work"
            )
        self.trainer.forget()
        self.metrics.log(step + 1, {})
        line = metrics.read_lines(self.metrics.path)[-1]
        return {p: line.get(f"time/{p}_s", 0.0) for p in PHASES} | {"total": total}


class Theirs:
    """The worker; ended with the context."""

    def __init__(self, python: str, settings: dict[str, Any], log: Any, limit: float = 1800.0):
        env = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
        if python != sys.executable:
            env.pop("PYTHONPATH", None)  # of our environment
        self.log, self.limit = log, limit
        self.process = subprocess.Popen(
            [python, str(WORKER), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, env=env,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        late = threading.Timer(self.limit, self.process.kill)
        late.daemon = True
        late.start()
        try:
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            self.process.wait(10)
            self.log.seek(0)
            said = [text.strip() for text in self.log.readlines() if text.strip()]
            raise SystemExit(f"TRL cannot run: {said[-1] if said else 'it ended without a word'}")
        found: dict[str, Any] = json.loads(line)
        return found

    def iteration(self) -> float:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return float(self.answer()["seconds"])


@contextlib.contextmanager
def theirs(python: str, settings: dict[str, Any]) -> Iterator[Theirs]:
    with tempfile.TemporaryFile("w+") as log:
        side = Theirs(python, settings, log)
        try:
            yield side
        finally:
            side.process.kill()
            side.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter of an environment with TRL")
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--exact", action="store_true", help="ours trains on the rollout's kernels")
    parser.add_argument("--prompts", type=int, default=4, help="prompts in an iteration")
    parser.add_argument("--n", type=int, default=8, help="answers a prompt")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--minibatch", type=int, default=8, help="rows of a minibatch")
    parser.add_argument("--repeats", type=int, default=3, help="iterations measured, after one to warm up")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    if args.prompts * args.n % args.minibatch:
        parser.error(
            f"--minibatch {args.minibatch} does not divide {args.prompts} prompts of {args.n} answers"
        )

    threads, dtype = use_threads(args.threads), models.pick_dtype(args.dtype)
    rank = 8 if args.train == "lora" else 0
    config = GRPOConfig(
        model=models.resolve(args.model), batch_size=args.minibatch, lora_r=rank, max_new_tokens=args.new,
        max_prompt_length=args.prompt, exact=args.exact, prompts_per_step=args.prompts, samples_per_prompt=args.n,
        learning_rate=1e-6, reward=["letters"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        side = Ours(config, dtype, Path(folder))
        generator = torch.Generator().manual_seed(0)
        shape = ((args.repeats + 1) * args.prompts, args.prompt)
        ids = torch.randint(side.trainer.engine.spec.vocab_size, shape, generator=generator).tolist()
        settings = {
            "model": config.model, "dtype": str(dtype).removeprefix("torch."), "threads": threads, "ids": ids,
            "prompts": args.prompts, "n": args.n, "new": args.new, "minibatch": args.minibatch,
            "iterations": args.repeats + 1, "kl_coef": config.kl_coef, "lora_r": rank, "lora_alpha": 2 * rank,
            "lora_targets": "all-linear", "folder": str(Path(folder) / "trl"),
        }  # fmt: skip
        ours: list[dict[str, float]] = []
        other: list[float] = []
        with theirs(args.trl_python, settings) as worker:
            facts = worker.answer()
            if facts["trainable"] != side.trainable:
                raise SystemExit(
                    f"TRL trains {facts['trainable']} numbers and dschat {side.trainable}: not equal work"
                )
            for step in range(args.repeats + 1):
                found = side.iteration(ids[step * args.prompts : (step + 1) * args.prompts], step)
                seconds = worker.iteration()
                print(f"{step}: dschat {found['total']:.1f} s, TRL {seconds:.1f} s", flush=True)
                if step:
                    ours.append(found)
                    other.append(seconds)
    spread, rest = Spread.of([o["total"] for o in ours]), Spread.of(other)
    result = {
        "kind": "trl",
        "machine": machine_facts(read_bandwidth()),
        "versions": {"trl": facts["version"]},
        "workload": {k: v for k, v in vars(args).items() if k not in ("output", "trl_python", "model")}
        | {"dtype": settings["dtype"], "trained": side.trainable},
        "dschat": vars(spread),
        "trl": vars(rest),
        "phases": {p: sorted(o[p] for o in ours)[len(ours) // 2] for p in PHASES},
        "ratio": rest.median / spread.median,
    }
    print(f"dschat is {result['ratio']:.2f} times as fast as {facts['version'].split(',')[0]}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
