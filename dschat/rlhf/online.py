"""The skeleton of every algorithm that learns from its own rollouts; an algorithm is a subclass of Trainer.

A step:  roll out -> score -> old and reference log-probs -> `credit` (the algorithm's) -> updates.

What has to be equal is equal by construction: policy, old, reference log-probs and entropy are all taken at
the sampling temperature from the same packed forward, positions come from masks, dropout is off everywhere,
the score sits at the last real token, and the first minibatch's ratio is checked to be 1. Everything random
is a function of (seed, step).

An algorithm says how scores and KL become advantages (`credit`), and whatever it trains beside the policy
(`extra_loss`, `extra_step`, `modules`, `optimizers`); dschat/rlhf/ppo.py, grpo.py and rloo.py are all there is
to those.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import device as devices
from .. import parallel
from ..config import ConfigError, OnlineConfig
from ..engine.frozen import frozen_engine
from ..engine.hybrid_engine import HybridEngine
from ..engine.rollout import Rollout, SamplingConfig
from ..engine.stepper import Stepper
from ..engine.zero import ZeroSettings, make_engine
from . import batching, conversations, data, environments, evaluate, losses, models, reading, report, sources
from .checks import require_rewards
from .environments import Episodes, action_mask
from .experience import Experience, log_prob_gap, masked_vector_mean, rollout_tensors, shape_scores
from .metrics import Metrics, read_log
from .names import logged
from .pretraining import PretrainingMix, WeightAverage
from .rewards import (
    HIDDEN,
    OwnTokenizer,
    RewardError,
    RewardFunction,
    Rewards,
    TrainerState,
    is_function_name,
    load_sources,
    prompt_text,
)  # fmt: skip
from .rewards import numbers as source_numbers
from .run import (
    ON_THE_CPU,
    Run,
    at_scale,
    derive_seed,
    float16_result,
    idle_reference,
    interruptible,
    learning_rate,
    make_loss_scale,
    make_optimizer,
    rollout_dtype,
    set_lr,
)  # fmt: skip
from .trunk import Trunk

RATIO_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 6e-3}
"""Deviation of the first ratio from 1 that rounding alone may cause, where kernels depend on the shape of a
batch.
"""


class RatioError(ConfigError):
    """The first minibatch's ratio is not 1: rollout and training disagree about the policy."""


class StepFailed(ConfigError):
    """A step that cannot be computed, with what it was to be computed from. trace: the traceback of what the user's own
    code raised; empty where it did not."""

    def __init__(
        self, message: str, tensors: Mapping[str, Tensor], texts: Mapping[str, Any], trace: str = ""
    ) -> None:
        super().__init__(message)
        self.tensors, self.texts, self.trace = dict(tensors), dict(texts), trace


class NotFinite(StepFailed):
    """A loss or a gradient that is nan or infinite."""


