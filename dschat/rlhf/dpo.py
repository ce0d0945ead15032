"""Direct preference optimisation: the policy learns from pairs without a reward model and without rollouts.

    loss = -log sigmoid(beta * ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected))))

The reference is the policy as it is at the start, or a model of its own. Its log-probs never change, so they
are computed once, before the first step, and kept in the run's folder (`reference/`): nothing but the
policy is in memory while it trains. Without that cache the reference is the policy with its adapter
switched off, or a frozen copy where all weights are trained.

After Rafailov et al. 2023 (sigmoid), Mitchell 2023 (label smoothing), Azar et al. 2023 (IPO).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import device as devices
from .. import parallel
from ..config import DPOConfig
from ..engine.frozen import frozen_engine
from ..engine.hybrid_engine import HybridEngine
from ..engine.zero import ZeroSettings, make_engine
from . import batching, conversations, data, losses, models, reading, sources
from .checkpoint import atomic_folder
from .run import (
    Run,
    float16_result,
    idle_reference,
    interruptible,
    learning_rate,
    make_loss_scale,
    make_optimizer,
    rollout_dtype,
    set_lr,
)  # fmt: skip


def train(config: DPOConfig, *, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the DPO run in `config.output_dir`.

    model, tokenizer: use these instead of loading `config.model`. Writes `model/` and, with LoRA, `adapter/`.
    """
    with Run(config, "dpo", model, tokenizer) as run, interruptible(run):
        if run.result is not None:
            return run.result
        tokenizer = tokenizer or models.load_tokenizer(config.model)
        encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
        train_set, train_stats = _examples(config, encoder, "train")
        eval_set, eval_stats = _examples(config, encoder, "eval")

        policy = model or models.load_policy(config.model, run.dtype)
        reference = Reference(config, policy, encoder.pad_id, run.device, run.zero)
        policy = models.make_trainable(devices.place(policy, run.device), config, "CAUSAL_LM")
        optimizer = make_optimizer(policy, config, config.learning_rate, config.lora_learning_rate)
        engine = make_engine(
            policy, optimizer, run.zero, make_loss_scale(config, run.dtype), dtype=run.rollout_dtype
        )
        optimizers = {"policy": engine.optimizer}
        reference.attach(engine)

        per_step = config.batch_size * config.gradient_accumulation_steps
        schedule = batching.Schedule(len(train_set), per_step, config.epochs, config.max_steps, config.seed)
        total = schedule.total_steps
        metrics = run.start(total)
        metrics.say(train_stats.sentence("DPO data"))
        if eval_set:
            metrics.say(eval_stats.sentence("DPO held-out data"))
        for line in idle_reference(config, run.device):
            metrics.say(line)
        with metrics.phase("reference"):
            # Before the weights are restored: what is trained now is what the reference is.
            reference.prepare(run.folder, {"train": train_set, "eval": eval_set})
        engine.stepper.load_state(run.restore({"policy": policy}, optimizers))

        final = run.logged(
            "loss", "accuracy", *(f"eval/{k}" for k in ("loss", "accuracy", "margin", "mean_token_accuracy"))
        )  # fmt: skip
        for step in range(run.step, total):
            rows = schedule.indices(step)
            with metrics.phase("update"):
                values = accumulate(engine, reference, train_set, rows, encoder.pad_id, config)
                values["lr"] = learning_rate(config, config.learning_rate, step, total)
                set_lr(engine.optimizer, values["lr"])
                values["grad_norm"] = engine.step(config.max_grad_norm or None)
            failed = [train_set[i] for i in rows]
            run.check_gradient(engine.stepper, step + 1, failed, {"policy": policy})
            values |= engine.stepper.numbers()
            if eval_set and run.eval_due(step + 1, total):
                with metrics.phase("eval"):
                    held_out = evaluate(engine, reference, eval_set, encoder.pad_id, config)
                values |= {f"eval/{k}": v for k, v in held_out.items()}
                final |= {f"eval_{k}": v for k, v in held_out.items()}
            metrics.log(step + 1, values, show=["loss", "accuracy", "eval/accuracy"])
            run.save(step + 1, {"policy": policy}, optimizers, engine.stepper.state())
            final |= {"loss": values["loss"], "accuracy": values["accuracy"]}
        run.restore_best({"policy": policy})
        written = models.save_model(policy, tokenizer, run.folder, config.merge_lora)
        final |= float16_result(engine.stepper)
        return run.finish({"steps": total, **final, "written": [str(p) for p in written]})


