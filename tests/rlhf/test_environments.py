"""Environments: what is masked, whose log-probs they are, where episodes end, and that one is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights

from dschat import cli, config_text
from dschat.config import ConfigError, GRPOConfig, PPOConfig
from dschat.engine import HybridEngine, SamplingConfig
from dschat.rlhf import conversations, data, environments, grpo, ppo, reading, replay

RECIPES = Path(__file__).parents[2] / "recipes"


class Echo:
    """Answers with the row's word; done after `length` actions; the reward is the turn's number."""

    seen: list[str] = []

    def reset(self, word, length=9, **columns):
        self.word, self.length, self.turn = word, length, 0
        return "Once upon a time"

    def step(self, action):
        Echo.seen.append(action)
        self.turn += 1
        return environments.Step(f" Then {self.word} said:", float(self.turn), self.turn == self.length)


ROWS = [{"word": "Tom"}, {"word": "Lily", "length": 1}, {"word": "the big dog"}]


def example(encoder, columns, factory=Echo):
    prompt = environments.first_prompt(factory, columns)
    return data.Example(encoder.prompt(prompt), [], prompt, columns, "row")


def play(engine, encoder, rows=ROWS, factory=Echo, *, n=2, tokens=5, max_turns=3, max_tokens=60, **sampling):
    settings = SamplingConfig(
        max_new_tokens=tokens, n=n, eos_token_id=encoder.stop_ids, pad_token_id=encoder.pad_id, **sampling
    )
    examples = [example(encoder, r, factory) for r in rows]
    return environments.play(
        engine, encoder, factory, examples, settings, max_turns=max_turns, max_tokens=max_tokens
    )


@pytest.fixture
def encoder(stories_tokenizer):
    return conversations.Encoder(stories_tokenizer)


@pytest.fixture
def engine(new_stories_model):
    return HybridEngine(new_stories_model(), exact=True)


def test_observations_are_masked_and_the_rest_is_not(engine, encoder):
    """Every row is action, observation, action, ...: the ids are those of the observation, and only those are not
    actions.
    """
    episodes = play(engine, encoder)
    assert episodes.turns.tolist() == [3, 3, 1, 1, 3, 3] and episodes.finished.tolist() == [0, 0, 1, 1, 0, 0]
    for row in range(6):
        said = encoder.observation(f" Then {ROWS[row // 2]['word']} said:", False, False)
        real = episodes.completion_mask[row]
        ids, actions = episodes.completion_ids[row][real].tolist(), episodes.actions[row][real].tolist()
        assert not episodes.actions[row][~real].any()
        turns = int(episodes.turns[row])
        edges = [i for i in range(1, len(ids)) if actions[i] != actions[i - 1]]
        assert actions[0] and actions[-1] and len(edges) == 2 * (turns - 1)
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            assert ids[begin:end] == said
        assert (episodes.logprobs[row][~episodes.actions[row]] == 0).all()
        assert episodes.rewards[row].sum() == sum(range(1, turns + 1))
        ends = [e - 1 for e in edges[::2]] + [len(ids) - 1]
        assert episodes.rewards[row].nonzero().squeeze(1).tolist() == ends


def test_log_probs_are_those_of_the_training_forward(engine, encoder):
    """Bit for bit across turns, though each turn was prefilled anew; and those of Hugging Face in float64."""
    episodes = play(engine, encoder, temperature=0.7)
    keep = episodes.actions
    with torch.no_grad():
        ours = engine.logprobs(episodes)
    assert torch.equal(ours[keep], episodes.logprobs[keep]) and keep.sum() > 30
    model = engine.model.double()
    for row in range(len(episodes)):
        ids = torch.cat([episodes.prompt_ids[row], episodes.completion_ids[row]])
        real = torch.cat([episodes.prompt_mask[row], episodes.completion_mask[row]])
        with torch.no_grad():
            logits = model(ids[real][None]).logits[0].double() / 0.7
        start = int(episodes.prompt_mask[row].sum())
        tokens = ids[real][start:]
        theirs = logits.log_softmax(-1)[start - 1 : -1].gather(1, tokens[:, None]).squeeze(1)
        acted = keep[row][episodes.completion_mask[row]]
        got = episodes.logprobs[row][episodes.completion_mask[row]][acted].double()
        torch.testing.assert_close(got, theirs[acted], atol=2e-4, rtol=0)


def test_the_environment_hears_exactly_what_was_drawn(engine, encoder):
    Echo.seen.clear()
    episodes = play(engine, encoder, rows=ROWS[:1], n=1)
    row = episodes.completion_mask[0]
    ids, actions = episodes.completion_ids[0][row].tolist(), episodes.actions[0][row].tolist()
    turns, last = [], False
    for token, acted in zip(ids, actions, strict=True):
        if acted and not last:
            turns.append([])
        if acted:
            turns[-1].append(token)
        last = acted
    assert [encoder.decode(t) for t in turns] == Echo.seen and len(turns) == 3


def test_turns_and_tokens_are_limited(engine, encoder):
    """After max_turns nothing more is asked; where an observation and a full action do not fit, the episode ends."""
    one = play(engine, encoder, max_turns=1)
    assert one.turns.tolist() == [1] * 6 and one.completion_ids.shape[1] <= 5 and not one.overflowed.any()
    said = [len(encoder.observation(f" Then {r['word']} said:", False, False)) for r in ROWS]
    limit = 5 + max(said[0], said[2]) + 4  # the longer observation leaves room for 4 tokens only
    tight = play(engine, encoder, max_tokens=limit)
    assert tight.completion_mask.sum(1).max() <= limit
    long_rows = [0, 1] if said[0] > said[2] else [4, 5]
    assert tight.turns[long_rows].tolist() == [1, 1] and tight.overflowed[long_rows].all()
    assert not tight.overflowed[2:4].any() and tight.finished[2:4].all(), "done is not overflow"
    roomy = play(engine, encoder, max_tokens=limit + 1)
    assert roomy.turns[long_rows].tolist() == [2, 2]


def test_more_than_the_context_is_refused_before_a_token_is_drawn(engine, encoder):
    Echo.seen.clear()
    room = engine.spec.context - len(encoder.prompt("Once upon a time"))
    with pytest.raises(ConfigError, match=f"lower max_new_tokens to {room} or less"):
        play(engine, encoder, max_tokens=room + 1)
    assert not Echo.seen
    play(engine, encoder, max_tokens=room, max_turns=1)


def test_first_turn_is_the_plain_rollout(engine, encoder):
    """Samples of one prompt differ, and an environment that ends at once changes nothing about them."""
    rows = [{"word": "Tom", "length": 1}]
    episodes = play(engine, encoder, rows=rows, n=4)
    ids = torch.tensor([encoder.prompt("Once upon a time")])
    settings = SamplingConfig(
        max_new_tokens=5, n=4, eos_token_id=encoder.stop_ids, seed=environments.derive_seed(0, "turn", 0)
    )
    plain = engine.generate(ids, None, settings)
    assert torch.equal(episodes.completion_ids, plain.completion_ids)
    assert (
        torch.equal(episodes.logprobs, plain.logprobs)
        and len(set(map(tuple, plain.completion_ids.tolist()))) > 1
    )


def test_observations_of_a_chat_continue_the_template(stories_tokenizer):
    """Prompt, action, observation as ids are the template's text of that conversation, ended by itself or not."""
    tokenizer = stories_tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        encoder = conversations.Encoder(tokenizer)
        turns = [{"role": "user", "content": "Hello"}]
        action = tokenizer("Hi there", add_special_tokens=False)["input_ids"]
        for ended in (True, False):
            seen = encoder.observation({"role": "tool", "content": "42"}, True, ended)
            ids = encoder.prompt(turns) + action + [encoder.end_id] * ended + seen
            whole = [*turns, {"role": "assistant", "content": "Hi there"}, {"role": "tool", "content": "42"}]
            text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
            assert ids.count(encoder.end_id) == 3
        with pytest.raises(reading.DataError, match=r"which is no message"):
            encoder.observation({"role": "tool"}, True, True)  # type: ignore[typeddict-item]
    finally:
        tokenizer.chat_template = before
    with pytest.raises(reading.DataError, match="answer with a text"):
        conversations.Encoder(tokenizer).observation({"role": "tool", "content": "42"}, False, True)


