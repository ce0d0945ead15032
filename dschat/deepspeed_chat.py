"""DeepSpeed-Chat's flags, in one table: what each is called here, why it has become pointless, or what replaces it.

`dschat.config` reads the table for flags and YAML keys alike; docs/deepspeed_chat.md shows it (`markdown()`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Translate = Callable[[str], Any]


@dataclass(frozen=True)
class Flag:
    """Flags of one meaning; exactly one of same, to, note, instead is given.

    names: of DeepSpeed-Chat, spaces between. same: the key has that name here too. to: the key here. note: why
    it has no effect. instead: why it is refused, and what replaces it. harmless: values of a refused flag that
    ask for what happens here anyway. values: texts of values that are called something else here. each: the number is
    of one process there and of all together here.
    """

    names: str
    same: bool = False
    to: str = ""
    note: str = ""
    instead: str = ""
    harmless: tuple[str, ...] = ()
    values: Mapping[str, Any] | Translate = field(default_factory=dict)
    each: bool = False


def _targets(value: str) -> str:
    """DeepSpeed-Chat matches parts of names, and its scripts give the layers: every linear module in them."""
    return "all-linear" if value.endswith(".") else value


OFF = ("false", "0", "0.0", "none")
TABLE = (
    Flag("learning_rate critic_learning_rate lora_learning_rate critic_lora_learning_rate weight_decay", same=True),
    Flag("critic_weight_decay gradient_accumulation_steps ppo_epochs unsup_coef beta label_smoothing", same=True),
    Flag("seed output_dir data_split zero_stage critic_zero_stage offload inference_tp_size", same=True),
    Flag("actor_zero_stage", to="zero_stage"),
    Flag("gradient_checkpointing critic_gradient_checkpointing", same=True),
    Flag("actor_gradient_checkpointing", to="gradient_checkpointing"),
    Flag("deepspeed", same=True, values={"true": "", "false": ""}),  # there a switch, here also a configuration's file
    Flag("deepspeed_config", to="deepspeed"),
    Flag("dtype", same=True, values={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}),
    Flag("model_name_or_path actor_model_name_or_path", to="model"),
    Flag("critic_model_name_or_path", to="reward"),  # the critic starts from the reward model, as it does there
    Flag("data_path sft_only_data_path", to="data"),
    Flag("unsupervised_dataset_name", to="unsup_data"),
    Flag("per_device_train_batch_size per_device_training_batch_size", to="batch_size", each=True),
    Flag("per_device_generation_batch_size", to="prompts_per_step", each=True),
    Flag("num_train_epochs", to="epochs"),
    Flag("max_train_steps test_stop_step", to="max_steps"),
    Flag("lr_scheduler_type", to="lr_schedule", values={"constant_with_warmup": "constant"}),
    Flag("num_warmup_steps", to="warmup_steps"),
    Flag("max_seq_len", to="max_length"),
    Flag("max_prompt_seq_len", to="max_prompt_length"),
    Flag("max_answer_seq_len", to="max_new_tokens"),
    Flag("lora_dim actor_lora_dim", to="lora_r"),
    Flag("critic_lora_dim", to="critic_lora_r"),
    Flag("lora_module_name actor_lora_module_name", to="lora_targets", values=_targets),
    Flag("actor_learning_rate", to="learning_rate"),
    Flag("actor_lora_learning_rate", to="lora_learning_rate"),
    Flag("actor_weight_decay", to="weight_decay"),
    Flag("enable_ema", to="ema_decay", values={"true": 0.992, "false": 0.0}),
    Flag("enable_tensorboard", to="tensorboard"),
    Flag("eval_interval", to="eval_every"),
    Flag("num_padding_at_beginning", note="masks are explicit here, so leading padding needs no number"),
    Flag("enable_hybrid_engine", note="the hybrid engine is always on"),
    Flag("unpin_actor_parameters", note="no parameter is pinned"),
    Flag("release_inference_cache", note="the cache is freed by itself"),
    Flag("tp_gather_partition_size", note="under ZeRO-3 one layer is gathered at a time"),
    Flag("align_overflow", note="where actor or critic overflows in float16, both leave the step out, always"),
    Flag("compute_fp32_loss", note="losses are float32 always"),
    Flag("add_eot_token", note="the end-of-turn token is appended always"),
    Flag("eot_token", note="the end of a turn is the chat template's, or EOS"),
    Flag("data_output_path", to="token_cache"),
    Flag("per_device_eval_batch_size", note="evaluation runs in pieces of batch_size, which changes no result"),
    Flag("print_loss", note="the loss is always shown"),
    Flag("print_answers print_answers_interval", note="completions are always logged"),
    Flag("tensorboard_path", note="TensorBoard files lie in output_dir"),
    Flag("enable_test_mode", note="test_stop_step, here max_steps, is what ends a run early"),
    Flag("only_optimize_lora", note="with lora_r the adapter trains alone"),
    Flag("critic_lora_module_name", note="lora_targets names the critic's modules too"),
    Flag("local_rank", note="the environment says it (LOCAL_RANK)"),
    Flag("offload_reference_model", to="offload_reference"),
    Flag("offload_reward_model", to="offload_reward"),
    Flag("disable_dropout disable_actor_dropout disable_critic_dropout", note="dropout is always off"),
    Flag("generation_batches", instead="raise prompts_per_step instead", harmless=("1",)),
    Flag("unsupervised_dataset_config_name", instead="name files or org/name:split in unsup_data"),
    Flag("dropout actor_dropout critic_dropout", instead="dropout is off in every stage; leave it out", harmless=OFF),
    Flag("eval_iters", instead="max_eval_rows counts rows: give eval_iters times the batch size there"),
    Flag("enable_mixed_precision_lora", instead="base_weights int8 holds the frozen weights in 8 bits", harmless=OFF),
)  # fmt: skip

FLAGS: dict[str, Flag] = {name: flag for flag in TABLE for name in flag.names.split()}
ALIASES = {name: flag.to for name, flag in FLAGS.items() if flag.to}
IGNORED = {name: flag.note for name, flag in FLAGS.items() if flag.note}
NOT_HERE = {name: flag.instead for name, flag in FLAGS.items() if flag.instead}


def text_of(value: Any) -> str | None:
    """A flag's or YAML key's single value as lower-case text; None for several."""
    if isinstance(value, (list, tuple)):
        return text_of(value[0]) if len(value) == 1 else None
    return "none" if value is None else str(value).lower()


def translate(flag: Flag, value: Any, processes: int | None = None) -> Any:
    """The value of a flag under its name here. processes: of the run; None: as the environment says."""
    text = text_of(value)
    if flag.each and text is not None and text.isdigit():
        return int(text) * (processes or int(os.environ.get("WORLD_SIZE", "1")))
    if callable(flag.values):
        single = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        return flag.values(single) if isinstance(single, str) else value
    return value if text is None else flag.values.get(text, value)


def markdown() -> str:
    """The table of docs/deepspeed_chat.md."""
    lines = ["| DeepSpeed-Chat | here |", "| --- | --- |"]
    for flag in TABLE:
        names = ", ".join(f"`{n}`" for n in flag.names.split())
        if flag.same:
            what = "the same name"
        elif flag.to:
            what = f"`{flag.to}`"
        else:
            what = f"no effect: {flag.note}" if flag.note else f"refused: {flag.instead}"
            if flag.harmless:
                what += f" (accepted with {', '.join(flag.harmless)})"
        if flag.each:
            what += ", times the number of processes"
        if flag.values and not callable(flag.values):
            what += "; " + ", ".join(f"{a} is {b if b != '' else 'nothing'}" for a, b in flag.values.items())
        elif callable(flag.values):
            what += "; a name that ends in a dot is all-linear"
        lines.append(f"| {names} | {what} |")
    return "\n".join(lines) + "\n"
