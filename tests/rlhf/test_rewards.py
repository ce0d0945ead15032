"""Rewards: functions, models, sums of several, and one sentence for a function that misbehaves."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time

import numpy as np
import pytest
import torch

from dschat import cli
from dschat.config import ConfigError, GRPOConfig
from dschat.rlhf import grpo, replay
from dschat.rlhf import rewards as R
from dschat.rlhf.metrics import read_lines


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
        ([1.0, "2.0"], "returned '2.0' for completion 1; return a number or None"),
        ([1.0, [2.0]], r"returned \[2.0\] for completion 1; return a number or None"),
        ([1.0, torch.ones(1)], r"returned tensor\(\[1.\]\) for completion 1; return a number or None"),
        (torch.ones(2, 1), r"returned shape \[2, 1\] for 2 completions; return \[2\]"),
        (np.float32(1), r"returned shape \[\] for 2 completions"),
        (np.ones(3), "returned 3 values for 2 completions"),
        ({"a": 1.0, "b": 2.0}, "returned a dict for 2 completions"),
        (None, "returned a NoneType for 2 completions"),
    ],
)
def test_bad_return_values(value, message):
    def bad(prompts, completions, **columns):
        return value

    with pytest.raises(R.RewardError, match=f"reward function bad {message}"):
        R.call_function(bad, ["a", "b"], ["c", "d"], {})


def test_tensors_and_columns():
    def fn(prompts, completions, number, **columns):
        assert isinstance(number, list) and set(columns) < set(R.ARGUMENTS)
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


# ------------------------------------------------------------------------------------------------ TRL's callables


SAY = {
    "list": lambda: [1.5, None],
    "tuple": lambda: (1.5, None),
    "array": lambda: np.array([1.5, 2.5]),
    "objects": lambda: np.array([1.5, None], dtype=object),
    "tensor": lambda: torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True),
    "scalars": lambda: [np.float64(1.5), torch.tensor(2.5)],
    "bools": lambda: [True, None],
}


@pytest.mark.parametrize("kind", SAY)
def test_every_kind_of_list(kind):
    found = R.call_function(lambda completions: SAY[kind](), ["a", "b"], ["c", "d"], {})
    assert found.dtype == torch.float32 and found[0] == (1.0 if kind == "bools" else 1.5)
    assert found[1] == 2.5 or math.isnan(found[1])


def test_a_function_gets_what_its_signature_takes():
    """No **kwargs: exactly the named arguments; with it everything, and columns never hide what is passed."""
    columns = {"answer": ["x", "y"], "other": [1, 2], "completion_ids": ["no", "no"], "prompt": ["no", "no"]}
    ids, state = [[5, 6], [7]], R.TrainerState(global_step=3, max_steps=9, epoch=0.5)
    seen: dict = {}

    def few(completions, answer, trainer_state):
        seen["few"] = (completions, answer, trainer_state.global_step, trainer_state.epoch)
        return [0.0, 0.0]

    def everything(**given):
        seen["all"] = given
        return [0.0, 0.0]

    def tokens(completion_ids, *, other=None, absent="default"):
        seen["tokens"] = (completion_ids, other, absent)
        return [float(len(i)) for i in completion_ids]

    class Judge:
        def __call__(self, completions, scale=2.0):
            return [scale, scale]

    functions = [few, everything, tokens, functools.partial(Judge(), scale=3.0)]
    found = R.call_functions(functions, ["p", "q"], ["c", "d"], columns, ids, state)
    assert seen["few"] == (["c", "d"], ["x", "y"], 3, 0.5)
    assert seen["tokens"] == (ids, [1, 2], "default") and found[2].tolist() == [2.0, 1.0]
    assert set(seen["all"]) == {
        "prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra", "answer", "other",
    }  # fmt: skip
    assert seen["all"]["completion_ids"] == ids and seen["all"]["trainer_state"] is state
    assert found[3].tolist() == [3.0, 3.0] and R.function_name(functions[3]) == "Judge"
    with pytest.raises(R.RewardError, match="tokens needs 'completion_ids', which is not given here"):
        R.call_function(tokens, ["p"], ["c"], {})


def test_conversations_are_messages():
    """Where the prompt is messages, so is the completion: one message of the assistant."""
    chat = [{"role": "user", "content": "hello"}]

    def format_reward(completions, **kwargs):
        return [float(completion[0]["content"].startswith("<a>")) for completion in completions]

    def see(prompts, completions):
        assert prompts == [chat, "text"] and completions == [[{"role": "assistant", "content": "c"}], "d"]
        return [0.0, 0.0]

    assert R.call_function(format_reward, [chat, chat], ["<a>x", "y"], {}).tolist() == [1.0, 0.0]
    R.call_function(see, [chat, "text"], ["c", "d"], {})


def test_async_functions_wait_together():
    """Two functions that wait for each other's start: only together do they end. In a notebook, a loop runs already."""
    here = [False, False]

    def waits(i):
        async def fn(completions, **columns):
            here[i] = True
            for _ in range(500):
                if all(here):
                    return [1.0 + i, None]
                await asyncio.sleep(0.01)
            return [0.0, 0.0]

        fn.__name__ = f"waits_{i}"
        return fn

    rewards = R.Rewards([("a", waits(0)), ("plain", lambda completions: [0.5, 0.5]), ("b", waits(1))])
    total, valid, parts = rewards(None, ["p", "q"], ["c", "d"], {})
    assert total.tolist() == [3.5, 0.5] and valid.all() and math.isnan(parts["a"][1])

    async def notebook():
        return R.call_function(waits(0), ["p", "q"], ["c", "d"], {})

    assert asyncio.run(notebook())[0] == 1.0


