"""Which rows a stage trains on and which it looks at: splits, shares of several sources, and rows left on disk.

Splits go by content: a row's side is a function of its prompt (of the whole row where it has none), so that it
does not move when rows are added, sorted or repeated, and no prompt stands on both sides.

    data_split: "2,4,4"    SFT, reward model and RL each get their own part, as in DeepSpeed-Chat
    eval_split: 0.05       this share of a stage's rows is held out
    data_weights: [3, 1]   rows from the sources in these proportions; a small source is repeated
    stream: true           rows stay on disk (.jsonl, .parquet, hub) and are read and encoded when a step needs them
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ..config import StageConfig
from . import batching, reading
from .reading import DataError, DataStats, Record
from .run import derive_seed

PARTS = {"sft": 0, "reward": 1, "dpo": 1}
"""The part of data_split that a stage takes; every other stage takes the last."""


def place(columns: Mapping[str, Any], salt: str) -> float:
    """A number in [0, 1) that depends on a row's prompt alone, or on all of a row without one."""
    for name in ("prompt", "messages", "chosen"):
        value = columns.get(name)
        if name == "prompt" and value is not None:
            break
        if isinstance(value, list) and len(value) > 1:
            value = value[:-1]  # the last message is the answer
            break
    else:
        value = dict(columns)
    text = json.dumps([salt, value], sort_keys=True, ensure_ascii=False, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56


def in_part(columns: Mapping[str, Any], shares: Sequence[float], part: int) -> bool:
    """Whether a row belongs to part `part` of a split in these proportions."""
    at, total = place(columns, "stage"), sum(shares)
    return (
        sum(shares[:part]) / total
        <= at
        < (sum(shares[: part + 1]) / total if part < len(shares) - 1 else 1.0)
    )


def blend(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """(source, row) of a mixture with as many rows as there are, in the proportions of `weights`.

    Every source gives floor or ceil of its share; a larger one gives a random choice, a smaller one all its rows
    as often as that takes and a random choice of them once more.
    """
    total, out = sum(sizes), []
    bounds = [round(total * sum(weights[:i]) / sum(weights)) for i in range(len(weights) + 1)]
    for source, size in enumerate(sizes):
        wanted = bounds[source + 1] - bounds[source]
        whole, rest = divmod(wanted, size) if size else (0, 0)
        order = batching.epoch_order(size, derive_seed(seed, "blend", source), 0)
        rows = list(range(size)) * whole + sorted(order[:rest])
        out += [(source, row) for row in rows]
    return out


def records(config: StageConfig, which: Literal["train", "eval"]) -> tuple[Sequence[Record], DataStats]:
    """The rows of a stage, or those that it holds out, and what was read for them.

    Raises DataError for what is missing or broken, and where a split leaves nothing.
    """
    limit = config.max_train_rows if which == "train" else config.max_eval_rows
    if which == "eval" and not config.eval_split:
        return reading.read(config.eval_data, limit, config.bad_rows)
    if which == "train" and not (
        config.eval_split or config.data_split or config.data_weights or config.stream
    ):
        return reading.read(config.data, limit, config.bad_rows)
    stats = DataStats()
    groups = []
    for source in config.data:
        rows = list(_kept(config, source, which, stats))
        if not rows:
            raise DataError(
                f"{source} has no row left for {'held-out data' if which == 'eval' else 'training'} of "
                f"{config.command} with data_split {config.data_split or 'none'} and eval_split "
                f"{config.eval_split}; give more rows or other shares"
            )
        groups.append(rows)
    if which == "train" and config.data_weights:
        chosen = blend([len(g) for g in groups], config.data_weights, config.seed)
        found = [groups[source][row] for source, row in chosen]
        for i, name in enumerate(config.data):
            stats.notes.append(f"{sum(source == i for source, _ in chosen)} of {name}")
    else:
        found = [row for group in groups for row in group]
    return (found[:limit] if limit else found), stats


def _kept(config: StageConfig, source: str, which: str, stats: DataStats) -> Iterator[Record]:
    """Rows of a source on the wanted side of both splits."""
    shares = [float(s) for s in config.data_split.split(",")] if config.data_split else []
    part = PARTS.get(config.command, len(shares) - 1)
    rows = _stored(source) if config.stream else reading.read_source(source)
    good, first_bad = False, ""
    for row in rows:
        stats.read += 1
        if isinstance(row, DataError):
            if config.bad_rows == "error":
                raise row
            stats.bad += 1
            first_bad = first_bad or str(row)
            stats.first_bad = stats.first_bad or first_bad
            continue
        good = True
        if shares and not in_part(row.columns, shares, part):
            continue
        held_out = bool(config.eval_split) and place(row.columns, "eval") < config.eval_split
        if held_out == (which == "eval"):
            yield row.forget() if isinstance(row, StoredRecord) else row
    if first_bad and not good:
        raise reading.nothing_good(source, first_bad)


# ------------------------------------------------------------------------------------------------ rows on disk


class StoredRecord(Record):
    """A row that keeps its place on disk alone and is read when its columns are asked for."""

    def __init__(self, where: str, columns: dict[str, Any], read: Callable[[], dict[str, Any]]) -> None:
        self._where, self._read = where, read
        self._columns: dict[str, Any] | None = columns

    @property
    def where(self) -> str:  # type: ignore[override]
        return self._where

    @property
    def columns(self) -> dict[str, Any]:  # type: ignore[override]
        return self._read() if self._columns is None else self._columns

    def forget(self) -> StoredRecord:
        """Keep the place alone."""
        self._columns = None
        return self


def _stored(source: str) -> Iterator[StoredRecord | DataError]:
    """The rows of a source that stay on disk, one at a time."""
    reading.require_source(source)
    if source.endswith(".jsonl"):
        yield from _lines(source)
        return
    if os.path.exists(source) and not source.endswith(".parquet"):
        raise DataError(
            f"{source} cannot be streamed; unpack or convert it to .jsonl or .parquet, or set stream to false"
        )
    # Steps take rows in a new order every epoch and a resumed run goes on at any of them, which an iterable data set
    # cannot give; this one is a memory-mapped file.
    rows = reading.load_stored(source)
    for i in range(len(rows)):
        read = functools.partial(_row, rows, i)
        yield StoredRecord(f"{source} row {i + 1}", read(), read)


def _row(rows: Any, i: int) -> dict[str, Any]:
    return dict(rows[i])


def _lines(source: str) -> Iterator[StoredRecord | DataError]:
    """The rows of a .jsonl file."""
    with open(source, "rb") as f:
        offset = 0
        for number, line in enumerate(iter(f.readline, b""), 1):
            here, offset = offset, offset + len(line)
            where = f"{source} line {number}"
            if line.strip():
                row = reading.parse_line(line, where)
                read = functools.partial(_line, source, here, where)
                yield row if isinstance(row, DataError) else StoredRecord(where, row.columns, read)


def _line(source: str, offset: int, where: str) -> dict[str, Any]:
    try:
        with open(source, "rb") as f:
            f.seek(offset)
            row = reading.parse_line(f.readline(), "it")
    except OSError as error:
        raise DataError(f"{where} has changed since the run began: {error}") from None
    if isinstance(row, DataError):
        raise DataError(f"{where} has changed since the run began: {row}")
    return row.columns
