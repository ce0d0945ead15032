"""Data: formats, columns, templates, masks, and one sentence for whatever is wrong with a row."""

from __future__ import annotations

import csv
import gzip
import json
import os

import pytest
import torch

from dschat.config import SFTConfig
from dschat.rlhf import batching, conversations, data, reading, sources

MODEL = os.path.join(os.path.dirname(__file__), "..", "data", "stories260k")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def encoder(plain):
    return conversations.Encoder(plain)


@pytest.fixture
def chat(plain):
    import copy

    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = TEMPLATE
    return conversations.Encoder(tokenizer)


ROWS = [
    {"prompt": "Once upon", "chosen": "a time", "rejected": "the end", "score": 3},
    {"prompt": "There was", "chosen": "a\u2028cat", "rejected": "no\ncat", "score": 4},
]


def write(path, rows=ROWS) -> str:
    name = str(path)
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), name)
        return name
    if ".csv" in name:
        import io

        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif ".jsonl" in name:
        text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    else:
        text = json.dumps(rows)
    data = text.encode()
    with gzip.open(name, "wb") if name.endswith(".gz") else open(name, "wb") as f:
        f.write(data)
    return name


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"])
def test_formats(tmp_path, ending):
    records, stats = reading.read([write(tmp_path / f"x.{ending}")])
    assert stats.read == 2
    for record, row in zip(records, ROWS, strict=True):
        assert {k: str(v) for k, v in record.columns.items()} == {k: str(v) for k, v in row.items()}
        assert "x." + ending in record.where
    assert len(reading.read([str(tmp_path / f"x.{ending}")] * 2, limit=3)[0]) == 3


