"""Splits by content, mixtures, streamed rows, the token cache and the workers."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers_rlhf import numbers, same_weights

from dschat.config import ConfigError, DPOConfig, GRPOConfig, RewardConfig, SFTConfig
from dschat.rlhf import conversations, data, reading, reward, sft, sources, token_cache

WORDS = ["cat", "dog", "sun", "red", "big", "sad", "box", "hat"]


def write(path: Path, n: int, name: str = "", repeat: int = 1) -> str:
    rows = [
        {"prompt": f"{name}{i} {WORDS[i % 8]}", "chosen": f"yes {i} {j}", "rejected": "no"}
        for i in range(n)
        for j in range(repeat)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def prompts(config, which="train"):
    return [r.columns["prompt"] for r in sources.records(config, which)[0]]


# ------------------------------------------------------------------------------------------------------ splits


def test_stages_get_their_parts(tmp_path):
    """2,4,4 as DeepSpeed-Chat's: three parts that are disjoint and complete, of about the shares' sizes, and no prompt
    stands in two of them.
    """
    file = write(tmp_path / "d.jsonl", 600, repeat=2)
    parts = {
        cls.command: prompts(cls(data=[file], data_split="2,4,4"))
        for cls in (SFTConfig, RewardConfig, DPOConfig, GRPOConfig)
    }
    assert parts["reward"] == parts["dpo"]
    sets = [set(parts[name]) for name in ("sft", "reward", "grpo")]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 600
    for found, share in zip(sets, (0.2, 0.4, 0.4), strict=True):
        assert abs(len(found) / 600 - share) < 0.06
    assert all(count == 2 for part in parts.values() for count in Counter(part).values())
    assert set(prompts(SFTConfig(data=[file], data_split="1,0,0"))) == set.union(*sets)
    with pytest.raises(reading.DataError, match=r"no row left for training of grpo with data_split 1,0,0"):
        prompts(GRPOConfig(data=[file], data_split="1,0,0"))


def test_held_out_rows_follow_their_content(tmp_path):
    """Sorting, adding and repeating rows moves no row to the other side."""
    file = write(tmp_path / "d.jsonl", 400)
    config = SFTConfig(data=[file], eval_split=0.25)
    train, held = set(prompts(config)), set(prompts(config, "eval"))
    assert not train & held and len(train | held) == 400 and 70 < len(held) < 130
    lines = Path(file).read_text().splitlines()
    more = tmp_path / "more.jsonl"
    extra = [json.dumps({"prompt": f"new {i}", "chosen": "a"}) for i in range(50)]
    more.write_text("\n".join([*extra, *reversed(lines), lines[0]]))
    again = SFTConfig(data=[str(more)], eval_split=0.25)
    assert train <= set(prompts(again)) and held <= set(prompts(again, "eval"))
    both = SFTConfig(data=[file], eval_split=0.25, data_split="2,4,4")
    assert abs(len(prompts(both, "eval")) / 80 - 0.25) < 0.15, "the two splits are independent"
    assert (
        sources.records(SFTConfig(data=[file], eval_split=0.25, max_eval_rows=5), "eval")[0][4:]
        and len(prompts(SFTConfig(data=[file], eval_split=0.25, max_eval_rows=5), "eval")) == 5
    )


def test_chats_split_by_what_precedes_the_answer():
    question = {"role": "user", "content": "hi"}
    sides = {
        sources.place({"messages": [question, {"role": "assistant", "content": a}]}, "eval") for a in "abc"
    }
    assert len(sides) == 1
    assert sources.place({"messages": [{"role": "user", "content": "ho"}, question]}, "eval") not in sides
    assert sources.place({"text": "a"}, "eval") != sources.place({"text": "b"}, "eval")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data_split": "2,4"}, "data_split is '2,4', but it must be three numbers"),
        ({"data_split": "2,-4,4"}, "must be three numbers"),
        ({"data_split": "0,0,0"}, "must be three numbers"),
        ({"data_split": "a,b,c"}, "must be three numbers"),
        ({"eval_split": 1.0}, "eval_split is 1.0"),
        ({"eval_split": 0.1, "eval_data": ["e"]}, "held-out rows come from one of the two"),
        ({"data_weights": [1.0, 2.0]}, "for 1 data sources; give each one a number above 0"),
        ({"data_weights": [0.0]}, "give each one a number above 0"),
        ({"stream": True, "data_workers": 2}, "leave out token_cache and data_workers"),
    ],
)
def test_settings_that_cannot_be(more, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**{"data": ["d.jsonl"], **more})


# ---------------------------------------------------------------------------------------------------- mixtures


def test_mixture(tmp_path):
    """Proportions are kept to the row, a small source is repeated evenly, and the same seed chooses the same rows."""
    a, b = write(tmp_path / "a.jsonl", 90, "a"), write(tmp_path / "b.jsonl", 10, "b")
    config = SFTConfig(data=[a, b], data_weights=[3.0, 1.0])
    rows, stats = sources.records(config, "train")
    found = Counter(r.columns["prompt"] for r in rows)
    counts = [sum(n for p, n in found.items() if p.startswith(x)) for x in "ab"]
    assert counts == [75, 25] and f"75 of {a}" in stats.sentence("x")
    assert {n for p, n in found.items() if p.startswith("a")} == {1}
    assert sorted(n for p, n in found.items() if p.startswith("b")) == [2] * 5 + [3] * 5
    assert prompts(config) == [r.columns["prompt"] for r in rows]
    assert prompts(SFTConfig(data=[a, b], data_weights=[3.0, 1.0], seed=1)) != prompts(config)
    for weights in ([1.0, 1.0], [1.0, 3.0], [0.001, 1.0], [2.0, 5.0]):
        chosen = Counter(s for s, _ in sources.blend([7, 11], weights, 0))
        for source in (0, 1):
            assert abs(chosen[source] - 18 * weights[source] / sum(weights)) < 1
        assert sum(chosen.values()) == 18


# ----------------------------------------------------------------------------------------------------- stream


def test_streamed_run_is_the_run_in_memory(base, tmp_path):
    """The same steps, numbers and weights, while records hold places in the file and not rows."""

    def run(folder, **more):
        config = SFTConfig(
            **{**base, **more, "output_dir": str(tmp_path / folder), "response": "chosen", "max_length": 64,
               "lora_r": 2, "batch_size": 4, "max_steps": 3, "eval_split": 0.2}
        )  # fmt: skip
        sft.train(config)
        return config

    run("memory")
    config = run("stream", stream=True)
    assert numbers(tmp_path / "memory") == numbers(tmp_path / "stream")
    assert same_weights(tmp_path / "memory" / "model", tmp_path / "stream" / "model")
    rows, _ = sources.records(config, "train")
    assert all(isinstance(r, sources.StoredRecord) and r._columns is None for r in rows)


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_parquet_and_hub_are_streamed(base, tmp_path, monkeypatch, kind):
    """Rows come one at a time out of a memory-mapped file, and the run is the one on the same rows in memory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in Path(base["data"][0]).read_text().splitlines()]
    source = str(tmp_path / "d.parquet")
    datasets.Dataset.from_list(rows).to_parquet(source)
    if kind == "hub":
        stored = datasets.load_dataset("parquet", data_files=source, split="train")
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"org/name": stored}[name])
        source = "org/name:train"

    def run(folder, **more):
        keys = {"response": "chosen", "max_length": 64, "lora_r": 2, "batch_size": 4, "max_steps": 2}
        config = SFTConfig(
            **{
                **base,
                **more,
                **keys,
                "data": [source],
                "eval_split": 0.2,
                "output_dir": str(tmp_path / folder),
            }
        )
        sft.train(config)
        return config

    run("memory")
    config = run("stream", stream=True)
    assert numbers(tmp_path / "memory") == numbers(tmp_path / "stream")
    found, _ = sources.records(config, "train")
    assert all(isinstance(r, sources.StoredRecord) and r._columns is None for r in found)
    held, _ = sources.records(config, "eval")
    assert sorted(json.dumps(r.columns) for r in [*found, *held]) == sorted(map(json.dumps, rows))
    assert {r.where for r in [*found, *held]} == {f"{source} row {i + 1}" for i in range(12)}


