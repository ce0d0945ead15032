"""The critic of PPO: values of completion tokens, from the reward model's weights wherever it can share them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import device as devices
from ..config import PPOConfig
from ..engine.precision import LossScale
from ..engine.rollout import Rollout
from ..engine.stepper import Stepper
from ..engine.zero import ZeroSettings, make_stepper
from . import conversations, models
from .rewards import RewardFunction, Rewards, load_sources
from .run import derive_seed, make_optimizer
from .trunk import Trunk


class Critic:
    """Values of completion tokens. In "head" mode the trunk is frozen, so its hidden states are computed
    once a rollout.
    """

    def __init__(self, scorer: models.Scorer, head: nn.Module, frozen_trunk: bool) -> None:
        self.scorer, self.head, self.frozen_trunk = scorer, head, frozen_trunk
        self.module: nn.Module = head if frozen_trunk else scorer.model

    @property
    def dtype(self) -> torch.dtype:
        """Of the trunk's weights."""
        embed: Any = self.scorer.packed.spec.embed
        found: torch.dtype = embed.weight.dtype
        return found

    def stepper(
        self, config: PPOConfig, zero: ZeroSettings | None, loss_scale: LossScale | None = None
    ) -> Stepper:
        """Optimizer, backward and step of what is trained."""
        optimizer = make_optimizer(
            self.module, config, config.critic_learning_rate, config.critic_lora_learning_rate,
            config.critic_weight_decay,
        )  # fmt: skip
        # A head alone is a few numbers, of which nothing is to be sharded.
        return make_stepper(
            self.module, optimizer, None if self.frozen_trunk else zero, self.scorer.packed, loss_scale
        )

    def features(self, rollout: Rollout) -> Tensor | None:
        """Hidden states before every completion token of the rollout, where they do not change; else None."""
        return self.scorer.gather(rollout)[1] if self.frozen_trunk else None

    def values(self, batch: Rollout, features: Tensor | None = None) -> Tensor:
        """float32 [B, C] with gradient, 0 where masked. features: those of the batch's tokens."""
        if not self.frozen_trunk:
            return self.scorer.values(batch)
        if features is None:
            features = self.scorer.gather(batch)[1]
        return models.scatter(self.scorer.read(features, self.head), batch.completion_mask)

    def save(self, tokenizer: Any, folder: Path, merge: bool, encoder: conversations.Encoder) -> list[Path]:
        """Write it as a sequence classifier whose score at a token is the value there (less reward_mean, by reward_std,
        where the config has them, as a reward model's). What has an adapter or an int8 base is used up.
        """
        model = self.scorer.model
        models.set_scorer_padding(model, tokenizer, encoder)
        if not self.frozen_trunk:
            return models.save_model(model, tokenizer, folder, merge)
        plain = models.merged(model)
        head = models.score_head(plain)
        models.set_score_head(plain, self.head)
        try:
            return models.save_model(plain, tokenizer, folder, merge)
        finally:
            models.set_score_head(plain, head)


class AdapterOff:
    """The reward model inside a critic with an adapter: scores with the adapter switched off."""

    def __init__(self, scorer: models.Scorer) -> None:
        self.scorer = scorer

    def rate(self, batch: Any) -> Tensor:
        self.scorer.forget()
        with self.scorer.model.disable_adapter():
            return self.scorer.rate(batch)


def _critic(config: PPOConfig, model: Any, adapted: bool, offload: bool, zero: ZeroSettings | None) -> Critic:
    """The critic on a sequence classifier. adapted: it has the adapter that trains already. offload, zero: where a
    frozen trunk lies."""
    if config.critic_update == "head":
        head = copy.deepcopy(models.score_head(model)).requires_grad_(True)
        if config.critic_head == "zero":
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        return Critic(models.frozen_scorer(model, offload, zero), head, frozen_trunk=True)
    if config.critic_update == "all":
        model.requires_grad_(True)
    elif not adapted:
        seed = derive_seed(config.seed, "critic")
        model = models.add_lora(
            model, config.critic_lora_r, 0.0, config.lora_targets, "SEQ_CLS", seed, config.lora_last
        )
    again = config.critic_gradient_checkpointing
    models.checkpointed(model, config.gradient_checkpointing if again is None else again)
    return Critic(models.Scorer(model), models.score_head(model), frozen_trunk=False)


def build_rewards_and_critic(
    config: PPOConfig,
    dtype: torch.dtype,
    functions: Sequence[RewardFunction] = (),
    encoder: conversations.Encoder | None = None,
    device: torch.device = devices.CPU,
    zero: ZeroSettings | None = None,
    base: Trunk | None = None,
) -> tuple[Rewards, Critic]:
    """Reward sources and critic as configured. The critic shares the frozen weights of the reward model it
    starts from.

    encoder: the policy's; a reward model with a tokenizer of its own then reads decoded and re-encoded answers.
    device: where the models are to be, which is where the policy is. zero: the critic's; under ZeRO-3 what is frozen
    is in shards too. base: the policy's, on which reward models are with reward_trunk policy, and the critic with
    critic_trunk policy.
    """
    sources, loaded = load_sources(config, dtype, functions, encoder, device, zero, base)
    first_model = next(iter(loaded), None)
    start = config.critic or first_model or config.model
    on_policy = config.critic_trunk == "policy"
    # One model for both, unless the critic trains its base, is on another, or gets modules of its own on the policy's.
    alike = start in loaded and config.reward_trunk == config.critic_trunk
    shared = alike and config.critic_update in (("head",) if on_policy else ("head", "lora"))

    if shared:
        model = loaded[start]
    elif base is None or not on_policy:
        model = models.load_scorer(start, dtype, config.seed, new_head="zero")
        model = devices.place(model, device)
    elif config.critic_update == "head":
        model = base.scorer(start, "critic_trunk")
    else:
        model = base.critic(
            start, "critic_trunk", config.critic_lora_r, config.lora_targets, config.lora_last,
            derive_seed(config.seed, "critic"),
        )  # fmt: skip
    critic = _critic(config, model, on_policy, config.offload_reward and shared, zero)
    for i, (name, source) in enumerate(sources):
        if shared and name == start:
            as_reward: Any = critic.scorer if config.critic_update == "head" else AdapterOff(critic.scorer)
            sources[i] = (name, as_reward)
        elif isinstance(source, nn.Module):
            sources[i] = (name, models.frozen_scorer(source, config.offload_reward, zero))
    return Rewards(sources, config.reward_weights), critic
