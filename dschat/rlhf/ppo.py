"""Proximal policy optimisation: a critic's values and GAE turn scores into per-token advantages.

    reward_t = -kl_coef * kl_t, plus the score at the last token       advantages, returns = gae(rewards, values)
    loss     = clipped surrogate(advantages) + clipped value loss(returns)

Models kept: the policy; the reference is the policy with its adapter switched off (a frozen copy when all weights are
trained); the critic starts from the reward model and shares its weights unless it trains them; both may be adapters on
the policy's weights (trunk.py). The rest: online.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PPOConfig
from ..engine.hybrid_engine import HybridEngine
from ..engine.rollout import Rollout
from ..engine.stepper import Stepper
from ..engine.zero import ZeroSettings
from . import conversations, losses, models, online
from .critic import Critic, build_rewards_and_critic
from .environments import credit_turns
from .experience import Experience
from .metrics import Metrics
from .rewards import RewardFunction, Rewards
from .run import learning_rate, make_loss_scale, set_lr
from .trunk import Trunk


class PPO(online.Trainer):
    """The skeleton with a critic. zero: the critic's, with its stage."""

    config: PPOConfig

    def __init__(
        self, config: PPOConfig, engine: HybridEngine, encoder: conversations.Encoder, rewards: Rewards, critic: Critic,
        reference: HybridEngine | None, zero: ZeroSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, engine, encoder, rewards, reference)
        self.critic = critic
        self.critic_parameters = models.trainable(critic.module)
        self.critic_stepper = critic.stepper(config, zero, make_loss_scale(config, critic.dtype))
        self.critic_optimizer: Any = self.critic_stepper.optimizer

    @classmethod
    def build(
        cls, config: PPOConfig, engine: HybridEngine, encoder: conversations.Encoder,
        reference: HybridEngine | None, functions: Sequence[RewardFunction], dtype: torch.dtype,
        zero: ZeroSettings | None = None, base: Trunk | None = None,
    ) -> PPO:  # fmt: skip
        zero = None if zero is None else zero.at(config.critic_zero_stage)
        rewards, critic = build_rewards_and_critic(
            config, dtype, functions, encoder, engine.device, zero, base
        )
        return cls(config, engine, encoder, rewards, critic, reference, zero)

    def credit(
        self, experience: Experience, scores: Tensor, valid: Tensor, metrics: Metrics
    ) -> dict[str, float]:
        config, rollout, mask = self.config, experience.rollout, experience.mask
        with metrics.phase("values"), torch.no_grad():
            experience.features = self.critic.features(rollout)
            if experience.features is not None:
                values = self.critic.values(rollout, experience.features)
            else:
                values = self.by_rows(rollout, self.critic.values)
        beta = experience.kl_coef if config.kl_place == "reward" else 0.0
        rewards = losses.kl_penalised_rewards(
            scores, experience.old_logp, experience.ref_logp, mask, beta, config.kl_kind
        )
        if config.reward_norm == "none":  # turns' rewards are then on the scale of the score
            rewards = credit_turns(rewards, rollout, self.rewards.weight_of("environment"))
        total = float(losses.masked_sum(rewards, mask, dim=-1).mean())
        if config.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        advantages, experience.returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
        experience.values = values
        experience.advantages = losses.whiten(advantages, mask) if config.whiten_advantages else advantages
        return {"score/total": total}

    def extra_loss(
        self, experience: Experience, rows: Sequence[int], batch: Rollout, ends: Tensor, how: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The value loss of one piece."""
        index = torch.as_tensor(rows, device=experience.mask.device)
        loss, found = losses.value_loss(
            self.critic.values(batch, experience.features_of(rows, ends)),
            experience.values[index],
            experience.returns[index],
            experience.mask[index],
            self.config.cliprange_value,
            spread=losses.masked_variance(experience.returns, experience.mask),
            **how,
        )
        return loss, {
            "value/loss": loss,
            "value/mean": found["value"],
            "value/explained_variance": found["explained_variance"],
            "value/clip_fraction": found["value_clip_fraction"],
        }

    def extra_norms(self) -> dict[str, float]:
        return {"value/grad_norm": self.critic_stepper.ready(self.config.max_grad_norm or None)}

    def extra_step(self, skip: bool = False) -> None:
        self.critic_stepper.apply(skip)

    def steppers(self) -> dict[str, Stepper]:
        return {**super().steppers(), "value": self.critic_stepper}

    def extra_backward(self, loss: Tensor) -> None:
        self.critic_stepper.backward(loss)

    def set_learning_rates(self, step: int, total: int) -> None:
        super().set_learning_rates(step, total)
        rate = learning_rate(self.config, self.config.critic_learning_rate, step, total)
        set_lr(self.critic_optimizer, rate)

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), "critic": self.critic.module}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().optimizers(), "critic": self.critic_optimizer}

    def export(self, folder: Path, tokenizer: Any) -> list[Path]:
        """`critic/model` (a sequence classifier, its score being the value) and, with LoRA, `critic/adapter`."""
        if not self.config.save_critic:
            return []
        return self.critic.save(tokenizer, folder / "critic", self.config.merge_lora, self.encoder)

    def forget(self) -> None:
        super().forget()
        self.critic.scorer.forget()


def train(
    config: PPOConfig, *, model: Any = None, tokenizer: Any = None, rewards: Sequence[RewardFunction] = ()
) -> dict[str, Any]:
    """Run (or go on with, or return the result of) the PPO run in `config.output_dir`; see online.train."""
    return online.train(config, PPO.build, model=model, tokenizer=tokenizer, rewards=rewards)