def _examples(
    config: DPOConfig, encoder: conversations.Encoder, which: Literal["train", "eval"]
) -> tuple[Sequence[data.Example], reading.DataStats]:
    records, stats = sources.records(config, which)
    examples = data.pair_examples(
        records, encoder, stats, max_length=config.max_length, **data.preparation(config),
    )  # fmt: skip
    return examples, stats


def pair_logprobs(
    engine: HybridEngine, examples: Sequence[data.Example], pad_id: int, mean: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of chosen and rejected answers, each float32 [B], from one packed forward over both.

    mean: over the assistant's tokens of an answer (IPO); else their sum.
    """
    return _pair_logprobs(engine, examples, pad_id, mean)[:2]


def _pair_logprobs(
    engine: HybridEngine, examples: Sequence[data.Example], pad_id: int, mean: bool
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """`pair_logprobs`, and of the chosen answers' tokens how many there are and how many are the likeliest."""
    batch, learnt = batching.answer_batch(examples, (0, 1), pad_id, engine.device)
    logp, gap = engine.logprobs(batch, temperature=1.0, gap=True)
    reduce = losses.masked_mean if mean else losses.masked_sum
    rows, chosen = reduce(logp, learnt, dim=-1), slice(len(examples))
    right = int(losses.right_tokens(gap[chosen], learnt[chosen]))
    return rows[chosen], rows[len(examples) :], {"right": right, "tokens": int(learnt[chosen].sum())}


class Reference:
    """Log-probs of pairs under the frozen reference, from the cache or computed when asked for."""

    def __init__(
        self, config: DPOConfig, policy: Any, pad_id: int, device: torch.device, zero: ZeroSettings | None = None
    ) -> None:  # fmt: skip
        """policy: as it is at the start. device: where the reference is to score."""
        self.config, self.pad_id = config, pad_id
        self.mean = config.loss == "ipo"
        self.cache: dict[str, Tensor] = {}
        self.frozen: HybridEngine | None = None
        if config.own_reference:
            dtype = next(policy.parameters()).dtype
            frozen = (
                models.load_policy(config.reference, dtype) if config.reference else copy.deepcopy(policy)
            )
            self.frozen = frozen_engine(
                devices.place(frozen, device), config.offload_reference, zero,
                dtype=rollout_dtype(config, dtype, device),
            )  # fmt: skip

    def attach(self, engine: HybridEngine) -> None:
        """The policy's engine, whose base the reference is when it is no model of its own."""
        self.engine = engine

    @torch.no_grad()
    def compute(self, examples: Sequence[data.Example]) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) by a forward of the reference."""
        if self.frozen is not None:
            return pair_logprobs(self.frozen, examples, self.pad_id, self.mean)
        adapter_off = self.engine.reference() if self.config.lora_r else contextlib.nullcontext()
        with adapter_off:
            return pair_logprobs(self.engine, examples, self.pad_id, self.mean)

    def _both(self, examples: Sequence[data.Example]) -> Tensor:
        """[2, pairs]: `compute` of all, each pair by one process."""
        found = parallel.by_rows(
            len(examples), self.config.batch_size, lambda rows: torch.stack(self.compute(examples[rows]), 1)
        )
        return found.t().contiguous()

    def prepare(self, folder: Path, sets: dict[str, Sequence[data.Example]]) -> None:
        """Fill the cache of every set, from `folder` where it holds that of the same pairs."""
        if not self.config.cache_reference:
            return
        file = folder / "reference" / f"{_digest(sets, self.mean)}.safetensors"
        if not parallel.from_lead(file.is_file):
            found = {name: self._both(examples).cpu() for name, examples in sets.items() if examples}
            if parallel.lead():
                with atomic_folder(file.parent) as temporary:
                    save_file(found, temporary / file.name)
            parallel.barrier()
        self.cache = {name: both.to(self.engine.device) for name, both in load_file(file).items()}
        self.frozen = None

    def pairs(
        self, name: str, rows: Sequence[int], examples: Sequence[data.Example]
    ) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) of `examples`, the given rows of the set `name`."""
        if name in self.cache:
            return self.cache[name][0, list(rows)], self.cache[name][1, list(rows)]
        return self.compute(examples)


