"""Settings that cannot work together are refused before a model is loaded, with the nearest that can: the table of
docs/bad_input.md, row by row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dschat import config as C
from dschat import launch
from dschat.rlhf import grpo, models, ppo, run, sft

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
TRAINERS = {"sft": sft.train, "ppo": ppo.train, "grpo": grpo.train}


def rows() -> dict[str, str]:
    """given -> what happens, of the page's last table."""
    section = PAGE.read_text().partition("## Runs")[2]
    return dict(re.findall(r"^\| (?!given)([^-].*?) \| (.+) \|$", section, re.MULTILINE))


ROWS = rows()


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_policy", "load_scorer"):
        monkeypatch.setattr(models, name, lambda *_, **__: pytest.fail("a model is loaded"))


def refused(base: dict[str, Any], command: str, **keys: Any) -> str:
    """The sentence that a run is refused with; it leaves no trace."""
    with pytest.raises(C.ConfigError) as error:
        more = {} if command == "sft" else {"reward": ["mine:f"]}
        TRAINERS[command](C.COMMANDS[command](**{**base, **more, **keys}))
    assert not Path(base["output_dir"]).exists() and "\n" not in str(error.value)
    return str(error.value)


def without_deepspeed(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    real = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda n: None if n == "deepspeed" else real(n))
    return refused(base, "sft", zero_stage=2)


def launched(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(C.ConfigError) as error:
        launch.main(["--num_processes", "2", "serve", "--model", base["model"]])
    return str(error.value)


def wide(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("dschat.rlhf.online.check_teams", lambda *_: None)
    return refused(base, "ppo", inference_tp_size=3)


CASES: dict[str, Any] = {
    "`offload` without `zero_stage`, or with 0": ("ppo", {"offload": True, "zero_stage": 0, "lora_r": 4}),
    "`critic_zero_stage` without `zero_stage`": ("ppo", {"critic_zero_stage": 3}),
    "`zero_stage` without DeepSpeed": without_deepspeed,
    "`inference_tp_size` that does not divide the processes": ("grpo", {"inference_tp_size": 2}),
    "`inference_tp_size` that does not divide the model's heads": wide,
    "`inference_tp_size` and `exact`": ("ppo", {"inference_tp_size": 2, "exact": True}),
    "`rollout_weights` int8 and `exact`": (
        "ppo", {"rollout_weights": "int8", "exact": True, "importance_cap": 2.0}
    ),
    "`rollout_weights` int8 without `importance_cap`": ("grpo", {"rollout_weights": "int8"}),
    "prompts that leave no room for the answers": ("grpo", {"max_new_tokens": 510}),
    "one answer a prompt, in GRPO": ("grpo", {"samples_per_prompt": 1}),
    "`unsup_coef` without `unsup_data`": ("ppo", {"unsup_coef": 1.0}),
    "`launch` of what runs in one process": launched,
}  # fmt: skip


@pytest.mark.parametrize("given", ROWS)
def test_the_page(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    case = CASES[given]
    said = case(base, monkeypatch) if callable(case) else refused(base, case[0], **case[1])
    for part in re.findall(r"`([^`]+)`", ROWS[given]):
        pieces = [re.escape(piece) for piece in part.split("...")]
        assert re.search(".*".join(pieces), said), said


def test_every_case_is_on_the_page() -> None:
    assert ROWS.keys() == CASES.keys()


def test_a_critic_with_another_tokenizer(base: dict[str, Any], tmp_path: Path) -> None:
    """As a reference: known before the policy is loaded."""
    import transformers

    other = tmp_path / "other"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base["model"])
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    transformers.AutoConfig.from_pretrained(base["model"]).save_pretrained(other)
    assert "has another tokenizer than the policy, but the critic reads" in refused(
        base, "ppo", critic=str(other)
    )
    assert "has another tokenizer than the policy, but log-probs" in refused(
        base, "grpo", reference=str(other)
    )
