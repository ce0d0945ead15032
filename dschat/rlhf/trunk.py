"""One base for several models: critic and reward models as adapters on the frozen weights of the policy.

Each has modules of its own, whose parameters are the policy's very tensors: nothing is switched on or off between
models, and what one of them trains (its adapter, its head) belongs to it alone. That a reward model's adapter is of
these weights is told by a digest, which its run wrote beside it (`base.json`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dschat_kernels.packing import is_lora

from ..config import ConfigError, StageConfig
from . import checkpoint, models

FACTS = ("digest", "dtype", "base_weights", *models.MOMENTS)
"""What `base.json` says: of the weights under the adapter, and the moments of its scores."""


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model."""
    return one == other or models.resolve(one) == models.resolve(other)


def trunk_of(model: Any) -> Any:
    """The decoder inside a language model or a sequence classifier, without a head."""
    return getattr(model, model.base_model_prefix, model)


def digest(model: Any) -> str:
    """Of names, types and bytes of the weights of a model's decoder, as it holds them."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(trunk_of(model).state_dict().items()):
        held = tensor.detach().cpu().contiguous()
        found.update(f"{name} {held.dtype} {tuple(held.shape)};".encode())
        found.update(memoryview(held.reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def about_base(model: Any, config: StageConfig) -> dict[str, str]:
    """What is to be known of the weights on which an adapter will be trained, before it is there."""
    return {"digest": digest(model), **held_as(config, next(model.parameters()).dtype)}


def held_as(config: StageConfig, dtype: torch.dtype) -> dict[str, str]:
    """What is known of the weights under an adapter before they are read."""
    return {"dtype": str(dtype).removeprefix("torch."), "base_weights": config.base_weights}


def twin(module: nn.Module, config: Any) -> nn.Module:
    """Other modules with the same parameters and buffers, not copies of them. config: in the place of the module's."""
    shared = (*module.parameters(), *module.buffers())
    memo: dict[int, Any] = {id(t): t for t in shared} | {id(module.config): config}
    return copy.deepcopy(module, memo)


class Trunk:
    """The base of a policy, for others to be built on. To be made before the policy gets its adapter, which freezes
    it."""

    def __init__(self, policy: Any, config: StageConfig) -> None:
        self.name, self.config = config.model, config
        self.bare = twin(trunk_of(policy), copy.deepcopy(policy.config))
        self._about: dict[str, str] | None = None

    @property
    def about(self) -> dict[str, str]:
        """`about_base` of it."""
        if self._about is None:
            self._about = about_base(self.bare, self.config)
        return self._about

    def scorer(self, name: str, key: str) -> Any:
        """The sequence classifier `name` on these weights: with the adapter and the head of a reward run, or, for a
        critic, with a head of zeros where it is the policy's model. key: the setting that asks for it.

        Raises ConfigError, one sentence, where the model is no adapter on these weights.
        """
        model = self._classifier()
        if same_model(name, self.name):
            if key == "reward_trunk":
                raise ConfigError(
                    f"{name} is the policy's model and no trained reward model; train one on it with dschat reward"
                )
            return model
        folder, about = self._adapter(name, key)
        model = models.load_adapter(model, str(folder)).requires_grad_(False)
        head: Any = models.score_head(model)
        models.set_score_head(model, head.modules_to_save["default"])
        models.take_moments(model, about)
        return model

    def critic(self, name: str, key: str, r: int, targets: list[str], last: int, seed: int) -> Any:
        """`scorer` with a fresh adapter to be trained; a reward run's own stays under it, frozen, and its head is where
        the new one begins. Errors: as `scorer`, and for targets that the model lacks."""
        model = models.add_lora(self._classifier(), r, 0.0, targets, "SEQ_CLS", seed, last)
        if same_model(name, self.name):
            return model
        folder, about = self._adapter(name, key)
        with models.loading("adapter", name), models.answering_peft():
            model.load_adapter(str(folder), models.UNDER)
        for layer in filter(is_lora, model.modules()):
            layer.set_adapter([models.UNDER, "default"])
        head: Any = models.score_head(model)
        heads = head.modules_to_save
        heads["default"].load_state_dict(heads[models.UNDER].state_dict())
        for part, parameter in model.named_parameters():
            if f".{models.UNDER}." in part:
                parameter.requires_grad_(False)
        # The new adapter alone is on what the reward run wrote as a whole.
        model.peft_config["default"].base_model_name_or_path = models.resolve(name)
        models.take_moments(model, about)
        return models.no_dropout(model)

    def _classifier(self) -> Any:
        """A sequence classifier with one label on these weights, its head zero."""
        import transformers

        bare: Any = self.bare
        device = next(self.bare.parameters()).device
        config = copy.deepcopy(bare.config)
        config.num_labels = 1
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            model = None
        if model is None or type(trunk_of(model)) is not type(bare):
            raise ConfigError(
                f"transformers has no sequence classifier around {type(bare).__name__}, so nothing can share the "
                f"weights of {self.name}; set critic_trunk and reward_trunk to own"
            )
        setattr(model, model.base_model_prefix, twin(bare, model.config))
        head = models.score_head(model).to_empty(device=device).to(next(bare.parameters()).dtype)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return models.no_dropout(model)

    def _adapter(self, name: str, key: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a reward run's adapter and its facts. Raises ConfigError where it is on other weights."""
        folder, about = read_adapter(name, key)
        require_alike(name, key, about, {k: self.about[k] for k in ("base_weights", "dtype")})
        if about["digest"] != self.about["digest"]:
            raise ConfigError(
                f"{key} is policy, but {name} was trained on other weights than those of {self.name} (digest "
                f"{about['digest'][:8]}, not {self.about['digest'][:8]}); train it with model {self.name}, or set "
                f"{key} to own"
            )
        return folder, about


def require_alike(
    name: str, key: str, about: Mapping[str, Any], own: Mapping[str, str], when: str = "was"
) -> None:
    """Raise ConfigError where the weights under an adapter differ from the policy's in one of those facts."""
    for what in own:
        if about[what] != own[what]:
            raise ConfigError(
                f"{key} is policy, but {name} {when} trained with {what} {about[what]} and this run has {own[what]}; "
                f"set {what} to {about[what]}, or {key} to own"
            )


def read_adapter(name: str, key: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the adapter that a reward run wrote, and what its `base.json` says. name: the run's folder, or its
    `model` or `adapter`. Raises ConfigError, one sentence, where there is none."""
    path = Path(models.resolve(name))
    folder = next((f for f in (path, path.parent / "adapter") if (f / "adapter_config.json").is_file()), None)
    if folder is None:
        raise ConfigError(
            f"{key} is policy, but {name} has no adapter beside it; train it with lora_r, or set {key} to own"
        )
    file = folder / models.BASE
    about = checkpoint.read_json(file, f"train it again, or set {key} to own") if file.is_file() else {}
    if not about.keys() - set(models.MOMENTS):
        raise ConfigError(
            f"{key} is policy, but {folder} has no {models.BASE} that says what weights it is on; train it with dschat "
            f"reward, or set {key} to own"
        )
    lacking = [fact for fact in FACTS if fact not in about]
    if lacking:
        raise ConfigError(f"{file} is damaged (it has no {lacking[0]}); train it again, or set {key} to own")
    return folder, about