def _digest(sets: dict[str, Sequence[data.Example]], mean: bool) -> str:
    """Name of the tokens of some pairs, so that a cache of other data is not taken for theirs."""
    h = hashlib.blake2b(b"mean" if mean else b"sum", digest_size=8)
    for name, examples in sets.items():
        h.update(repr((name, [(e.prompt_ids, e.answers, e.learnt) for e in examples])).encode())
    return h.hexdigest()


def _piece_loss(
    engine: HybridEngine, reference: Reference, name: str, rows: Sequence[int],
    examples: Sequence[data.Example], pad_id: int, config: DPOConfig, normalizer: int,
) -> tuple[Tensor, losses.Metrics, dict[str, int]]:  # fmt: skip
    chosen, rejected, counts = _pair_logprobs(engine, examples, pad_id, reference.mean)
    ref_chosen, ref_rejected = reference.pairs(name, rows, examples)
    loss, found = losses.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, config.beta, label_smoothing=config.label_smoothing,
        kind=config.loss, normalizer=normalizer,
    )  # fmt: skip
    return loss, found, counts


def _token_accuracy(values: dict[str, float]) -> dict[str, float]:
    """Numbers of all pieces, with the share of the chosen answers' tokens that are the likeliest in place of counts."""
    right, tokens = values.pop("right"), values.pop("tokens")
    return {**values, "mean_token_accuracy": right / max(tokens, 1)}


def accumulate(
    engine: HybridEngine, reference: Reference, train_set: Sequence[data.Example], rows: Sequence[int],
    pad_id: int, config: DPOConfig,
) -> dict[str, float]:  # fmt: skip
    """Gradients of one step, `batch_size` pairs at a time; the loss is the mean over all of them."""
    numbers = ("accuracy", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    values = dict.fromkeys(("loss", *numbers, "right", "tokens"), 0.0)
    for piece, own in parallel.shares(rows, config.batch_size):
        examples = [train_set[i] for i in piece]
        loss, found, counts = _piece_loss(
            engine, reference, "train", piece, examples, pad_id, config, normalizer=len(rows)
        )
        engine.backward(loss if own else loss * 0.0)
        values["loss"] += float(loss.detach()) * own
        for key, value in found.items():
            values[key] += float(value) * own * len(piece) / len(rows)
        for key, count in counts.items():
            values[key] += count * own
    values = _token_accuracy(parallel.total(values))
    values["margin"] = values["rewards/chosen"] - values["rewards/rejected"]
    return values


@torch.no_grad()
def evaluate(
    engine: HybridEngine, reference: Reference, examples: Sequence[data.Example], pad_id: int,
    config: DPOConfig,
) -> dict[str, float]:  # fmt: skip
    """Loss, accuracy and margin of the implicit rewards on held-out pairs, and the chosen answers' token accuracy."""
    out = dict.fromkeys(("loss", "accuracy", "margin", "right", "tokens"), 0.0)
    for rows, own in parallel.shares(range(len(examples)), config.batch_size):
        piece = [examples[i] for i in rows]
        loss, found, counts = _piece_loss(
            engine, reference, "eval", rows, piece, pad_id, config, normalizer=len(examples)
        )
        share = own * len(piece) / len(examples)
        out["loss"] += float(loss) * own
        out["accuracy"] += float(found["accuracy"]) * share
        out["margin"] += float(found["rewards/chosen"] - found["rewards/rejected"]) * share
        for key, count in counts.items():
            out[key] += count * own
    return _token_accuracy(parallel.total(out))
