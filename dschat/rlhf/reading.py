"""Rows of files: where each came from, and one sentence for each that is bad.

Sources: .jsonl, .json (a list, as DeepSpeed-Chat's local files), .csv, .parquet, each also .gz except
parquet; anything else is the name of a hub data set, `org/name` or `org/name:split`, read through `datasets`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
DEEPEST = 64
"""Lists and objects within each other; far from where Python's recursion ends, here and in libraries."""
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the file, the row and what to do."""


@dataclass
class Record:
    """One row and where it came from."""

    where: str
    columns: dict[str, Any]


@dataclass
class DataStats:
    """What became of the rows; `sentence()` says it."""

    read: int = 0
    kept: int = 0
    dropped: int = 0
    cut: int = 0
    bad: int = 0
    first_bad: str = ""
    notes: list[str] = field(default_factory=list)

    def sentence(self, what: str) -> str:
        parts = [f"{what}: {self.kept} of {self.read} rows"]
        if self.dropped:
            parts.append(f"{self.dropped} over the length limit dropped")
        if self.cut:
            parts.append(f"{self.cut} over the length limit cut")
        if self.bad:
            parts.append(f"{self.bad} unreadable skipped (first: {self.first_bad})")
        parts += self.notes
        return ", ".join(parts)


def read(
    sources: Sequence[str], limit: int = 0, bad_rows: Literal["error", "skip"] = "error"
) -> tuple[list[Record], DataStats]:
    """All rows of all sources in order, at most `limit` (0: all). Raises DataError for what is missing or
    broken.
    """
    stats = DataStats()
    records: list[Record] = []
    for source in sources:
        empty, good, first_bad = True, False, ""
        for item in read_source(str(source)):
            empty = False
            if limit and len(records) >= limit:
                break
            stats.read += 1
            if isinstance(item, DataError):
                if bad_rows == "error":
                    raise item
                stats.bad += 1
                first_bad = first_bad or str(item)
            else:
                good = True
                records.append(item)
        if first_bad and not good:
            raise nothing_good(source, first_bad)
        stats.first_bad = stats.first_bad or first_bad
        if empty:
            raise DataError(f"data file {source} holds no rows; give one that does, or leave it out")
    return records, stats


def require_file(source: str) -> None:
    """Raise DataError for a path without a file."""
    if os.path.isfile(source):
        return
    folder = os.path.dirname(source) or "."
    there = (
        sorted(f for f in os.listdir(folder) if not f.startswith("."))[:8] if os.path.isdir(folder) else []
    )
    hint = f"{folder} has {', '.join(there)}" if there else f"and neither does the folder {folder}"
    raise DataError(f"data file {source} does not exist; {hint}")


def require_source(source: str) -> None:
    """Raise DataError for what is no file, and cannot be the name of a hub data set."""
    plain = source.removesuffix(".gz")
    if os.path.isdir(source):
        there = sorted(f for f in os.listdir(source) if f.removesuffix(".gz").endswith(FILE_ENDINGS))
        raise DataError(
            f"{source} is a folder; name a file in it"
            + (f", such as {os.path.join(source, there[0])}" if there else "")
        )
    if plain.endswith(FILE_ENDINGS) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        require_file(source)


def nothing_good(source: str, first_bad: str) -> DataError:
    """What is said of a source whose rows are all bad, where bad rows are skipped."""
    return DataError(
        f"{source} holds no good row, so skipping the bad ones leaves nothing; the first: {first_bad}"
    )


def parse_line(line: bytes, where: str) -> Record | DataError:
    """A row of a .jsonl file."""
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return DataError(f"{where} is not UTF-8 ({byte}); save it as UTF-8")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return DataError(f"{where} is not valid JSON: {error.msg} (column {error.colno})")
    except ValueError as error:  # a number of thousands of digits
        return DataError(f"{where} is not valid JSON: {str(error).split(';')[0]}")
    except RecursionError:
        return too_deep(where)
    return as_record(row, where)


def too_deep(where: str) -> DataError:
    return DataError(f"{where} is nested deeper than {DEEPEST} levels; flatten it")


def as_record(row: Any, where: str) -> Record | DataError:
    """A row that was parsed from a file: an object of texts that a tokenizer takes, not nested without end."""
    if not isinstance(row, dict):
        return DataError(f"{where} is a {type(row).__name__}, not an object")
    values: list[Any] = [row]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for value in values:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and (half := _HALF.search(value)):
                return DataError(
                    f"{where} holds {half[0]!r}, half of a surrogate pair, which no text has; write the whole character"
                )
        values = inner
        if not values:
            return Record(where, row)
    return too_deep(where)


def read_source(source: str) -> Iterator[Record | DataError]:
    """The rows of one file or hub data set, with DataError in the place of a bad one."""
    require_source(source)
    if not os.path.exists(source):
        yield from (Record(f"{source} row {i + 1}", dict(row)) for i, row in enumerate(load_stored(source)))
        return
    plain = source.removesuffix(".gz")
    if plain.endswith(".parquet"):
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(source).to_pylist()
        except Exception as error:
            raise DataError(
                f"{source} is not a readable parquet file: {str(error).splitlines()[0]}"
            ) from None
        yield from (Record(f"{source} row {i + 1}", row) for i, row in enumerate(rows))
        return
    if not plain.endswith(FILE_ENDINGS):
        raise DataError(f"{source} has an ending that is not known; use one of {', '.join(FILE_ENDINGS)}")
    try:
        with gzip.open(source, "rb") if source.endswith(".gz") else open(source, "rb") as f:
            content = f.read().removeprefix(codecs.BOM_UTF8)  # some programs write it first
    except (OSError, EOFError) as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    if plain.endswith(".csv"):
        # Bytes that are no UTF-8 become halves of surrogate pairs, which nothing else in the file can.
        yield from _csv_rows(source, content.decode(errors="surrogateescape"))
    elif plain.endswith(".json") and content.lstrip().startswith(b"["):
        try:
            rows = json.loads(content.decode())
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"{source} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{source} line {error.lineno} is not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise DataError(f"{source} is not valid JSON: {str(error).split(';')[0]}") from None
        except RecursionError:
            raise too_deep(source) from None
        yield from (as_record(row, f"{source} row {i + 1}") for i, row in enumerate(rows))
    else:
        for number, row in enumerate(content.split(b"\n"), 1):
            if row.strip():
                yield parse_line(row, f"{source} line {number}")


def _csv_rows(source: str, text: str) -> Iterator[Record | DataError]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        names = list(reader.fieldnames or [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{source} has the column {twice[0]!r} twice; rename or remove one")
        if half := _HALF.search(" ".join(names)):
            raise _not_utf8(f"{source} line 1", half[0])
        for row in reader:
            where = f"{source} line {reader.line_num}"
            if None in row or any(v is None for v in row.values()):
                yield DataError(f"{where} has another number of fields than the header")
            elif half := _HALF.search(" ".join(row.values())):
                yield _not_utf8(where, half[0])
            else:
                yield Record(where, dict(row))
    except csv.Error as error:
        raise DataError(
            f"{source} line {reader.line_num + 1} cannot be read: {error}; convert the file to .jsonl"
        ) from None


FINGERPRINTS: dict[str, str] = {}
"""Of hub data sets that were read: what `datasets` tells their content by."""


def _not_utf8(where: str, half: str) -> DataError:
    return DataError(f"{where} is not UTF-8 (byte 0x{ord(half) - 0xDC00:02x}); save it as UTF-8")


def load_stored(source: str) -> Any:
    """A parquet file or a hub data set as `datasets` keeps it: memory-mapped, rows by number."""
    import datasets

    file = source.endswith(".parquet") and os.path.exists(source)
    name, _, split = source.partition(":")
    try:
        if file:
            return datasets.load_dataset("parquet", data_files=source, split="train")
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if file:
            raise DataError(f"{source} is not a readable parquet file: {reason}") from None
        raise DataError(
            f"{source} is no file here, and as a hub data set it cannot be loaded: {reason}"
        ) from None
    FINGERPRINTS[source] = str(getattr(rows, "_fingerprint", ""))
    return rows


def require_columns(records: Sequence[Record], *wanted: Sequence[str]) -> None:
    """Each of `wanted` is a list of alternatives, one of which some row must have. Raises DataError naming
    what exists.
    """
    have = sorted({name for record in records for name in record.columns})
    for alternatives in wanted:
        if records and not any(name in have for name in alternatives):
            source = records[0].where.rsplit(" ", 2)[0]
            needed = " or ".join(repr(a) for a in alternatives)
            raise DataError(f"{source} has no column {needed}; its columns are {', '.join(have)}")
