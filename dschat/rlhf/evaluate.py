"""What a run changed: held-out prompts before and after, paired, with an interval; and how fast the
rollout was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .. import device as devices
from ..engine.zero import whole
from . import batching, data, losses, models
from .environments import action_mask
from .rewards import prompt_text

if TYPE_CHECKING:
    from .online import Trainer

BLOCK = 500_000
"""How many rows of resamples are held at once."""


def evaluate(trainer: Trainer, examples: Sequence[data.Example], seed: int) -> dict[str, Any]:
    """Sample held-out prompts, always with the same random streams: scores, KL and texts. A prompt's score is the mean
    over those of its answers that a reward judges; None where there is none."""
    samples = trainer.config.eval_samples
    rollout = trainer.generate(examples, samples, seed)
    texts = trainer.texts(rollout)
    scores, valid = trainer.score(rollout, examples, texts)
    mask = action_mask(rollout)
    gap = losses.kl(rollout.logprobs, trainer.reference_logprobs(rollout), "k1", mask)
    judged = valid.view(len(examples), -1)
    means = torch.where(judged, scores.view_as(judged), 0.0).sum(1) / judged.sum(1)
    return {
        "scores": [
            score if bool(some) else None for score, some in zip(means.tolist(), judged.any(1), strict=True)
        ],
        "kl": float(losses.masked_sum(gap, mask, dim=-1).mean()),
        "length": float(rollout.completion_mask.sum(1).float().mean()),
        "finished": float(rollout.finished.float().mean()),
        "texts": texts[::samples],
    }


def resamples(rows: int, count: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """`count` draws of `rows` out of as many, with replacement, [draws, rows] at a time: as few as memory likes, the
    same ones however many that are."""
    generator = np.random.default_rng(seed)
    size = max(1, BLOCK // rows)
    for start in range(0, count, size):
        yield generator.integers(0, rows, (min(size, count - start), rows))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int = 0, count: int = 10_000
) -> tuple[float, float, float]:
    """(mean difference, low, high): 95 % percentile interval over prompts, before and after resampled
    together.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    means = [difference[rows].mean(1) for rows in resamples(len(difference), count, seed)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def held_out(before: Mapping[str, Any], after: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Two evaluations of the same prompts, compared on those that have a score in both; {} where none has."""
    pairs = list(zip(before["scores"], after["scores"], strict=True))
    both = [i for i, pair in enumerate(pairs) if None not in pair]
    if not both:
        return {}
    scores = [[side["scores"][i] for i in both] for side in (before, after)]
    change, low, high = paired_bootstrap(scores[0], scores[1], seed)
    found = {"prompts": len(both), "change": change, "low": low, "high": high, "kl": after["kl"]}
    for name, side, own in zip(("before", "after"), (before, after), scores, strict=True):
        found[name] = float(np.mean(own))
        found[f"length_{name}"], found[f"finished_{name}"] = side["length"], side["finished"]
    return found


def table(
    examples: Sequence[data.Example], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row a prompt: answers and scores before and after."""
    return [
        {
            "prompt": prompt_text(example.prompt),
            "before": before["texts"][i],
            "score before": before["scores"][i],
            "after": after["texts"][i],
            "score after": after["scores"][i],
        }
        for i, example in enumerate(examples)
    ]


def compare_with_hf(trainer: Trainer, examples: Sequence[data.Example], seed: int) -> dict[str, float]:
    """Tokens a second of the rollout and of Hugging Face generate: same prompts and sampling, one batch,
    warmed up.

    Hugging Face runs a copy with the adapter merged, which is its fastest way to run an adapter. Both stop at
    the end of an answer; only real tokens count.
    """
    import transformers

    config, encoder = trainer.config, trainer.encoder
    device = trainer.engine.device
    ids, mask = (x.to(device) for x in batching.pad([e.prompt_ids for e in examples], encoder.pad_id, "left"))
    trainer.generate(examples[:2], 1, seed)
    start = time.perf_counter()
    rollout = trainer.generate(examples, 1, seed)
    ours = rollout.stats.completion_tokens / (time.perf_counter() - start)

    with whole(trainer.engine.model.parameters()):
        plain: Any = copy.deepcopy(trainer.engine.model)
    plain = models.merged(plain) if models.is_peft(plain) else plain
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=encoder.stop_ids,
        pad_token_id=encoder.pad_id,
    )
    warm = copy.deepcopy(settings)
    warm.max_new_tokens = 2
    with torch.no_grad(), devices.seeded(config.seed, device):
        plain.generate(ids[:2], attention_mask=mask[:2].long(), generation_config=warm)
        devices.synchronize(device)
        start = time.perf_counter()
        out = plain.generate(ids, attention_mask=mask.long(), generation_config=settings)
        devices.synchronize(device)
        seconds = time.perf_counter() - start
    ended = torch.isin(out[:, ids.shape[1] :].cpu(), torch.tensor(encoder.stop_ids, device="cpu")).long()
    tokens = int((ended.cumsum(1) - ended == 0).sum())  # up to and including the first end
    theirs = tokens / seconds
    return {
        "tokens_per_s": ours,
        "hf_tokens_per_s": theirs,
        "speedup": ours / theirs,
        "prompts": float(len(examples)),
    }


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What a PPO, GRPO or RLOO run did, for people."""
    out = []
    if held := result.get("held_out"):
        clear = held["low"] > 0 or held["high"] < 0
        out.append(
            f"Reward on {held['prompts']} held-out prompts: {held['before']:.3f} before, {held['after']:.3f} "
            f"after; change {held['change']:+.3f}, 95 % interval {held['low']:+.3f} to {held['high']:+.3f} "
            f"(paired bootstrap; {'it leaves out 0' if clear else 'it holds 0, so no change is shown'})."
        )
        out.append(f"KL of a held-out answer to the reference: {held['kl']:.3f} nats.")
        out.append(
            f"Answers: {held['length_before']:.1f} tokens before, {held['length_after']:.1f} after; "
            f"{100 * held['finished_before']:.0f} % ended by themselves before, "
            f"{100 * held['finished_after']:.0f} % after."
        )
    if speed := result.get("speed"):
        out.append(
            f"Rollout: {speed['tokens_per_s']:.0f} tokens/s; Hugging Face generate, adapter merged: "
            f"{speed['hf_tokens_per_s']:.0f} tokens/s; same {speed['prompts']:.0f} prompts in one batch "
            f"({speed['speedup']:.1f} times)."
        )
    if gap := result.get("log_prob_gap"):
        out.append(
            f"Log-probs, rollout against training: mean |d| {gap['mean']:.2e}, max {gap['max']:.2e}, "
            f"mean exp|d| {gap['mult']:.6f}."
        )
    return out
