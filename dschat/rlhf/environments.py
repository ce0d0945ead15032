"""Environments of several turns: the policy acts, reads what comes back, and acts again.

A class with two methods; one object of it plays one episode:

    def reset(self, **columns) -> prompt            the row's columns in, a text or messages out
    def step(self, action: str) -> (observation, reward, done)

The state lives in the object; the policy sees what was said: prompt, action, observation, action, ... An
observation is a text (in a chat it becomes the user's next message) or a message {role, content}. Everything in
an environment has to follow from the row and the actions, so that a run can be repeated and resumed.

`play` turns that into a rollout whose completion is the whole transcript after the prompt. Tokens that the policy
drew are `actions`; an observation's tokens are read by the model and by the critic, but no loss, no KL and no
advantage ever counts them. The tokens of one turn are never encoded anew for the next: the next turn is generated
behind the very ids that were drawn, so their log-probs are those of one training forward over the transcript.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import ConfigError
from ..engine.hybrid_engine import HybridEngine
from ..engine.rollout import Rollout, RolloutStats, SamplingConfig
from . import batching, conversations, data, reading
from .rewards import first_line, load_function
from .run import derive_seed


class EpisodeError(ConfigError):
    """An environment that raised or gave what is no step; the message is one sentence. episode: the row's columns and
    the actions up to there, which play it again. trace: the traceback of what it raised."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace
        self.episode: dict[str, Any] = {}


class Step(NamedTuple):
    """What an action led to; `step` may return a plain tuple of the three."""

    observation: str | Mapping[str, str]
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """One episode. Columns of the data reach `reset` by name."""

    def reset(self, **columns: Any) -> conversations.PromptText: ...

    def step(self, action: str) -> Step | tuple[str | Mapping[str, str], float, bool]: ...


Factory = Callable[[], Environment]


@dataclass
class Episodes(Rollout):
    """A rollout of whole episodes, one row an episode. finished: whether the environment ended it.

    actions: bool [rows, C], completion tokens that the policy drew; the others are observations, whose logprobs
    are 0. rewards: float32 [rows, C], the reward of each turn at its action's last token. turns: int64 [rows],
    actions taken. overflowed: bool [rows], ended because observation and next action would not have fitted.
    """

    actions: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    turns: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    overflowed: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {
            "episode/return": float(self.rewards.sum(1).mean()),
            "episode/turns": float(self.turns.float().mean()),
            "episode/done": float(self.finished.float().mean()),
            "episode/overflow": float(self.overflowed.float().mean()),
        }


def action_mask(rollout: Rollout) -> Tensor:
    """bool [rows, C]: completion tokens that the policy drew; all of them where nothing answers it."""
    return rollout.actions if isinstance(rollout, Episodes) else rollout.completion_mask.bool()


def credit_turns(rewards: Tensor, rollout: Rollout, weight: float = 1.0) -> Tensor:
    """Per-token rewards [rows, C] with the score at the last action, where earlier turns' rewards move to where they
    were earned; every row keeps its sum.
    """
    if not isinstance(rollout, Episodes):
        return rewards
    places = torch.arange(rollout.actions.shape[1], device=rollout.actions.device)
    last = torch.where(rollout.actions, places, -1).amax(1, keepdim=True)
    earlier = torch.where(places < last, weight * rollout.rewards, torch.zeros_like(rollout.rewards))
    return rewards + earlier - torch.where(places == last, earlier.sum(1, keepdim=True), 0.0)


# ------------------------------------------------------------------------------------------------------ playing


def load_environment(source: str) -> Factory:
    """The class that `package.module:Class` or `path/file.py:Class` names."""
    factory: Any = load_function(source, "environment")
    for method in ("reset", "step"):
        if not callable(getattr(factory, method, None)):
            raise ConfigError(f"environment {source} has no method {method}; it needs reset and step")
    return factory


def first_prompt(factory: Factory, columns: Mapping[str, Any]) -> conversations.PromptText:
    """What an episode of this row begins with. Raises DataError where `reset` refuses the row."""
    try:
        prompt = factory().reset(**columns)
    except (Exception, SystemExit) as error:
        raise reading.DataError(f"the environment's reset refuses the row: {first_line(error)}") from error
    return conversations.prompt_of({"prompt": prompt})


