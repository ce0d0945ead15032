"""Where scores come from: reward models, Python functions, or several of them weighted and added.

A reward function is called with keywords only and gets one entry a completion in every list:

    def fn(prompts, completions, **columns) -> list[float | None]

prompts: the prompt column as it is in the data (a text, or messages); completions: texts without special
tokens; columns: every other column of the data by name. None means that the function has nothing to say about
that completion.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import device as devices
from .. import parallel
from ..config import ConfigError, OnlineConfig
from . import data, models

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(ValueError):
    """A reward function that gave something that is no list of scores; the message is one sentence."""


class ScoresBatches(Protocol):
    """A reward model: scores token sequences without gradient (see models.Scorer)."""

    def rate(self, batch: Any) -> Tensor: ...


def prompt_text(prompt: Any) -> str:
    """A prompt for people: the text, or the content of the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def is_function_name(source: str) -> bool:
    """Whether a reward in the config names a function (`package.module:function`, `file.py:function`) and
    not a model.
    """
    module, colon, function = source.rpartition(":")
    return bool(colon) and function.isidentifier() and not os.path.exists(source) and bool(module)


def load_function(source: str, key: str = "reward") -> RewardFunction:
    """The function that `package.module:function` or `path/file.py:function` names; the working directory is
    searched too. key: what it is in the config.
    """
    module_name, _, function_name = source.rpartition(":")
    try:
        if module_name.endswith(".py"):
            if not os.path.isfile(module_name):
                raise ConfigError(f"{key} {source} names the file {module_name}, which does not exist")
            module = _import_file(os.path.realpath(module_name), os.stat(module_name).st_mtime_ns)
        else:
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            module = importlib.import_module(module_name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key} {source} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")][:8]
        kind = "function" if key == "reward" else "class"
        raise ConfigError(
            f"{key} {source}: {module_name} has no {kind} {function_name}; it has {', '.join(there)}"
        )
    return function


@functools.cache
def _import_file(path: str, written: int) -> Any:
    """The module in a file, which runs once, as every module does: who looks ahead and who uses it get the same.
    written: when the file was, so that another one in its place is imported too."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_function(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Tensor:
    """Scores float32 [B], NaN where the function said None. Raises RewardError for anything else."""
    name = getattr(function, "__name__", type(function).__name__)
    values = function(
        prompts=list(prompts), completions=list(completions), **{k: list(v) for k, v in columns.items()}
    )
    if isinstance(values, Tensor):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise RewardError(
            f"reward function {name} returned {got} for {len(completions)} completions; return one each"
        )
    scores = []
    for i, value in enumerate(values):
        if value is None:
            scores.append(math.nan)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward function {name} returned {value!r} for completion {i}; return a number or None"
            ) from None
        if not math.isfinite(number):
            raise RewardError(
                f"reward function {name} returned {number} for completion {i}; return a finite number or None"
            )
        scores.append(number)
    return torch.tensor(scores, dtype=torch.float32, device="cpu")


class EpisodeReturn:
    """The environment as a reward source: the sum of an episode's rewards."""

    def rate(self, batch: Any) -> Tensor:
        """float32 [rows]."""
        bad = ~torch.isfinite(batch.rewards)
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            raise RewardError(
                f"the environment gave reward {float(batch.rewards[row, column])} in episode {row}; "
                "return a finite number"
            )
        return batch.rewards.sum(1)