def test_a_broken_chat_template_is_said(stories_tokenizer):
    before = stories_tokenizer.chat_template
    try:
        stories_tokenizer.chat_template = "{{ raise_exception('no assistants here') }}"
        with pytest.raises(reading.DataError, match="fails on a question and its answer: no assistants here"):
            conversations.Encoder(stories_tokenizer)
        stories_tokenizer.chat_template = "{{ messages[0].content }}"
        with pytest.raises(reading.DataError, match="leaves out what the assistant says"):
            conversations.Encoder(stories_tokenizer)
    finally:
        stories_tokenizer.chat_template = before


def test_rewards_of_turns_stay_where_they_were_earned(engine, encoder):
    episodes = play(engine, encoder, n=1)
    score = torch.zeros_like(episodes.rewards)
    for row in range(3):
        score[row, int(episodes.actions[row].nonzero().max())] = float(episodes.rewards[row].sum()) - 0.5
    moved = environments.credit_turns(score, episodes)
    torch.testing.assert_close(moved.sum(1), score.sum(1))
    last = score != 0
    assert torch.equal(moved[~last], episodes.rewards[~last])
    torch.testing.assert_close(moved[last], episodes.rewards[last] - 0.5)
    assert torch.equal(environments.credit_turns(score, episodes, 0.0), score)


