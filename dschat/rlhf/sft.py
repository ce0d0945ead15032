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
from . import batching, conversations, data, losses, models, reading, sources
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
        encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
        train_set, train_stats = _examples(config, encoder, "train")
        eval_set, eval_stats = _examples(config, encoder, "eval")

        model = devices.place(model or models.load_policy(config.model, run.dtype), run.device)
        model = models.make_trainable(model, config, "CAUSAL_LM")
        optimizer = make_optimizer(model, config, config.learning_rate, config.lora_learning_rate)
        engine = make_engine(
            model, optimizer, run.zero, make_loss_scale(config, run.dtype), dtype=run.rollout_dtype
        )

        batches, per_step = _batches(train_set, config, train_stats)
        schedule = batching.Schedule(len(batches), per_step, config.epochs, config.max_steps, config.seed)
        total = schedule.total_steps
        metrics = run.start(total)
        metrics.say(train_stats.sentence("SFT data"))
        if eval_set:
            metrics.say(eval_stats.sentence("SFT held-out data"))
        optimizers = {"policy": engine.optimizer}
        engine.stepper.load_state(run.restore({"policy": model}, optimizers))

        final = run.logged("loss", "eval/loss", "eval/mean_token_accuracy")
        for step in range(run.step, total):
            pieces = [[train_set[i] for i in batches[k]] for k in schedule.indices(step)]
            examples = [e for piece in pieces for e in piece]
            with metrics.phase("update"):
                values: dict[str, float] = accumulate(
                    engine, examples, encoder.pad_id, config, pieces if config.max_tokens_per_batch else None
                )
                lr = learning_rate(config, config.learning_rate, step, total)
                set_lr(engine.optimizer, lr)
                norm = engine.step(config.max_grad_norm or None)
            run.check_gradient(engine.stepper, step + 1, examples, {"policy": model})
            values |= {"grad_norm": norm, "lr": lr, **engine.stepper.numbers()}
            if eval_set and run.eval_due(step + 1, total):
                with metrics.phase("eval"):
                    held_out = evaluate(engine, eval_set, encoder.pad_id, config)
                values |= {f"eval/{k}": v for k, v in held_out.items()}
                final |= {f"eval_{k}": v for k, v in held_out.items()}
            metrics.log(step + 1, values, show=["loss", "eval/loss"])
            run.save(step + 1, {"policy": model}, optimizers, engine.stepper.state())
            final["loss"] = values["loss"]
        run.restore_best({"policy": model})
        written = models.save_model(model, tokenizer, run.folder, config.merge_lora)
        final |= float16_result(engine.stepper)
        return run.finish({"steps": total, **final, "written": [str(p) for p in written]})


def _examples(
    config: SFTConfig, encoder: conversations.Encoder, which: Literal["train", "eval"]
) -> tuple[Sequence[data.Example], reading.DataStats]:
    records, stats = sources.records(config, which)
    examples = data.sft_examples(
        records, encoder, stats, response=config.response, max_length=config.max_length,
        **data.preparation(config),
    )  # fmt: skip
    return examples, stats


def _batches(
    examples: Sequence[data.Example], config: SFTConfig, stats: reading.DataStats
) -> tuple[Sequence[Sequence[int]], int]:
    """What a step is put together from, as rows of `examples`, and how many of them: single rows, or batches filled
    with tokens.
    """
    if not config.max_tokens_per_batch:
        each = [range(i, i + 1) for i in range(len(examples))]
        return each, config.batch_size * config.gradient_accumulation_steps
    lengths = [len(e.prompt_ids) + len(e.answers[0]) for e in examples]
    batches = batching.fill(lengths, config.max_tokens_per_batch, config.seed)
    full = sum(lengths) / max(1, len(batches) * config.max_tokens_per_batch)
    stats.notes.append(f"in {len(batches)} batches, {full:.0%} full")
    return batches, config.gradient_accumulation_steps


def accumulate(
    engine: HybridEngine, examples: Sequence[data.Example], pad_id: int, config: SFTConfig,
    pieces: Sequence[Sequence[data.Example]] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Gradients of one step, a forward and backward for each of `pieces` (None: of `batch_size` rows).

    Returns the loss, how many the responses' tokens are, their mean entropy and the share of them that are the
    likeliest, over all whatever the pieces.
    """
    if pieces is None:
        pieces = list(batching.chunks(examples, config.batch_size))
    tokens = sum(sum(e.learnt_of(0)) for e in examples)
    count = tokens if config.aggregation == "token" else len(examples)
    found = dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), 0.0)
    for piece, own in (part for rows in pieces for part in parallel.shares(rows, len(rows))):
        batch, learnt = batching.answer_batch(piece, (0,), pad_id, engine.device)
        logp, entropy, gap = engine.logprobs(batch, temperature=1.0, entropy=True, gap=True)
        loss, _ = losses.nll_loss(logp, learnt, aggregation=config.aggregation, normalizer=count)
        engine.backward(loss if own else loss * 0.0)
        found["loss"] += float(loss.detach()) * own
        found["entropy"] += float((entropy.detach() * learnt).sum()) * own / max(tokens, 1)
        found["mean_token_accuracy"] += float(losses.right_tokens(gap, learnt)) * own / max(tokens, 1)
    return {**parallel.total(found), "tokens": tokens}


@torch.no_grad()
def evaluate(
    engine: HybridEngine, examples: Sequence[data.Example], pad_id: int, config: SFTConfig
) -> dict[str, float]:
    """Mean loss of held-out responses, aggregated as in training, and the share of their tokens that are the likeliest
    ones."""
    tokens = sum(sum(e.learnt_of(0)) for e in examples)
    count = tokens if config.aggregation == "token" else len(examples)
    found = {"loss": 0.0, "mean_token_accuracy": 0.0}
    for piece, own in parallel.shares(examples, config.batch_size):
        batch, learnt = batching.answer_batch(piece, (0,), pad_id, engine.device)
        logp, gap = engine.logprobs(batch, temperature=1.0, gap=True)
        loss, _ = losses.nll_loss(logp, learnt, aggregation=config.aggregation, normalizer=count)
        found["loss"] += float(loss) * own
        found["mean_token_accuracy"] += float(losses.right_tokens(gap, learnt)) * own / max(tokens, 1)
    return parallel.total(found)
