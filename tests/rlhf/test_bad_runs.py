"""Settings that cannot work together are refused before a model is loaded, with the nearest that can: the table of
docs/bad_input.md, row by row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dschat import config as C
from dschat import config_base, launch
from dschat.rlhf import dpo, grpo, models, ppo, reading, reward, rloo, run, sft
from dschat.rlhf import train as pipeline

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
TRAINERS = {
    "sft": sft.train, "reward": reward.train, "dpo": dpo.train, "ppo": ppo.train, "grpo": grpo.train,
    "rloo": rloo.train,
}  # fmt: skip


def rows() -> dict[str, str]:
    """given -> what happens, of the page's last table."""
    section = PAGE.read_text().partition("## Runs")[2]
    return dict(re.findall(r"^\| (?!given)([^-].*?) \| (.+) \|$", section, re.MULTILINE))


ROWS = rows()
NUMBER = "dschat.rlhf.verifiers:number"
"""A reward function that is there."""


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_policy", "load_scorer"):
        monkeypatch.setattr(models, name, lambda *_, **__: pytest.fail("a model is loaded"))


def refused(base: dict[str, Any], command: str, **keys: Any) -> str:
    """The sentence that a run is refused with; it leaves no trace."""
    with pytest.raises(C.ConfigError) as error:
        more = {"reward": [NUMBER]} if command in ("ppo", "grpo", "rloo") else {}
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
    monkeypatch.setattr("dschat.rlhf.checks.check_teams", lambda *_: None)
    return refused(base, "ppo", inference_tp_size=3)


CASES: dict[str, Any] = {
    "`offload` without `zero_stage`, or with 0": ("ppo", {"offload": True, "zero_stage": 0, "lora_r": 4}),
    "`critic_zero_stage` without `zero_stage`": ("ppo", {"critic_zero_stage": 3}),
    "`zero_stage` without DeepSpeed": without_deepspeed,
    "`inference_tp_size` that does not divide the processes": ("grpo", {"inference_tp_size": 2}),
    "`inference_tp_size` that does not divide the model's heads": wide,
    "`inference_tp_size` and `exact`": ("ppo", {"inference_tp_size": 2, "exact": True}),
    "`offload_reference` and `exact`, all weights trained": (
        "ppo", {"offload_reference": True, "exact": True, "lora_r": 0}
    ),
    "`rollout_weights` int8 and `exact`": (
        "ppo", {"rollout_weights": "int8", "exact": True, "importance_cap": 2.0}
    ),
    "`rollout_weights` int8 without `importance_cap`": ("grpo", {"rollout_weights": "int8"}),
    "prompts that leave no room for the answers": ("grpo", {"max_new_tokens": 510}),
    "one answer a prompt, in GRPO": ("grpo", {"samples_per_prompt": 1}),
    "`unsup_coef` without `unsup_data`": ("ppo", {"unsup_coef": 1.0}),
    "`lora_targets` that name no module of the model": ("sft", {"lora_r": 4, "lora_targets": ["c_attn"]}),
    "`lora_targets` that the critic's model lacks": ("ppo", {"lora_r": 0, "lora_targets": ["c_attn"]}),
    "`lora_last` above the model's layers": ("grpo", {"lora_r": 4, "lora_last": 6}),
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


@pytest.mark.parametrize("command", TRAINERS)
def test_adapters_are_looked_at_in_every_stage(base: dict[str, Any], command: str) -> None:
    """What was given, and all names that the model has."""
    said = refused(base, command, lora_r=4, lora_targets=["q_proj", "gate"])
    assert said == (
        "lora_targets has 'gate', which the model lacks; use all-linear, or some of down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj"
    )


def test_adapters_of_a_model_that_is_an_adapter(base: dict[str, Any], tmp_path: Path) -> None:
    """Its base has the modules."""
    import peft

    where = tmp_path / "adapter"
    peft.LoraConfig(base_model_name_or_path=base["model"], target_modules=["q_proj"]).save_pretrained(where)
    assert "lora_targets has 'fc1', which the model lacks" in refused(
        base | {"model": str(where)}, "sft", lora_r=4, lora_targets=["fc1"]
    )


def test_what_a_critic_starts_from(base: dict[str, Any], tmp_path: Path) -> None:
    """Its own model, else the first reward model, else the policy's: the one that lacks the modules is refused."""
    import transformers

    other = tmp_path / "gpt2"
    transformers.AutoTokenizer.from_pretrained(base["model"]).save_pretrained(other)
    small = transformers.GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)
    small.save_pretrained(other)
    for keys in ({"critic": str(other)}, {"reward": [NUMBER, str(other)]}):
        said = refused(base, "ppo", lora_r=4, lora_targets=["q_proj"], **keys)
        assert (
            "lora_targets has 'q_proj', which the critic's model lacks; use all-linear, or some of c_attn"
            in said
        )


def test_an_outline_reads_and_draws_nothing(base: dict[str, Any]) -> None:
    import torch

    before = torch.get_rng_state()
    found = models.outline(base["model"])
    assert {p.device.type for p in found.parameters()} == {"meta"} and torch.equal(
        before, torch.get_rng_state()
    )


def test_a_pipeline_is_refused_before_its_first_stage(base: dict[str, Any], tmp_path: Path) -> None:
    """What can be known of a later stage before weights are read, also of models that earlier stages are to write."""
    import transformers

    other = tmp_path / "gpt2"
    transformers.AutoTokenizer.from_pretrained(base["model"]).save_pretrained(other)
    transformers.GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2).save_pretrained(other)
    stages: dict[str, dict[str, Any]] = {"sft": {}, "reward": {}, "ppo": {}}
    lacks = r"lora_targets has 'c_attn', which the model lacks; use all-linear, or some of down_proj"
    bad = {"lora_r": 4, "lora_targets": ["c_attn"]}
    for given, said in (
        ({"reward": bad}, lacks),
        ({"ppo": bad}, lacks),
        (
            {"reward": {"model": str(other)}, "ppo": {"lora_targets": ["q_proj"]}},
            "'q_proj', which the critic's model lacks",
        ),
        ({"ppo": {"lora_r": 4, "lora_last": 6}}, "lora_last is 6, but the model has 5 layers"),
        ({"ppo": {"data": [str(tmp_path / "none.jsonl")]}}, r"none\.jsonl does not exist"),
        ({"ppo": {"reward": [f"{NUMBER}s"]}}, "has no function numbers; it has"),
        ({"ppo": {"critic": str(tmp_path / "none")}}, "does not exist; give a folder"),
        ({"ppo": {"inference_tp_size": 2}}, "there is 1 process: set it to 1"),
    ):
        keys = base | {name: stages[name] | given.get(name, {}) for name in stages}
        with pytest.raises((C.ConfigError, reading.DataError), match=said):
            pipeline.train(config_base.build(C.TrainConfig, keys))
        assert not Path(base["output_dir"]).exists(), given
    keys = base | {"sft": {}, "ppo": {"reward": []}}
    with pytest.raises(C.ConfigError, match="reward is empty"):
        pipeline.train(config_base.build(C.TrainConfig, keys))
    assert not Path(base["output_dir"]).exists()