# ------------------------------------------------------------------------------------------------ in training


def keys(base: dict, tmp_path: Path, **more) -> dict:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    small = {
        "data": [str(path)], "environment": f"{__file__}:Echo", "max_turns": 2, "turn_tokens": 5,
        "max_new_tokens": 30, "batch_size": 4, "prompts_per_step": 3, "samples_per_prompt": 2, "max_steps": 2,
        "lora_r": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    return {**base, **small, **more}


def test_ppo_of_episodes_resumes_bit_for_bit(base, tmp_path, kill_after):
    def run(folder):
        more = {"output_dir": str(tmp_path / folder), "exact": True, "max_steps": 3, "eval_data": None}
        more["eval_data"] = [str(tmp_path / "rows.jsonl")]
        ppo.train(PPOConfig(**keys(base, tmp_path, **more)))

    run("straight")
    kill_after(2)
    with pytest.raises(Killed):
        run("again")
    kill_after(None)
    run("again")
    assert numbers(tmp_path / "again") == numbers(tmp_path / "straight")
    assert same_weights(tmp_path / "again", tmp_path / "straight")
    logged = numbers(tmp_path / "straight")
    assert all(n["policy/first_ratio_deviation"] == 0.0 and n["episode/turns"] > 1 for n in logged)
    assert logged[0]["kl/sequence"] == 0.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 'no', float('nan'), True",
            "gave reward nan in episode 0; .*the batch is in .*failed-step-000001",
        ),
        ("return 'no', 'much', True", "gave reward 'much'; return a number"),
        ("return 'no'", r"returned 'no'; return \(observation, reward, done\)"),
    ],
)
def test_bad_environments_are_said(base, tmp_path, body, message):
    file = tmp_path / "bad.py"
    file.write_text(
        f"class Bad:\n def reset(self, **c):\n  return 'Once'\n def step(self, action):\n  {body}\n"
    )
    with pytest.raises(ConfigError, match=message):
        grpo.train(GRPOConfig(**keys(base, tmp_path, environment=f"{file}:Bad")))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('first\\nsecond line')", "the environment's step raised ValueError: first"),
        ("raise SystemExit(0)", "the environment's step raised SystemExit: 0"),
        ("return 'no', 'much', True", "the environment's step gave reward 'much'; return a number"),
        ("return 'no'", "the environment's step returned 'no'"),
        ("return 7, 1.0, False", "the observation is 7"),
    ],
)
def test_an_environment_that_fails_keeps_its_episode(base, tmp_path, capsys, body, said):
    """By its command: exit code 2 and one sentence; the failed episode's row and actions are played again by replay."""
    file = tmp_path / "game.py"
    source = (
        "class Game:\n"
        "    def reset(self, number, **columns):\n        self.turn = 0\n        return 'Once upon a time'\n"
        "    def step(self, action):\n        self.turn += 1\n"
        "        if self.turn == 2:\n            {}\n"
        "        return ' Then', 1.0, False\n"
    )
    file.write_text(source.format(body))
    keys = {**base, "lora_r": 2, "batch_size": 4, "prompts_per_step": 2, "samples_per_prompt": 2, "max_turns": 3,
            "max_new_tokens": 24, "turn_tokens": 4, "environment": f"{file}:Game", "max_steps": 2}  # fmt: skip
    flags = [f"--{k}={v[0] if isinstance(v, list) else v}" for k, v in keys.items()]
    assert cli.main(["grpo", *flags]) == 2
    folder = tmp_path / "run" / "failed-step-000001"
    error = capsys.readouterr().err
    assert said in error and f"the batch is in {folder}" in error and error.count("\n") == 1
    kept = json.loads((folder / "batch.json").read_text())["episode"]
    assert set(kept["columns"]) >= {"number", "chosen"} and len(kept["actions"]) == 2
    assert (folder / "traceback.txt").is_file() == ("raise" in body)
    again = replay.replay(str(folder))
    assert again.where == "environment" and said in again.lines[-1]
    if "second" in body:
        assert any("second line" in line for line in again.lines)
    file.write_text(source.format("pass"))
    assert not replay.replay(str(folder)).where


