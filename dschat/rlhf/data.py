"""From files to token ids: columns, chat templates, length limits, batches with explicit masks.

Sources: .jsonl, .json (a list, as DeepSpeed-Chat's local files), .csv, .parquet, each also .gz except
parquet; anything else is the name of a hub data set, `org/name` or `org/name:split`, read through `datasets`.

Columns: `prompt` is a text, or a list of chat messages {role, content}; `chosen`, `rejected`, `completion`,
`response` are texts, or messages, which may begin with the prompt's; `messages` is a whole conversation whose last
message is the response. Of an answer of several messages the assistant's are learnt. Texts are taken literally;
messages go through the tokenizer's chat template. All other columns are kept and reach reward functions by name.

Pairs without a prompt share one: the messages, or the text, that chosen and rejected both begin with. A prompt that
is a text beside whole conversations is read out of them, in the same way.

Masks are made from lengths, never from token ids, so a pad token that is also EOS does no harm. A completion
ends with the token that ends a turn, so that stopping is learnt. Everything random is a function of (seed,
epoch), so that a data position is a step number.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import io
import json
import math
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import token_cache

Message = Mapping[str, str]
PromptText = str | list[dict[str, str]]
Answer = str | list[dict[str, str]]
"""A text, or the messages of several turns, of which the first and the last are the assistant's."""
RESPONSE_COLUMNS = ("completion", "response", "chosen", "messages")
MARKER = "dschat-marker"  # stands for an assistant's words, to see what a chat template puts behind them
FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
DEEPEST = (
    64  # lists and objects within each other; far from where Python's recursion ends, here and in libraries
)
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


# ---------------------------------------------------------------------------------------------- reading files


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
            content = f.read().removeprefix(
                codecs.BOM_UTF8
            )  # some programs put it before the first character
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


# -------------------------------------------------------------------------------------------- texts to tokens


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        raise DataError(f"{name} is the text {_short(value)}, but it must be a list of messages")
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{name} is {_short(value)}, which is neither a text nor a list of messages")
    for message in value:
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"{name} holds {_short(message)}, which is no message with the texts role and content"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def answer_text(value: Any, name: str) -> str:
    """The text of a completion column: itself, or the content of its last message."""
    if isinstance(value, str):
        return value
    return _messages(value, name)[-1]["content"]


def prompt_of(columns: Mapping[str, Any], answer: str | None = None) -> PromptText:
    """The prompt of a row: its prompt column, or what precedes the assistant's last message in the `answer` or
    messages column; all of it where the assistant has yet to speak.
    """
    value = columns.get("prompt")
    if isinstance(value, str):
        if not value:
            raise DataError("prompt is empty")
        return value
    have = [name for name in columns if columns[name] is not None]
    if "prompt" in have:
        return _messages(value, "prompt")
    sources = [
        n for n in (answer, "messages") if n in have and (n != answer or not isinstance(columns[n], str))
    ]
    if not sources:
        raise DataError(
            f"there is neither a prompt nor a messages column, but {', '.join(have) or 'nothing'}; add a prompt"
        )
    conversation = _messages(columns[str(sources[0])], str(sources[0]))
    if conversation[-1]["role"] != "assistant":
        return conversation
    if len(conversation) < 2:
        raise DataError(f"{sources[0]} holds a single message, so there is no prompt before it; add a prompt")
    return conversation[:-1]


def _turns(value: Any, name: str) -> list[dict[str, str]]:
    """Messages that end with an answer."""
    turns = _messages(value, name)
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"{name} ends with a message of {turns[-1]['role']!r}, so it has no answer; end with one of the assistant"
        )
    return turns


def _is_whole(prompt: Any, turns: Sequence[Message]) -> bool:
    """Whether messages hold the prompt too, because the row has none or only the text of one."""
    return prompt is None or (isinstance(prompt, str) and turns[0]["role"] != "assistant")


def _behind(prompt: PromptText, turns: list[dict[str, str]], name: str) -> Answer:
    """The answer to a prompt that messages, which may begin with it, give."""
    n = len(prompt)
    answer = turns[n:] if len(turns) > n and turns[:n] == prompt else turns
    if answer[0]["role"] != "assistant":
        raise DataError(
            f"{name} does not go on from the prompt but begins with another message of {answer[0]['role']!r}; begin it "
            "with the prompt's messages or with one of the assistant"
        )
    return answer[0]["content"] if len(answer) == 1 else answer


