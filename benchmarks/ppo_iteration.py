"""A whole PPO iteration against the same algorithm in Hugging Face generate and plain PyTorch, phase by phase.

    python benchmarks/ppo_iteration.py --train lora --output benchmarks/results/ppo-lora.json
    python benchmarks/ppo_iteration.py --train full --output benchmarks/results/ppo-full.json

Both sides do the same work on the same prompts: random tokens of exact length, every answer of exact length (no EOS),
one reward model whose frozen trunk also carries the critic's head, a reference (the adapter switched off, or a frozen
copy), one epoch of minibatches with clipped policy and value losses and AdamW. The plain side never pads, keeps logits
of the answer's positions only, and shares the scoring pass between reward and critic, as ours does. Sides take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dschat import device as devices
from dschat.bench import machine_facts
from dschat.config import PPOConfig
from dschat.engine.hybrid_engine import HybridEngine
from dschat.rlhf import conversations, critic, data, losses, metrics, models, ppo
from dschat.rlhf.experience import Experience
from dschat.rlhf.rewards import Rewards
from dschat.rlhf.run import make_optimizer
from dschat_kernels.backends import read_bandwidth

PHASES = ("flip", "prefill", "decode", "sample", "score", "logprobs", "reference", "values", "update")


class Endless(conversations.Encoder):
    """An encoder without stop tokens: every answer runs to its full length."""

    @property
    def stop_ids(self) -> list[int]:
        return []


class Ours:
    """dschat's PPO, step by step as its training loop runs it."""

    def __init__(self, config: PPOConfig, dtype: torch.dtype, device: torch.device, folder: Path):
        policy = devices.place(models.load_policy(config.model, dtype), device)
        reference = None if config.lora_r else HybridEngine(copy.deepcopy(policy).requires_grad_(False))
        policy = models.make_trainable(policy, config, "CAUSAL_LM")
        engine = HybridEngine(
            policy, make_optimizer(policy, config, config.learning_rate), exact=config.exact
        )
        scorer = models.load_scorer(config.model, dtype, config.seed).requires_grad_(False)
        trunk = models.Scorer(devices.place(scorer, device))
        head = copy.deepcopy(trunk.head).requires_grad_(True)
        encoder = Endless(models.load_tokenizer(config.model))
        rewards = Rewards([("reward", trunk)], [])
        self.trainer = ppo.PPO(
            config, engine, encoder, rewards, critic.Critic(trunk, head, frozen_trunk=True), reference
        )
        self.metrics = metrics.Metrics(
            folder, "benchmark", 1, tensorboard=False, progress=False, device=device
        )

    def iteration(self, prompts: Tensor, step: int) -> dict[str, float]:
        examples = [data.Example(row.tolist(), [], "") for row in prompts]
        start = time.perf_counter()
        experience, _ = self.trainer.collect(examples, step, self.metrics)
        with self.metrics.phase("update"):
            self.trainer.update(experience, step, 1000)
        total = time.perf_counter() - start
        self.trainer.forget()
        self.metrics.log(step + 1, {})
        line = metrics.read_lines(self.metrics.path)[-1]
        return {p: line.get(f"time/{p}_s", 0.0) for p in PHASES} | {"total": total}


