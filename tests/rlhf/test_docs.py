"""docs/: the algorithm that is shown there runs, and settings and names are those of the code."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from helpers_rlhf import Killed, numbers
from test_grpo import keys, short

from dschat import cli, config_base, config_text
from dschat import config as configs
from dschat.rlhf.metrics import read_lines

DOCS = Path(__file__).parents[2] / "docs"
ALGORITHMS = (DOCS / "algorithms.md").read_text()


def test_the_algorithm_of_the_page_learns_and_resumes(base, tmp_path, kill_after):
    """Less than 150 lines make an algorithm: rising rewards, and a killed run goes on to the same numbers."""
    (source,) = re.findall(r"```python\n(.*?)```", ALGORITHMS, re.DOTALL)
    assert len(source.splitlines()) < 150
    made: dict = {}
    exec(compile(source, "algorithms.md", "exec"), made)

    def run(folder):
        more = {"max_steps": 8, "learning_rate": 1e-2, "kl_coef": 0.01, "exact": True, "max_new_tokens": 12}
        config = made["ReinforceConfig"](
            **keys(base, **more, eval_data=base["data"], max_eval_rows=6, eval_samples=4,
                   output_dir=str(tmp_path / folder))
        )  # fmt: skip
        return made["train"](config, rewards=(short,))

    held = run("straight")["held_out"]
    assert held["low"] > 0 and held["after"] > held["before"]
    kill_after(5)
    with pytest.raises(Killed):
        run("again")
    kill_after(None)
    run("again")
    assert numbers(tmp_path / "again") == numbers(tmp_path / "straight")


def test_settings_of_the_page_are_valid():
    """The variants' settings, all together with the defaults, make a config."""
    rows = re.findall(r"^\| (Dr\. GRPO|DAPO|GSPO|GRPO) \| (.*) \|$", ALGORITHMS, re.MULTILINE)
    assert len(rows) == 4
    for name, text in rows:
        settings = dict(re.findall(r"`(\w+): ([\w.]+)`", text))
        assert settings, name
        config_text.load(configs.GRPOConfig, None, settings)
    known = {k for cls in configs.COMMANDS.values() for k in config_base.field_types(cls)}
    common = ALGORITHMS[ALGORITHMS.index("Common to them:") : ALGORITHMS.index("Published variants")]
    fields = set(re.findall(r"`(\w+)`", common))
    assert fields and fields <= known


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_commands_and_functions_of_the_pages_exist(page):
    from dschat.rlhf import verifiers

    text = (DOCS / page).read_text()
    for command in re.findall(r"^dschat (\w+)|`dschat (\w+)", text, re.MULTILINE):
        assert (command[0] or command[1]) in {*configs.COMMANDS, "launch", "bench"}
    for line in re.findall(r"^dschat (eval .+|report .+|serve .+)$", text, re.MULTILINE):
        command, *words = line.split()
        cls = configs.COMMANDS[command]
        if cls.positional and not words[0].startswith("--"):
            words = [f"--{cls.positional}", *words]
        config_text.load(cls, None, config_text.parse_flags(words, cls))
    for name in re.findall(r"dschat\.rlhf\.verifiers:(\w+)", text):
        assert callable(getattr(verifiers, name))


# --------------------------------------------------------------------------------------------- coming from TRL

TRL = (DOCS / "trl.md").read_text()


