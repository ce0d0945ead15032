"""Where scores come from: reward models, Python functions, or several of them weighted and added.

A reward function is called as TRL calls one: with keywords only, of which it gets those that its signature takes
(all, with **kwargs), and with one entry a completion in every list:

    def fn(prompts, completions, completion_ids, trainer_state, **columns) -> list[float | None]

prompts: the prompt column as it is in the data, a text or messages. completions: texts without special tokens; where
the prompt is messages, a list of one message {role: assistant, content: that text}. completion_ids: the token ids.
trainer_state: a TrainerState. columns: every other column of the data by name. log_metric and log_extra are there
too (see Log). None means that the function has nothing to say about that completion. `async def` functions are
awaited together.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import device as devices
from .. import parallel
from ..config import ConfigError, OnlineConfig
from ..engine.zero import ZeroSettings
from . import batching, conversations, models
from .trunk import Trunk

RewardFunction = Callable[..., Any]
"""Gives a list (or an array, or a tensor) of n numbers, or promises one (`async def`)."""

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""What a function gets beside the columns of the data; a column of such a name is hidden."""

HIDDEN = frozenset({"prompt", "completion", *ARGUMENTS})
"""Columns that reach no function as such."""


class RewardError(ValueError):
    """A reward function that raised or gave no list of scores; the message is one sentence. trace: the traceback of
    what it raised."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@dataclass
class TrainerState:
    """How far a run is, under the names of transformers.TrainerState: steps done, steps in all, epochs done."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0


@dataclass
class Log:
    """What reward functions said beside their scores: `log_metric(name, value)` is averaged over a step's calls and
    logged as `reward/NAME`; `log_extra(column, values)`, one a completion, stands in completions.jsonl."""

    values: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.values.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra[str(column)] = list(values)

    def numbers(self) -> dict[str, float]:
        return {f"reward/{name}": sum(found) / len(found) for name, found in self.values.items()}


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
    except (Exception, SystemExit) as error:  # a script may end itself
        raise ConfigError(f"{key} {source} cannot be imported: {first_line(error)}") from error
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


def function_name(function: Any) -> str:
    """What a function is called in messages and in the log."""
    if isinstance(function, functools.partial):
        return function_name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# -------------------------------------------------------------------------------------------- calling functions


def _parameters(function: RewardFunction) -> tuple[dict[str, inspect.Parameter], bool]:
    """(the arguments that a function takes by name, whether it takes any other too)."""
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return {}, True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        {name: p for name, p in found.items() if p.kind in named},
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()),
    )


def needed_columns(function: RewardFunction) -> list[str]:
    """Arguments without a default that only the data can give. Raises ConfigError for one that no name reaches."""
    try:
        every = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    empty = inspect.Parameter.empty
    for p in every:
        if p.kind is inspect.Parameter.POSITIONAL_ONLY and p.default is empty:
            raise ConfigError(
                f"reward function {function_name(function)} takes {p.name} by its position alone, but all arguments "
                "come by name; take the / out of its signature"
            )
    named, _ = _parameters(function)
    return [name for name, p in named.items() if p.default is empty and name not in ARGUMENTS]


def require_columns(function: RewardFunction, columns: Collection[str], where: str) -> None:
    """Raise ConfigError where a function needs an argument that data with these columns does not give."""
    have = sorted(set(columns) - HIDDEN)
    for name in needed_columns(function):
        if name in have:
            continue
        near = difflib.get_close_matches(name, [*ARGUMENTS, *have], n=1)
        hint = f"did you mean {near[0]}?" if near else "rename it, or give it a default"
        raise ConfigError(
            f"reward function {function_name(function)} needs {name!r}, which is no column of {where} "
            f"(it has {', '.join(have) or 'none beside prompt'}); {hint}"
        )


