"""DeepSpeed-Chat's flags, one by one, and the migration page, line by line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from dschat import config as C
from dschat import config_base, config_text
from dschat import deepspeed_chat as D

PAGE = (Path(__file__).parents[1] / "docs" / "deepspeed_chat.md").read_text()
BASE = {"sft": C.SFTConfig, "reward": C.RewardConfig, "dpo": C.DPOConfig, "ppo": C.PPOConfig}

# Every flag of DeepSpeed-Chat's four scripts: command, flag and value as given there, and what it becomes:
# {key: value}, "note" (no effect, said so), or the end of the sentence that refuses it.
ONE = {
    "data_path": ("a b", {"data": ["a", "b"]}),
    "data_split": ("2,4,4", {"data_split": "2,4,4"}),
    "data_output_path": ("/tmp/x", {"token_cache": "/tmp/x"}),
    "gradient_accumulation_steps": ("2", {"gradient_accumulation_steps": 2}),
    "lr_scheduler_type": ("cosine", {"lr_schedule": "cosine"}),
    "num_train_epochs": ("3", {"epochs": 3}),
    "output_dir": ("o", {"output_dir": "o"}),
    "seed": ("1234", {"seed": 1234}),
    "dtype": ("bf16", {"dtype": "bfloat16"}),
    "offload": ("", {"offload": True}),
    "compute_fp32_loss": ("", "note"),
    "enable_tensorboard": ("", {"tensorboard": True}),
    "tensorboard_path": ("t", "note"),
    "add_eot_token": ("", "note"),
    "only_optimize_lora": ("", "note"),
    "local_rank": ("0", "note"),
    "deepspeed": ("", {"deepspeed": ""}),
}
STEP_1 = {
    "model_name_or_path": ("m", {"model": "m"}),
    "per_device_train_batch_size": ("8", {"batch_size": 8}),
    "per_device_eval_batch_size": ("8", "note"),
    "max_seq_len": ("256", {"max_length": 256}),
    "learning_rate": ("1e-3", {"learning_rate": 1e-3}),
    "weight_decay": ("0.1", {"weight_decay": 0.1}),
    "num_warmup_steps": ("7", {"warmup_steps": 7}),
    "gradient_checkpointing": ("", {"gradient_checkpointing": True}),
    "dropout": ("0.1", "dropout is off in every stage; leave it out"),
    "zero_stage": ("2", {"zero_stage": 2}),
    "lora_dim": ("128", {"lora_r": 128}),
    "lora_module_name": ("decoder.layers.", {"lora_targets": ["all-linear"]}),
    "lora_learning_rate": ("5e-4", {"lora_learning_rate": 5e-4}),
    "eot_token": ("<|endoftext|>", "note"),
}
SCRIPTS = {
    "sft": ONE | STEP_1 | {"sft_only_data_path": ("c", {"data": ["c"]}), "print_loss": ("", "note")},
    "reward": ONE | STEP_1 | {
        "num_padding_at_beginning": ("1", "note"),
        "eval_interval": ("5", {"eval_every": 5}),
        "eval_iters": ("100", "give eval_iters times the batch size there"),
    },
    "dpo": ONE | STEP_1 | {
        "beta": ("0.2", {"beta": 0.2}),
        "label_smoothing": ("0.1", {"label_smoothing": 0.1}),
        "offload_reference_model": ("", {"offload_reference": True}),
    },
    "ppo": ONE | {
        "actor_model_name_or_path": ("a", {"model": "a"}),
        "critic_model_name_or_path": ("c", {"reward": ["c"]}),
        "unsupervised_dataset_name": ("u", {"unsup_data": ["u"]}),
        "unsupervised_dataset_config_name": ("u", "name files or org/name:split in unsup_data"),
        "unsup_coef": ("27.8", {"unsup_coef": 27.8}),
        "num_padding_at_beginning": ("1", "note"),
        "per_device_generation_batch_size": ("4", {"prompts_per_step": 4}),
        "per_device_training_batch_size": ("4", {"batch_size": 4}),
        "generation_batches": ("2", "raise prompts_per_step instead"),
        "ppo_epochs": ("2", {"ppo_epochs": 2}),
        "max_prompt_seq_len": ("64", {"max_prompt_length": 64}),
        "max_answer_seq_len": ("64", {"max_new_tokens": 64}),
        "actor_learning_rate": ("9.65e-6", {"learning_rate": 9.65e-6}),
        "critic_learning_rate": ("5e-6", {"critic_learning_rate": 5e-6}),
        "actor_weight_decay": ("0.1", {"weight_decay": 0.1}),
        "critic_weight_decay": ("0.2", {"critic_weight_decay": 0.2}),
        "num_warmup_steps": ("100", {"warmup_steps": 100}),
        "enable_hybrid_engine": ("", "note"),
        "unpin_actor_parameters": ("", "note"),
        "release_inference_cache": ("", "note"),
        "inference_tp_size": ("2", {"inference_tp_size": 2}),
        "tp_gather_partition_size": ("8", "note"),
        "offload_reference_model": ("", {"offload_reference": True}),
        "offload_reward_model": ("", {"offload_reward": True}),
        "actor_zero_stage": ("3", {"zero_stage": 3}),
        "critic_zero_stage": ("3", {"critic_zero_stage": 3}),
        "actor_gradient_checkpointing": ("", {"gradient_checkpointing": True}),
        "critic_gradient_checkpointing": ("", {"critic_gradient_checkpointing": True}),
        "actor_dropout": ("0.1", "dropout is off in every stage; leave it out"),
        "critic_dropout": ("0.1", "dropout is off in every stage; leave it out"),
        "actor_lora_dim": ("64", {"lora_r": 64}),
        "critic_lora_dim": ("64", {"critic_lora_r": 64}),
        "actor_lora_module_name": ("layers.", {"lora_targets": ["all-linear"]}),
        "critic_lora_module_name": ("layers.", "note"),
        "actor_lora_learning_rate": ("5e-4", {"lora_learning_rate": 5e-4}),
        "critic_lora_learning_rate": ("5e-4", {"critic_lora_learning_rate": 5e-4}),
        "enable_ema": ("", {"ema_decay": 0.992}),
        "enable_mixed_precision_lora": ("", "base_weights int8 holds the frozen weights in 8 bits"),
        "align_overflow": ("", "note"),
        "print_answers": ("", "note"),
        "print_answers_interval": ("1", "note"),
        "enable_test_mode": ("", "note"),
        "test_stop_step": ("5", {"max_steps": 5}),
    },
}  # fmt: skip
# A flag whose other half is needed before the config is complete.
NEEDS = {
    "unsup_coef": "--unsup_data x",
    "unsupervised_dataset_name": "--unsup_coef 1",
    "offload": "--zero_stage 2",
    "critic_zero_stage": "--zero_stage 2",
}


def parse(command: str, line: str):
    cls = BASE[command]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = config_text.load(cls, None, config_text.parse_flags(line.split(), cls))
    return config, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("command", "flag"), [(c, f) for c in SCRIPTS for f in SCRIPTS[c]], ids=lambda x: str(x)
)
def test_every_flag(command, flag):
    """As a flag and as a YAML key."""
    value, expected = SCRIPTS[command][flag]
    line = f"--{flag} {value} {NEEDS.get(flag, '')}"
    if isinstance(expected, dict):
        config, notes = parse(command, line)
        assert {k: getattr(config, k) for k in expected} == expected and not notes
        if flag not in NEEDS:
            words = value.split()
            plain = words if len(words) > 1 else (True if not value else value)
            assert config_base.build(BASE[command], {flag: plain}) == config
    elif expected == "note":
        config, notes = parse(command, line)
        assert (
            config == BASE[command]() and len(notes) == 1 and notes[0].startswith(f"{flag} has no effect: ")
        )
    else:
        with pytest.raises(C.ConfigError) as error:
            parse(command, line)
        assert str(error.value).startswith(f"{flag} in the flags is not supported: ")
        assert str(error.value).endswith(expected)


@pytest.mark.parametrize(
    "line",
    [
        "--generation_batches 1 --actor_dropout none",
        "--actor_dropout 0.0 --critic_dropout 0",
        "--dropout false --enable_mixed_precision_lora false",
    ],
)
def test_refused_flags_with_values_that_change_nothing(line):
    config, notes = parse("ppo", line)
    assert config == C.PPOConfig() and len(notes) == 2
    assert all(n.endswith("has no effect: that is so here anyway") for n in notes)


def test_values():
    assert parse("sft", "--lora_module_name q_proj")[0].lora_targets == ["q_proj"]
    assert parse("sft", "--lr_scheduler_type constant_with_warmup")[0].lr_schedule == "constant"
    assert parse("sft", "--dtype fp32")[0].dtype == "float32"
    assert parse("ppo", "--enable_ema false")[0].ema_decay == 0.0
    assert parse("sft", "--dtype fp16")[0].dtype == "float16"
    with pytest.raises(C.ConfigError, match="lr_schedule is 'polynomial', but it must be one of"):
        parse("sft", "--lr_scheduler_type polynomial")
    with pytest.raises(C.ConfigError, match="--model_name_or_path and --model both set model; keep one"):
        parse("sft", "--model a --model_name_or_path b")


def test_the_table_is_whole():
    """One meaning a flag, targets that exist, and every flag of the scripts above in it."""
    listed = [name for flag in D.TABLE for name in flag.names.split()]
    assert len(listed) == len(set(listed))
    known = {k for cls in C.COMMANDS.values() for k in config_base.field_types(cls)}
    for flag in D.TABLE:
        assert sum(map(bool, (flag.same, flag.to, flag.note, flag.instead))) == 1, flag.names
        assert not flag.to or flag.to in known
        assert not flag.same or set(flag.names.split()) <= known
    assert {f for script in SCRIPTS.values() for f in script} <= set(listed)
    assert set(listed) - {f for s in SCRIPTS.values() for f in s} == {
        "max_train_steps", "deepspeed_config", "disable_dropout", "disable_actor_dropout", "disable_critic_dropout",
    }  # fmt: skip


COMMANDS = re.findall(r"^dschat (\w+) (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "line"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_commands_of_the_page(command, line):
    config, _ = parse(command, line)
    assert config.output_dir.startswith("out/") and config.data == ["mine.jsonl"]
    if command == "ppo":
        assert (config.model, config.reward, config.ema_decay) == ("out/step1", ["out/step2"], 0.992)
        assert (config.critic_weight_decay, config.warmup_steps, config.lr_schedule) == (0.1, 100, "cosine")


def test_the_page_shows_the_table():
    assert PAGE.endswith(D.markdown()) and len(COMMANDS) == 4
    keys = {k for cls in BASE.values() for k in config_base.field_types(cls)}
    section = PAGE[PAGE.index("## What is different") : PAGE.index("## Its recipes")]
    fields = set(re.findall(r"`(?:--(?:no-)?)?([a-z_0-9]+)[ `]", section))
    assert fields and fields <= keys, fields - keys
