"""Rewards: functions, models, sums of several, and one sentence for a function that misbehaves."""

from __future__ import annotations

import math

import pytest
import torch

from dschat.config import ConfigError
from dschat.rlhf import rewards as R


def length(prompts, completions, **columns):
    return [len(c) for c in completions]


def answer(prompts, completions, answer, **columns):
    return [1.0 if a in c else None for a, c in zip(answer, completions, strict=True)]


class Model:
    def rate(self, batch):
        return batch * 10


def test_weighted_sum_and_none():
    """A completion that no source scores is invalid; one that some source scores gets those sources' sum."""
    sources = [("model", Model()), ("answer", answer)]
    rewards = R.Rewards(sources, [0.5, 2.0])
    batch = torch.tensor([1.0, 2.0])
    total, valid, parts = rewards(batch, ["p"] * 2, ["yes x", "no"], {"answer": ["yes", "yes"]})
    assert total.tolist() == [7.0, 10.0] and valid.tolist() == [True, True]
    assert parts["model"].tolist() == [10.0, 20.0] and math.isnan(parts["answer"][1])
    total, valid, _ = R.Rewards(sources[1:])(batch, ["p"] * 2, ["yes x", "no"], {"answer": ["yes", "yes"]})
    assert total.tolist() == [1.0, 0.0] and valid.tolist() == [True, False]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        (3.0, "returned a float for 2 completions"),
        ([1.0, "x"], "returned 'x' for completion 1; return a number or None"),
        ([1.0, math.nan], "returned nan for completion 1; return a finite number"),
    ],
)
def test_bad_return_values(value, message):
    def bad(prompts, completions, **columns):
        return value

    with pytest.raises(R.RewardError, match=f"reward function bad {message}"):
        R.call_function(bad, ["a", "b"], ["c", "d"], {})


def test_tensors_and_columns():
    def fn(prompts, completions, number, **columns):
        assert isinstance(number, list) and columns == {}
        return torch.tensor(number)

    assert R.call_function(fn, ["a", "b"], ["c", "d"], {"number": (1, 2)}).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/mine.py:other", "has no function other; it has score"),
        ("{tmp}/nowhere.py:score", "which does not exist"),
        ("{tmp}/broken.py:score", "cannot be imported: ZeroDivisionError"),
        ("no.such.module:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_bad_function_names(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        R.load_function(source.format(tmp=tmp_path))
    good = R.load_function(f"{tmp_path}/mine.py:score")
    assert good(prompts=["a"], completions=["b"]) == [1.0]
    assert R.load_function("os.path:join")("a", "b") == "a/b"  # type: ignore[arg-type,comparison-overlap]


def test_names(tmp_path):
    (tmp_path / "odd:name").mkdir()
    assert R.is_function_name("pkg.mod:fn") and R.is_function_name("/x/y.py:fn")
    assert not R.is_function_name("runs/reward") and not R.is_function_name(str(tmp_path / "odd:name"))
    with pytest.raises(ConfigError, match="there is no reward"):
        R.Rewards([])
    with pytest.raises(ConfigError, match="1 weights for 2 rewards"):
        R.Rewards([("a", length), ("b", length)], [1.0])
    assert R.prompt_text("x") == "x" and R.prompt_text([{"role": "user", "content": "y"}]) == "y"