def test_async_functions_that_fail():
    async def bad(completions):
        await asyncio.sleep(0)
        raise KeyError("no such key")

    async def leaves(completions):
        raise SystemExit(0)

    async def good(completions):
        return [1.0] * len(completions)

    for function, said in (
        (bad, "bad raised KeyError: 'no such key'"),
        (leaves, "leaves raised SystemExit: 0"),
    ):
        with pytest.raises(R.RewardError, match=said) as caught:
            R.call_functions([good, function], ["p"], ["c"], {})
        assert f"in {function.__name__}" in caught.value.trace
    assert R.call_function(good, ["p"], ["c"], {}).tolist() == [1.0], "the loop still runs"


def write(folder, text):
    """A file of reward functions, and its name."""
    file = folder / f"mine_{time.time_ns()}.py"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def f(completions, solution): ...",
            "f needs 'solution', which is no column of .*chosen, number, rejected",
        ),
        (
            "def f(completions, numbers): ...",
            r"f needs 'numbers', which is no column of .*did you mean number\?",
        ),
        ("def f(completions, completions_ids): ...", r"completions_ids.*did you mean completion_ids\?"),
        ("def f(prompt, completions): ...", r"f needs 'prompt'.*did you mean prompts\?"),
        (
            "def f(completions, /, **columns): ...",
            "f takes completions by its position alone.*take the / out",
        ),
    ],
)
@pytest.mark.parametrize("given", ["by name", "in Python", "for held-out rows"])
def test_arguments_are_checked_before_models_load(base, tmp_path, monkeypatch, source, message, given):
    """An argument that nothing gives ends the run before a weight is read, and nothing is written."""
    monkeypatch.setattr("dschat.rlhf.models.load_policy", lambda *a, **k: pytest.fail("loaded"))
    function = f"{write(tmp_path, source)}:f"
    more = {"max_new_tokens": 4, "max_prompt_length": 16}
    if given == "for held-out rows":
        if "/" not in source:
            rows = [{"prompt": "a", "number": 1, "solution": "b", "numbers": 2, "completions_ids": 1}]
            (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            more |= {"eval_data": base["data"], "data": [str(tmp_path / "train.jsonl")]}
    rewards, names = ([R.load_function(function)], []) if given == "in Python" else ([], [function])
    with pytest.raises(ConfigError, match=message):
        grpo.train(GRPOConfig(**{**base, **more, "reward": names}), rewards=rewards)
    assert not (tmp_path / "run").exists()


def test_columns_that_only_later_rows_have_are_found(base, tmp_path):
    """Rows of several tasks: a column counts wherever it stands in the file."""
    from dschat.rlhf import checks

    rows = [{"prompt": "a", "one": 1}, {"prompt": "b", "two": 2}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    function = R.load_function(f"{write(tmp_path, 'def f(completions, two, **columns): ...')}:f")
    checks.require_rewards(GRPOConfig(**{**base, "data": [str(tmp_path / "two.jsonl")]}), [function])


def test_a_run_gives_them_all(base, tmp_path):
    """The arguments in a real run: ids whose text is the completion, a state that counts, and what functions log."""
    seen = []

    def fn(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, number):
        seen.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
        assert len(prompts) == len(completions) == len(completion_ids) == len(number) == 4
        assert all(isinstance(i, int) for ids in completion_ids for i in ids)
        log_metric("characters", sum(map(len, completions)) / 4)
        log_extra("tokens", [len(ids) for ids in completion_ids])
        return [float(len(ids)) if n % 2 else None for ids, n in zip(completion_ids, number, strict=True)]

    async def slow(completions):
        await asyncio.sleep(0)
        return np.array([len(c) for c in completions])

    more = {"lora_r": 2, "batch_size": 4, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4}
    config = GRPOConfig(**{**base, **more, "max_steps": 3, "eval_data": base["data"], "max_eval_rows": 4})
    grpo.train(config, rewards=(fn, slow))
    assert seen == [(0, 3, 0.0), (0, 3, 0.0), (1, 3, 1 / 6), (2, 3, 2 / 6), (3, 3, 0.5)]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(line["reward/characters"] == line["rewards/slow/mean"] for line in lines)
    assert all("rewards/slow/std" in line for line in lines)
    rows = read_lines(tmp_path / "run" / "completions.jsonl")
    assert all(1 <= row["tokens"] <= 4 for row in rows if "before" not in row)


# ------------------------------------------------------------------------------------------- functions that fail

SMALL = {"lora_r": 2, "batch_size": 4, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('no such word')", "f raised KeyError: 'no such word'"),
        ("raise ValueError('first\\nsecond line\\nthird')", "f raised ValueError: first"),
        ("raise SystemExit(0)", "f raised SystemExit: 0"),
        ("exit()", "f raised SystemExit"),
        ("assert False", "f raised AssertionError"),
    ],
)
@pytest.mark.parametrize("how", ["def", "async def"])
def test_a_function_that_raises_ends_the_run_and_keeps_its_batch(base, tmp_path, capsys, body, said, how):
    """By its command: exit code 2, a sentence with the function's name, and batch and traceback for dschat replay."""
    if body == "exit()":
        body = "import sys; sys.exit()"
    file = write(tmp_path, f"{how} f(completions, **columns):\n    {body}\n")
    keys = {**base, **SMALL, "reward": f"{file}:f", "max_steps": 2}
    flags = [f"--{k}={v[0] if isinstance(v, list) else v}" for k, v in keys.items()]
    assert cli.main(["grpo", *flags]) == 2
    folder = tmp_path / "run" / "failed-step-000001"
    trace = folder / "traceback.txt"
    error = capsys.readouterr().err
    assert (
        f"reward function {said}; the batch is in {folder}" in error and f"traceback is in {trace}" in error
    )
    assert error.count("\n") == 1 and "in f" in trace.read_text() and file in trace.read_text()
    if "second" in body:
        assert "first\nsecond line\nthird\n" in trace.read_text()
    kept = json.loads((folder / "batch.json").read_text())
    assert len(kept["completions"]) == len(kept["columns"]["number"]) == 4 and said in kept["message"]
    again = replay.replay(str(folder))
    assert again.where == "rewards" and f"failed: rewards: reward function {said}" in again.lines[-1]
    assert any(file in line for line in again.lines), "the traceback, too"
    open(file, "w").write("def f(completions, trainer_state, **c):\n    return [1.0] * len(completions)\n")
    assert not replay.replay(str(folder)).where


def test_a_file_that_ends_itself_is_refused(base, tmp_path, capsys):
    file = write(tmp_path, "raise SystemExit(0)\n")
    flags = [f"--{k}={v[0] if isinstance(v, list) else v}" for k, v in base.items()]
    assert cli.main(["grpo", *flags, "--reward", f"{file}:f"]) == 2
    assert "cannot be imported: SystemExit: 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_without_any_reward_is_said(base):
    def silent(completions):
        return [None] * len(completions)

    async def mute(completions):
        return [None] * len(completions)

    with pytest.warns(UserWarning, match="reward function silent, mute returned None for all 4 completions"):
        grpo.train(GRPOConfig(**{**base, **SMALL, "max_steps": 1}), rewards=(silent, mute))


def test_numbers_of_each_reward_have_a_name_of_their_own():
    one, two = torch.tensor([1.0, 3.0]), torch.tensor([float("nan"), 5.0])
    found = R.numbers({"runs/a/model": one, "short": two})
    assert found == {
        "rewards/a/mean": 2.0, "rewards/a/std": pytest.approx(2**0.5), "rewards/short/mean": 5.0,
        "rewards/short/std": 0.0,
    }  # fmt: skip
    found = R.numbers({"x/reward/model": one, "y/reward/model": two})
    assert (found["rewards/x/reward/model/mean"], found["rewards/y/reward/model/mean"]) == (2.0, 5.0)
