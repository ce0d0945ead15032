"""Supervised fine-tuning: maximum likelihood of the responses, end of turn included, prompts not trained
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from .. import device as devices
from .. import parallel
from ..config import SFTConfig
from ..engine.hybrid_engine import HybridEngine
from ..engine.zero import make_engine
from . import data, losses, models, sources
from .run import (
    Run,
    float16_result,
    interruptible,
    learning_rate,
    make_loss_scale,
    make_optimizer,
    set_lr,
)  # fmt: skip


def train(config: SFTConfig, *, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the SFT run in `config.output_dir`.

    model, tokenizer: use these instead of loading `config.model`. Writes `model/` and, with LoRA, `adapter/`.
    """
    with Run(config, "sft", model, tokenizer) as run, interruptible(run):
        if run.result is not None:
            return run.result
        tokenizer = tokenizer or models.load_tokenizer(config.model)
        encoder = data.Encoder(tokenizer, config.system_prompt, config.model)
        train_set, train_stats = _examples(config, encoder, "train")
        eval_set, eval_stats = _examples(config, encoder, "eval")

        model = devices.place(model or models.load_policy(config.model, run.dtype), run.device)
        model = models.make_trainable(model, config, "CAUSAL_LM")
        optimizer = make_optimizer(model, config, config.learning_rate, config.lora_learning_rate)
        engine = make_engine(
            model, optimizer, run.zero, make_loss_scale(config, run.dtype), dtype=run.rollout_dtype
        )

        per_step = config.batch_size * config.gradient_accumulation_steps
        schedule = data.Schedule(len(train_set), per_step, config.epochs, config.max_steps, config.seed)
        total = schedule.total_steps
        metrics = run.start(total)
        metrics.say(train_stats.sentence("SFT data"))
        if eval_set:
            metrics.say(eval_stats.sentence("SFT held-out data"))
        optimizers = {"policy": engine.optimizer}
        engine.stepper.load_state(run.restore({"policy": model}, optimizers))

        final: dict[str, Any] = {}
        for step in range(run.step, total):
            examples = [train_set[i] for i in schedule.indices(step)]
            with metrics.phase("update"):
                loss, tokens = accumulate(engine, examples, encoder.pad_id, config)
                lr = learning_rate(config, config.learning_rate, step, total)
                set_lr(engine.optimizer, lr)
                norm = engine.step(config.max_grad_norm or None)
            run.check_gradient(engine.stepper, step + 1, examples, {"policy": model})
            values = {"loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens, **engine.stepper.numbers()}
            if eval_set and run.eval_due(step + 1, total):
                with metrics.phase("eval"):
                    held_out = evaluate(engine, eval_set, encoder.pad_id, config)
                final["eval_loss"] = values["eval/loss"] = held_out
            metrics.log(step + 1, values, show=["loss", "eval/loss"])
            run.save(step + 1, {"policy": model}, optimizers, engine.stepper.state())
            final["loss"] = loss
        run.restore_best({"policy": model})
        written = models.save_model(model, tokenizer, run.folder, config.merge_lora)
        final |= float16_result(engine.stepper)
        return run.finish({"steps": total, **final, "written": [str(p) for p in written]})


def _examples(
    config: SFTConfig, encoder: data.Encoder, which: Literal["train", "eval"]
) -> tuple[Sequence[data.Example], data.DataStats]:
    records, stats = sources.records(config, which)
    examples = data.sft_examples(
        records, encoder, stats, response=config.response, max_length=config.max_length,
        **data.preparation(config),
    )  # fmt: skip
    return examples, stats


def _batch(engine: HybridEngine, examples: Sequence[data.Example], pad_id: int) -> Any:
    prompts, answers = [e.prompt_ids for e in examples], [e.answers[0] for e in examples]
    return data.Sequences.of(prompts, answers, pad_id, engine.device)


def accumulate(
    engine: HybridEngine, examples: Sequence[data.Example], pad_id: int, config: SFTConfig
) -> tuple[float, int]:
    """Gradients of one step, in pieces of `batch_size` rows; the loss is over all of them, whatever the
    pieces.
    """
    tokens = sum(len(e.answers[0]) for e in examples)
    count = tokens if config.aggregation == "token" else len(examples)
    total = 0.0
    for piece, own in parallel.shares(examples, config.batch_size):
        batch = _batch(engine, piece, pad_id)
        logp = engine.logprobs(batch, temperature=1.0)
        loss, _ = losses.nll_loss(
            logp, batch.completion_mask, aggregation=config.aggregation, normalizer=count
        )
        engine.backward(loss if own else loss * 0.0)
        total += float(loss.detach()) * own
    return parallel.total({"loss": total})["loss"], tokens


@torch.no_grad()
def evaluate(engine: HybridEngine, examples: Sequence[data.Example], pad_id: int, config: SFTConfig) -> float:
    """Mean loss of held-out responses, aggregated as in training."""
    tokens = sum(len(e.answers[0]) for e in examples)
    count = tokens if config.aggregation == "token" else len(examples)
    total = 0.0
    for piece, own in parallel.shares(examples, config.batch_size):
        batch = _batch(engine, piece, pad_id)
        logp = engine.logprobs(batch, temperature=1.0)
        loss, _ = losses.nll_loss(
            logp, batch.completion_mask, aggregation=config.aggregation, normalizer=count
        )
        total += float(loss) * own
    return parallel.total({"loss": total})["loss"]
