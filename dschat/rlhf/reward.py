"""Reward model: a sequence classifier that scores the chosen answer of a pair above the rejected one.

The score is read at the last real token. When training is done, mean and deviation of the scores of training
answers are stored in the model's config (`reward_mean`, `reward_std`), and every reader (models.Scorer) takes
them out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from .. import device as devices
from .. import parallel
from ..config import RewardConfig
from ..engine.zero import make_stepper
from . import batching, conversations, data, losses, models, reading, sources, trunk
from .run import (
    Run,
    float16_result,
    interruptible,
    learning_rate,
    make_loss_scale,
    make_optimizer,
    set_lr,
)  # fmt: skip

MEANS = ("accuracy", "margin", "mean_reward")
EXTREMES = {"min_reward": -1.0, "max_reward": 1.0}
"""What is logged of a step's pairs; an extreme is the largest with this sign."""
NORMALISE_ON = 128  # training pairs whose scores give mean and deviation


def train(config: RewardConfig, *, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the reward run in `config.output_dir`.

    model: a sequence classifier with one label to use instead of loading `config.model`. Writes `model/` and,
    with LoRA, `adapter/`.
    """
    with Run(config, "reward", model, tokenizer) as run, interruptible(run):
        if run.result is not None:
            return run.result
        tokenizer = tokenizer or models.load_tokenizer(config.model)
        encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
        train_set, train_stats = _examples(config, encoder, "train")
        eval_set, eval_stats = _examples(config, encoder, "eval")

        model = model or models.load_scorer(config.model, run.dtype, config.seed)
        model = devices.place(model, run.device)
        models.set_scorer_padding(model, tokenizer, encoder)
        model = models.hold_base(model, config)
        bare = model
        base = parallel.from_lead(lambda: trunk.about_base(bare, config)) if config.lora_r else {}
        model = models.make_trainable(model, config, "SEQ_CLS")
        model.config.reward_mean, model.config.reward_std = 0.0, 1.0
        scorer = models.Scorer(model)
        optimizer = make_optimizer(model, config, config.learning_rate, config.lora_learning_rate)
        loss_scale = make_loss_scale(config, run.dtype)
        stepper = make_stepper(model, optimizer, run.zero, scorer.packed, loss_scale)
        optimizers = {"reward": stepper.optimizer}

        per_step = config.batch_size * config.gradient_accumulation_steps
        schedule = batching.Schedule(len(train_set), per_step, config.epochs, config.max_steps, config.seed)
        total = schedule.total_steps
        metrics = run.start(total)
        metrics.say(train_stats.sentence("reward data"))
        if eval_set:
            metrics.say(eval_stats.sentence("reward held-out data"))
        stepper.load_state(run.restore({"reward": model}, optimizers))

        final = run.logged(
            "loss", "accuracy", *(f"eval/{name}" for name in ("loss", *MEANS, *EXTREMES))
        )  # fmt: skip
        for step in range(run.step, total):
            examples = [train_set[i] for i in schedule.indices(step)]
            with metrics.phase("update"):
                values = dict.fromkeys(("loss", *MEANS), 0.0)
                extremes: dict[str, float] = {}
                for piece, own in parallel.shares(examples, config.batch_size):
                    loss, found = pair_loss(scorer, piece, encoder.pad_id, config, len(examples))
                    stepper.backward(loss if own else loss * 0.0)
                    values["loss"] += float(loss.detach()) * own
                    for name in MEANS:
                        values[name] += float(found[name]) * own * len(piece) / len(examples)
                    for name, sign in EXTREMES.items() if own else ():
                        extremes[name] = max(sign * float(found[name]), extremes.get(name, -math.inf))
                values = parallel.total(values | extremes, largest=tuple(EXTREMES))
                values |= {name: sign * values[name] for name, sign in EXTREMES.items()}
                values["lr"] = learning_rate(config, config.learning_rate, step, total)
                set_lr(stepper.optimizer, values["lr"])
                values["grad_norm"] = stepper.step(config.max_grad_norm or None)
                run.check_gradient(stepper, step + 1, examples, {"reward": model})
                values |= stepper.numbers()
            if eval_set and run.eval_due(step + 1, total):
                with metrics.phase("eval"):
                    held_out = evaluate(scorer, eval_set, encoder.pad_id, config)
                values |= {f"eval/{k}": v for k, v in held_out.items()}
                final |= {f"eval_{k}": v for k, v in held_out.items()}
            metrics.log(step + 1, values, show=["loss", "accuracy", "eval/accuracy"])
            run.save(step + 1, {"reward": model}, optimizers, stepper.state())
            final |= {"loss": values["loss"], "accuracy": values["accuracy"]}

        run.restore_best({"reward": model})
        if config.normalise:
            mean, std = moments(scorer, train_set[:NORMALISE_ON], encoder.pad_id, config.batch_size)
            model.config.reward_mean, model.config.reward_std = mean, std
            final |= {"reward_mean": mean, "reward_std": std}
        if eval_set:
            final["eval_pairs"] = len(eval_set)
            final["eval_longer_wins"] = longer_wins(eval_set)
        final |= float16_result(stepper)
        written = models.save_model(model, tokenizer, run.folder, config.merge_lora, base)
        return run.finish({"steps": total, **final, "written": [str(p) for p in written]})


def _examples(
    config: RewardConfig, encoder: conversations.Encoder, which: Literal["train", "eval"]
) -> tuple[Sequence[data.Example], reading.DataStats]:
    records, stats = sources.records(config, which)
    examples = data.pair_examples(
        records, encoder, stats, max_length=config.max_length, margin=config.margin,
        **data.preparation(config),
    )  # fmt: skip
    return examples, stats


def longer_wins(pairs: Sequence[data.Example]) -> float:
    """How often the longer answer is the chosen one, equal lengths being right half of the time."""
    gaps = [len(e.answers[0]) - len(e.answers[1]) for e in pairs]
    return sum(0.5 + 0.5 * ((gap > 0) - (gap < 0)) for gap in gaps) / len(gaps)


def _margins(examples: Sequence[data.Example], column: str, device: torch.device) -> torch.Tensor | None:
    values = [float(e.columns[column]) for e in examples] if column else None
    return None if values is None else torch.tensor(values, device=device)


def pair_loss(
    scorer: models.Scorer,
    examples: Sequence[data.Example],
    pad_id: int,
    config: RewardConfig,
    normalizer: int,
) -> tuple[torch.Tensor, losses.Metrics]:
    """The configured loss of some pairs, summed and divided by `normalizer`."""
    if config.loss == "last":
        chosen, rejected = pair_scores(scorer, examples, pad_id)
        return losses.bradley_terry_loss(
            chosen, rejected, _margins(examples, config.margin, scorer.device), normalizer=normalizer
        )
    batch = _both(scorer, examples, pad_id)
    tokens, mask, n = scorer.token_scores(batch), batch.completion_mask, len(examples)
    same = (batch.completion_ids[:n] == batch.completion_ids[n:]) & mask[:n] & mask[n:]
    start = same.long().cumprod(1).sum(1)
    return losses.per_token_pair_loss(
        tokens[:n], tokens[n:], mask[:n], mask[n:], start, normalizer=normalizer
    )


def _both(scorer: models.Scorer, examples: Sequence[data.Example], pad_id: int) -> batching.Sequences:
    """Chosen answers, then rejected ones."""
    return batching.answer_batch(examples, (0, 1), pad_id, scorer.device)[0]


def pair_scores(
    scorer: models.Scorer, examples: Sequence[data.Example], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of chosen and rejected, each [B], from one packed forward over both."""
    scores = scorer.scores(_both(scorer, examples, pad_id))
    return scores[: len(examples)], scores[len(examples) :]


def all_scores(
    scorer: models.Scorer, examples: Sequence[data.Example], pad_id: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pair_scores` of many pairs, each by one process; without gradient."""
    both = parallel.by_rows(
        len(examples), batch_size, lambda rows: torch.stack(pair_scores(scorer, examples[rows], pad_id), 1)
    )
    return both[:, 0], both[:, 1]


@torch.no_grad()
def evaluate(
    scorer: models.Scorer, examples: Sequence[data.Example], pad_id: int, config: RewardConfig
) -> dict[str, float]:
    """Loss, accuracy, margin and scores of held-out pairs."""
    chosen, rejected = all_scores(scorer, examples, pad_id, config.batch_size)
    loss, metrics = losses.bradley_terry_loss(
        chosen, rejected, _margins(examples, config.margin, scorer.device)
    )
    return {"loss": float(loss)} | {name: float(metrics[name]) for name in (*MEANS, *EXTREMES)}


@torch.no_grad()
def moments(
    scorer: models.Scorer, examples: Sequence[data.Example], pad_id: int, batch_size: int
) -> tuple[float, float]:
    """Mean and biased standard deviation of the raw scores of all answers of some pairs."""
    scores = torch.cat(all_scores(scorer, examples, pad_id, batch_size)).double()
    std = float(scores.std(correction=0))
    return float(scores.mean()), std if std > 1e-6 else 1.0