def test_bad_lines_have_file_and_number(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n[1]\n{"prompt": "b"}\n')
    with pytest.raises(reading.DataError, match=r"x\.jsonl line 2 is not valid JSON"):
        reading.read([str(path)])
    records, stats = reading.read([str(path)], bad_rows="skip")
    assert [r.where.rsplit(" ", 1)[1] for r in records] == ["1", "4"]
    assert (stats.read, stats.bad) == (4, 2) and "line 2" in stats.sentence("x")
    ragged = tmp_path / "x.csv"
    ragged.write_text("a,b\n1,2\n3\n")
    with pytest.raises(reading.DataError, match=r"x\.csv line 3 has another number of fields"):
        reading.read([str(ragged)])


UNREADABLE = {
    "bytes": (
        b'{"prompt": "b", "chosen": "\xff"}',
        r"is not UTF-8 \(byte 0xff at column 28\); save it as UTF-8",
    ),
    "surrogate": (
        rb'{"prompt": "b", "chosen": ["\ud800"]}',
        r"holds '\\ud800', half of a surrogate pair, .*; write the whole character",
    ),
    "key": (rb'{"\udc80": "b"}', r"holds '\\udc80', half of a surrogate pair"),
    "depth": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"is nested deeper than 64 levels"),
    "less deep": (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}", r"is nested deeper than 64 levels"),
    "digits": (b'{"prompt": ' + b"1" * 5000 + b"}", r"is not valid JSON: .*digits"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_line_that_cannot_be_read_is_a_bad_row(tmp_path, kind, stream):
    """With its number; the rows around it are read, and a tokenizer takes every text that is."""
    line, message = UNREADABLE[kind]
    path = tmp_path / "x.jsonl"
    good = '{"prompt": "caf\u00e9 \\ud83d\\ude00", "chosen": "c"}\n'.encode()
    path.write_bytes(good + line + b"\n" + good)
    keys = {"data": [str(path)], "stream": stream, "eval_split": 1e-9}
    for config in (SFTConfig(**keys), SFTConfig(data=[str(path)])):
        with pytest.raises(reading.DataError, match=rf"^\S*x\.jsonl line 2 {message}") as error:
            sources.records(config, "train")
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    rows, stats = sources.records(SFTConfig(**keys, bad_rows="skip"), "train")
    assert [r.columns["prompt"] for r in rows] == ["caf\u00e9 \U0001f600"] * 2
    assert (stats.read, stats.bad) == (3, 1) and "line 2" in stats.first_bad
    assert [r.where.rsplit(" ", 1)[1] for r in rows] == ["1", "3"]


def test_bad_cells_and_items_are_bad_rows(tmp_path):
    """Of a .csv and of a list, as of a .jsonl file."""
    table, listed = tmp_path / "x.csv", tmp_path / "x.json"
    table.write_bytes(b"a,b\n1,2\n3,caf\xe9\n5,6\n")
    listed.write_bytes(rb'[{"a": "1"}, {"a": "\ud800"}, 7, {"a": "5"}]')
    for path, where, message, bad in (
        (table, "line 3", "is not UTF-8 \\(byte 0xe9", 1),
        (listed, "row 2", "half of a surrogate pair", 2),
    ):
        with pytest.raises(reading.DataError, match=f"{path.name} {where} .*{message}"):
            reading.read([str(path)])
        rows, stats = reading.read([str(path)], bad_rows="skip")
        assert [r.columns["a"] for r in rows] == ["1", "5"] and stats.bad == bad
    table.write_bytes(b"a,caf\xe9\n1,2\n")
    with pytest.raises(reading.DataError, match=r"x\.csv line 1 is not UTF-8 .*; save it as UTF-8"):
        reading.read([str(table)], bad_rows="skip")
    listed.write_text("[" * 100_000)
    with pytest.raises(reading.DataError, match=r"x\.json is nested deeper than 64 levels"):
        reading.read([str(listed)], bad_rows="skip")


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_of_bad_rows_alone(tmp_path, stream):
    """Such as one in UTF-16: skipping all of it leaves nothing to train on."""
    path = tmp_path / "x.jsonl"
    path.write_bytes("".join('{"prompt": "a"}\n' * 2).encode("utf-16"))
    config = SFTConfig(data=[str(path)], stream=stream, bad_rows="skip")
    with pytest.raises(reading.DataError, match=r"x\.jsonl.*no (good )?row.*line 1 is not UTF-8"):
        sources.records(config, "train")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_mark_before_the_first_character(tmp_path, ending):
    """Of a file that another program saved as UTF-8 with a byte order mark."""
    write(tmp_path / f"x.{ending}")
    plain, _ = reading.read([str(tmp_path / f"x.{ending}")])
    (tmp_path / f"y.{ending}").write_bytes(b"\xef\xbb\xbf" + (tmp_path / f"x.{ending}").read_bytes())
    marked, _ = reading.read([str(tmp_path / f"y.{ending}")])
    assert plain and [r.columns for r in marked] == [r.columns for r in plain]


def test_a_cell_that_csv_refuses(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n3," + "x" * 200_000 + "\n")
    with pytest.raises(
        reading.DataError, match=r"x\.csv line 3 cannot be read: field larger .*; convert .* to \.jsonl"
    ):
        reading.read([str(path)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"data file .*missing\.jsonl does not exist; .* has other\.jsonl"),
        ("nowhere/x.jsonl", r"nowhere/x\.jsonl does not exist; and neither does the folder"),
        ("", r"is a folder; name a file in it, such as .*other\.jsonl"),
        ("x.txt", r"x\.txt has an ending that is not known; use one of \.jsonl"),
        ("broken.jsonl.gz", r"broken\.jsonl\.gz cannot be read"),
        ("broken.parquet", r"broken\.parquet is not a readable parquet file"),
        ("broken.json", r"broken\.json line 1 is not valid JSON"),
    ],
)
def test_bad_files(tmp_path, name, message):
    write(tmp_path / "other.jsonl")
    if name and "missing" not in name and "nowhere" not in name:
        (tmp_path / name).write_text("[garbage")
    with pytest.raises(reading.DataError, match=message) as error:
        reading.read([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_hub_name_without_network(monkeypatch):
    import datasets

    def refuse(name, split):
        raise ConnectionError(f"no route to {name} {split}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        reading.DataError,
        match=r"org/name:test is no file here, and as a hub data set .* no route to org/name test",
    ):
        reading.read(["org/name:test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"prompt": split}])
    assert reading.read(["org/name"])[0][0].columns == {"prompt": "train"}


def records(*rows) -> list[reading.Record]:
    return [reading.Record(f"f.jsonl line {i + 1}", dict(r)) for i, r in enumerate(rows)]


# ------------------------------------------------------------------------------------------------------ texts


def test_end_of_answer_is_learnt(encoder, plain):
    """checklist 2.1 #1; 2.2 plus 1: every reference ends with EOS, and only complete ones do."""
    (example,) = data.sft_examples(
        records({"prompt": "Once upon a time", "completion": "there was a cat"}), encoder, reading.DataStats()
    )
    assert example.answers[0][-1] == plain.eos_token_id
    assert encoder.decode(example.answers[0]).strip() == "there was a cat"
    assert example.prompt_ids[0] == plain.bos_token_id and example.prompt_ids[-1] != plain.eos_token_id


def test_messages_and_columns(chat, plain):
    turn = [{"role": "user", "content": "Hi"}]
    full = [*turn, {"role": "assistant", "content": "Hello"}]
    rows = records(
        {"prompt": turn, "response": "Hello"},
        {"prompt": turn, "completion": [{"role": "assistant", "content": "Hello"}]},
        {"messages": full},
        {"chosen": full, "rejected": full[:1] + [{"role": "assistant", "content": "Bye"}]},
    )
    examples = data.sft_examples(rows, chat, reading.DataStats())
    assert (
        len({tuple(e.prompt_ids) for e in examples}) == 1
        and len({tuple(e.answers[0]) for e in examples}) == 1
    )
    assert chat.end_id == 2 != chat.eos_id, "the template ends a turn with </s>"
    assert examples[0].answers[0][-1] == 2 and chat.stop_ids == [1, 2]
    assert plain.decode(examples[0].prompt_ids).endswith("<assistant>")
    assert data.prompt_examples(rows, chat, reading.DataStats())[3].prompt_ids == examples[0].prompt_ids
    (pair,) = data.pair_examples(rows[3:], chat, reading.DataStats())
    assert pair.answers[0] == examples[0].answers[0] != pair.answers[1]
    with_system = conversations.Encoder(chat.tokenizer, system_prompt="Be kind")
    assert "Be kind" in plain.decode(with_system.prompt(turn)) and "Be kind" not in plain.decode(
        chat.prompt(turn)
    )
    own = [{"role": "system", "content": "Own"}, *turn]
    assert with_system.prompt(own) == chat.prompt(own)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "there is no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected is 3, which is neither a text nor a list"),
        (
            {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"},
            "no message with the texts role and content",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
            "has no chat template",
        ),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt is empty"),
        ({"chosen": "b", "rejected": "c"}, "neither a prompt nor a messages|neither a text nor a list"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"},
            "margin is 'x', which is not a number",
        ),
    ],
)
def test_bad_rows(encoder, row, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}
    rows = records(good, {"margin": 0.5} | row)
    with pytest.raises(reading.DataError, match=f"^f.jsonl line 2: .*({message})"):
        data.pair_examples(rows, encoder, reading.DataStats(), margin="margin")
    stats = reading.DataStats()
    assert (
        len(data.pair_examples(rows, encoder, stats, margin="margin", bad_rows="skip"))
        == stats.kept
        == stats.bad
        == 1
    )


U, A = (lambda t: {"role": "user", "content": t}), (lambda t: {"role": "assistant", "content": t})


def test_answers_of_several_messages(chat, plain):
    """As TRL takes them; the assistant's turns are learnt, what others say in between is only read."""
    said = [A("Hello"), U("How are you?"), A("Fine"), A("Bye")]
    rows = records(
        {"prompt": [U("Hi")], "completion": said},
        {"prompt": [U("Hi")], "completion": [U("Hi"), *said]},
        {"prompt": [U("Hi")], "completion": "Hello"},
    )
    first, repeated, single = data.sft_examples(rows, chat, reading.DataStats())
    text = chat.tokenizer.apply_chat_template([U("Hi"), *said], tokenize=False)
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = plain.decode(first.prompt_ids + first.answers[0])
    # This tokenizer puts a space before the first word of whatever it is given.
    assert found.replace("<assistant> ", "<assistant>") == plain.decode(ids)
    learnt = [i for i, own in zip(first.answers[0], first.learnt[0], strict=True) if own]
    assert learnt == [i for t in ("Hello", "Fine", "Bye") for i in chat.completion(t)]
    assert first.answers[0][: len(single.answers[0])] == single.answers[0] and single.learnt == []
    assert (repeated.prompt_ids, repeated.answers) == (first.prompt_ids, first.answers)
    batch, mask = batching.answer_batch([first, single], (0,), 0)
    assert mask.sum(1).tolist() == [len(learnt), len(single.answers[0])]
    assert batch.completion_mask.sum(1).tolist() == [len(first.answers[0]), len(single.answers[0])]
    (cut,) = data.sft_examples(
        rows[:1], chat, reading.DataStats(), max_length=len(first.prompt_ids) + 9, overlong="cut"
    )
    assert cut.answers[0] == first.answers[0][:9] and cut.learnt[0] == first.learnt[0][:9]


def test_prompts_that_pairs_share(chat, plain):
    """What both begin with is the prompt, be it messages or texts; a prompt given as a text beside whole
    conversations is theirs, and is put into the template with them."""
    begin = [U("Hi"), A("Hello"), U("So?")]
    rows = records(
        {"prompt": begin, "chosen": [A("a")], "rejected": [A("b")]},
        {"prompt": begin, "chosen": [*begin, A("a")], "rejected": [*begin, A("b")]},
        {"chosen": [*begin, A("a")], "rejected": [*begin, A("b")]},
        {"prompt": "So?", "chosen": [*begin, A("a")], "rejected": [*begin, A("b")]},
        {"prompt": None, "chosen": [*begin, A("a"), U("c"), A("d")], "rejected": [*begin, A("b")]},
    )
    pairs = data.pair_examples(rows, chat, reading.DataStats())
    assert all(p.prompt_ids == chat.prompt(begin) and p.prompt == begin for p in pairs)
    assert all(p.answers == [chat.completion("a"), chat.completion("b")] for p in pairs[:4])
    assert len(pairs[4].answers[0]) > sum(pairs[4].learnt[0]) and all(pairs[4].learnt[1])
    (example,) = data.sft_examples(
        records({"prompt": "Hi", "messages": [*begin, A("a")]}), chat, reading.DataStats()
    )
    assert (example.prompt_ids, example.answers) == (pairs[0].prompt_ids, pairs[0].answers[:1])
    (text,) = data.pair_examples(
        records({"chosen": "It is red", "rejected": "It is blue"}), chat, reading.DataStats()
    )
    assert text.prompt == "It is" and text.answers[0] == chat.completion(" red")
    (asked,) = data.prompt_examples(records({"messages": begin}), chat, reading.DataStats())
    assert asked.prompt == begin, "a conversation that ends with the user is all prompt"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [U("a"), A("b"), U("c")]},
            "messages ends with a message of 'user', .* end with .*assistant",
        ),
        ({"prompt": [U("a")], "completion": [U("c")]}, "completion ends with a message of 'user'"),
        ({"prompt": [U("a")], "completion": [U("b"), A("c")]}, "completion does not go on from the prompt"),
        (
            {"prompt": None, "completion": "b"},
            "there is neither a prompt nor a messages column, but completion",
        ),
        ({"prompt": None, "messages": [A("b")]}, "messages holds a single message, so there is no prompt"),
        ({"prompt": "a", "completion": None}, "there is no response"),
        ({"prompt": "", "completion": [A("b")]}, "prompt is empty"),
    ],
)
def test_bad_answers(chat, row, message):
    rows = records({"prompt": "a", "completion": "b"}, row)
    with pytest.raises(reading.DataError, match=f"^f.jsonl line 2: {message}"):
        data.sft_examples(rows, chat, reading.DataStats())
    stats = reading.DataStats()
    assert len(data.sft_examples(rows, chat, stats, bad_rows="skip")) == stats.bad == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": [U("a"), A("b")], "rejected": [U("c"), A("d")]},
            "chosen and rejected answer differing prompts",
        ),
        (
            {"chosen": [U("a"), A("b"), U("c"), A("d")], "rejected": [U("a"), A("b"), U("x"), A("d")]},
            "chosen and rejected answer differing prompts",
        ),
        (
            {"prompt": [U("a")], "chosen": [U("a"), A("b")], "rejected": [U("c"), A("d")]},
            "rejected does not go on from the prompt",
        ),
        ({"chosen": [U("a"), A("b")], "rejected": [U("a"), A("b")]}, "chosen and rejected are equal"),
        (
            {"chosen": [U("a"), A("b")], "rejected": [U("a"), U("b")]},
            "rejected ends with a message of 'user'",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "there is neither a prompt nor .* share no beginning; add a prompt",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
            "margin is nan, .* a finite",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -float("inf")},
            "margin is -inf, .* a finite",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin is 1000.*, .* a finite"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "nan"}, "margin is 'nan', .* a finite"),
    ],
)
def test_bad_pairs(chat, row, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "0.5"}  # as a .csv file gives it
    rows = records(good, {"margin": 1} | row)
    with pytest.raises(reading.DataError, match=f"^f.jsonl line 2: {message}"):
        data.pair_examples(rows, chat, reading.DataStats(), margin="margin")
    stats = reading.DataStats()
    assert len(data.pair_examples(rows, chat, stats, margin="margin", bad_rows="skip")) == stats.bad == 1