def test_a_reset_that_ends_the_process_is_refused(base, tmp_path):
    file = tmp_path / "game.py"
    file.write_text(
        "class Game:\n    def reset(self, **columns):\n        raise SystemExit(0)\n"
        "    def step(self, action):\n        return '', 0.0, True\n"
    )
    with pytest.raises(reading.DataError, match="reset refuses the row: SystemExit: 0"):
        grpo.train(GRPOConfig(**{**base, "environment": f"{file}:Game", "max_new_tokens": 8}))


def test_reset_that_changes_is_refused(base, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "import random\nclass Bad:\n def reset(self, **c):\n  return 'Once' + str(random.random())\n"
        " def step(self, action):\n  return '', 0.0, True\n"
    )
    with pytest.raises(
        ConfigError, match=r"gave another prompt for .*rows.jsonl line .* let it depend on the row"
    ):
        grpo.train(GRPOConfig(**keys(base, tmp_path, environment=f"{file}:Bad")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"turn_tokens": 31}, "turn_tokens is 31, .* raise max_new_tokens to 31"),
        ({"turn_tokens": 0, "max_turns": 31}, "raise max_new_tokens to 31"),
        ({"max_turns": 0}, "max_turns is 0"),
        ({"compare_hf": 3}, "set compare_hf to 0"),
        ({"reward_weights": [1.0, 1.0]}, "give one weight a reward, the environment first"),
    ],
)
def test_settings_that_cannot_be(base, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**keys(base, tmp_path, **more))


def test_names_that_are_no_environment(base, tmp_path):
    with pytest.raises(ConfigError, match=r"environment .* has no class Nothing"):
        environments.load_environment(f"{__file__}:Nothing")
    with pytest.raises(ConfigError, match="has no method reset"):
        environments.load_environment(f"{__file__}:keys")
    with pytest.raises(reading.DataError, match=r"reset refuses the row: TypeError: .*word"):
        environments.first_prompt(Echo, {})


# ----------------------------------------------------------------------------------------- the worked example


def test_a_game_is_learnt(tmp_path, monkeypatch):
    """The recipe, cut short: the name that an observation told comes up in the next action, which needs both the
    observation's tokens in the context and the reward at the right action.
    """
    monkeypatch.chdir(RECIPES.parent)
    flags = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": "14",
        "progress": "false",
        "tensorboard": "false",
    }
    config = config_text.load(GRPOConfig, str(RECIPES / "friend.yaml"), flags)
    held = grpo.train(config)["held_out"]
    assert held["before"] < 0.4 and held["low"] > 0.2, held


def test_games_of_the_recipes():
    namespace: dict = {}
    exec((RECIPES / "games.py").read_text(), namespace)
    game = namespace["Guess"]()
    assert "between 1 and 20" in game.reset(secret=7, high=20)[0]["content"]
    assert game.step("I say 10!") == ("Answer with one number and nothing else.", 0.0, False)
    assert game.step("10.") == ("Lower than 10.", 0.3, False)
    assert game.step("12") == ("Lower than 12.", 0.1, False), "against what was said"
    assert game.step("3") == ("Higher than 3.", 0.3, False)
    assert game.step(" 7") == ("Yes!", 1.0, True)
    tool = namespace["Calculator"]()
    tool.reset(prompt="How many?", answer="-1,200")
    assert tool.step("calc: 2*(3 - -4)/ 7") == ("2", 0.1, False)
    assert tool.step("calc: 1/0") == ("That cannot be calculated.", 0.0, False)
    assert tool.step("So -1200") == ("", 1.0, True)
    for bad in ("", "1 +", "(1", "2 2", "((((", ")", "1 //2"):
        assert namespace["evaluate"](bad) is None
    assert namespace["evaluate"]("-2*-(1+0.5)") == 3.0


def test_the_recipe_for_the_chat_model_is_valid():
    config = config_text.load(GRPOConfig, str(RECIPES / "guess.yaml"), {})
    assert environments.load_environment(str(RECIPES.parent / config.environment))