class Trainer(abc.ABC):
    """Policy, reference and rewards, and what one step does with them."""

    def __init__(
        self,
        config: OnlineConfig,
        engine: HybridEngine,
        encoder: conversations.Encoder,
        rewards: Rewards,
        reference: HybridEngine | None,
    ) -> None:
        self.config, self.engine, self.encoder = config, engine, encoder
        self.rewards, self.reference = rewards, reference
        if engine.optimizer is None:
            raise ConfigError("the engine has no optimizer; give HybridEngine(model, optimizer=...)")
        self.policy_optimizer = engine.optimizer
        self.moments = losses.RunningMoments()
        self.kl_controller = (
            losses.AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
            if config.kl_control == "adaptive"
            else losses.FixedKLController(config.kl_coef)
        )
        self.dtype = next(engine.model.parameters()).dtype
        self.environment = environments.load_environment(config.environment) if config.environment else None
        self.mix = PretrainingMix(config, encoder) if config.unsup_coef else None
        self.average = WeightAverage(engine.model, config.ema_decay) if config.ema_decay else None
        self.progress = TrainerState()
        self.source_scores: dict[str, Tensor] = {}
        """Each reward's own scores of the rollout that `score` was given last."""

    # ------------------------------------------------------------------------------ what an algorithm decides

    @classmethod
    def build(
        cls, config: Any, engine: HybridEngine, encoder: conversations.Encoder, reference: HybridEngine | None,
        functions: Sequence[RewardFunction], dtype: torch.dtype, zero: ZeroSettings | None = None,
        base: Trunk | None = None,
    ) -> Trainer:  # fmt: skip
        """The trainer with the rewards that the config names, and `functions`. base: the policy's, where others are to
        be adapters on it."""
        sources, _ = load_sources(config, dtype, functions, encoder, engine.device, zero, base)
        away = partial(models.frozen_scorer, offload=config.offload_reward, zero=zero)
        scorers = [(n, away(s) if isinstance(s, nn.Module) else s) for n, s in sources]
        return cls(config, engine, encoder, Rewards(scorers, config.reward_weights), reference)

    @abc.abstractmethod
    def credit(
        self, experience: Experience, scores: Tensor, valid: Tensor, metrics: Metrics
    ) -> dict[str, float]:
        """Fill `experience.advantages` [B, C] from the shaped scores [B]; returns numbers for the log."""

    def extra_loss(
        self, experience: Experience, rows: Sequence[int], batch: Rollout, ends: Tensor, how: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Loss, and numbers for the log, of what is trained beside the policy, for one piece."""
        return None

    def extra_norms(self) -> dict[str, float]:
        """Clip the gradients of what is trained beside the policy; returns their norms before that."""
        return {}

    def extra_backward(self, loss: Tensor) -> None:
        """Gradients of what `extra_loss` gave."""
        loss.backward()

    def extra_step(self, skip: bool = False) -> None:
        """Optimizer step of what is trained beside the policy. skip: drop its gradients instead."""
        return None

    def steppers(self) -> dict[str, Stepper]:
        """Of everything that is trained, by the name that its numbers have in the log."""
        return {"policy": self.engine.stepper}

    def set_learning_rates(self, step: int, total: int) -> None:
        set_lr(self.policy_optimizer, learning_rate(self.config, self.config.learning_rate, step, total))

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps."""
        average = {} if self.average is None else {"average": self.average}
        return {"policy": self.engine.model, **average}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self.policy_optimizer}

    def export(self, folder: Path, tokenizer: Any) -> list[Path]:
        """Write what was trained beside the policy; returns the folders."""
        return []

    def forget(self) -> None:
        """Drop what reward models remember of the last rollout."""
        for _, source in self.rewards.sources:
            if isinstance(source, models.Scorer):
                source.forget()

    def idle_offloads(self) -> list[str]:
        """A sentence for each model that was to lie in the host's memory and does not."""
        config, device = self.config, self.engine.device
        out = idle_reference(config, device)
        if not config.offload_reward:
            return out
        own = [
            name for name, source in self.rewards.sources if isinstance(source, (models.Scorer, OwnTokenizer))
        ]
        shared = [name for name in config.reward if not is_function_name(name) and name not in own]
        if own and device == devices.CPU:
            out.append(f"offload_reward has no effect {ON_THE_CPU}")
        if shared:
            out.append(
                f"offload_reward has no effect on {shared[0]}, whose weights are those of a model that trains"
            )
        if not own and not shared:
            out.append("offload_reward has no effect: no reward is a model")
        return out

    # ----------------------------------------------------------------------------------------------- roll out

    def generate(self, examples: Sequence[data.Example], samples: int, seed: int) -> Rollout:
        ids, mask = batching.pad([e.prompt_ids for e in examples], self.encoder.pad_id, "left")
        sampling = SamplingConfig(
            max_new_tokens=self.config.action_tokens,
            temperature=self.config.temperature,
            n=samples,
            seed=seed,
            eos_token_id=self.encoder.stop_ids,
            pad_token_id=self.encoder.pad_id,
        )
        if self.environment is not None:
            try:
                return environments.play(
                    self.engine, self.encoder, self.environment, examples, sampling,
                    max_turns=self.config.max_turns, max_tokens=self.config.max_new_tokens,
                )  # fmt: skip
            except environments.EpisodeError as error:
                raise StepFailed(str(error), {}, {"episode": error.episode}, error.trace) from error
        return self.engine.generate(ids, mask, sampling)

    def texts(self, rollout: Rollout) -> list[str]:
        rows = zip(rollout.completion_ids.cpu(), rollout.completion_mask.bool().cpu(), strict=True)
        return [self.encoder.decode(ids[mask].tolist()) for ids, mask in rows]

    def score(
        self, rollout: Rollout, examples: Sequence[data.Example], texts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """(raw scores [B], valid [B]) of a rollout with len(texts) / len(examples) samples of each prompt, on its
        device.
        """
        n = len(texts) // len(examples)
        rows = [e for e in examples for _ in range(n)]
        names = {k for e in examples for k in e.columns} - HIDDEN
        columns = {k: [e.columns.get(k) for e in rows] for k in sorted(names)}
        prompts = [e.prompt for e in rows]
        try:
            scores, valid, parts = self.rewards(rollout, prompts, texts, columns, self.progress)
        except RewardError as error:
            kept = {"prompts": prompts, "completions": list(texts), "columns": columns}
            kept["progress"] = dataclasses.asdict(self.progress)
            raise StepFailed(str(error), rollout_tensors(rollout), kept, error.trace) from error
        self.source_scores = parts
        device = rollout.completion_mask.device
        return scores.to(device), valid.to(device)

    # ---------------------------------------------------------------------------------------------- log-probs

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs under the present policy, `batch_size` rows at a time."""
        return self.by_rows(rollout, self.engine.logprobs)

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs under the frozen reference, at the rollout's temperature."""
        if self.reference is not None:
            return self.by_rows(rollout, self.reference.logprobs)
        with self.engine.reference():
            return self.by_rows(rollout, self.engine.logprobs)

    def by_rows(self, rollout: Rollout, compute: Callable[[Rollout], Tensor]) -> Tensor:
        """`compute` of a rollout, `batch_size` rows at a time, each by one process; without gradient."""
        return parallel.by_rows(
            len(rollout), self.config.batch_size, lambda rows: compute(rollout.select(rows))
        )

    # ---------------------------------------------------------------------------------------------- one step

    def collect(
        self, examples: Sequence[data.Example], step: int, metrics: Metrics
    ) -> tuple[Experience, dict[str, Any]]:
        """Roll out, score, and turn it into advantages."""
        config = self.config
        seed = derive_seed(config.seed, "rollout", step)
        rollout = self.generate(examples, config.samples_per_prompt, seed)
        for name in ("flip", "prefill", "decode", "sample"):
            metrics.add_time(name, getattr(rollout.stats, name))
        texts = self.texts(rollout)
        with metrics.phase("score"):
            scores, valid = self.score(rollout, examples, texts)
        kept = valid & rollout.finished if config.mask_truncated else valid
        mask = action_mask(rollout) & kept[:, None]
        with metrics.phase("logprobs"):
            # In exact mode the rollout's log-probs *are* those of the training forward; the ratio check
            # proves it.
            old = rollout.logprobs if config.exact else self.logprobs(rollout)
            gap = log_prob_gap(rollout.logprobs, old, mask)
        with metrics.phase("reference"):
            reference = self.reference_logprobs(rollout)

        shaped = shape_scores(scores, rollout.finished, config, self.moments, valid)
        tolerance = config.ratio_tolerance
        if tolerance is None:
            tolerance = 0.0 if config.exact else max(RATIO_FLOOR[self.dtype], 4 * math.expm1(gap["max"]))
        beta = self.kl_controller.value
        experience = Experience(rollout, mask, old, reference, gap, tolerance, beta)
        numbers = self._importance(experience) | self.credit(experience, shaped, valid, metrics)

        kl_tokens = losses.kl(old, reference, "k1", mask)
        kl_sequence = masked_vector_mean(losses.masked_sum(kl_tokens, mask, dim=-1), valid)
        k3 = losses.masked_sum(losses.kl(old, reference, "k3", mask), mask, dim=-1)
        self.kl_controller.update(kl_sequence, len(rollout))
        lengths = rollout.completion_mask.sum(1).float()
        generation = rollout.stats.total or 1.0
        numbers |= {
            "score/mean": masked_vector_mean(scores, valid),
            "score/std": float(scores[valid].std(correction=0)) if bool(valid.any()) else 0.0,
            "score/valid": float(valid.float().mean()),
            "kl/sequence": kl_sequence,
            "kl/sequence_k3": masked_vector_mean(k3, valid),
            "kl/token": float(losses.masked_mean(kl_tokens, mask)),
            "kl/coef": beta,
            "rollout/length": float(lengths.mean()),
            "rollout/finished": float(rollout.finished.float().mean()),
            "time/rollout_tokens_per_s": rollout.stats.completion_tokens / generation,
            **{f"gap/{k}": v for k, v in gap.items()},
            **(rollout.numbers() if isinstance(rollout, Episodes) else {}),
            **source_numbers(self.source_scores),
            **self.rewards.log.numbers(),
        }
        extra = self.rewards.log.extra
        rows = [
            {"prompt": prompt_text(examples[i // config.samples_per_prompt].prompt), "completion": texts[i],
             "score": float(scores[i])} | {k: v[i] for k, v in extra.items() if i < len(v)}
            for i in range(min(len(texts), config.keep_completions * config.samples_per_prompt))
        ]  # fmt: skip
        metrics.completions(step + 1, rows)
        return experience, numbers

    def _importance(self, experience: Experience) -> dict[str, float]:
        """Truncated importance weights where rollout and training log-probs differ, and what they did."""
        config = self.config
        if config.importance_cap is None:
            return {}
        experience.weights, found = losses.truncated_importance(
            experience.old_logp, experience.rollout.logprobs, experience.mask, config.importance_cap,
            config.importance_level,
        )  # fmt: skip
        return {f"importance/{k}": float(v) for k, v in found.items()}

    def update(self, experience: Experience, step: int, total: int) -> dict[str, float]:
        """`ppo_epochs` passes of minibatches over an experience; returns the averages of their metrics."""
        config = self.config
        self.set_learning_rates(step, total)
        ends = experience.rollout.completion_mask.sum(1).cumsum(0).cpu()
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        count = 0
        size = config.batch_size * config.gradient_accumulation_steps
        for epoch in range(config.ppo_epochs):
            order = batching.epoch_order(
                len(experience.rollout), derive_seed(config.seed, "minibatch", step), epoch
            )
            for minibatch in batching.chunks(order, size):
                found = parallel.total(
                    self.minibatch(experience, minibatch, ends), largest=["policy/first_ratio_deviation"]
                )
                self._check_finite(found, experience, minibatch, step, "/loss")
                if epoch == 0 and count == 0:
                    self._check_ratio(found["policy/first_ratio_deviation"], experience, step)
                    sums["policy/first_ratio_deviation"] = found["policy/first_ratio_deviation"]
                found.pop("policy/first_ratio_deviation")
                if self.mix is not None:
                    found |= self.mix.backward(self.engine, step, count)
                found |= self._step(experience, minibatch, step)
                if self.average is not None:
                    self.average.update(self.engine.model)
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
                    counts[name] = counts.get(name, 0) + 1
                count += 1
        first = sums.pop("policy/first_ratio_deviation", 0.0)
        out = {k: v / counts[k] for k, v in sums.items()} | {
            "policy/first_ratio_deviation": first,
            "lr": self.policy_optimizer.param_groups[0]["lr"],
        }
        for name, stepper in self.steppers().items():
            out |= stepper.numbers(f"{name}/")
        return out

    def _step(self, experience: Experience, rows: Sequence[int], step: int) -> dict[str, float]:
        """Steps of all optimizers, or of none: a gradient that is not finite stops the run first, or makes all leave
        the step out where it is an overflow that the loss scale answers."""
        norms = self.extra_norms()
        overflow = self._overflow(norms, experience, rows, step)
        norms["policy/grad_norm"] = self.engine.ready(self.config.max_grad_norm or None)
        overflow |= self._overflow(norms, experience, rows, step)
        self.engine.apply(skip=overflow)
        self.extra_step(skip=overflow)
        for name, stepper in self.steppers().items():
            if f"{name}/grad_norm" in norms:
                norms[f"{name}/grad_norm"] = stepper.norm
        return {} if overflow else norms

    def _overflow(
        self, norms: Mapping[str, float], experience: Experience, rows: Sequence[int], step: int
    ) -> bool:
        """Whether one of these norms is an overflow that its loss scale answers; NotFinite for another that is not
        finite."""
        steppers = self.steppers()
        overflow = False
        for name, value in norms.items():
            stepper = steppers.get(name.partition("/")[0])
            if stepper is not None and stepper.overflow:
                overflow = True
            else:
                said = logged(self.config.command, name)
                self._check_finite({f"{said}{at_scale(stepper)}": value}, experience, rows, step, "")
        return overflow

    def minibatch(self, experience: Experience, rows: Sequence[int], ends: Tensor) -> dict[str, float]:
        """Gradients for some rows, in pieces of `batch_size`, normalised by the whole minibatch."""
        config = self.config
        device = experience.mask.device
        real = experience.mask.cpu()  # what is counted of it below does not wait for the device
        mask = real[torch.as_tensor(rows, device="cpu")]
        count = {"token": mask.sum(), "sequence": mask.any(-1).sum()}.get(config.aggregation)
        normalizer = float(len(rows) * config.max_new_tokens if count is None else count)
        tokens = max(float(mask.sum()), 1.0)
        how: dict[str, Any] = {"aggregation": config.aggregation, "normalizer": max(normalizer, 1.0)}
        out = {"policy/first_ratio_deviation": 0.0}

        for i, (piece, own) in enumerate(parallel.shares(rows, config.batch_size)):
            everybody = rows[i * config.batch_size : (i + 1) * config.batch_size]
            if not bool(real[torch.as_tensor(everybody, device="cpu")].any()):
                continue
            index = torch.as_tensor(piece, device=device)
            batch, mask = experience.rollout.select(index), experience.mask[index]
            counted = int(real[torch.as_tensor(piece, device="cpu")].sum())
            if not own or not counted:  # others have rows here: the same steps, for a gradient of 0
                self._idle(experience, piece, batch, ends, how)
                continue
            share = counted / tokens
            loss, found = self._policy_loss(experience, index, batch, mask, how)
            self.engine.backward(loss)
            extra = self.extra_loss(experience, piece, batch, ends, how)
            if extra is not None:
                self.extra_backward(extra[0])
                found |= extra[1]
            numbers = losses.floats(found)
            deviation = numbers.pop("policy/first_ratio_deviation")
            out["policy/first_ratio_deviation"] = max(out["policy/first_ratio_deviation"], deviation)
            for name, value in numbers.items():
                weight = 1.0 if name.endswith("/loss") else share  # losses are normalised already
                out[name] = out.get(name, 0.0) + value * weight
        return out

    def _idle(
        self, experience: Experience, piece: Sequence[int], batch: Rollout, ends: Tensor, how: dict[str, Any]
    ) -> None:
        self.engine.backward(self.engine.logprobs(batch).sum() * 0.0)
        extra = self.extra_loss(experience, piece, batch, ends, how)
        if extra is not None:
            self.extra_backward(extra[0] * 0.0)

    def _policy_loss(
        self, experience: Experience, index: Tensor, batch: Rollout, mask: Tensor, how: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate, less the entropy bonus, plus the KL where its place is the loss."""
        config = self.config
        logp, entropy = self.engine.logprobs(batch, entropy=True)
        old = experience.old_logp[index]
        loss, found = losses.policy_loss(
            logp, old, experience.advantages[index], mask, config.cliprange,
            cliprange_high=config.cliprange_high, dual_clip=config.dual_clip, level=config.ratio_level,
            weights=None if experience.weights is None else experience.weights[index], **how,
        )  # fmt: skip
        values = {
            "policy/loss": loss,
            "policy/entropy": losses.masked_mean(entropy, mask),
            "policy/first_ratio_deviation": found["ratio_max_deviation"],
            **{f"policy/{name}": found[name] for name in ("clip_fraction", "approx_kl", "ratio")},
        }
        total = loss
        if config.entropy_coef:
            total = total - config.entropy_coef * losses.entropy_bonus(entropy, mask, **how)
        if config.kl_place == "loss" and experience.kl_coef:
            term = losses.kl_loss(
                logp, experience.ref_logp[index], mask, config.kl_kind,
                old_logp=old if config.kl_correction else None, **how,
            )  # fmt: skip
            values["kl/loss"] = term
            total = total + experience.kl_coef * term
        return total, values

    def _check_finite(
        self, found: Mapping[str, float], experience: Experience, rows: Sequence[int], step: int, ending: str
    ) -> None:
        for name, value in found.items():
            if name.endswith(ending) and not math.isfinite(value):
                said = logged(self.config.command, name)
                raise NotFinite(
                    f"{said} is {value} at step {step + 1} of {self.config.command}; lower the learning rate",
                    experience.tensors(),
                    {"minibatch": list(rows), "kl_coef": experience.kl_coef},
                )

    def _check_ratio(self, deviation: float, experience: Experience, step: int) -> None:
        if not deviation <= experience.tolerance:  # also catches nan
            raise RatioError(
                f"the first minibatch's ratio is off by {deviation:.3g} at step {step + 1}, more than "
                f"{experience.tolerance:.3g}; rollout and training disagree, see dschat verify, or raise "
                "ratio_tolerance"
            )

    def state(self) -> dict[str, Any]:
        scales = {name: found for name, stepper in self.steppers().items() if (found := stepper.state())}
        return {
            "kl": self.kl_controller.state_dict(),
            "moments": self.moments.state_dict(),
            **({"loss_scales": scales} if scales else {}),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.kl_controller.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])
        for name, stepper in self.steppers().items():
            stepper.load_state(state.get("loss_scales", {}).get(name, {}))


# --------------------------------------------------------------------------------------------------- training


def train(
    config: OnlineConfig,
    build: Callable[..., Trainer],
    *,
    model: Any = None,
    tokenizer: Any = None,
    rewards: Sequence[RewardFunction] = (),
) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the run in `config.output_dir`, with the trainer that
    `build` makes (see Trainer.build).

    model, tokenizer: use these instead of loading `config.model`. rewards: functions beside those that the
    config names.
    """
    require_rewards(config, rewards)
    name = config.command.upper()
    with Run(config, config.command, model, tokenizer) as run, interruptible(run):
        if run.result is not None:
            return run.result
        tokenizer = tokenizer or models.load_tokenizer(config.model)
        encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
        train_set, train_stats = read_prompts(config, encoder, "train")
        eval_set, eval_stats = read_prompts(config, encoder, "eval")
        if model is None:
            found = models.read_config(config.model)
            _check_room(config, [train_set, eval_set], getattr(found, "max_position_embeddings", None))

        trainer = assemble(config, build, encoder, run.dtype, model, rewards, run.zero)
        engine = trainer.engine
        _check_room(config, [train_set, eval_set], engine.spec.context)

        schedule = batching.Schedule(
            len(train_set), config.prompts_per_step, config.epochs, config.max_steps, config.seed
        )
        total = schedule.total_steps
        metrics = run.start(total)
        metrics.say(train_stats.sentence(f"{name} prompts"))
        if eval_set:
            metrics.say(eval_stats.sentence(f"{name} held-out prompts"))
        for line in trainer.idle_offloads():
            metrics.say(line)
        modules, optimizers = trainer.modules(), trainer.optimizers()
        eval_seed = derive_seed(config.seed, "eval")
        saved = run.restore(modules, optimizers)
        engine.epoch += run.step  # restored weights: packs made before are of another epoch
        if saved:
            trainer.load_state(saved)
        before: dict[str, Any] = saved.get("before") or {}

        def done(step: int) -> None:
            trainer.progress = TrainerState(step, total, step / schedule.steps_per_epoch, config.epochs)

        done(run.step)
        if eval_set and not before:
            with _keeping(run, 0, modules):
                before = evaluate.evaluate(trainer, eval_set, eval_seed)

        after: dict[str, Any] = {}
        for step in range(run.step, total):
            examples = [train_set[i] for i in schedule.indices(step)]
            done(step)
            with _keeping(run, step + 1, modules):
                experience, numbers = trainer.collect(examples, step, metrics)
                with metrics.phase("update"):
                    numbers |= trainer.update(experience, step, total)
                done(step + 1)
                if eval_set and run.eval_due(step + 1, total):
                    with metrics.phase("eval"):
                        after = evaluate.evaluate(trainer, eval_set, eval_seed)
                    numbers |= {"eval/kl": after["kl"], "eval/length": after["length"]}
                    if judged := [score for score in after["scores"] if score is not None]:
                        numbers["eval/score"] = float(np.mean(judged))
            metrics.log(step + 1, numbers, show=["score/mean", "kl/sequence", "rollout/length"])
            extra = trainer.state() | {"before": before, "after": after}
            run.save(step + 1, modules, optimizers, extra)
            trainer.forget()
        best = run.restore_best(modules)
        engine.epoch += 1  # the weights may be others now
        trainer.forget()
        after = best.get("after") or after or saved.get("after", {})
        return _conclude(run, trainer, eval_set, before, after, tokenizer)


def assemble(
    config: OnlineConfig,
    build: Callable[..., Trainer],
    encoder: conversations.Encoder,
    dtype: torch.dtype,
    model: Any = None,
    rewards: Sequence[RewardFunction] = (),
    zero: ZeroSettings | None = None,
) -> Trainer:
    """The trainer of a config as it is before its first step: models loaded, adapters and optimizers made."""
    device = devices.use(config.device)
    policy = model or models.load_policy(config.model, dtype)
    reference = None
    if config.own_reference:
        frozen = models.load_policy(config.reference, dtype) if config.reference else copy.deepcopy(policy)
        reference = frozen_engine(
            devices.place(frozen, device), config.offload_reference, zero, exact=config.exact,
            dtype=rollout_dtype(config, dtype, device),
        )  # fmt: skip
    policy = models.hold_base(devices.place(policy, device), config)
    base = Trunk(policy, config) if config.shares_trunk else None
    policy = models.make_trainable(policy, config, "CAUSAL_LM")
    optimizer = make_optimizer(policy, config, config.learning_rate, config.lora_learning_rate)
    engine = make_engine(
        policy, optimizer, zero, make_loss_scale(config, dtype), exact=config.exact,
        rollout_weights=config.rollout_weights, kv_cache=config.kv_cache,
        dtype=rollout_dtype(config, dtype, device), inference_tp_size=config.inference_tp_size,
    )  # fmt: skip
    return build(config, engine, encoder, reference, rewards, dtype, zero, base)


def _check_room(config: OnlineConfig, sets: Sequence[Sequence[data.Example]], context: int | None) -> None:
    """Refuses prompts that leave no room for an answer in a context; None: nobody knows one."""
    lengths = [len(e.prompt_ids) for examples in sets for e in examples] if not config.stream else []
    longest = max(lengths, default=0)
    if not context or longest + config.max_new_tokens <= context:
        return
    room = context - longest
    advice = f"max_new_tokens to {room} or less, or max_prompt_length" if room > 0 else "max_prompt_length"
    raise ConfigError(
        f"a prompt has {longest} tokens and max_new_tokens is {config.max_new_tokens}, more than the model's "
        f"context of {context}; lower {advice}"
    )


@contextlib.contextmanager
def _keeping(run: Run, step: int, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A batch on which a step fails is kept with the weights that it met."""
    try:
        yield
    except StepFailed as error:
        where = run.save_failed(step, str(error), error.tensors, error.texts, modules)
        message = f"{error}; the batch is in {where}, see dschat replay {where}"
        if error.trace:
            message += f"; the traceback is in {where / 'traceback.txt'}"
            if parallel.lead():
                (where / "traceback.txt").write_text(error.trace, encoding="utf-8")
        raise ConfigError(message) from error


def read_prompts(
    config: OnlineConfig, encoder: conversations.Encoder, which: Literal["train", "eval"]
) -> tuple[Sequence[data.Example], reading.DataStats]:
    """The prompts that a config trains on or is evaluated on, and what became of the rows of its data."""
    records, stats = sources.records(config, which)
    factory = environments.load_environment(config.environment) if config.environment else None
    examples = data.prompt_examples(
        records, encoder, stats, max_prompt_length=config.max_prompt_length,
        **data.preparation(config),
        make_prompt=partial(environments.first_prompt, factory) if factory else None,
    )  # fmt: skip
    return examples, stats


def _conclude(
    run: Run,
    trainer: Trainer,
    eval_set: Sequence[data.Example],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    tokenizer: Any,
) -> dict[str, Any]:
    """Compare before and after, measure speed, save models, write the report."""
    config, metrics = trainer.config, run.metrics
    assert metrics is not None
    name = config.command.upper()
    result: dict[str, Any] = {"steps": metrics.total_steps, **float16_result(*trainer.steppers().values())}
    # From the file: the last step may have been another process's, before it was killed.
    gaps = {k: logged(config.command, f"gap/{k}") for k in ("mean", "max", "mult")}
    log = read_log(run.folder, config.command)
    last: Mapping[str, Any] = next((line for line in reversed(log) if gaps["mean"] in line), {})
    result["log_prob_gap"] = {k: last[key] for k, key in gaps.items() if key in last}
    rows: list[dict[str, Any]] = []
    if before and after:
        result["held_out"] = evaluate.held_out(before, after, config.seed)
        rows = evaluate.table(eval_set, before, after)
        title = f"held-out prompts, before and after {name}"
        metrics.completions(metrics.total_steps, rows, show=8, title=title)
    if config.compare_hf and eval_set:
        chosen = list(eval_set)[: config.compare_hf]
        metrics.say(f"timing the rollout against Hugging Face generate on {len(chosen)} prompts")
        result["speed"] = evaluate.compare_with_hf(trainer, chosen, derive_seed(config.seed, "compare"))
    written: list[Any] = []
    if trainer.average is not None:
        averaged = trainer.average.of(trainer.engine.model)
        written += models.save_model(averaged, tokenizer, run.folder / "ema", config.merge_lora)
    written += models.save_model(trainer.engine.model, tokenizer, run.folder, config.merge_lora)
    written += trainer.export(run.folder, tokenizer)
    result["written"] = [str(p) for p in written]
    lines = evaluate.sentences(result)
    if parallel.lead():
        report.write(run.folder, f"{name} run", lines, rows[:20])
    for line in lines:
        metrics.say(line)
    return run.finish(result)
