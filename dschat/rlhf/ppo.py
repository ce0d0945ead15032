"""Proximal policy optimisation.

A step:  roll out -> score -> old, reference log-probs and values -> per-token rewards, advantages -> updates.

What has to be equal is equal by construction: policy, old, reference log-probs and entropy are all taken at
the sampling temperature from the same packed forward, positions come from masks, dropout is off everywhere,
the score sits at the last real token, and the first minibatch's ratio is checked to be 1. Everything random
is a function of (seed, step).

Models kept in memory: the policy; the reference is the policy with its adapter switched off (a frozen copy
when all weights are trained); the critic starts from the reward model and shares its weights unless it trains
them.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ConfigError, PPOConfig
from ..engine.hybrid_engine import HybridEngine
from ..engine.rollout import Rollout, SamplingConfig
from . import data, evaluate, losses, models, report
from .metrics import Metrics
from .rewards import RewardFunction, Rewards, is_function_name, load_function, prompt_text
from .run import Run, clip_gradients, interruptible, learning_rate, make_optimizer, require_data, set_lr

RATIO_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Deviation of the first ratio from 1 that rounding alone may cause, where kernels depend on the shape of a
batch.
"""


class RatioError(ConfigError):
    """The first minibatch's ratio is not 1: rollout and training disagree about the policy."""


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed for one purpose and step, 0 .. 2^63 - 1."""
    text = ":".join(str(p) for p in (seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


# ----------------------------------------------------------------------------------------------------- critic


class Critic:
    """Values of completion tokens. In "head" mode the trunk is frozen, so its hidden states are computed
    once a rollout.
    """

    def __init__(self, scorer: models.Scorer, head: nn.Module, frozen_trunk: bool) -> None:
        self.scorer, self.head, self.frozen_trunk = scorer, head, frozen_trunk
        self.module: nn.Module = head if frozen_trunk else scorer.model

    def features(self, rollout: Rollout) -> Tensor | None:
        """Hidden states before every completion token of the rollout, where they do not change; else None."""
        return self.scorer.gather(rollout)[1] if self.frozen_trunk else None

    def values(self, batch: Rollout, features: Tensor | None = None) -> Tensor:
        """float32 [B, C] with gradient, 0 where masked. features: those of the batch's tokens."""
        if features is None:
            return self.scorer.values(batch)
        return models.scatter(self.scorer.read(features, self.head), batch.completion_mask)


class AdapterOff:
    """The reward model inside a critic with an adapter: scores with the adapter switched off."""

    def __init__(self, scorer: models.Scorer) -> None:
        self.scorer = scorer

    def rate(self, batch: Any) -> Tensor:
        self.scorer.forget()
        with self.scorer.model.disable_adapter():
            return self.scorer.rate(batch)


def build_rewards_and_critic(
    config: PPOConfig, dtype: torch.dtype, functions: Sequence[RewardFunction] = ()
) -> tuple[Rewards, Critic]:
    """Reward sources and critic as configured. The critic shares the frozen weights of the reward model it
    starts from.
    """
    loaded: dict[str, Any] = {}
    sources: list[tuple[str, Any]] = [(getattr(f, "__name__", "function"), f) for f in functions]
    for name in config.reward:
        if is_function_name(name):
            sources.append((name.rpartition(":")[2], load_function(name)))
        else:
            loaded[name] = models.load_scorer(name, dtype, config.seed).requires_grad_(False)
            sources.append((name, loaded[name]))
    first_model = next(iter(loaded), None)
    start = config.critic or first_model or config.model

    head: nn.Module
    if config.critic_update == "all" or start not in loaded:
        model = models.load_scorer(start, dtype, config.seed, new_head="zero")
    else:
        model = loaded[start]
    if config.critic_update == "head":
        head = copy.deepcopy(models.score_head(model)).requires_grad_(True)
        critic = Critic(models.Scorer(model.requires_grad_(False)), head, frozen_trunk=True)
    elif config.critic_update == "lora":
        seed = derive_seed(config.seed, "critic")
        model = models.add_lora(
            model, config.critic_lora_r, 0.0, config.lora_targets, "SEQ_CLS", seed, config.lora_last
        )
        critic = Critic(models.Scorer(model), models.score_head(model), frozen_trunk=False)
    else:
        model.requires_grad_(True)
        critic = Critic(models.Scorer(model), models.score_head(model), frozen_trunk=False)

    shared = start in loaded and config.critic_update != "all"
    for i, (name, source) in enumerate(sources):
        if shared and name == start:
            as_reward: Any = critic.scorer if config.critic_update == "head" else AdapterOff(critic.scorer)
            sources[i] = (name, as_reward)
        elif isinstance(source, nn.Module):
            sources[i] = (name, models.Scorer(source))
    return Rewards(sources, config.reward_weights), critic


