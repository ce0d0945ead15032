"""REINFORCE leave-one-out: each answer's baseline is the mean score of the prompt's other answers.

    advantage = (score - kl_coef * KL of the answer) - mean of the same over the other answers
    loss      = -advantage * p(answer) / p_old(answer), clipped as PPO's

which on-policy is REINFORCE with a whole answer as one action. It is GRPO's skeleton with another baseline,
no scaling, and the ratio of the answer: RLOOConfig's defaults. After Ahmadian et al. 2024.
"""

from __future__ import annotations

from .grpo import train

__all__ = ["train"]