class Rewards:
    """A weighted sum of reward models and reward functions.

    A completion about which no source has anything to say is invalid; it is left out of the update, not
    scored 0.
    """

    def __init__(
        self, sources: Sequence[tuple[str, ScoresBatches | RewardFunction]], weights: Sequence[float] = ()
    ) -> None:
        if not sources:
            raise ConfigError(
                "there is no reward; name a reward model folder or a function (module:function)"
            )
        if weights and len(weights) != len(sources):
            raise ConfigError(
                f"there are {len(weights)} weights for {len(sources)} rewards; give one weight a reward"
            )
        self.sources = list(sources)
        self.weights = list(weights) or [1.0] * len(sources)

    def weight_of(self, name: str) -> float:
        """Weight of the first source of that name; 0 where there is none."""
        names = [n for n, _ in self.sources]
        return self.weights[names.index(name)] if name in names else 0.0

    def __call__(
        self,
        batch: Any,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(scores float32 [B], valid bool [B], each source's own scores by name with NaN where it said
        nothing).
        """
        total = torch.zeros(len(completions), device="cpu")
        valid = torch.zeros(len(completions), dtype=torch.bool, device="cpu")
        parts: dict[str, Tensor] = {}
        for (name, source), weight in zip(self.sources, self.weights, strict=True):
            model: Any = source
            if hasattr(source, "rate") or hasattr(source, "rate_texts"):
                own = hasattr(source, "rate_texts")
                scores = model.rate_texts(batch, prompts, completions) if own else model.rate(batch)
                scores = scores.float().cpu()
                if not bool(torch.isfinite(scores).all()):
                    row = int((~torch.isfinite(scores)).nonzero()[0])
                    raise RewardError(
                        f"reward model {name} gives {float(scores[row])} for completion {row}; load it in "
                        "float32, or train it again with a lower learning rate"
                    )
            else:

                def call(function: Any = source) -> Tensor:
                    return call_function(function, prompts, completions, columns)

                scores = parallel.from_lead(call)
            said = ~torch.isnan(scores)
            total = total + weight * torch.where(said, scores, torch.zeros_like(scores))
            valid |= said
            parts[name] = scores
        return total, valid, parts


def load_sources(
    config: OnlineConfig,
    dtype: torch.dtype,
    functions: Sequence[RewardFunction] = (),
    encoder: data.Encoder | None = None,
    device: torch.device = devices.CPU,
) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """(all reward sources by name, functions first, then the environment; the frozen reward models among them by name).

    encoder: the policy's; with it a reward model whose tokenizer is another one becomes an OwnTokenizer.
    device: where reward models are to be.
    """
    loaded: dict[str, Any] = {}
    sources: list[tuple[str, Any]] = [(getattr(f, "__name__", "function"), f) for f in functions]
    if config.environment:
        sources.append(("environment", EpisodeReturn()))
    for name in config.reward:
        if is_function_name(name):
            sources.append((name.rpartition(":")[2], load_function(name)))
        else:
            model = models.load_scorer(name, dtype, config.seed).requires_grad_(False)
            loaded[name] = devices.place(model, device)
            own = other_tokenizer(name, encoder.tokenizer) if encoder is not None else None
            if own is None:
                sources.append((name, loaded[name]))
            else:
                scorer = models.Scorer(loaded.pop(name))
                sources.append((name, OwnTokenizer(scorer, data.Encoder(own, config.system_prompt, name))))
    return sources, loaded


# -------------------------------------------------------------------------------------------------- tokenizers


class OwnTokenizer:
    """A reward model that reads with its own tokenizer: prompts and answers are encoded anew from their text."""

    def __init__(self, scorer: models.Scorer, encoder: data.Encoder) -> None:
        self.scorer, self.encoder = scorer, encoder

    def rate_texts(self, batch: Any, prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
        """Scores float32 [B]; an answer that did not end has no end-of-turn token here either."""
        finished = getattr(
            batch, "finished", torch.ones(len(completions), dtype=torch.bool, device="cpu")
        ).tolist()
        answers = [
            ids if done or len(ids) < 2 else ids[:-1]
            for ids, done in zip(map(self.encoder.completion, completions), finished, strict=True)
        ]
        given = [self.encoder.prompt(p) for p in prompts]
        rows = data.Sequences.of(given, answers, self.encoder.pad_id, self.scorer.device)
        return self.scorer.rate(rows)


def other_tokenizer(name: str, tokenizer: Any) -> Any:
    """The tokenizer of model `name` if it has one that is not `tokenizer`, else None."""
    path = models.resolve(name)
    if os.path.isdir(path) and not any(f.startswith("tokenizer") for f in os.listdir(path)):
        return None
    own = models.load_tokenizer(name)
    same = own.get_vocab() == tokenizer.get_vocab() and own.eos_token_id == tokenizer.eos_token_id
    return None if same else own


def require_same_tokenizer(
    name: str, tokenizer: Any, key: str = "reference", why: str = "log-probs are compared token by token"
) -> None:
    """Raise ConfigError where model `name` has another tokenizer than the policy."""
    if other_tokenizer(name, tokenizer) is not None:
        raise ConfigError(
            f"{key} {name} has another tokenizer than the policy, but {why}; name a model with the same one"
        )