# ------------------------------------------------------------------------------------------------- experience


@dataclass
class Experience:
    """Everything about a rollout that stays fixed during the updates; all [B, C] unless said."""

    rollout: Rollout
    mask: Tensor
    old_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    features: Tensor | None
    gap: dict[str, float]
    tolerance: float


def shape_scores(
    scores: Tensor, finished: Tensor, config: PPOConfig, moments: losses.RunningMoments, valid: Tensor
) -> Tensor:
    """Scores as they enter the rewards: normalised, clipped, and less the penalty for answers that did not
    end.
    """
    if config.reward_norm == "batch" and bool(valid.any()):
        chosen = losses.RunningMoments()
        chosen.update(scores[valid])
        scores = (scores - chosen.mean) / chosen.std
    elif config.reward_norm == "running":
        moments.update(scores[valid])
        scores = (scores - moments.mean) / moments.std
    if config.reward_clip:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    return scores - config.missing_eos_penalty * (~finished).to(scores.dtype)


def log_prob_gap(rollout_logp: Tensor, logp: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the rollout's log-probs are from the training forward's: mean and max |d|, and mean exp |d|."""
    d = (logp - rollout_logp).abs()
    return {
        "mean": float(losses.masked_mean(d, mask)),
        "max": float(losses.masked_max(d, mask)),
        "mult": float(losses.masked_mean(d.exp(), mask)),
    }


class PPO:
    """Policy, reference, rewards and critic, and what one step does with them."""

    def __init__(
        self,
        config: PPOConfig,
        engine: HybridEngine,
        encoder: data.Encoder,
        rewards: Rewards,
        critic: Critic,
        reference: HybridEngine | None,
    ) -> None:
        self.config, self.engine, self.encoder = config, engine, encoder
        self.rewards, self.critic, self.reference = rewards, critic, reference
        if engine.optimizer is None:
            raise ConfigError("the engine has no optimizer; give HybridEngine(model, optimizer=...)")
        self.policy_optimizer = engine.optimizer
        self.critic_parameters = [p for p in critic.module.parameters() if p.requires_grad]
        self.critic_optimizer = make_optimizer(self.critic_parameters, config, config.critic_learning_rate)
        self.moments = losses.RunningMoments()
        self.kl_controller = (
            losses.AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
            if config.kl_control == "adaptive"
            else losses.FixedKLController(config.kl_coef)
        )
        self.dtype = next(engine.model.parameters()).dtype

    # ----------------------------------------------------------------------------------------------- roll out

    def generate(self, examples: Sequence[data.Example], samples: int, seed: int) -> Rollout:
        ids, mask = data.pad([e.prompt_ids for e in examples], self.encoder.pad_id, "left")
        sampling = SamplingConfig(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            n=samples,
            seed=seed,
            eos_token_id=self.encoder.stop_ids,
            pad_token_id=self.encoder.pad_id,
        )
        return self.engine.generate(ids, mask, sampling)

    def texts(self, rollout: Rollout) -> list[str]:
        return [
            self.encoder.decode(ids[mask].tolist())
            for ids, mask in zip(rollout.completion_ids, rollout.completion_mask.bool(), strict=True)
        ]

    def score(
        self, rollout: Rollout, examples: Sequence[data.Example], texts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """(raw scores [B], valid [B]) of a rollout with len(texts) / len(examples) samples of each prompt."""
        n = len(texts) // len(examples)
        rows = [e for e in examples for _ in range(n)]
        names = {k for e in examples for k in e.columns} - {"prompt", "prompts", "completion", "completions"}
        columns = {k: [e.columns.get(k) for e in rows] for k in sorted(names)}
        scores, valid, _ = self.rewards(rollout, [e.prompt for e in rows], texts, columns)
        return scores, valid

    # ---------------------------------------------------------------------------------------------- log-probs

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs under the present policy, `batch_size` rows at a time."""
        parts = [self.engine.logprobs(rollout.select(rows)) for rows in self._pieces(len(rollout))]
        return torch.cat(parts)

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs under the frozen reference, at the rollout's temperature."""
        if self.reference is not None:
            return torch.cat([self.reference.logprobs(rollout.select(r)) for r in self._pieces(len(rollout))])
        with self.engine.reference():
            return torch.cat([self.engine.logprobs(rollout.select(r)) for r in self._pieces(len(rollout))])

    def _pieces(self, rows: int) -> Iterator[slice]:
        size = self.config.batch_size
        return (slice(i, i + size) for i in range(0, rows, size))

    # ---------------------------------------------------------------------------------------------- one step

    def collect(
        self, examples: Sequence[data.Example], step: int, metrics: Metrics
    ) -> tuple[Experience, dict[str, Any]]:
        """Roll out, score, and turn it into advantages and returns."""
        config = self.config
        seed = derive_seed(config.seed, "rollout", step)
        rollout = self.generate(examples, config.samples_per_prompt, seed)
        for name in ("flip", "prefill", "decode", "sample"):
            metrics.add_time(name, getattr(rollout.stats, name))
        texts = self.texts(rollout)
        with metrics.phase("score"):
            scores, valid = self.score(rollout, examples, texts)
        mask = rollout.completion_mask.bool() & valid[:, None]
        with metrics.phase("logprobs"):
            # In exact mode the rollout's log-probs *are* those of the training forward; the ratio check
            # proves it.
            old = rollout.logprobs if config.exact else self.logprobs(rollout)
            gap = log_prob_gap(rollout.logprobs, old, mask)
        with metrics.phase("reference"):
            reference = self.reference_logprobs(rollout)
        with metrics.phase("values"), torch.no_grad():
            features = self.critic.features(rollout)
            if features is not None:
                values = self.critic.values(rollout, features)
            else:
                pieces = self._pieces(len(rollout))
                values = torch.cat([self.critic.values(rollout.select(rows)) for rows in pieces])

        shaped = shape_scores(scores, rollout.finished, config, self.moments, valid)
        beta = self.kl_controller.value
        rewards = losses.kl_penalised_rewards(shaped, old, reference, mask, beta, config.kl_kind)
        if config.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        advantages, returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = losses.whiten(advantages, mask)

        kl_tokens = losses.kl(old, reference, "k1", mask)
        kl_sequence = masked_vector_mean(losses.masked_sum(kl_tokens, mask, dim=-1), valid)
        k3 = losses.masked_sum(losses.kl(old, reference, "k3", mask), mask, dim=-1)
        self.kl_controller.update(kl_sequence, len(rollout))
        tolerance = config.ratio_tolerance
        if tolerance is None:
            tolerance = 0.0 if config.exact else max(RATIO_FLOOR[self.dtype], 4 * math.expm1(gap["max"]))
        experience = Experience(rollout, mask, old, values, advantages, returns, features, gap, tolerance)
        lengths = rollout.completion_mask.sum(1).float()
        generation = rollout.stats.total or 1.0
        numbers = {
            "score/mean": masked_vector_mean(scores, valid),
            "score/std": float(scores[valid].std(correction=0)) if bool(valid.any()) else 0.0,
            "score/total": float(losses.masked_sum(rewards, mask, dim=-1).mean()),
            "score/valid": float(valid.float().mean()),
            "kl/sequence": kl_sequence,
            "kl/sequence_k3": masked_vector_mean(k3, valid),
            "kl/token": float(losses.masked_mean(kl_tokens, mask)),
            "kl/coef": beta,
            "rollout/length": float(lengths.mean()),
            "rollout/finished": float(rollout.finished.float().mean()),
            "time/rollout_tokens_per_s": rollout.stats.completion_tokens / generation,
            **{f"gap/{k}": v for k, v in gap.items()},
        }
        rows = [
            {"prompt": prompt_text(examples[i // config.samples_per_prompt].prompt), "completion": texts[i],
             "score": float(scores[i])}
            for i in range(min(len(texts), 4 * config.samples_per_prompt))
        ]  # fmt: skip
        metrics.completions(step + 1, rows)
        return experience, numbers

    def update(self, experience: Experience, step: int, total: int) -> dict[str, float]:
        """`ppo_epochs` passes of minibatches over an experience; returns the averages of their metrics."""
        config = self.config
        set_lr(self.policy_optimizer, learning_rate(config, config.learning_rate, step, total))
        set_lr(self.critic_optimizer, learning_rate(config, config.critic_learning_rate, step, total))
        starts = experience.rollout.completion_mask.sum(1).cumsum(0)
        sums: dict[str, float] = {}
        count = 0
        size = config.batch_size * config.gradient_accumulation_steps
        for epoch in range(config.ppo_epochs):
            order = data.epoch_order(
                len(experience.rollout), derive_seed(config.seed, "minibatch", step), epoch
            )
            for minibatch in data.chunks(order, size):
                found = self._minibatch(experience, minibatch, starts)
                if epoch == 0 and count == 0:
                    self._check_ratio(found["policy/first_ratio_deviation"], experience, step)
                    sums["policy/first_ratio_deviation"] = found["policy/first_ratio_deviation"]
                found.pop("policy/first_ratio_deviation")
                found["policy/grad_norm"] = self.engine.step(config.max_grad_norm or None)
                found["value/grad_norm"] = clip_gradients(self.critic_parameters, config.max_grad_norm)
                self.critic_optimizer.step()
                self.critic_optimizer.zero_grad(set_to_none=True)
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
                count += 1
        first = sums.pop("policy/first_ratio_deviation", 0.0)
        return {k: v / max(count, 1) for k, v in sums.items()} | {
            "policy/first_ratio_deviation": first,
            "lr": self.policy_optimizer.param_groups[0]["lr"],
        }

    def _minibatch(self, experience: Experience, rows: Sequence[int], ends: Tensor) -> dict[str, float]:
        """Gradients of policy and critic for some rows, in pieces of `batch_size`, normalised by the whole
        minibatch.
        """
        config = self.config
        mask = experience.mask[torch.as_tensor(rows)]
        normalizer = max(float(mask.sum() if config.aggregation == "token" else mask.any(-1).sum()), 1.0)
        tokens = max(float(mask.sum()), 1.0)
        out = {"policy/first_ratio_deviation": 0.0}

        def add(name: str, value: Tensor, weight: float = 1.0) -> None:
            out[name] = out.get(name, 0.0) + float(value.detach()) * weight

        for piece in data.chunks(rows, config.batch_size):
            index = torch.as_tensor(piece)
            batch, mask = experience.rollout.select(index), experience.mask[index]
            share = float(mask.sum()) / tokens
            how: Any = {"aggregation": config.aggregation, "normalizer": normalizer}
            if not bool(mask.any()):
                continue
            logp, entropy = self.engine.logprobs(batch, entropy=True)
            loss, found = losses.policy_loss(
                logp, experience.old_logp[index], experience.advantages[index], mask, config.cliprange,
                cliprange_high=config.cliprange_high, dual_clip=config.dual_clip, **how,
            )  # fmt: skip
            bonus = losses.entropy_bonus(entropy, mask, **how)
            self.engine.backward(loss - config.entropy_coef * bonus if config.entropy_coef else loss)
            add("policy/loss", loss)
            add("policy/entropy", losses.masked_mean(entropy, mask), share)
            for name in ("clip_fraction", "approx_kl", "ratio"):
                add(f"policy/{name}", found[name], share)
            deviation = float(found["ratio_max_deviation"])
            out["policy/first_ratio_deviation"] = max(out["policy/first_ratio_deviation"], deviation)

            features = None
            if experience.features is not None:
                where = torch.cat([torch.arange(int(ends[i - 1]) if i else 0, int(ends[i])) for i in piece])
                features = experience.features[where]
            value_loss, found = losses.value_loss(
                self.critic.values(batch, features),
                experience.values[index],
                experience.returns[index],
                mask,
                config.cliprange_value,
                **how,
            )
            value_loss.backward()
            add("value/loss", value_loss)
            add("value/mean", found["value"], share)
            add("value/explained_variance", found["explained_variance"], share)
            add("value/clip_fraction", found["value_clip_fraction"], share)
        return out

    def _check_ratio(self, deviation: float, experience: Experience, step: int) -> None:
        if not deviation <= experience.tolerance:  # also catches nan
            raise RatioError(
                f"the first minibatch's ratio is off by {deviation:.3g} at step {step + 1}, more than "
                f"{experience.tolerance:.3g}; rollout and training disagree, see dschat verify, or raise "
                "ratio_tolerance"
            )

    def state(self) -> dict[str, Any]:
        return {"kl": self.kl_controller.state_dict(), "moments": self.moments.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.kl_controller.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])


def masked_vector_mean(x: Tensor, keep: Tensor) -> float:
    """Mean of the kept entries of a vector; 0 when none is kept."""
    return float(x[keep].mean()) if bool(keep.any()) else 0.0


# --------------------------------------------------------------------------------------------------- training


def train(
    config: PPOConfig, *, model: Any = None, tokenizer: Any = None, rewards: Sequence[RewardFunction] = ()
) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the PPO run in `config.output_dir`.

    model, tokenizer: use these instead of loading `config.model`. rewards: functions beside those that the
    config names.
    """
    require_data(config)
    if not config.reward and not rewards:
        raise ConfigError("reward is empty; name a reward model folder or a function (module:function)")
    with Run(config, "ppo") as run, interruptible(run):
        if run.result is not None:
            return run.result
        tokenizer = tokenizer or models.load_tokenizer(config.model)
        encoder = data.Encoder(tokenizer, config.system_prompt, config.model)
        train_set, train_stats = _examples(config, encoder, config.data, config.max_train_rows)
        eval_set, eval_stats = _examples(config, encoder, config.eval_data, config.max_eval_rows)

        dtype = models.pick_dtype(config.dtype)
        policy = model or models.load_policy(config.model, dtype)
        reference = None
        if config.reference or not config.lora_r:
            frozen = (
                models.load_policy(config.reference, dtype) if config.reference else copy.deepcopy(policy)
            )
            reference = HybridEngine(frozen.requires_grad_(False))
        policy = models.make_trainable(policy, config, "CAUSAL_LM")
        optimizer = make_optimizer(models.trainable(policy), config, config.learning_rate)
        engine = HybridEngine(policy, optimizer, exact=config.exact)
        reward_sources, critic = build_rewards_and_critic(config, dtype, rewards)
        ppo = PPO(config, engine, encoder, reward_sources, critic, reference)

        schedule = data.Schedule(
            len(train_set), config.prompts_per_step, config.epochs, config.max_steps, config.seed
        )
        total = schedule.total_steps
        metrics = run.start(total)
        metrics.say(train_stats.sentence("PPO prompts"))
        if eval_set:
            metrics.say(eval_stats.sentence("PPO held-out prompts"))
        modules = {"policy": policy, "critic": critic.module}
        optimizers = {"policy": optimizer, "critic": ppo.critic_optimizer}
        eval_seed = derive_seed(config.seed, "eval")
        saved = run.restore(modules, optimizers)
        engine.epoch += run.step  # restored weights: packs made before are of another epoch
        if saved:
            ppo.load_state(saved)
        before: dict[str, Any] = saved.get("before") or (
            evaluate.evaluate(ppo, eval_set, eval_seed) if eval_set else {}
        )

        after: dict[str, Any] = {}
        last: dict[str, float] = {}
        for step in range(run.step, total):
            examples = [train_set[i] for i in schedule.indices(step)]
            experience, numbers = ppo.collect(examples, step, metrics)
            with metrics.phase("update"):
                numbers |= ppo.update(experience, step, total)
            for name in ("policy/grad_norm", "value/grad_norm"):
                run.check_finite(numbers.get(name, 0.0), name, step + 1)
            if eval_set and run.eval_due(step + 1, total):
                with metrics.phase("eval"):
                    after = evaluate.evaluate(ppo, eval_set, eval_seed)
                numbers |= {
                    "eval/score": float(np.mean(after["scores"])),
                    "eval/kl": after["kl"],
                    "eval/length": after["length"],
                }
            last = metrics.log(step + 1, numbers, show=["score/mean", "kl/sequence", "rollout/length"])
            extra = ppo.state() | {"before": before, "after": after}
            run.save(step + 1, modules, optimizers, extra)
            critic.scorer.forget()
        after = after or saved.get("after", {})
        return _conclude(run, ppo, eval_set, before, after, last, tokenizer)


def _examples(
    config: PPOConfig, encoder: data.Encoder, sources: Sequence[str], limit: int
) -> tuple[list[data.Example], data.DataStats]:
    records, stats = data.read(sources, limit, config.bad_rows)
    examples = data.prompt_examples(
        records, encoder, stats, max_prompt_length=config.max_prompt_length,
        overlong=config.overlong, bad_rows=config.bad_rows,
    )  # fmt: skip
    return examples, stats


def _conclude(
    run: Run,
    ppo: PPO,
    eval_set: Sequence[data.Example],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    last: Mapping[str, float],
    tokenizer: Any,
) -> dict[str, Any]:
    """Compare before and after, measure speed, save models, write the report."""
    config, metrics = ppo.config, run.metrics
    assert metrics is not None
    result: dict[str, Any] = {"steps": metrics.total_steps}
    result["log_prob_gap"] = {k: last[f"gap/{k}"] for k in ("mean", "max", "mult") if f"gap/{k}" in last}
    rows: list[dict[str, Any]] = []
    if before and after:
        result["held_out"] = evaluate.held_out(before, after, config.seed)
        rows = evaluate.table(eval_set, before, after)
        metrics.completions(metrics.total_steps, rows, show=8, title="held-out prompts, before and after PPO")
    if config.compare_hf and eval_set:
        chosen = list(eval_set)[: config.compare_hf]
        metrics.say(f"timing the rollout against Hugging Face generate on {len(chosen)} prompts")
        result["speed"] = evaluate.compare_with_hf(ppo, chosen, derive_seed(config.seed, "compare"))
    written = models.save_model(ppo.engine.model, tokenizer, run.folder, config.merge_lora)
    result["written"] = [str(p) for p in written]
    lines = evaluate.sentences(result)
    report.write(run.folder, "PPO run", lines, rows[:20])
    for line in lines:
        metrics.say(line)
    return run.finish(result)