def answered(columns: Mapping[str, Any], name: str) -> tuple[PromptText, Answer]:
    """Prompt and answer of a row whose answer is in column `name`."""
    value = columns[name]
    if isinstance(value, str):
        return prompt_of(columns), value
    turns = _turns(value, name)
    whole = _is_whole(columns.get("prompt"), turns)
    prompt = prompt_of({name: turns}, name) if whole else prompt_of(columns)
    return prompt, _behind(prompt, turns, name)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many of the first items of both are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pair_of(columns: Mapping[str, Any]) -> tuple[PromptText, Answer, Answer]:
    """Prompt, chosen and rejected of a row; without a prompt it is what the two share at their beginning."""
    chosen, rejected, prompt = columns["chosen"], columns["rejected"], columns.get("prompt")
    if chosen == rejected:
        raise DataError("chosen and rejected are equal, so nothing can be learnt from them")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None or columns.get("messages") is not None:
            return prompt_of(columns), chosen, rejected
        # As in TRL: the space before the first words that differ is theirs.
        shared = chosen[: _common(chosen, rejected)].removesuffix(" ")
        if not shared:
            raise DataError(
                "there is neither a prompt nor a messages column, and chosen and rejected share no beginning; add a "
                "prompt"
            )
        return shared, chosen[len(shared) :], rejected[len(shared) :]
    if isinstance(chosen, str) or isinstance(rejected, str):
        return prompt_of(columns), *(
            v if isinstance(v, str) else _behind(prompt_of(columns), _turns(v, name), name)
            for name, v in (("chosen", chosen), ("rejected", rejected))
        )  # type: ignore[return-value]
    both = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    given: PromptText
    if _is_whole(prompt, both[0]):
        n = min(_common(*both), *(len(turns) - 1 for turns in both))
        if not n or any(turns[n]["role"] != "assistant" for turns in both):
            raise DataError(
                "chosen and rejected answer differing prompts; let both begin with the same messages, up to the "
                "assistant's where they part"
            )
        given = both[0][:n]
    else:
        given = prompt_of(columns)
    answers = _behind(given, both[0], "chosen"), _behind(given, both[1], "rejected")
    return given, *answers


class Encoder:
    """Token ids of prompts and completions for one tokenizer.

    system_prompt: put before conversations that have no system message; None leaves it to the template.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None, name: str = "the tokenizer") -> None:
        self.tokenizer, self.system_prompt, self.name = tokenizer, system_prompt, name
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{name} has no EOS token, so no end of an answer could be learnt; set tokenizer.eos_token"
            )
        self.eos_id = int(tokenizer.eos_token_id)
        # Any id does for padding, because nothing here looks at it; masks say what is real.
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id)
        self.end_id = self._end_of_turn() if tokenizer.chat_template else self.eos_id

    def _end_of_turn(self) -> int:
        """The token with which the chat template ends an assistant's turn (Llama 3: <|eot_id|>, not EOS)."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARKER}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{self.name} has a chat template that fails on a question and its answer: {reason}; mend "
                "tokenizer.chat_template, or set it to None for plain texts"
            ) from error
        if MARKER not in text:
            raise DataError(
                f"{self.name} has a chat template that leaves out what the assistant says, so no end of a turn can "
                "be found; mend tokenizer.chat_template, or set it to None for plain texts"
            )
        after = self.tokenizer(text[text.rfind(MARKER) + len(MARKER) :], add_special_tokens=False)[
            "input_ids"
        ]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return int(after[0]) if after and after[0] in special else self.eos_id

    def settings(self) -> dict[str, Any]:
        """What decides the ids that come out, as plain values."""
        return {"tokenizer": token_cache.fingerprint(self.tokenizer), "system_prompt": self.system_prompt}

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which an answer ends: the end of a turn and EOS."""
        return sorted({self.end_id, self.eos_id})

    def prompt(self, prompt: PromptText) -> list[int]:
        """Ids of a text (with the tokenizer's own BOS rule) or of messages up to where the assistant
        speaks.
        """
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_id else ids
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name} has no chat template, which messages need; use texts as prompts")
        if self.system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self.system_prompt}, *prompt]
        try:
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise DataError(f"the chat template refuses the prompt: {str(error).splitlines()[0]}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def completion(self, text: str) -> list[int]:
        """Ids of an answer, the token that ends the turn included."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def answer(self, said: Answer) -> list[int]:
        """Ids of an answer, the tokens that end its turns included; ~id where others speak, which is not learnt."""
        if isinstance(said, str):
            return self.completion(said)
        ids: list[int] = []
        others: list[Message] = []
        for message in said:
            if message["role"] != "assistant":
                others.append(message)
                continue
            if ids:
                ids += [~i for i in self._between(others, "answer", ended=True)]
            ids += self.completion(message["content"])
            others = []
        return ids

    def observation(self, said: str | Message, chat: bool, ended: bool) -> list[int]:
        """Ids of what an environment answers, up to where the policy speaks again.

        In a chat: the message (a text is the user's) as the template puts it behind an assistant's turn, whose end
        is added where the turn did not end by itself. In plain text: the text as it is.
        """
        if not chat:
            if not isinstance(said, str):
                raise DataError(
                    f"the observation is {_short(said)}, but the prompt is a text; answer with a text"
                )
            return list(self.tokenizer(said, add_special_tokens=False)["input_ids"])
        message = (
            {"role": "user", "content": said}
            if isinstance(said, str)
            else _messages([said], "observation")[0]
        )
        return self._between([message], "observation", ended)

    def _between(self, messages: Sequence[Message], what: str, ended: bool) -> list[int]:
        """Ids from the end of an assistant's turn, without the token that ends it where it has `ended`, through the
        messages of others up to the next turn."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARKER}, *messages]
        if not self.tokenizer.chat_template:
            raise DataError(f"{self.name} has no chat template, which messages need; use texts")
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise DataError(f"the chat template refuses the {what}: {str(error).splitlines()[0]}") from None
        ids = self.tokenizer(text[text.rfind(MARKER) + len(MARKER) :], add_special_tokens=False)["input_ids"]
        return list(ids[1:] if ended and ids and ids[0] == self.end_id else ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


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


E = TypeVar("E")
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
    size = -(-len(records) // (4 * workers))
    pieces = [range(i, min(i + size, len(records))) for i in range(0, len(records), size)]
    _forked = encoding, records
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
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
            raise DataError(
                f"{margin} is {_short(columns[margin])}, which is not a number; give a finite one"
            )
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


# ---------------------------------------------------------------------------------------------------- batches


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, longest]; mask is bool and made from the lengths."""
    width = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long, device="cpu")
    mask = torch.zeros((len(rows), width), dtype=torch.bool, device="cpu")
    for i, row in enumerate(rows):
        if row:
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, where] = torch.as_tensor(row, dtype=torch.long, device="cpu")
            mask[i, where] = True
    return ids, mask