def test_columns_named_twice(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen,prompt\na,b,c\n")
    with pytest.raises(
        reading.DataError, match=r"x\.csv has the column 'prompt' twice; rename or remove one"
    ):
        reading.read([str(path)], bad_rows="skip")


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.jsonl", ""), ("x.jsonl", "\n \n"), ("x.json", "[]"), ("x.csv", "prompt,response\n")],
)
def test_a_file_without_rows(tmp_path, name, text):
    full, path = write(tmp_path / "full.jsonl"), tmp_path / name
    path.write_text(text)
    with pytest.raises(reading.DataError, match=rf"data file .*{name} holds no rows; give one that does"):
        reading.read([full, str(path)])


def test_missing_column(encoder):
    with pytest.raises(
        reading.DataError, match=r"f\.jsonl has no column 'rejected'; its columns are chosen, prompt"
    ):
        data.pair_examples(records({"prompt": "a", "chosen": "b"}), encoder, reading.DataStats())
    with pytest.raises(
        reading.DataError, match="has no column 'completion' or 'response' or 'chosen' or 'messages'"
    ):
        data.sft_examples(records({"prompt": "a"}), encoder, reading.DataStats())
    with pytest.raises(reading.DataError, match="has no column 'reference'"):
        data.sft_examples(records({"prompt": "a"}), encoder, reading.DataStats(), response="reference")