@dataclass
class _Track:
    """One episode while it is played."""

    game: Environment
    example: data.Example
    chat: bool
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    actions: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: int = 0
    said: list[str] = field(default_factory=list)  # the actions as texts
    observation: str | Mapping[str, str] = ""
    ended: bool = False  # the last action ended by itself
    done: bool = False
    overflowed: bool = False

    def add(self, ids: Sequence[int], logprobs: Sequence[float], action: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.actions += [action] * len(ids)
        self.rewards += [0.0] * len(ids)

    def keep(self, error: EpisodeError) -> EpisodeError:
        """The error with this episode, as far as it went."""
        error.episode = {
            "where": self.example.where, "columns": dict(self.example.columns), "actions": list(self.said),
        }  # fmt: skip
        return error


def play(
    engine: HybridEngine,
    encoder: conversations.Encoder,
    factory: Factory,
    examples: Sequence[data.Example],
    sampling: SamplingConfig,
    *,
    max_turns: int,
    max_tokens: int,
) -> Episodes:
    """`sampling.n` episodes of every example, all of them turn by turn together.

    sampling: of one action; its max_new_tokens cuts an action, which then goes to the environment as it is.
    max_tokens: of a transcript, observations included. An episode ends when the environment says so, after
    `max_turns` actions, or when the observation and a full action would not fit into max_tokens; an observation
    that nothing follows is left out. Raises ValueError, before anything is generated, where prompt and max_tokens
    exceed the model's context.
    """
    longest = max(len(e.prompt_ids) for e in examples)
    if longest + max_tokens > engine.spec.context:
        raise ConfigError(
            f"a prompt has {longest} tokens and an episode may have {max_tokens}, more than the model's context of "
            f"{engine.spec.context}; lower max_new_tokens to {engine.spec.context - longest} or less"
        )
    tracks = []
    for example in examples:
        for _ in range(sampling.n):
            game, prompt = _begin(factory, example.columns)
            if prompt != example.prompt:
                raise ConfigError(
                    f"the environment's reset gave another prompt for {example.where} than before; "
                    "let it depend on the row alone"
                )
            chat = not isinstance(example.prompt, str)
            tracks.append(_Track(game, example, chat, list(example.prompt_ids)))
    stats = RolloutStats()
    going = tracks
    for turn in range(max_turns):
        if not going:
            break
        settings = replace(
            sampling, n=1 if turn else sampling.n, seed=derive_seed(sampling.seed, "turn", turn)
        )
        # In the first turn the samples of a prompt share its prefill.
        rows = going[:: settings.n]
        ids, mask = batching.pad([t.prompt + t.ids for t in rows], encoder.pad_id, "left")
        drawn = engine.generate(ids, mask, settings)
        _add_stats(stats, drawn.stats)
        for i, track in enumerate(going):
            _act(track, encoder, drawn, i)
        last = turn + 1 == max_turns
        going = [t for t in going if not last and _go_on(t, encoder, sampling.max_new_tokens, max_tokens)]
    return _gather(tracks, examples, sampling, stats, encoder.pad_id, engine.device)


def _begin(factory: Factory, columns: Mapping[str, Any]) -> tuple[Environment, Any]:
    """A new episode and its prompt."""
    try:
        game = factory()
        return game, game.reset(**columns)
    except (Exception, SystemExit) as error:
        raised = _raised("reset", error)
        raised.episode = {"columns": dict(columns), "actions": []}
        raise raised from error


def _take(game: Environment, action: str) -> Step:
    """What an environment answers to an action. Raises EpisodeError for what is no answer."""
    try:
        result = game.step(action)
    except (Exception, SystemExit) as error:
        raise _raised("step", error) from error
    if not isinstance(result, tuple) or not 1 <= len(result) <= 3:
        raise EpisodeError(f"the environment's step returned {result!r}; return (observation, reward, done)")
    step = Step(*result)
    try:
        return step._replace(reward=float(step.reward))
    except (TypeError, ValueError):
        raise EpisodeError(f"the environment's step gave reward {step.reward!r}; return a number") from None


def _raised(method: str, error: BaseException) -> EpisodeError:
    trace = "".join(traceback.format_exception(error))
    return EpisodeError(f"the environment's {method} raised {first_line(error)}", trace)


def play_again(factory: Factory, episode: Mapping[str, Any], encoder: conversations.Encoder) -> None:
    """A failed episode once more, with the actions that it had. Raises EpisodeError where it fails again."""
    game, prompt = _begin(factory, episode["columns"])
    for action in episode["actions"]:
        step = _take(game, action)
        if not step.done:
            _observe(step.observation, not isinstance(prompt, str), True, encoder)


def _observe(said: Any, chat: bool, ended: bool, encoder: conversations.Encoder) -> list[int]:
    """Token ids of an observation. Raises EpisodeError for what is none."""
    try:
        return encoder.observation(said, chat, ended)
    except reading.DataError as error:
        raise EpisodeError(str(error)) from error


def _act(track: _Track, encoder: conversations.Encoder, drawn: Rollout, row: int) -> None:
    """Hand one drawn action to its environment."""
    real = drawn.completion_mask[row].bool()
    action = drawn.completion_ids[row][real].tolist()
    track.add(action, drawn.logprobs[row][real].tolist(), True)
    track.said.append(encoder.decode(action))
    try:
        step = _take(track.game, track.said[-1])
    except EpisodeError as error:
        raise track.keep(error) from error.__cause__
    track.rewards[-1] = step.reward
    track.turns += 1
    track.done = bool(step.done)
    track.observation, track.ended = step.observation, bool(drawn.finished[row])


def _go_on(track: _Track, encoder: conversations.Encoder, turn_tokens: int, max_tokens: int) -> bool:
    """Append the observation if the episode has another turn; whether it has."""
    if track.done:
        return False
    try:
        seen = _observe(track.observation, track.chat, track.ended, encoder)
    except EpisodeError as error:
        raise track.keep(error) from error.__cause__
    track.overflowed = len(track.ids) + len(seen) + turn_tokens > max_tokens
    if not track.overflowed:
        track.add(seen, [0.0] * len(seen), False)
    return not track.overflowed


def _add_stats(total: RolloutStats, part: RolloutStats) -> None:
    """Times and counts of the turns add up; memory is that of the largest."""
    total.weights, total.kv_cache = part.weights, part.kv_cache
    for name in ("slots", "cache_bytes", "packed_bytes"):
        setattr(total, name, max(getattr(total, name), getattr(part, name)))
    for f in fields(RolloutStats):
        if f.name not in ("slots", "cache_bytes", "packed_bytes", "weights", "kv_cache"):
            setattr(total, f.name, getattr(total, f.name) + getattr(part, f.name))


def _gather(
    tracks: Sequence[_Track],
    examples: Sequence[data.Example],
    sampling: SamplingConfig,
    stats: RolloutStats,
    pad_id: int,
    device: torch.device,
) -> Episodes:
    width = max(len(t.ids) for t in tracks)

    def rows(name: str, dtype: torch.dtype) -> Tensor:
        padded = [[*getattr(t, name), *[0] * (width - len(t.ids))] for t in tracks]
        return torch.tensor(padded, dtype=dtype, device=device)

    def each(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=device)

    prompt_ids, prompt_mask = batching.pad([t.prompt for t in tracks], pad_id, "left")
    completion_ids, completion_mask = batching.pad([t.ids for t in tracks], pad_id, "right")
    return Episodes(
        prompt_ids.to(device),
        prompt_mask.to(device),
        completion_ids.to(device),
        completion_mask.to(device),
        rows("logprobs", torch.float32),
        each([t.done for t in tracks]),
        sampling,
        stats,
        rows("actions", torch.bool),
        rows("rewards", torch.float32),
        each([t.turns for t in tracks]),
        each([t.overflowed for t in tracks]),
    )