@dataclass
class Sequences:
    """Prompts padded on the left, completions on the right, so that column P is every row's first answer
    token.

    prompt_ids, prompt_mask [B, P]; completion_ids, completion_mask [B, C]. The same layout as a Rollout.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int,
        device: torch.device | None = None,
    ) -> Sequences:  # fmt: skip
        """device: where the model is that reads them; None: the CPU."""
        made = (*pad(prompts, pad_id, "left"), *pad(completions, pad_id, "right"))
        return cls(*(tensor.to(device) for tensor in made))

    def select(self, rows: slice | Sequence[int]) -> Sequences:
        """The sequences of some rows."""
        return Sequences(
            self.prompt_ids[rows],
            self.prompt_mask[rows],
            self.completion_ids[rows],
            self.completion_mask[rows],
        )

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)


def answer_batch(
    examples: Sequence[Example], answers: Sequence[int], pad_id: int, device: torch.device | None = None
) -> tuple[Sequences, Tensor]:
    """The answers of these numbers, those of one number in a row, and which of their tokens are learnt: bool [B, C]."""
    batch = Sequences.of(
        [e.prompt_ids for _ in answers for e in examples], [e.answers[k] for k in answers for e in examples],
        pad_id, device,
    )  # fmt: skip
    learnt, _ = pad([e.learnt_of(k) for k in answers for e in examples], 0, "right")
    return batch, learnt.to(batch.completion_mask)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in an epoch, a function of its arguments alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    return [int(i) for i in generator.permutation(n)]


def fill(lengths: Sequence[int], budget: int, seed: int) -> list[list[int]]:
    """Rows in batches of at most `budget` tokens: the longest first, each into the fullest batch that has room for it.

    The seed decides which of the rows of one length go where. No row may be longer than the budget.
    """
    batches: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once
    having: dict[int, list[list[int]]] = {}  # room -> batches
    for row in sorted(epoch_order(len(lengths), seed, 0), key=lambda row: -lengths[row]):
        place = bisect.bisect_left(rooms, lengths[row])
        if place < len(rooms):
            room = rooms[place]
            batch = having[room].pop()
            if not having[room]:
                del having[room], rooms[place]
        else:
            room, batch = budget, []
            batches.append(batch)
        batch.append(row)
        room -= lengths[row]
        if room and room not in having:
            bisect.insort(rooms, room)
        if room:
            having.setdefault(room, []).append(batch)
    return batches


@dataclass(frozen=True)
class Schedule:
    """Which rows make up step `s`: the data position of a run is its step number, nothing else needs saving.

    Every epoch is a new order; its last batch may be smaller. max_steps cuts short or, being larger, adds
    epochs.
    """

    rows: int
    batch_size: int
    epochs: int = 1
    max_steps: int = 0
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Rows of step 0, 1, ..."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch_order(self.rows, self.seed, epoch)[k * self.batch_size : (k + 1) * self.batch_size]


def chunks(items: Sequence[E], size: int) -> Iterator[Sequence[E]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
