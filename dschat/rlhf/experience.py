"""One rollout and everything about it that stays fixed while a policy learns from it, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..config import OnlineConfig
from ..engine.rollout import Rollout
from . import losses


@dataclass
class Experience:
    """All [B, C] unless said.

    mask: tokens that count: real ones, of rows that have a score. old_logp, ref_logp: under the policy that
    wrote them (by the training forward) and under the reference. weights: truncated importance weights, None
    where they are 1. advantages: what the algorithm made of scores and KL. values, returns: of a critic's
    algorithm; features [N, H]: the frozen critic trunk's hidden states before every completion token.
    kl_coef: weight of the KL in this step. tolerance: of the first ratio's deviation from 1.
    """

    rollout: Rollout
    mask: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    gap: dict[str, float]
    tolerance: float
    kl_coef: float = 0.0
    weights: Tensor | None = None
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    values: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    returns: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    features: Tensor | None = None

    def features_of(self, rows: Sequence[int], ends: Tensor) -> Tensor | None:
        """The features of some rows, of which row i has those up to ends[i]; None where there are none."""
        if self.features is None:
            return None
        where = [torch.arange(int(ends[i - 1]) if i else 0, int(ends[i]), device="cpu") for i in rows]
        return self.features[torch.cat(where).to(self.features.device)]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that replays a failed update, by name."""
        names = ("mask", "old_logp", "ref_logp", "advantages", "values", "returns")
        found = rollout_tensors(self.rollout) | {name: getattr(self, name) for name in names}
        return found if self.weights is None else found | {"weights": self.weights}


def rollout_tensors(rollout: Rollout) -> dict[str, Tensor]:
    """The tensors of a rollout by name, to be kept."""
    found = {f"rollout.{f.name}": getattr(rollout, f.name) for f in fields(rollout)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def shape_scores(
    scores: Tensor, finished: Tensor, config: OnlineConfig, moments: losses.RunningMoments, valid: Tensor
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
    elif config.reward_norm == "group":
        scores, _ = losses.group_advantages(scores, valid, config.samples_per_prompt, scale="none")
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


def masked_vector_mean(x: Tensor, keep: Tensor) -> float:
    """Mean of the kept entries of a vector; 0 when none is kept."""
    return float(x[keep].mean()) if bool(keep.any()) else 0.0
