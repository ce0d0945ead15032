"""Config: Python API = flags = YAML keys, and one sentence for whatever is wrong."""

from __future__ import annotations

import warnings

import pytest
import yaml

from dschat import config as C
from dschat import config_base, config_text
from dschat import deepspeed_chat as D


def write(tmp_path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_three_ways_are_one(tmp_path):
    path = write(tmp_path, "model: m\nkl_coef: 2e-2\nreward: rm\ncliprange_value: null\nexact: yes\n")
    argv = "--model m --kl_coef 2e-2 --reward rm --cliprange-value none --exact".split()
    by_flags = config_text.load(C.PPOConfig, None, config_text.parse_flags(argv, C.PPOConfig))
    by_hand = C.PPOConfig(model="m", kl_coef=0.02, reward=["rm"], cliprange_value=None, exact=True)
    assert config_text.load(C.PPOConfig, path) == by_flags == by_hand
    assert config_text.load(C.PPOConfig, path, {"kl_coef": ["0.5"]}).kl_coef == 0.5, "flags win over the file"


@pytest.mark.parametrize("cls", list(C.COMMANDS.values()), ids=list(C.COMMANDS))
def test_dump_is_read_back(cls, tmp_path):
    values = {"ppo": {"model": "m", "kl_coef": 1e-5}} if cls is C.TrainConfig else {}
    values = {"runs": ["a", "b"]} if cls in (C.ReportConfig, C.CompareConfig) else values
    values = {"batch": "runs/x/failed-step-000003"} if cls is C.ReplayConfig else values
    config = config_base.build(cls, values)
    for comments in (False, True):
        text = config_text.dump(config, comments)
        assert config_text.load(cls, write(tmp_path, text)) == config
        for value in (yaml.safe_load(text) or {}).values():
            assert not (isinstance(value, str) and value.replace("e-", "").replace(".", "").isdigit()), value
    assert all(f"--{name}" in config_text.usage(cls) for name in config_base.field_types(cls))


def test_every_field_explains_itself():
    import dataclasses

    for cls in C.COMMANDS.values():
        for f in dataclasses.fields(cls):
            assert f.metadata.get("help"), f"{cls.__name__}.{f.name}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_ceof: 0.1", "unknown key 'kl_ceof' in .*c.yaml; did you mean 'kl_coef'"),
        ("zzz: 1", "unknown key 'zzz' in .*c.yaml; the nearest are "),
        ("learning_rate: fast", "learning_rate is 'fast', but it must be a number"),
        ("learning_rate: .nan", "learning_rate is nan, but it must be a number"),
        ("batch_size: 1.5", "batch_size is 1.5, but it must be a whole number"),
        ("batch_size: true", "batch_size is True, but it must be a whole number"),
        ("batch_size: 0", "batch_size is 0, but it must be 1 or more"),
        ("batch_size: [1, 2]", "batch_size is .*, but it must be a whole number"),
        ("exact: maybe", "exact is 'maybe', but it must be true or false"),
        ("model: null", "model is None, but it must be a text"),
        ("model: 3", "model is 3, but it must be a text"),
        ("data: {a: b}", "data is .*, but it must be a text"),
        ("kl_kind: k33", "kl_kind is 'k33', but it must be one of k1, k2, k3; did you mean k3"),
        ("gamma: 1.5", "gamma is 1.5, but it must be between 0 and 1"),
        ("dual_clip: 0.5", "dual_clip is 0.5, but it must be greater than 1, or none"),
        ("top_p: 0.9", "top_p is 0.9, .* full distribution, .* set top_p to 1.0"),
        ("top_k: 50", "top_k is 50, .* full distribution, .* set top_k to 0"),
        ("temperature: 0", "temperature is 0.0, but PPO samples"),
        ("reward: [a, b]\nreward_weights: [1]", "reward_weights has 1 entries for 2 rewards"),
        ("inference_tp_size: 0", "inference_tp_size is 0, but it must be 1 or more"),
        (
            "inference_tp_size: 2\nexact: true",
            "inference_tp_size is 2 and exact is true, .* set exact to false",
        ),
        ("zero_stage: 4", "zero_stage is 4, but it must be 0, 1, 2 or 3, or none"),
        ("offload: true", "offload is true and zero_stage None; set zero_stage to 1, 2 or 3"),
        ("critic_zero_stage: 3", "critic_zero_stage is 3 without zero_stage; set both"),
        (
            "offload_reference: true\nexact: true\nlora_r: 0",
            "offload_reference is true and exact is true, .* set exact to false, or offload_reference to false",
        ),
        ("model: a\nmodel_name_or_path: b", "'model_name_or_path' in .* sets model, which is set already"),
        ("- a\n- b", "must hold `key: value` lines, but it holds a list"),
        ("a: [1", "line 1 is not valid YAML"),
    ],
)
def test_bad_keys_and_values(tmp_path, text, message):
    with pytest.raises(C.ConfigError, match=message) as error:
        config_text.load(C.PPOConfig, write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\n".encode("utf-16"), r"c\.yaml is not UTF-8 \(byte 0xff at line 1\); save it as UTF-8"),
        (
            "seed: 1\nmodel: caf\u00e9\n".encode("latin-1"),
            r"c\.yaml is not UTF-8 \(byte 0xe9 at line 2\); save it",
        ),
        (b"seed: 1\nmodel: m\nseed: 2\n", r"c\.yaml line 3 gives 'seed' again; keep one of the two"),
        (
            b"seed: 18446744073709551616\n",
            r"seed is 18446744073709551616, but it must be a whole number of 64 bits",
        ),
        (
            b"qqq: 1\n",
            r"unknown key 'qqq' in .*c\.yaml; the nearest are \S+, \S+ and \S+, all are in dschat ppo --help$",
        ),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(C.ConfigError, match=message) as error:
        config_text.load(C.PPOConfig, str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_stage_may_repeat_a_key_of_all(tmp_path):
    """Only within one mapping is a key given twice; << takes what another has."""
    path = write(tmp_path, "seed: 1\nsft: &a {seed: 2}\nreward: {<<: *a, seed: 3}\n")
    config = config_text.load(C.TrainConfig, path)
    assert config.sft and config.reward and (config.sft.seed, config.reward.seed) == (2, 3)
    with pytest.raises(C.ConfigError, match="line 1 gives 'seed' again"):
        config_text.load(C.TrainConfig, write(tmp_path, "sft: {seed: 1, seed: 2}\n"))


def test_python_is_checked_too():
    with pytest.raises(C.ConfigError, match=r"kl_coef is 'a', but it must be a number"):
        C.PPOConfig(kl_coef="a")
    with pytest.raises(TypeError, match="kl_ceof"):
        C.PPOConfig(kl_ceof=1)


def test_missing_file_names_what_is_there(tmp_path):
    write(tmp_path, "")
    with pytest.raises(C.ConfigError, match=r"config file .*missing\.yaml does not exist; .* has c\.yaml"):
        config_text.load(C.SFTConfig, str(tmp_path / "missing.yaml"))


def test_deepspeed_chat_names(tmp_path):
    text = "actor_model_name_or_path: m\ncritic_model_name_or_path: rm\nper_device_training_batch_size: 4\n"
    text += (
        "actor_lora_dim: 8\nmax_answer_seq_len: 32\nactor_learning_rate: 1e-4\nnum_padding_at_beginning: 1\n"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = config_text.load(C.PPOConfig, write(tmp_path, text))
    assert (config.model, config.reward, config.batch_size, config.lora_r) == ("m", ["rm"], 4, 8)
    assert (config.max_new_tokens, config.learning_rate) == (32, 1e-4)
    assert [str(w.message) for w in caught] == [
        "num_padding_at_beginning has no effect: masks are explicit here, so leading padding needs no number"
    ]
    for cls in (C.SFTConfig, C.RewardConfig, C.PPOConfig):
        known = config_base.field_types(cls)
        assert (
            not set(D.ALIASES) & set(known)
            and not set(D.IGNORED) & set(known)
            and not set(D.NOT_HERE) & set(known)
        )


PIPELINE = """
output_dir: out
model: base
seed: 7
data: [d.jsonl]
sft: {learning_rate: 1e-4}
reward: {seed: 8}
ppo: {data: other.jsonl}
"""


def test_pipeline_wires_the_stages(tmp_path):
    config = config_text.load(
        C.TrainConfig, write(tmp_path, PIPELINE), {"ppo.kl-coef": ["0.5"], "seed": ["9"]}
    )
    assert config.sft and config.reward and config.ppo
    assert (config.sft.model, config.sft.seed, config.sft.learning_rate, config.sft.output_dir) == (
        "base", 9, 1e-4, "out/sft",
    )  # fmt: skip
    assert (config.reward.model, config.reward.seed, config.reward.data) == ("out/sft/model", 8, ["d.jsonl"])
    assert (config.ppo.model, config.ppo.reward, config.ppo.data) == (
        "out/sft/model", ["out/reward/model"], ["other.jsonl"],
    )  # fmt: skip
    assert config.ppo.kl_coef == 0.5
    alone = config_base.build(C.TrainConfig, {"model": "base", "ppo": {"reward": "m:f"}})
    assert alone.sft is None and alone.ppo and (alone.ppo.model, alone.ppo.reward) == ("base", ["m:f"])


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({}, {}, "no stage is configured"),
        ({"sft": 3}, {}, "sft in .* is 3, but it must hold the keys of that stage"),
        ({"sft": {"klcoef": 1}}, {}, "unknown key 'klcoef' in sft of"),
        ({"sft": {}}, {"pp.x": ["1"]}, "--pp.x names a stage 'pp', but the stages of dschat train are: sft"),
        ({"sft": {}}, {"sft.lerning_rate": ["1"]}, "did you mean 'learning_rate'"),
    ],
)
def test_bad_pipelines(tmp_path, values, flags, message):
    path = write(tmp_path, yaml.safe_dump(values))
    with pytest.raises(C.ConfigError, match=message):
        config_text.load(C.TrainConfig, path, flags)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model", "x"], "'model' does not belong to a flag"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--seed"], "seed is True, but it must be a whole number"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(C.ConfigError, match=message):
        config_text.load(C.SFTConfig, None, config_text.parse_flags(argv, C.SFTConfig))


def test_a_list_may_be_given_in_pieces():
    argv = "--data a b --data c --data=d".split()
    assert config_text.load(C.SFTConfig, None, config_text.parse_flags(argv, C.SFTConfig)).data == [
        "a",
        "b",
        "c",
        "d",
    ]
    argv = "--sft.data a --sft.data b --output_dir out".split()
    config = config_text.load(C.TrainConfig, None, config_text.parse_flags(argv, C.TrainConfig))
    assert config.sft and config.sft.data == ["a", "b"] and config.sft.output_dir == "out/sft"
    with pytest.raises(C.ConfigError, match=r"--sft\.seed is given twice"):
        config_text.parse_flags("--sft.seed 1 --sft.seed 2".split(), C.TrainConfig)


def test_flag_forms():
    argv = [
        "--data",
        "a",
        "b",
        "--seed=3",
        "--no-progress",
        "--tensorboard",
        "false",
        "--learning-rate",
        "-0.0",
    ]
    config = config_text.load(C.SFTConfig, None, config_text.parse_flags(argv, C.SFTConfig))
    assert (config.data, config.seed, config.progress, config.tensorboard) == (["a", "b"], 3, False, False)