def call_function(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Scores float32 [B], NaN where the function said None. Raises RewardError for anything else."""
    return call_functions([function], prompts, completions, columns, completion_ids)[0]


def call_functions(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None = None,
    state: TrainerState | None = None,
    log: Log | None = None,
) -> list[Tensor]:
    """`call_function` of several; what `async def` ones promise is awaited together. completions: texts."""
    log = log or Log()
    given: dict[str, Any] = {k: list(v) for k, v in columns.items() if k not in HIDDEN}
    given |= {"prompts": list(prompts), "trainer_state": state or TrainerState()}
    given["completions"] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    given |= {"log_metric": log.log_metric, "log_extra": log.log_extra}
    if completion_ids is not None:
        given["completion_ids"] = [list(ids) for ids in completion_ids]
    said: list[Any] = []
    promised: dict[int, Awaitable[Any]] = {}
    try:
        for function in functions:
            said.append(_call(function, given))
            if inspect.isawaitable(said[-1]):
                promised[len(said) - 1] = said[-1]
    except RewardError:
        for promise in promised.values():
            if inspect.iscoroutine(promise):
                promise.close()
        raise
    for i, (value, error) in zip(promised, _await(list(promised.values())), strict=True):
        if error is not None:
            raise _raised(functions[i], error) from error
        said[i] = value
    return [_scores(f, values, len(completions)) for f, values in zip(functions, said, strict=True)]


def _call(function: RewardFunction, given: Mapping[str, Any]) -> Any:
    """What a function returns for the arguments among these that it takes."""
    named, others = _parameters(function)
    missing = [n for n, p in named.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise RewardError(
            f"reward function {function_name(function)} needs {missing[0]!r}, which is not given here; there are "
            f"{', '.join(given)}"
        )
    try:
        return function(**(given if others else {n: given[n] for n in named if n in given}))
    except (Exception, SystemExit) as error:
        raise _raised(function, error) from error


def _raised(function: RewardFunction, error: BaseException) -> RewardError:
    trace = "".join(traceback.format_exception(error))
    return RewardError(f"reward function {function_name(function)} raised {first_line(error)}", trace)


_loops: list[asyncio.AbstractEventLoop] = []


def _await(promises: Sequence[Awaitable[Any]]) -> list[tuple[Any, BaseException | None]]:
    """(value, error) of each, all awaited at the same time. One event loop, in a thread of its own, serves the
    process: sessions that functions keep belong to a loop, and a notebook has one running in this thread."""
    if not promises:
        return []
    if not _loops:
        _loops.append(asyncio.new_event_loop())
        threading.Thread(target=_loops[0].run_forever, name="reward functions", daemon=True).start()

    async def one(promise: Awaitable[Any]) -> tuple[Any, BaseException | None]:
        try:
            return await promise, None
        except (Exception, SystemExit) as error:  # SystemExit would end the loop
            return None, error

    async def together() -> list[tuple[Any, BaseException | None]]:
        return list(await asyncio.gather(*(one(p) for p in promises)))

    future = asyncio.run_coroutine_threadsafe(together(), _loops[0])
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _scores(function: RewardFunction, values: Any, count: int) -> Tensor:
    """What a function returned as float32 [count]. Raises RewardError for what is no list of numbers and None."""
    name = function_name(function)
    shape = getattr(values, "shape", None)
    if shape is not None and len(shape) != 1:
        raise RewardError(
            f"reward function {name} returned shape {list(shape)} for {count} completions; return [{count}]"
        )
    if hasattr(values, "tolist"):  # a tensor, an array, a series
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
        raise RewardError(f"reward function {name} returned {got} for {count} completions; return one each")
    scores = []
    for i, value in enumerate(values):
        if value is None:
            scores.append(math.nan)
            continue
        try:
            if isinstance(value, (str, bytes)) or getattr(value, "ndim", None):
                raise TypeError
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


# ---------------------------------------------------------------------------------------------- several rewards


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
        self.log = Log()
        """What the functions logged in the last call."""

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
        state: TrainerState | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(scores float32 [B], valid bool [B], each source's own scores by name with NaN where it said
        nothing). What functions logged is in `log` then.
        """
        functions: list[Any] = [source for _, source in self.sources if not _is_model(source)]
        ids = completion_ids(batch)

        def call() -> tuple[list[Tensor], Log]:
            log = Log()
            return call_functions(functions, prompts, completions, columns, ids, state, log), log

        found, self.log = parallel.from_lead(call) if functions else ([], Log())
        from_functions = iter(found)
        total = torch.zeros(len(completions), device="cpu")
        valid = torch.zeros(len(completions), dtype=torch.bool, device="cpu")
        parts: dict[str, Tensor] = {}
        for (name, source), weight in zip(self.sources, self.weights, strict=True):
            model: Any = source
            if _is_model(source):
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
                scores = next(from_functions)
            said = ~torch.isnan(scores)
            total = total + weight * torch.where(said, scores, torch.zeros_like(scores))
            valid |= said
            parts[name] = scores
        if len(completions) and not bool(valid.any()):
            names = ", ".join(name for name, _ in self.sources)
            warnings.warn(
                f"reward function {names} returned None for all {len(completions)} completions of a batch, which is "
                "left out of the update; return a number where there is something to say",
                stacklevel=2,
            )
        return total, valid, parts


def _is_model(source: Any) -> bool:
    return hasattr(source, "rate") or hasattr(source, "rate_texts")


def completion_ids(batch: Any) -> list[list[int]] | None:
    """Token ids of a rollout's completions, the one that ends an answer included; None for what is no rollout."""
    if not hasattr(batch, "completion_ids"):
        return None
    rows = zip(batch.completion_ids.cpu(), batch.completion_mask.bool().cpu(), strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def _short(name: str) -> str:
    """The last folder of a path, but for the `model` that every run writes."""
    *before, last = name.rstrip("/").split("/")
    return before[-1] if before and last == "model" else last


def numbers(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and deviation of each source's own scores, for the log, under TRL's names."""
    out = {}
    shorts = {name: _short(name) for name in parts}
    for name, scores in parts.items():
        said = scores[~torch.isnan(scores)]
        if len(said):
            short = name if list(shorts.values()).count(shorts[name]) > 1 else shorts[name]
            out[f"rewards/{short}/mean"] = float(said.mean())
            out[f"rewards/{short}/std"] = float(said.std()) if len(said) > 1 else 0.0
    return out


def load_sources(
    config: OnlineConfig,
    dtype: torch.dtype,
    functions: Sequence[RewardFunction] = (),
    encoder: conversations.Encoder | None = None,
    device: torch.device = devices.CPU,
    zero: ZeroSettings | None = None,
    base: Trunk | None = None,
) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """(all reward sources by name, functions first, then the environment; the frozen reward models among them by name).

    encoder: the policy's; with it a reward model whose tokenizer is another one becomes an OwnTokenizer.
    device: where reward models are to be. zero: of an OwnTokenizer's. base: the policy's, on which they are with
    reward_trunk policy.
    """
    if config.shares_trunk and base is None:
        raise ValueError(
            f"{config.shares_trunk[0]} is policy: give the policy's base (dschat.rlhf.trunk.Trunk)."
        )
    loaded: dict[str, Any] = {}
    sources: list[tuple[str, Any]] = [(function_name(f), f) for f in functions]
    if config.environment:
        sources.append(("environment", EpisodeReturn()))
    for name in config.reward:
        if is_function_name(name):
            sources.append((name.rpartition(":")[2], load_function(name)))
        else:
            if base is not None and config.reward_trunk == "policy":
                loaded[name] = base.scorer(name, "reward_trunk")  # where the policy is
            else:
                model = models.load_scorer(name, dtype, config.seed, new_head=None)
                loaded[name] = devices.place(model.requires_grad_(False), device)
            own = other_tokenizer(name, encoder.tokenizer) if encoder is not None else None
            if own is None:
                sources.append((name, loaded[name]))
            else:
                scorer = models.frozen_scorer(loaded.pop(name), config.offload_reward, zero)
                sources.append(
                    (name, OwnTokenizer(scorer, conversations.Encoder(own, config.system_prompt, name)))
                )
    return sources, loaded


# -------------------------------------------------------------------------------------------------- tokenizers


class OwnTokenizer:
    """A reward model that reads with its own tokenizer: prompts and answers are encoded anew from their text."""

    def __init__(self, scorer: models.Scorer, encoder: conversations.Encoder) -> None:
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
        rows = batching.Sequences.of(given, answers, self.encoder.pad_id, self.scorer.device)
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
