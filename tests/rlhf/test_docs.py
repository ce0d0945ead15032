"""docs/: the algorithm that is shown there runs, and settings and names are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers_rlhf import Killed, numbers
from test_grpo import keys, short

from dschat import config as configs

DOCS = Path(__file__).parents[2] / "docs"
ALGORITHMS = (DOCS / "algorithms.md").read_text()


def test_the_algorithm_of_the_page_learns_and_resumes(base, tmp_path, kill_after):
    """Less than 150 lines make an algorithm: rising rewards, and a killed run goes on to the same numbers."""
    (source,) = re.findall(r"```python\n(.*?)```", ALGORITHMS, re.DOTALL)
    assert len(source.splitlines()) < 150
    names: dict = {}
    exec(compile(source, "algorithms.md", "exec"), names)

    def run(folder):
        more = {"max_steps": 8, "learning_rate": 1e-2, "kl_coef": 0.01, "exact": True, "max_new_tokens": 12}
        config = names["ReinforceConfig"](
            **keys(base, **more, eval_data=base["data"], max_eval_rows=6, eval_samples=4,
                   output_dir=str(tmp_path / folder))
        )  # fmt: skip
        return names["train"](config, rewards=(short,))

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
        configs.load(configs.GRPOConfig, None, settings)
    known = {k for cls in configs.COMMANDS.values() for k in configs.field_types(cls)}
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
        configs.load(cls, None, configs.parse_flags(words, cls))
    for name in re.findall(r"dschat\.rlhf\.verifiers:(\w+)", text):
        assert callable(getattr(verifiers, name))
