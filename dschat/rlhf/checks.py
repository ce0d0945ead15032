"""What is known to stop a stage before weights are read: from its settings, the models' configurations and outlines,
and the names of its files. `Run` looks when it is made, and a pipeline makes the runs of all its stages before the
first begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from dschat_kernels.sharding import check_heads

from .. import parallel
from ..config import ConfigError, DPOConfig, OnlineConfig, PPOConfig, StageConfig
from ..engine.sharing import check_teams
from . import models, reading
from .rewards import (
    RewardFunction,
    is_function_name,
    load_function,
    needed_columns,
    other_tokenizer,
    require_columns,
    require_same_tokenizer,
)  # fmt: skip
from .trunk import read_adapter, require_alike, same_model

Made = Mapping[str, str]
"""Folder of a stage that is still to run -> the model that it starts from, whose modules and tokenizer its own has."""


def origin(name: str, made: Made) -> str:
    """The model to look at in the place of one that a stage is still to write: the one it starts from."""
    path = Path(name).expanduser().resolve()
    for folder, start in made.items():
        where = Path(folder).expanduser().resolve()
        if path in (where, where / "model", where / "adapter"):
            return start
    return name


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


def check_stage(config: StageConfig, made: Made, model: Any = None, tokenizer: Any = None) -> None:
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
        _check_rewards(config, partial(origin, made=made), own_tokenizer)


def _check_trunk(
    config: OnlineConfig, wanted: Sequence[tuple[str, str]], origin_of: Callable[[str], str]
) -> None:
    """Models that a setting puts on the policy's base were trained as adapters, on one that is held alike; whether on
    the same weights is known when those are read. wanted: (model, setting); those that a stage is still to write are
    looked at then."""
    for name, key in wanted:
        if origin_of(name) == name and not same_model(name, origin_of(config.model)):
            require_alike(name, key, read_adapter(name, key)[1], {"base_weights": config.base_weights})


def _check(check: Callable[..., Any], *values: Any) -> None:
    try:
        check(*values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_rewards(
    config: OnlineConfig, origin_of: Callable[[str], str], own_tokenizer: Callable[[], Any]
) -> None:
    """Reward models are there, the critic's model can be what it is to be, and functions can be imported."""
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
    _check_trunk(config, on_policy, origin_of)
    if config.environment:
        from .environments import load_environment  # imports Run

        load_environment(config.environment)
    for name in config.reward:
        if is_function_name(name):
            _require_columns(config, load_function(name))