def test_what_cannot_be_streamed(tmp_path):
    for name, message in (
        ("bad.parquet", r"bad\.parquet is not a readable parquet file"),
        ("no.parquet", r"no\.parquet does not exist"),
        ("a.csv", r"a\.csv cannot be streamed; unpack or convert it to \.jsonl or \.parquet"),
        ("a.jsonl.gz", r"a\.jsonl\.gz cannot be streamed"),
    ):
        if "no" not in name:
            (tmp_path / name).write_text("garbage")
        with pytest.raises(reading.DataError, match=message) as error:
            sources.records(SFTConfig(data=[str(tmp_path / name)], stream=True), "train")
        assert "\n" not in str(error.value)


def test_streamed_rows(tmp_path, stories_tokenizer):
    """Rows that do not fit are replaced by the next; broken lines are found at the start, changes later."""
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "one", "chosen": "two " * (60 if i in (1, 2) else 1), "n": i} for i in range(4)]
    file.write_text(json.dumps(rows[0]) + "\n\nnonsense\n" + "".join(json.dumps(r) + "\n" for r in rows[1:]))
    encoder = conversations.Encoder(stories_tokenizer)
    keys = {"data": [str(file)], "stream": True, "max_length": 20}
    with pytest.raises(reading.DataError, match=r"d\.jsonl line 3 is not valid JSON"):
        sources.records(SFTConfig(**keys), "train")
    config = SFTConfig(**keys, bad_rows="skip")
    records, stats = sources.records(config, "train")
    examples = data.sft_examples(records, encoder, stats, max_length=20, **data.preparation(config))
    assert [e.columns["n"] for e in examples[:]] == [0, 3, 3, 3] and stats.bad == 1
    assert examples[0].where.endswith("line 1") and examples[3].where.endswith("line 6")
    with pytest.raises(reading.DataError, match="all are bad or over max_length 2"):
        data.sft_examples(records, encoder, stats, max_length=2, **data.preparation(config))[0]
    file.write_text("x" * 10)
    with pytest.raises(reading.DataError, match="line 1 has changed since the run began"):
        examples[0]
    with pytest.raises(reading.DataError, match=r"data file a\.csv does not exist"):
        sources.records(SFTConfig(data=["a.csv"], stream=True), "train")
    with pytest.raises(reading.DataError, match="does not exist"):
        sources.records(SFTConfig(data=[str(tmp_path / "no.jsonl")], stream=True), "train")