def table(title: str) -> list[list[str]]:
    """The cells of the rows of the table under a title."""
    section = TRL.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_settings_for_trl_users_exist():
    commands = {
        "SFTConfig": "sft",
        "RewardConfig": "reward",
        "DPOConfig": "dpo",
        "PPOConfig": "ppo",
        "GRPOConfig": "grpo",
    }
    rows = table("Settings")
    assert len(rows) > 40
    for cls, theirs, ours, *_ in rows:
        assert names(theirs) and (names(ours) or ours == "none"), theirs
        for command in commands.values() if cls == "all" else [commands[cls]]:
            known = config_base.field_types(configs.COMMANDS[command])
            assert set(names(ours)) <= set(known), (command, ours)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_rows_of_trl_are_read_or_refused(stories_tokenizer):
    from copy import deepcopy

    from dschat.rlhf import conversations, data, reading

    tokenizer = deepcopy(stories_tokenizer)
    tokenizer.chat_template = CHAT
    encoder = conversations.Encoder(tokenizer)
    read = {
        "sft": lambda r, s: data.sft_examples(r, encoder, s, max_length=200),
        "reward": lambda r, s: data.pair_examples(r, encoder, s, max_length=200),
        "dpo": lambda r, s: data.pair_examples(r, encoder, s, max_length=200),
        **dict.fromkeys(("ppo", "grpo", "rloo"), lambda r, s: data.prompt_examples(r, encoder, s)),
    }
    rows = table("Data")
    assert len(rows) == 10
    for _, row, where in rows:
        record = reading.Record("row.jsonl line 1", json.loads(row.strip("`")))
        if where.startswith("none"):
            for command in ("sft", "dpo", "ppo"):
                with pytest.raises(reading.DataError):
                    read[command]([record], reading.DataStats())
            continue
        for command in where.split(", "):
            (example,) = read[command]([record], reading.DataStats())
            assert example.prompt_ids and all(example.answers), (command, row)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_metrics_for_trl_users_are_logged(base, tmp_path, stage):
    """A step of every stage on the tiny model has the page's names."""
    rows = [row for row in table("Metrics") if row[0] == stage]
    wanted = {name for row in rows for name in names(row[2])}
    assert wanted and all(names(row[1]) for row in rows)
    more = {"max_steps": 1, "batch_size": 4, "lora_r": 2}
    online = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4, "kl_coef": 0.1}
    more |= online if stage in ("ppo", "grpo") else {"max_length": 64}
    cls = configs.COMMANDS[stage]
    train = importlib.import_module(f"dschat.rlhf.{stage}").train
    train(cls(**{**base, **more}), **({"rewards": (short,)} if stage in ("ppo", "grpo") else {}))
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert wanted <= set(line), wanted - set(line)


# ------------------------------------------------------------------------------------ coming from DeepSpeed-Chat


def test_commands_of_the_deepspeed_chat_page_run(stories_dir, pairs, tmp_path, capsys):
    """The page's four commands one after the other, flags as they stand there: other data, the tiny model, shorter
    texts, two steps."""
    page = (DOCS / "deepspeed_chat.md").read_text()
    commands = re.findall(r"^dschat ((?:sft|reward|dpo|ppo) --.*)$", page, re.MULTILINE)
    assert [c.split()[0] for c in commands] == ["sft", "reward", "dpo", "ppo"]
    shorter = {
        "--max_seq_len": "64",
        "--max_prompt_seq_len": "32",
        "--max_answer_seq_len": "8",
        "--lora_dim": "4",
    }
    for command in commands:
        words = command.split()
        for i, flag in enumerate(words[:-1]):
            value = words[i + 1]
            if flag in shorter:
                words[i + 1] = shorter[flag]
            elif flag.endswith("batch_size"):
                words[i + 1] = str(min(4, int(value)))
            elif value == "mine.jsonl":
                words[i + 1] = pairs
            elif value.startswith("facebook/"):
                words[i + 1] = str(stories_dir)
            elif value.startswith("out/"):
                words[i + 1] = str(tmp_path / value)
        assert not any("facebook" in w or w.startswith("out/") for w in words)
        words += [
            "--max_steps",
            "2",
            "--device",
            "cpu",
            "--no-progress",
            "--no-tensorboard",
            "--threads",
            "1",
        ]
        assert cli.main(words) == 0, (words[0], capsys.readouterr().err)
        folder = Path(words[words.index("--output_dir") + 1])
        losses = {"ppo": "policy/loss"}
        lines = read_lines(folder / "metrics.jsonl")
        assert len(lines) == 2 and all(line[losses.get(words[0], "loss")] is not None for line in lines)
        assert (folder / "result.json").is_file()
    step3 = tmp_path / "out" / "step3"
    assert (step3 / "model").is_dir() and (step3 / "ema").is_dir() and (step3 / "critic").is_dir()
    assert (tmp_path / "out" / "dpo" / "adapter").is_dir()