def test_length_limits(encoder):
    long = "once upon a time there was a little cat and a little dog"
    rows = records({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": long})
    dropped, cut = reading.DataStats(), reading.DataStats()
    assert len(data.sft_examples(rows, encoder, dropped, max_length=12)) == 1 and dropped.dropped == 1
    examples = data.sft_examples(rows, encoder, cut, max_length=12, overlong="cut")
    assert cut.cut == 1 and len(examples[1].prompt_ids) + len(examples[1].answers[0]) == 12
    assert examples[1].answers[0][-1] != encoder.end_id, "a cut answer did not end"
    assert "1 over the length limit dropped" in dropped.sentence(
        "x"
    ) and "1 over the length limit cut" in cut.sentence("x")
    with pytest.raises(
        reading.DataError, match=r"no row of f\.jsonl is left: all are over max_length 3; raise it"
    ):
        data.sft_examples(rows[1:], encoder, reading.DataStats(), max_length=3)
    prompts = records({"prompt": long})
    (example,) = data.prompt_examples(
        prompts, encoder, reading.DataStats(), max_prompt_length=5, overlong="cut"
    )
    assert example.prompt_ids == encoder.prompt(long)[-5:]
    with pytest.raises(reading.DataError, match="max_prompt_length 5"):
        data.prompt_examples(prompts, encoder, reading.DataStats(), max_prompt_length=5)


def test_tokenizer_without_eos(plain):
    import copy

    tokenizer = copy.deepcopy(plain)
    tokenizer.eos_token = None
    with pytest.raises(reading.DataError, match="has no EOS token"):
        conversations.Encoder(tokenizer)


# ---------------------------------------------------------------------------------------------------- batches


def test_masks_come_from_lengths():
    """checklist 2.1 #1, #2; 2.2 plus 6: prompts left-padded, answers right-padded, and a pad id inside a row stays
    real.
    """
    s = batching.Sequences.of([[7], [0, 5, 0]], [[0, 0], [4]], pad_id=0)
    assert s.prompt_ids.tolist() == [[0, 0, 7], [0, 5, 0]]
    assert s.prompt_mask.long().tolist() == [[0, 0, 1], [1, 1, 1]]
    assert s.completion_ids.tolist() == [[0, 0], [4, 0]]
    assert s.completion_mask.long().tolist() == [[1, 1], [1, 0]]
    assert s.input_ids.shape == s.attention_mask.shape == (2, 5)
    assert s.attention_mask.dtype == torch.bool
    assert batching.Sequences.of([[1]], [[]], 0).completion_ids.shape == (1, 0)


def test_schedule_is_a_function_of_the_step():
    """checklist 2.1 #24, #25: every epoch sees every row once, in another order, and nothing else needs
    saving.
    """
    s = batching.Schedule(rows=10, batch_size=4, epochs=2, seed=3)
    assert (s.steps_per_epoch, s.total_steps) == (3, 6)
    first, second = ([i for k in range(3) for i in s.indices(e * 3 + k)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert s.indices(4) == batching.Schedule(rows=10, batch_size=4, seed=3).indices(4)
    assert s.indices(0) != batching.Schedule(rows=10, batch_size=4, seed=4).indices(0)
    assert batching.Schedule(rows=10, batch_size=4, max_steps=7).total_steps == 7
    assert [len(c) for c in batching.chunks(range(5), 2)] == [2, 2, 1]
