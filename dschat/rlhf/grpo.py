"""Group relative policy optimisation: the other answers to a prompt are the baseline, so there is no critic.

    advantage = (score - mean of the group) / deviation of the group, the same at every token of an answer
    loss      = clipped surrogate(advantage) + kl_coef * k3        (or the KL is taken off the score)

Variants by their settings: Dr. GRPO is scale none with aggregation constant; DAPO's are cliprange_high above
cliprange with aggregation token, and flat groups dropped; GSPO is ratio_level sequence with aggregation
sequence. What is common to all algorithms is in dschat/rlhf/online.py.

After Shao et al. 2024 (GRPO), Liu et al. 2025 (Dr. GRPO), Yu et al. 2025 (DAPO), Zheng et al. 2025 (GSPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..config import GRPOConfig
from . import losses, online
from .experience import Experience
from .metrics import Metrics
from .rewards import RewardFunction


class GRPO(online.Trainer):
    """The skeleton with group baselines."""

    config: GRPOConfig

    def credit(
        self, experience: Experience, scores: Tensor, valid: Tensor, metrics: Metrics
    ) -> dict[str, float]:
        config, mask = self.config, experience.mask
        if config.kl_place == "reward":
            tokens = losses.kl(experience.old_logp, experience.ref_logp, config.kl_kind, mask)
            scores = scores - experience.kl_coef * losses.masked_sum(tokens, mask, dim=-1)
        advantages, flat = losses.group_advantages(
            scores, valid, config.samples_per_prompt, baseline=config.baseline, scale=config.scale
        )
        if config.flat_groups == "drop":
            experience.mask = mask & ~flat[:, None]
        experience.advantages = advantages[:, None] * experience.mask
        return {
            "score/total": float(scores[valid].mean()) if bool(valid.any()) else 0.0,
            "group/flat": float(flat.float().mean()),
            "group/advantage_std": float(advantages.std(correction=0)),
        }


def train(
    config: GRPOConfig, *, model: Any = None, tokenizer: Any = None, rewards: Sequence[RewardFunction] = ()
) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the run in `config.output_dir`; see online.train."""
    return online.train(config, GRPO.build, model=model, tokenizer=tokenizer, rewards=rewards)
