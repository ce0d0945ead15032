"""One run: its folder, what it was started with, its seeds, its checkpoints, its metrics, its end.

A run's folder holds `config.yaml` (resolved), `run.json` (config, versions, seed), `metrics.jsonl`,
`tensorboard/`, `checkpoints/`, `completions.jsonl`, and when it is done the models and `result.json`.
Starting it again goes on where it was: a finished run returns its result, an unfinished one resumes from its
newest checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dschat_kernels.limits import use_threads

from .. import config_base, config_text, parallel
from .. import device as devices
from ..config import ConfigError, DPOConfig, OnlineConfig, StageConfig
from ..engine.precision import LossScale
from ..engine.stepper import Stepper
from ..engine.zero import ZeroSettings, whole
from . import checkpoint, checks, data, digests, models, names, trackers
from .metrics import Metrics, read_lines, read_log, reset_peak_memory

# Keys that may differ when a run goes on: they change what is shown or kept and where things lie, never what is
# computed (but for the rounding of sums over processes).
FREE_KEYS = {
    "resume",
    "overwrite",
    "progress",
    "tensorboard",
    "report_to",
    "project",
    "run_name",
    "save_every",
    "keep_checkpoints",
    "keep_completions",
    "threads",
    "device",
    "output_dir",
    "token_cache",
    "data_workers",
    "stream",
    "zero_stage",
    "critic_zero_stage",
    "offload",
    "offload_reference",
    "offload_reward",
    "deepspeed",
}
LENGTH_KEYS = {"max_steps", "epochs"}
"""Keys that may differ when a run goes on where its learning rate does not depend on how long it will be."""
ANEW = "put back what it was, name another output_dir, or add --overwrite to start anew"
"""What to do about a folder whose run.json nobody can read."""


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed for one purpose and step, 0 .. 2^63 - 1."""
    text = ":".join(str(p) for p in (seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def versions() -> dict[str, str]:
    """Versions of everything that numbers depend on."""
    import importlib.metadata

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("dschat", "torch", "transformers", "peft", "safetensors", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"torch": torch.__version__}  # names the build, which its metadata may not


def learning_rate(config: StageConfig, peak: float, step: int, total: int) -> float:
    """Learning rate of step 0 .. total - 1: linear warm-up to `peak`, then constant, or linearly, by a cosine
    or exponentially down to lr_final * peak.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.lr_schedule == "exponential":
        return peak * config.lr_final**progress
    falls = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    share = falls[config.lr_schedule]
    return peak * (config.lr_final + (1 - config.lr_final) * share if config.lr_final else share)


def make_optimizer(
    module: nn.Module,
    config: StageConfig,
    lr: float,
    lora_lr: float | None = None,
    weight_decay: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a module.

    Biases and norms (everything with one dimension) do not decay. lora_lr: peak of the adapter's matrices, if
    it differs from `lr`; a group's `lr_scale` keeps the ratio while a schedule moves both. weight_decay: None is
    the config's.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            scale = lora_lr / lr if lora_lr is not None and lr and "lora_" in name else 1.0
            decay = config.weight_decay if weight_decay is None else weight_decay
            decay = decay if parameter.dim() > 1 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ConfigError("no parameter is trainable; set lora_r, or 0 to train all weights")
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )


def require_data(config: StageConfig) -> None:
    """Raise ConfigError when a run has nothing to train on."""
    if not config.data:
        raise ConfigError("data is empty; name at least one file (.jsonl, .csv, .parquet) or hub data set")


def _length(settings: Mapping[str, Any]) -> str:
    """What a run's settings say of its length, as the key that decides it."""
    key = "max_steps" if settings.get("max_steps") else "epochs"
    return f"{key} {settings.get(key)}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def require_present_name(config: StageConfig, stage: str) -> None:
    """Raise ConfigError where best_metric is a name that the log of this stage had in earlier versions."""
    now = names.logged(stage, config.best_metric)
    if now != config.best_metric:
        raise ConfigError(
            f"best_metric is {config.best_metric}, which {stage} logs as {now} now; set best_metric to {now}"
        )


class Run:
    """Open a run's folder; use as a context manager. `result` is not None when the run is finished
    already. Raises ConfigError where the run cannot start, as far as that is known before weights are read.

    model, tokenizer: those that the run was given. made: what earlier stages are still to write (see checks.Made).
    """

    def __init__(
        self, config: StageConfig, stage: str, model: Any = None, tokenizer: Any = None,
        made: checks.Made | None = None,
    ) -> None:  # fmt: skip
        require_data(config)
        require_present_name(config, stage)
        self.device = devices.use(config.device)
        self.dtype = models.pick_dtype(config.dtype, self.device)
        parallel.start(self.device)
        self.zero = zero_settings(config)
        self.trackers = trackers.chosen(config.report_to)
        self.rollout_dtype = rollout_dtype(config, self.dtype, self.device)
        self.config, self.stage = config, stage
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.metrics: Metrics | None = None
        self.result: dict[str, Any] | None = None
        self.tensors: dict[str, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.longer = False
        """Whether it goes on to another number of steps than it was started with."""
        self.number = uuid.uuid4().hex
        """What trackers know the run by; kept when it goes on."""
        self._started = time.perf_counter()
        self._given = model is not None
        self._data_before: dict[str, str] = {}
        """What the rows were that the run began with; {} where it begins."""
        self._models_before: dict[str, str] = {}
        """What the models were that it began with; {} where it begins."""
        self._lock: checkpoint.Lock | None = None
        try:
            self._open()
            if self.result is None:
                checks.check_stage(config, self.dtype, made or {}, model, tokenizer)
                parallel.from_lead(partial(checkpoint.require_writable, self.folder))
        except BaseException:
            self.close()
            raise
        parallel.barrier()  # every process has looked at the folder before the lead writes into it

    def _open(self) -> None:
        """Look at what is there; nothing is written before `start`, so that a run that cannot start leaves
        no trace.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"output_dir {self.folder} is a file; name a folder")
        file = self.folder / "run.json"
        if file.is_file() and not self._finished():
            self._take()
        if self.config.overwrite:
            if not file.is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
                raise ConfigError(
                    f"output_dir {self.folder} holds files of no run, so it is not deleted; name another"
                )
        elif file.is_file():
            self._continue(checkpoint.read_json(file, ANEW))
        if self.result is not None:
            return
        use_threads(self.config.threads)
        random.seed(self.config.seed)
        np.random.seed(self.config.seed % 2**32)
        torch.manual_seed(self.config.seed)
        reset_peak_memory(self.device)

    def _finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    def _take(self) -> None:
        """Hold the folder against other processes. Raises CheckpointError where one has it."""

        def take() -> None:
            self._lock = self._lock or checkpoint.Lock(self.folder)

        parallel.from_lead(take)

    def close(self) -> None:
        """Give the folder free."""
        if self.metrics is not None:
            self.metrics.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _continue(self, before: dict[str, Any]) -> None:
        if self.config.resume == "never":
            raise ConfigError(
                f"output_dir {self.folder} holds a run already; name another, or add --overwrite"
            )
        if before.get("stage") != self.stage:
            raise ConfigError(
                f"output_dir {self.folder} holds a run of {before.get('stage')}; name another folder"
            )
        if not isinstance(before.get("config"), dict):
            raise ConfigError(f"{self.folder / 'run.json'} is damaged (it holds no config); {ANEW}")
        now, began = self.config.to_dict(), config_base.defaults(type(self.config)) | before["config"]
        began["best_metric"] = names.logged(self.stage, str(began["best_metric"]))
        for key, value in now.items():
            if key not in FREE_KEYS | LENGTH_KEYS and began.get(key) != value:
                old = began.get(key)
                raise ConfigError(
                    f"output_dir {self.folder} holds a run with {key} {old!r}, not {value!r}; "
                    "name another output_dir, or add --overwrite"
                )
        self.longer = _length(now) != _length(began)
        if self.longer:
            self._require_constant_rate(_length(began), _length(now))
        self._data_before, self._models_before = before.get("data", {}), before.get("models", {})
        self._require_same_data()
        self._require_same_models()
        self.number = before.get("number", self.number)
        if "dtype" in before:  # what auto was where the run began
            self.dtype = models.pick_dtype(before["dtype"])
            self.rollout_dtype = rollout_dtype(self.config, self.dtype, self.device)
        done = self.folder / "result.json"
        if done.is_file() and self.longer:
            if checkpoint.latest(self.checkpoints) is None:
                raise ConfigError(
                    f"output_dir {self.folder} holds a finished run without checkpoints (save_every 0), so it cannot "
                    "go on; name another output_dir, or add --overwrite"
                )
            self._take()
        elif done.is_file():
            self.result = checkpoint.read_json(done, "delete it and start again, to have it written anew")
            return
        for name in ("metrics.jsonl", "completions.jsonl"):  # what `start` cuts back
            read_lines(self.folder / name)
        newest = checkpoint.latest(self.checkpoints)
        if newest is not None:
            self.tensors, self.state, self.step = checkpoint.load(newest)
            lacking = [k for k in ("optimizers", "rng", "extra") if not isinstance(self.state.get(k), dict)]
            if lacking:
                raise ConfigError(
                    f"checkpoint {newest} has a damaged state.json (no {lacking[0]}); delete {newest} to go on from "
                    "the one before, or from the start"
                )
            self.best = self.state.get("best")

    def _require_constant_rate(self, before: str, now: str) -> None:
        if self.config.lr_schedule != "constant":
            raise ConfigError(
                f"output_dir {self.folder} holds a run with {before}, not {now}, and lr_schedule "
                f"{self.config.lr_schedule}, by which the steps taken would have had other learning rates; name "
                "another output_dir, or add --overwrite (with lr_schedule constant a run may go on to more steps)"
            )

    def _require_same_data(self, read: bool = False) -> None:
        """Raise ConfigError where a source holds other rows than those that the run began with."""
        for source, digest in parallel.from_lead(partial(digests.of_data, self.config, read)).items():
            if self._data_before.get(source, digest) != digest:
                raise ConfigError(
                    f"{source} has changed since the run in {self.folder} began; put the first file back, name another "
                    "output_dir, or add --overwrite"
                )

    def _require_same_models(self) -> None:
        """Raise ConfigError where another model lies under the name of one that the run began with."""
        for name, digest in parallel.from_lead(partial(digests.of_models, self.config, self._given)).items():
            if self._models_before.get(name, digest) != digest:
                raise ConfigError(
                    f"model {name} has changed since the run in {self.folder} began; put the first model back, name "
                    "another output_dir, or add --overwrite"
                )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, total_steps: int) -> Metrics:
        """Write what the run is started with, and open its metrics at the step where it goes on."""
        if total_steps < self.step:
            raise ConfigError(
                f"output_dir {self.folder} holds a run that has taken {self.step} steps, more than the {total_steps} "
                "asked for; set max_steps to more, name another output_dir, or add --overwrite"
            )
        self._require_same_data(read=True)
        if parallel.lead():
            with checkpoint.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self._lock is None
        self._take()
        parallel.from_lead(partial(self._require_untouched, fresh))
        sinks: list[trackers.Tracker] = []
        if parallel.lead():
            self._write_start()
            sinks = [self._tracker(package) for package in self.trackers]
        self.metrics = Metrics(
            self.folder, self.stage, total_steps, after_step=self.step, write=parallel.lead(),
            tensorboard=self.config.tensorboard, progress=self.config.progress, device=self.device,
            trackers=sinks,
        )  # fmt: skip
        parallel.barrier()
        if self.dtype == torch.float16 and self.device.type == "cpu":
            self.metrics.say(NO_HALF_KERNELS)
        if self.step:
            self.metrics.say(f"{self.stage}: going on after step {self.step} of {total_steps}")
        return self.metrics

    def logged(self, *wanted: str) -> dict[str, Any]:
        """The last values of these metrics before the step where the run goes on, as a result names them: a run that
        was killed after its last step has their result too."""
        keys = {name.replace("/", "_"): names.logged(self.stage, name) for name in wanted}
        found: dict[str, Any] = {}
        for line in read_log(self.folder, self.stage):
            found |= {name: line[key] for name, key in keys.items() if line.get(key) is not None}
        return found

    def _require_untouched(self, fresh: bool) -> None:
        """Raise ConfigError where another process has begun a run here since this one looked."""
        if fresh and not self.config.overwrite and not self.step and (self.folder / "run.json").is_file():
            raise ConfigError(
                f"another process has begun a run in output_dir {self.folder} meanwhile; start again to go on from it, "
                "or name another output_dir"
            )

    def _tracker(self, package: str) -> trackers.Tracker:
        name = self.config.run_name or self.folder.resolve().name
        return trackers.Tracker(
            package, self.config.project, name, self.folder, self.number, self.config.to_dict()
        )

    def _write_start(self) -> None:
        if self.config.overwrite and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name != checkpoint.LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with checkpoint.writing(self.folder):  # a finished run that goes on is not done any more
            (self.folder / "result.json").unlink(missing_ok=True)
        content = {"stage": self.stage, "seed": self.config.seed, "versions": versions()}
        content["processes"], content["dtype"] = parallel.world(), str(self.dtype).removeprefix("torch.")
        content["device"], content["number"] = devices.describe(self.device), self.number
        if self.rollout_dtype is not None:
            content["rollout_dtype"] = str(self.rollout_dtype).removeprefix("torch.")
        content["data"] = self._data_before | digests.of_data(self.config, read=True)
        content["models"] = self._models_before | digests.of_models(self.config, self._given)
        content["config"] = self.config.to_dict()
        checkpoint.atomic_text(self.folder / "config.yaml", config_text.dump(self.config))
        checkpoint.atomic_text(self.folder / "run.json", json.dumps(content, indent=1) + "\n")

    def restore(
        self, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, Any]:
        """Put the newest checkpoint into modules, optimizers and random generators; returns what else was
        saved ({} at the start).
        """
        if not self.step:
            return {}
        for name, module in modules.items():
            with whole([p for p in module.parameters() if p.requires_grad], write=True):
                checkpoint.load_module_state(name, module, self.tensors)
        for name, optimizer in optimizers.items():
            checkpoint.load_optimizer_state(
                f"optimizer.{name}", optimizer, self.tensors, self.state["optimizers"][name]
            )
        checkpoint.set_rng_state(self.tensors, self.state["rng"], self.device)
        self.tensors = {}
        return dict(self.state["extra"])

    def save(
        self, step: int, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer],
        extra: Mapping[str, Any] | None = None, last: bool = False,
    ) -> None:  # fmt: skip
        """Checkpoint after `step` if it is due or the best so far. extra: what else to keep, as JSON values."""
        assert self.metrics is not None
        better = self._look_at_best(step)
        every = self.config.save_every
        if not better and (not every or (step % every and not last)):
            return
        with self.metrics.phase("checkpoint"):
            all_tensors, rng = checkpoint.rng_state(self.device)
            states = {}
            for name, module in modules.items():
                all_tensors |= _module_state(name, module)
            for name, optimizer in optimizers.items():
                found, states[name] = checkpoint.optimizer_state(f"optimizer.{name}", optimizer)
                all_tensors |= found
            state = {"optimizers": states, "rng": rng, "extra": dict(extra or {}), "best": self.best}
            best = self.best["step"] if self.best else None
            if parallel.lead():
                checkpoint.save(
                    self.checkpoints, step, all_tensors, state, self.config.keep_checkpoints, best
                )

    def _look_at_best(self, step: int) -> bool:
        """Whether best_metric of this step is better than all before."""
        name = self.config.best_metric
        assert self.metrics is not None
        if not name:
            return False
        if name not in self.metrics.latest:
            if self.eval_due(step, self.metrics.total_steps):
                known = [k for k in self.metrics.latest if not k.startswith("time/")]
                raise ConfigError(
                    f"best_metric is {name}, which {self.stage} does not log; use one of {', '.join(known)}"
                )
            return False
        value = self.metrics.latest[name]
        lower = self.config.best_is == "lowest"
        if self.best and not (value < self.best["value"] if lower else value > self.best["value"]):
            return False
        self.best = {"step": step, "value": value}
        return True

    def restore_best(self, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Put the best checkpoint's weights into modules, for what is written at the end.

        Returns what else it kept; {} where the last step is the best, or none was asked for.
        """
        assert self.metrics is not None
        if not self.best or self.best["step"] == self.metrics.total_steps:
            return {}
        tensors, state, step = checkpoint.load(checkpoint.step_folder(self.checkpoints, self.best["step"]))
        for name, module in modules.items():
            with whole([p for p in module.parameters() if p.requires_grad], write=True):
                checkpoint.load_module_state(name, module, tensors)
        self.metrics.say(f"writing the best step, {step}: {self.config.best_metric} {self.best['value']:.4g}")
        return dict(state["extra"])

    def eval_due(self, step: int, total: int) -> bool:
        """Whether held-out data is looked at after `step`."""
        every = self.config.eval_every
        return step == total or bool(every and step % every == 0)

    def check_finite(
        self,
        value: float,
        what: str,
        step: int,
        rows: Sequence[data.Example],
        modules: Mapping[str, nn.Module],
    ) -> None:
        """Stop before a checkpoint is written when training has blown up; the step's rows and the weights are kept."""
        if math.isfinite(value):
            return
        kept = [
            {
                "where": e.where,
                "prompt_ids": e.prompt_ids,
                "answers": e.answers,
                "learnt": e.learnt,
                "columns": e.columns,
            }
            for e in rows
        ]
        message = f"the {what} is {value} at step {step} of {self.stage}; lower the learning rate"
        where = self.save_failed(step, message, {}, {"rows": kept}, modules)
        raise ConfigError(f"{message}; the batch is in {where}, see dschat replay {where}")

    def check_gradient(
        self, stepper: Stepper, step: int, rows: Sequence[data.Example], modules: Mapping[str, nn.Module]
    ) -> None:
        """`check_finite` of a step's gradient, but for an overflow that the loss scale has answered."""
        if not stepper.overflow:
            self.check_finite(stepper.norm, f"gradient{at_scale(stepper)}", step, rows, modules)

    def save_failed(
        self, step: int, message: str, tensors: Mapping[str, Tensor], texts: Mapping[str, Any],
        modules: Mapping[str, nn.Module],
    ) -> Path:  # fmt: skip
        """Keep what a step failed on, for `dschat replay`: `failed-step-000003/` with the batch and the weights."""
        where = self.folder / f"failed-step-{step:06d}"
        weights: dict[str, Tensor] = {}
        for name, module in modules.items():  # every process: weights that are divided are put together
            weights |= _module_state(name, module)
        if not parallel.lead():
            return where
        with checkpoint.atomic_folder(where) as temporary:
            for name, content in (("batch", tensors), ("weights", weights)):
                plain = {k: v.detach().cpu().contiguous().clone() for k, v in content.items()}
                save_file(plain, temporary / f"{name}.safetensors")
            about = {"step": step, "stage": self.stage, "message": message, **texts}
            text = json.dumps(about, indent=1, default=repr) + "\n"
            (temporary / "batch.json").write_text(text, encoding="utf-8")
        return where

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json, the sign that the run is done."""
        best = {"best": {"metric": self.config.best_metric, **self.best}} if self.best else {}
        self.result = dict(result) | best | {"seconds": time.perf_counter() - self._started}
        if parallel.lead():
            checkpoint.atomic_text(self.folder / "result.json", json.dumps(self.result, indent=1) + "\n")
        parallel.barrier()
        return self.result


NO_HALF_KERNELS = (
    "float16: the CPU kernels have none, so training runs PyTorch's operations, products in float32 and rounded, and "
    "rollouts run in float32 from the same weights"
)


def rollout_dtype(config: StageConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What generation runs in where it cannot run in the weights' dtype; None: in that. Raises ConfigError where the
    config needs the two to be one."""
    if dtype != torch.float16 or device.type != "cpu":
        return None
    if getattr(config, "exact", False):
        raise ConfigError(
            "dtype is float16 and exact is true, but rollouts on the CPU run in float32; set dtype to bfloat16 or "
            "float32, or exact to false"
        )
    return torch.float32


ON_THE_CPU = "on the CPU, whose memory is the host's"


def idle_reference(config: OnlineConfig | DPOConfig, device: torch.device) -> list[str]:
    """The sentence that says why `offload_reference` moves nothing; none where it does, or is not asked for."""
    if not config.offload_reference:
        return []
    if not config.own_reference:
        return ["offload_reference has no effect: the reference is the policy's own weights"]
    return [f"offload_reference has no effect {ON_THE_CPU}"] if device == devices.CPU else []


def make_loss_scale(config: StageConfig, dtype: torch.dtype) -> LossScale | None:
    """A loss scale as configured, for float16."""
    if dtype != torch.float16:
        return None
    return LossScale(
        config.loss_scale, config.initial_scale_power, config.loss_scale_window, config.hysteresis,
        config.min_loss_scale,
    )  # fmt: skip


def at_scale(stepper: Stepper | None) -> str:
    """Says, behind what is not finite, that no smaller loss scale is left."""
    scale = None if stepper is None else stepper.loss_scale
    return "" if scale is None else f" at loss scale {scale.value:g}, which cannot fall,"


def float16_result(*steppers: Stepper) -> dict[str, Any]:
    """What a run's result says of its loss scales; {} without."""
    scales = [s.loss_scale for s in steppers if s.loss_scale is not None]
    return (
        {"float16": {"loss_scale": [s.value for s in scales], "skipped": [s.skipped for s in scales]}}
        if scales
        else {}
    )


def zero_settings(config: StageConfig) -> ZeroSettings | None:
    """What a run asks DeepSpeed for; None: nothing. Raises ConfigError for settings that cannot work."""
    try:
        settings = ZeroSettings.read(config.zero_stage, config.offload, config.deepspeed)
        if settings is not None and config.dtype == "float16":
            settings.require_wide_sums(config.deepspeed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if settings is not None and isinstance(config, OnlineConfig):
        config.require_whole_trunk(settings.stage)
    if settings is not None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"zero_stage is {settings.stage} and DeepSpeed is not installed; run: pip install 'dschat[deepspeed]', or "
            "leave zero_stage out"
        )
    return settings


def _module_state(name: str, module: nn.Module) -> dict[str, Tensor]:
    """checkpoint.module_state of a module whose weights may be sharded: one by one, copied on the lead."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not any(hasattr(p, "ds_id") for p in trained.values()):
        return checkpoint.module_state(name, module)
    out = {}
    for key, parameter in trained.items():
        with whole([parameter]):
            if parallel.lead():
                out[f"{name}.{key}"] = parameter.detach().cpu().clone()
    return out


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Ctrl-C, a full disk, and the loss of another process, end a run with one line that says how to go on. Ctrl-C
    stays a KeyboardInterrupt: whoever tries one setting after the other is stopped too."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError, checkpoint.WriteError) as error:
        if isinstance(error, RuntimeError) and not parallel.is_parted(error):
            raise
        newest = checkpoint.latest(run.checkpoints)
        where = f"after {newest.name}" if newest else "from the start"
        go_on = f"the same command goes on {where} ({os.fspath(run.folder)})"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {go_on}") from None
        lost = "another process of this run has ended or does not answer"
        raise ConfigError(f"{lost if isinstance(error, RuntimeError) else error}; {go_on}") from None