class Plain:
    """The same algorithm in Hugging Face generate and plain PyTorch."""

    def __init__(self, config: PPOConfig, dtype: torch.dtype, device: torch.device):
        self.config, self.device = config, device
        self.policy = devices.place(models.load_policy(config.model, dtype), device)
        self.reference = None if config.lora_r else copy.deepcopy(self.policy).requires_grad_(False)
        self.policy = models.make_trainable(self.policy, config, "CAUSAL_LM")
        scorer = models.load_scorer(config.model, dtype, config.seed).requires_grad_(False)
        scorer = devices.place(scorer, device)
        self.trunk, self.reward_head = scorer.get_decoder(), scorer.score
        self.value_head = copy.deepcopy(scorer.score).requires_grad_(True)
        self.optimizer = make_optimizer(self.policy, config, config.learning_rate)
        self.critic_optimizer = make_optimizer(self.value_head, config, config.critic_learning_rate)
        self.times: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        devices.synchronize(self.device)
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start

    def generate(self, prompts: Tensor) -> Tensor:
        new = self.config.max_new_tokens
        return self.policy.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=new, min_new_tokens=new, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def logprobs(self, model: Any, ids: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the answer's tokens [rows, new], and the entropies before them for the log, if asked."""
        new = self.config.max_new_tokens
        logits = model(ids, use_cache=False, logits_to_keep=new + 1).logits[:, :-1].float()
        logp = logits.log_softmax(-1)
        entropies = None
        if entropy:
            with torch.no_grad():
                entropies = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, ids[:, -new:, None]).squeeze(-1), entropies

    def pieces(self, ids: Tensor) -> tuple[Tensor, ...]:
        return ids.split(self.config.batch_size)

    @torch.no_grad()
    def collect(self, prompts: Tensor) -> tuple[Tensor, Tensor, Experience]:
        config, new = self.config, self.config.max_new_tokens
        with self.phase("generate"):
            ids = self.generate(prompts)
        with self.phase("score"):
            hidden = torch.cat([self.trunk(p, use_cache=False).last_hidden_state for p in self.pieces(ids)])
            scores = self.reward_head(hidden[:, -1]).squeeze(-1).float()
            features = hidden[:, -new - 1 : -1]
            values = self.value_head(features).squeeze(-1).float()
        with self.phase("logprobs"):
            old = torch.cat([self.logprobs(self.policy, p)[0] for p in self.pieces(ids)])
        with self.phase("reference"):
            model = self.reference if self.reference is not None else self.policy
            off: Any = self.policy.disable_adapter() if config.lora_r else contextlib.nullcontext()
            with off:
                reference = torch.cat([self.logprobs(model, p)[0] for p in self.pieces(ids)])
        mask = torch.ones_like(old, dtype=torch.bool)
        rewards = losses.kl_penalised_rewards(
            scores - config.missing_eos_penalty, old, reference, mask, config.kl_coef, config.kl_kind
        )
        advantages, returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
        advantages = losses.whiten(advantages, mask)
        rollout: Any = None
        experience = Experience(rollout, mask, old, reference, {}, 0.0, config.kl_coef)
        experience.values, experience.returns, experience.advantages = values, returns, advantages
        return ids, features, experience

    def update(self, ids: Tensor, features: Tensor, e: Experience, seed: int) -> None:
        config = self.config
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).to(self.device)
        for rows in order.split(config.batch_size):
            logp, _ = self.logprobs(self.policy, ids[rows], entropy=True)
            loss, _ = losses.policy_loss(
                logp, e.old_logp[rows], e.advantages[rows], e.mask[rows], config.cliprange
            )
            loss.backward()
            values = self.value_head(features[rows]).squeeze(-1).float()
            value_loss, _ = losses.value_loss(
                values, e.values[rows], e.returns[rows], e.mask[rows], config.cliprange_value
            )
            value_loss.backward()
            for optimizer in (self.optimizer, self.critic_optimizer):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def iteration(self, prompts: Tensor, step: int) -> dict[str, float]:
        self.times = {}
        start = time.perf_counter()
        ids, features, experience = self.collect(prompts.to(self.device))
        with self.phase("update"):
            self.update(ids, features, experience, step)
        return self.times | {"total": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--exact", action="store_true", help="training forward on the rollout's kernels")
    parser.add_argument("--batch", type=int, default=32, help="prompts in an iteration")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--minibatch", type=int, default=8, help="rows of a minibatch")
    parser.add_argument("--repeats", type=int, default=3, help="iterations measured, after one to warm up")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()

    device = devices.use(args.device)
    dtype = models.pick_dtype(args.dtype, device)
    config = PPOConfig(
        model=models.resolve(args.model), batch_size=args.minibatch, lora_r=8 if args.train == "lora" else 0,
        critic_update="head", max_new_tokens=args.new, max_prompt_length=args.prompt, exact=args.exact,
        prompts_per_step=args.batch, learning_rate=1e-6, reward=["reward"], device=args.device,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Any] = {
            "dschat": Ours(config, dtype, device, Path(folder)), "plain": Plain(config, dtype, device)
        }  # fmt: skip
        vocabulary = sides["dschat"].trainer.engine.spec.vocab_size
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for step in range(args.repeats + 1):
            generator = torch.Generator().manual_seed(step)
            prompts = torch.randint(vocabulary, (args.batch, args.prompt), generator=generator)
            for name, side in sides.items():
                found = side.iteration(prompts, step)
                print(f"{name} {step}: {found['total']:.1f} s", flush=True)
                if step:
                    runs[name].append(found)
    result: dict[str, Any] = {
        "machine": machine_facts(read_bandwidth(device=device), device),
        "workload": vars(args) | {"output": None, "dtype": str(dtype).removeprefix("torch.")},
        "sides": {
            name: {
                phase: {
                    "median": statistics.median(r[phase] for r in found),
                    "low": min(r[phase] for r in found),
                    "high": max(r[phase] for r in found),
                }
                for phase in found[0]
            }
            for name, found in runs.items()
        },
    }
    ratio = result["sides"]["plain"]["total"]["median"] / result["sides"]["dschat"]["total"]["median"]
    result["ratio"] = ratio
    for name, phases in result["sides"].items():
        parts = ", ".join(f"{p} {t['median']:.2f}" for p, t in phases.items() if t["median"] > 0)
        print(f"{name}: {parts} (seconds)")
    print(f"dschat is {ratio:.2f} times as fast")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
