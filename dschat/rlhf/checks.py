"""What is known to stop a stage before weights are read: from its settings, the models' configurations and outlines,
and the names of its files. `Run` looks when it is made, and a pipeline makes the runs of all its stages before the
first begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from dschat_kernels.sharding import check_heads

from .. import parallel
from ..config import ConfigError, DPOConfig, OnlineConfig, PPOConfig, RewardConfig, StageConfig
from ..engine.sharing import check_teams
from . import digests, models, reading
from .rewards import (
    RewardFunction,
    is_function_name,
    load_function,
    needed_columns,
    other_tokenizer,
    require_columns,
    require_same_tokenizer,
)  # fmt: skip
from .trunk import held_as, read_adapter, require_alike, same_model

T = TypeVar("T")


@dataclass(frozen=True)
class Ahead:
    """A stage that is still to run."""

    config: StageConfig
    dtype: torch.dtype


Made = Mapping[str, Ahead]
"""Folder -> the stage that is still to write a model there."""


def writer(name: str, folders: Mapping[str, T]) -> T | None:
    """What stands for the one of these folders of runs whose model is called so; None: it is of none of them."""
    path = Path(name).expanduser().resolve()
    for folder, found in folders.items():
        where = Path(folder).expanduser().resolve()
        if path in (where, where / "model", where / "adapter"):
            return found
    return None


def origin(name: str, made: Made) -> str:
    """The model to look at in the place of one that a stage is still to write: the one it starts from, whose modules
    and tokenizer its own has."""
    stage = writer(name, made)
    return name if stage is None else origin(stage.config.model, made)


def _same(one: str, other: str, made: Made) -> bool:
    """Whether two names are of one model, which a stage may still have to write."""
    stages = writer(one, made), writer(other, made)
    return same_model(one, other) if stages == (None, None) else stages[0] is stages[1]


def require_rewards(config: OnlineConfig, functions: Sequence[RewardFunction] = ()) -> None:
    """Raise ConfigError when nothing scores the answers, or a function needs what the data does not have. functions:
    given beside those that the config names."""
    if not config.reward and not functions and not config.environment:
        raise ConfigError("reward is empty; name a reward model folder or a function (module:function)")
    for function in functions:
        _require_columns(config, function)


def _require_columns(config: OnlineConfig, function: RewardFunction) -> None:
    """Every argument that a reward function needs is a column of some row; the data is read only for an argument that
    nothing else gives, and what is wrong with it is said where it is read for good."""
    wanted = needed_columns(function)
    for group in (config.data, config.eval_data) if wanted else ():
        have: set[str] = set()
        with contextlib.suppress(reading.DataError, OSError, ValueError):
            for row in (row for source in group for row in _rows(source)):
                have |= set(row.columns)
                if have.issuperset(wanted):
                    break
        if have:
            require_columns(function, have, " and ".join(group))


def _rows(source: str) -> Iterator[reading.Record]:
    """The readable rows of a source, the lines of a .jsonl file one at a time."""
    if not source.endswith(".jsonl"):
        yield from (row for row in reading.read_source(source) if isinstance(row, reading.Record))
        return
    with open(source, "rb") as f:
        parsed = (reading.parse_line(line, source) for line in f if line.strip())
        yield from (row for row in parsed if isinstance(row, reading.Record))


def check_stage(
    config: StageConfig, dtype: torch.dtype, made: Made, model: Any = None, tokenizer: Any = None
) -> None:
    """Raise ConfigError for what stops a stage for certain. model, tokenizer: those that it was given, which nothing
    is looked up for."""
    if isinstance(config, OnlineConfig):
        _check(check_teams, config.inference_tp_size, parallel.world())
    for source in (*config.data, *config.eval_data, *getattr(config, "unsup_data", ())):
        reading.require_source(source)
    name = origin(config.model, made)
    if model is None:
        models.resolve(name)
        if config.lora_r:
            models.check_lora(config, name)

    @cache
    def own_tokenizer() -> Any:
        return tokenizer or models.load_tokenizer(name)

    if isinstance(config, (DPOConfig, OnlineConfig)) and config.reference:
        require_same_tokenizer(origin(config.reference, made), own_tokenizer())
    if isinstance(config, OnlineConfig):
        if model is None and config.inference_tp_size > 1:
            found = models.read_config(name)
            if found is not None:
                _check(check_heads, *models.heads_of(found), config.inference_tp_size)
        _check_rewards(config, dtype, made, own_tokenizer)


def _check_trunk(
    config: OnlineConfig, dtype: torch.dtype, wanted: Sequence[tuple[str, str]], made: Made
) -> None:
    """Models that a setting puts on the policy's base were trained as adapters, on one that is held alike, or will be;
    whether a finished one was on the same weights is known when those are read. wanted: (model, setting)."""
    own = held_as(config, dtype)
    for name, key in wanted:
        if _same(name, config.model, made):
            continue
        stage = writer(name, made)
        if stage is None:
            require_alike(name, key, read_adapter(name, key)[1], own)
        else:
            _check_ahead(config, name, key, stage, made)
            require_alike("the reward stage", key, held_as(stage.config, stage.dtype), own, "will be")


def _check_ahead(config: OnlineConfig, name: str, key: str, stage: Ahead, made: Made) -> None:
    """A model that a stage is still to write will be an adapter on the weights of the policy."""
    before = stage.config
    if not isinstance(before, RewardConfig):
        raise ConfigError(
            f"{key} is policy, but {name} is what {before.command} is to write, which is neither the policy's model "
            f"nor a reward model; train one on {config.model} with dschat reward, or set {key} to own"
        )
    if not before.lora_r:
        raise ConfigError(
            f"{key} is policy, but the reward stage has lora_r 0, so it will train all weights of {before.model}; give "
            f"it a lora_r, or set {key} to own"
        )
    if not (_same(before.model, config.model, made) or digests.alike(before.model, config.model)):
        raise ConfigError(
            f"{key} is policy, but the reward stage trains on {before.model} and the policy is {config.model}, which "
            f"are other weights; give both stages one model, or set {key} to own"
        )


def _check(check: Callable[..., Any], *values: Any) -> None:
    try:
        check(*values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_rewards(
    config: OnlineConfig, dtype: torch.dtype, made: Made, own_tokenizer: Callable[[], Any]
) -> None:
    """Reward models are there, the critic's model can be what it is to be, and functions can be imported."""
    origin_of = partial(origin, made=made)
    names = [name for name in config.reward if not is_function_name(name)]
    for name in names:
        models.resolve(origin_of(name))
    if config.reward_trunk == "policy" and not names:
        raise ConfigError(
            "reward_trunk is policy and reward names no model; name one, or set reward_trunk to own"
        )
    on_policy = [(name, "reward_trunk") for name in names if config.reward_trunk == "policy"]
    if isinstance(config, PPOConfig):
        if config.critic:
            why = "the critic reads the policy's tokens"
            require_same_tokenizer(origin_of(config.critic), own_tokenizer(), "critic", why)
        if config.critic_update == "lora" or config.critic_trunk == "policy":
            same = (n for n in names if other_tokenizer(origin_of(n), own_tokenizer()) is None)
            start = config.critic or next(same, config.model)
            if config.critic_update == "lora":
                models.check_lora(config, origin_of(start), "the critic's model")
            if config.critic_trunk == "policy":
                on_policy.append((start, "critic_trunk"))
    _check_trunk(config, dtype, on_policy, made)
    if config.environment:
        from .environments import load_environment  # imports Run

        load_environment(config.environment)
    for name in config.reward:
        if is_function_name(name):
            _require_columns(config, load_function(name))