# ---------------------------------------------------------------------------------------------- cache, workers


def pairs_of(file, tokenizer, **more):
    records, stats = reading.read([file])
    more = {"max_length": 24, "bad_rows": "skip", **more}
    return data.pair_examples(records, conversations.Encoder(tokenizer), stats, **more), stats


@pytest.fixture
def mixed_rows(tmp_path) -> str:
    """Good, bad and overlong rows."""
    file = Path(write(tmp_path / "d.jsonl", 40))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[7]["chosen"] = rows[7]["rejected"]
    rows[9]["chosen"] = "long " * 60
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def test_workers_change_nothing(mixed_rows, stories_tokenizer):
    for overlong in ("drop", "cut"):
        alone, stats = pairs_of(mixed_rows, stories_tokenizer, overlong=overlong)
        several, counted = pairs_of(mixed_rows, stories_tokenizer, overlong=overlong, workers=3)
        assert alone == several and stats == counted and stats.bad == 1
        assert (stats.dropped, stats.cut) == ((1, 0) if overlong == "drop" else (0, 1))
    with pytest.raises(reading.DataError, match=r"line 8: chosen and rejected are equal"):
        pairs_of(mixed_rows, stories_tokenizer, workers=2, bad_rows="error")


def test_cache_gives_the_same_and_tokenizes_nothing(mixed_rows, stories_tokenizer, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first, stats = pairs_of(mixed_rows, stories_tokenizer, cache=cache)
    monkeypatch.setattr(conversations.Encoder, "completion", None)
    monkeypatch.setattr(conversations.Encoder, "prompt", None)
    again, counted = pairs_of(mixed_rows, stories_tokenizer, cache=cache)
    assert again == first and counted.notes == ["token ids from the cache"]
    assert (counted.kept, counted.dropped, counted.bad, counted.first_bad) == (
        stats.kept, stats.dropped, stats.bad, stats.first_bad,
    )  # fmt: skip
    for more in ({"max_length": 25}, {"overlong": "cut"}):
        with pytest.raises(TypeError):
            pairs_of(mixed_rows, stories_tokenizer, cache=cache, **more)
    Path(mixed_rows).write_text(Path(mixed_rows).read_text().replace("yes 3", "yes 4"))
    with pytest.raises(TypeError):
        pairs_of(mixed_rows, stories_tokenizer, cache=cache)
    assert len(os.listdir(cache)) == 1 and not any("pkl" in f or "pickle" in f for f in os.listdir(cache))


def test_another_tokenizer_is_another_key(stories_tokenizer):
    before = token_cache.fingerprint(stories_tokenizer)
    template = stories_tokenizer.chat_template
    stories_tokenizer.chat_template = "{{ messages }}"
    changed = token_cache.fingerprint(stories_tokenizer)
    stories_tokenizer.chat_template = template
    assert changed != before == token_cache.fingerprint(stories_tokenizer)
    a, b = ({"tokenizer": t, "system_prompt": None} for t in (before, changed))
    keys = {
        token_cache.key_of(rows, s) for s in (a, b) for rows in ([{"x": 1}], [{"x": 1}, {}], [{"x": 2}], [])
    }
    assert len(keys) == 8


@pytest.mark.parametrize("damage", ["truncate", "flip", "lose", "json"])
def test_damaged_entries_are_made_anew(mixed_rows, stories_tokenizer, tmp_path, damage):
    cache = tmp_path / "cache"
    first, _ = pairs_of(mixed_rows, stories_tokenizer, cache=str(cache))
    (entry,) = cache.iterdir()
    ids = entry / "ids.safetensors"
    if damage == "truncate":
        os.truncate(ids, 40)
    elif damage == "flip":
        content = bytearray(ids.read_bytes())
        content[-1] ^= 1
        ids.write_bytes(content)
    elif damage == "lose":
        ids.unlink()
    else:
        (entry / "rows.json").write_text("{")
    for _ in range(2):
        again, stats = pairs_of(mixed_rows, stories_tokenizer, cache=str(cache))
        assert again == first
    assert stats.notes == ["token ids from the cache"]


def test_stages_use_the_cache(base, tmp_path):
    """The keys reach the stages: a second run on the same rows takes its ids from the cache and learns the same."""
    for folder in ("a", "b"):
        more = {
            "output_dir": str(tmp_path / folder),
            "token_cache": str(tmp_path / "cache"),
            "data_workers": 2,
        }
        small = {"max_length": 64, "lora_r": 2, "batch_size": 4, "max_steps": 2}
        reward.train(RewardConfig(**{**base, **small, **more}))
    assert len(os.listdir(tmp_path / "cache")) == 1
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
