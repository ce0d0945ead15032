"""From rows to examples: what each stage reads of a row, length limits, several workers, the cache of token ids."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from . import token_cache
from .conversations import Encoder, PromptText, answered, pair_of, prompt_of, shown
from .reading import DataError, DataStats, Record, require_columns

RESPONSE_COLUMNS = ("completion", "response", "chosen", "messages")


@dataclass
class Example:
    """A prompt with its answers: none (PPO), one (SFT), or chosen and rejected (reward model).

    learnt: of each answer, which of its tokens are the assistant's; empty where all are.
    """

    prompt_ids: list[int]
    answers: list[list[int]]
    prompt: PromptText
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    learnt: list[list[bool]] = field(default_factory=list)

    def learnt_of(self, answer: int) -> list[bool]:
        return self.learnt[answer] if self.learnt else [True] * len(self.answers[answer])


Outcome = token_cache.Outcome


@dataclass(frozen=True)
class Encoding:
    """How the rows of a data set become token ids.

    encode: (prompt ids, answers' ids, cut) of a row's columns, None for one over the length limit; in an answer, ~id
    is a token that is not learnt. prompt: the row's prompt as it was. limit: what the length limit is called.
    settings: everything that decides `encode`; None: it must not be remembered.
    """

    encode: Callable[[Mapping[str, Any]], Outcome]
    prompt: Callable[[Mapping[str, Any]], PromptText]
    limit: str
    settings: Mapping[str, Any] | None

    def attempt(self, record: Record) -> Outcome:
        """What becomes of a row; a text says why it is bad."""
        try:
            return self.encode(record.columns)
        except DataError as error:
            return f"{record.where}: {error}"

    def example(self, record: Record, outcome: tuple[list[int], list[list[int]], bool]) -> Example:
        answers = [[i if i >= 0 else ~i for i in ids] for ids in outcome[1]]
        learnt = [] if answers == outcome[1] else [[i >= 0 for i in ids] for ids in outcome[1]]
        return Example(outcome[0], answers, self.prompt(record.columns), record.columns, record.where, learnt)


class StreamedExamples(Sequence[Example]):
    """Examples that are read and encoded when they are asked for; nothing of them is kept.

    In the place of a row that is too long (or bad, where bad rows are skipped) stands the next that is not.
    """

    def __init__(self, records: Sequence[Record], encoding: Encoding, bad_rows: str) -> None:
        self.records, self.encoding, self.bad_rows = records, encoding, bad_rows

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for shift in range(len(self)):
            place = self.records[(index + shift) % len(self)]
            record = Record(place.where, place.columns)  # read once
            outcome = self.encoding.attempt(record)
            if isinstance(outcome, tuple):
                return self.encoding.example(record, outcome)
            if isinstance(outcome, str) and self.bad_rows == "error":
                raise DataError(outcome)
        raise DataError(
            f"no row is left: all are bad or over {self.encoding.limit}; raise it, or set overlong to cut"
        )


PIECE = 1000
"""Rows that a worker takes at a time, at most; Ctrl-C waits for the pieces that are begun."""
_forked: tuple[Encoding, Sequence[Record]] | None = None  # what the workers work on: they inherit it by fork


def _attempt_rows(rows: range) -> list[Outcome]:
    assert _forked is not None
    encoding, records = _forked
    return [encoding.attempt(records[i]) for i in rows]


def _attempts(records: Sequence[Record], encoding: Encoding, workers: int) -> list[Outcome]:
    """The outcome of every row, in order, from `workers` processes (0: this one)."""
    global _forked
    if workers < 1 or len(records) < 2:
        return [encoding.attempt(r) for r in records]
    if "fork" not in multiprocessing.get_all_start_methods():
        raise DataError(f"data_workers is {workers}, but this system has no fork; set data_workers to 0")
    size = min(PIECE, -(-len(records) // (4 * workers)))
    pieces = [range(i, min(i + size, len(records))) for i in range(0, len(records), size)]
    _forked = encoding, records
    try:
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
        ) as pool:  # Ctrl-C reaches them too; it is this process that answers
            return [outcome for piece in pool.map(_attempt_rows, pieces) for outcome in piece]
    finally:
        _forked = None


def _convert(
    records: Sequence[Record], stats: DataStats, encoding: Encoding, bad_rows: str, workers: int, cache: str,
    stream: bool,
) -> Sequence[Example]:  # fmt: skip
    """All rows encoded, from the cache where it has them; what is bad or too long is counted and left out."""
    if stream:
        stats.kept = len(records)
        stats.notes.append("streamed, the next row in the place of one that does not fit")
        streamed = StreamedExamples(records, encoding, bad_rows)
        if records:
            streamed[0]  # whether any row fits is known before the run begins
        return streamed
    outcomes: list[Outcome] | None = None
    if cache and records and encoding.settings is not None:
        key = token_cache.key_of((r.columns for r in records), encoding.settings)
        outcomes = token_cache.find(cache, key)
        if outcomes is None:
            outcomes = _attempts(records, encoding, workers)
            token_cache.store(cache, key, outcomes)
        else:
            stats.notes.append("token ids from the cache")
    else:
        outcomes = _attempts(records, encoding, workers)
    out: list[Example] = []
    for record, outcome in zip(records, outcomes, strict=True):
        if isinstance(outcome, str):
            if bad_rows == "error":
                raise DataError(outcome)
            stats.bad += 1
            stats.first_bad = stats.first_bad or outcome
        elif outcome is None:
            stats.dropped += 1
        else:
            stats.cut += outcome[2]
            out.append(encoding.example(record, outcome))
    stats.kept = len(out)
    if records and not out:
        source = records[0].where.rsplit(" ", 2)[0]
        why = (
            f"all are over {encoding.limit}; raise it, or set overlong to cut"
            if stats.dropped
            else f"first: {stats.first_bad}"
        )
        raise DataError(f"no row of {source} is left: {why}")
    return out


def _fit(prompt: list[int], answers: list[list[int]], limit: int, overlong: str) -> Outcome:
    """Prompt and answers that fit together into `limit` tokens. Cut answers lose their end-of-turn token: nothing
    ended there.
    """
    if not prompt:
        raise DataError("the prompt has no token")
    room = limit - len(prompt)
    if all(len(a) <= room for a in answers):
        return prompt, answers, False
    if overlong == "drop" or room < 1:
        return None
    return prompt, [a[:room] for a in answers], True


def preparation(config: Any) -> dict[str, Any]:
    """The keywords of sft_examples, pair_examples and prompt_examples that every stage's config has."""
    return {
        "overlong": config.overlong, "bad_rows": config.bad_rows, "workers": config.data_workers,
        "cache": config.token_cache, "stream": config.stream,
    }  # fmt: skip


def sft_examples(
    records: Sequence[Record], encoder: Encoder, stats: DataStats, *, response: str = "auto",
    max_length: int = 512, overlong: Literal["drop", "cut"] = "drop",
    bad_rows: Literal["error", "skip"] = "error", workers: int = 0, cache: str = "", stream: bool = False,
) -> Sequence[Example]:  # fmt: skip
    """Prompt and response of each row. response: the column, or "auto" for the first of RESPONSE_COLUMNS
    that a row has. workers, cache, stream: see `_convert`.
    """
    names = RESPONSE_COLUMNS if response == "auto" else (response,)
    require_columns(records[:1] if stream else records, names)

    def name_in(columns: Mapping[str, Any]) -> str:
        name = next((n for n in names if columns.get(n) is not None), None)
        if name is None:
            raise DataError(f"there is no response; a column {' or '.join(names)} is needed")
        return name

    def encode(columns: Mapping[str, Any]) -> Outcome:
        prompt, answer = answered(columns, name_in(columns))
        return _fit(encoder.prompt(prompt), [encoder.answer(answer)], max_length, overlong)

    settings = {"kind": "sft", "response": response, "max_length": max_length, "overlong": overlong}
    encoding = Encoding(
        encode, lambda columns: answered(columns, name_in(columns))[0], f"max_length {max_length}",
        settings | encoder.settings(),
    )  # fmt: skip
    return _convert(records, stats, encoding, bad_rows, workers, cache, stream)


def _is_finite(value: Any) -> bool:
    """Whether a value, also a text of a .csv file, is a number to compute with."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def pair_examples(
    records: Sequence[Record], encoder: Encoder, stats: DataStats, *, max_length: int = 512, margin: str = "",
    overlong: Literal["drop", "cut"] = "drop", bad_rows: Literal["error", "skip"] = "error",
    workers: int = 0, cache: str = "", stream: bool = False,
) -> Sequence[Example]:  # fmt: skip
    """Prompt, chosen and rejected of each row; pairs of equal answers are bad rows. margin: a numeric
    column, or empty. workers, cache, stream: see `_convert`.
    """
    require_columns(
        records[:1] if stream else records, ["chosen"], ["rejected"], *([[margin]] if margin else [])
    )

    def encode(columns: Mapping[str, Any]) -> Outcome:
        for name in ("chosen", "rejected", *([margin] if margin else [])):
            if columns.get(name) is None:
                raise DataError(f"there is no {name}")
        if margin and not _is_finite(columns[margin]):
            raise DataError(f"{margin} is {shown(columns[margin])}, which is not a number; give a finite one")
        prompt, *answers = pair_of(columns)
        return _fit(encoder.prompt(prompt), [encoder.answer(a) for a in answers], max_length, overlong)

    settings = {"kind": "pairs", "margin": margin, "max_length": max_length, "overlong": overlong}
    encoding = Encoding(
        encode, lambda columns: pair_of(columns)[0], f"max_length {max_length}",
        settings | encoder.settings(),
    )  # fmt: skip
    return _convert(records, stats, encoding, bad_rows, workers, cache, stream)


def prompt_examples(
    records: Sequence[Record], encoder: Encoder, stats: DataStats, *, max_prompt_length: int = 256,
    overlong: Literal["drop", "cut"] = "drop", bad_rows: Literal["error", "skip"] = "error",
    workers: int = 0, cache: str = "", stream: bool = False,
    make_prompt: Callable[[Mapping[str, Any]], PromptText] | None = None,
) -> Sequence[Example]:  # fmt: skip
    """Prompts alone. A prompt that is cut keeps its last tokens, which is where the question to the
    assistant stands. make_prompt: makes the prompt of a row's columns; None: the row has one. workers, cache,
    stream: see `_convert`.
    """
    if make_prompt is None:
        require_columns(records[:1] if stream else records, ["prompt", "messages", "chosen"])

    def of(columns: Mapping[str, Any]) -> PromptText:
        return prompt_of(columns, "chosen" if "messages" not in columns else None)

    prompt_for = make_prompt or of

    def encode(columns: Mapping[str, Any]) -> Outcome:
        ids = encoder.prompt(prompt_for(columns))
        if not ids:
            raise DataError("the prompt has no token")
        if len(ids) <= max_prompt_length:
            return ids, [], False
        return None if overlong == "drop" else (ids[-max_prompt_length:], [], True)

    settings = {"kind": "prompts", "max_length": max_prompt_length, "overlong": overlong} | encoder.settings()
    encoding = Encoding(
        encode, prompt_for, f"max_prompt_length {max_prompt_length}", None if make_prompt else settings
    )
    return _convert(records, stats, encoding, bad_rows, workers, cache, stream)
