"""A failed step once more, piece by piece, until the first number that is not finite.

The order is that of the computation: the weights, each module of the model row by row (Hugging Face's own forward,
whose modules can be watched), the rewards, what the batch was given, the loss on the kernels that trained, the
gradients.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import config as configs
from .. import config_base
from .. import device as devices
from ..config import ConfigError
from ..engine.hybrid_engine import HybridEngine
from ..engine.precision import LossScale
from ..engine.rollout import Rollout, SamplingConfig
from ..engine.stepper import Stepper
from . import batching, checkpoint, conversations, data, dpo, environments, models, online, ppo, reward, sft
from .experience import Experience
from .grpo import GRPO
from .names import logged
from .rewards import RewardError, TrainerState, is_function_name
from .run import rollout_dtype

BUILD: dict[str, Callable[..., online.Trainer]] = {
    "ppo": ppo.PPO.build,
    "grpo": GRPO.build,
    "rloo": GRPO.build,
}
BATCH = (
    "rollout.logprobs",
    "rollout.rewards",
    "old_logp",
    "ref_logp",
    "weights",
    "values",
    "returns",
    "advantages",
)
"""Numbers of a batch in the order in which they were made."""


@dataclass
class Replay:
    """where: what has the first number that is not finite, or failed; empty if nothing did. lines: what was found."""

    lines: list[str] = field(default_factory=list)
    where: str = ""

    def ok(self, what: str) -> None:
        self.lines.append(f"finite: {what}")

    def stop(self, what: str, said: str) -> Replay:
        self.where = what
        self.lines.append(f"not finite: {what}: {said}")
        return self

    def fail(self, what: str, error: RewardError | environments.EpisodeError) -> Replay:
        """What the user's own code raised or gave."""
        self.where = what
        self.lines += [*error.trace.splitlines(), f"failed: {what}: {error}"]
        return self


def replay(path: str, device: str = "auto") -> Replay:
    """Compute the failed step in `path` again, on whichever device. Raises ConfigError for what is no failed step of a
    run.
    """
    place = devices.use(device)
    about, config, dtype, batch, weights = _read(Path(path))
    config.device = device
    stage = str(about["stage"])
    out = Replay([f"step {about['step']} of {stage}: {about['message']}"])
    for name, tensor in weights.items():
        if bad := describe(tensor):
            return out.stop(f"weight {name}", bad)
    out.ok(f"{len(weights)} trained weights")
    tokenizer = models.load_tokenizer(config.model)
    encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
    if "episode" in about:
        return _episode(out, about["episode"], config, encoder)
    if stage in BUILD:
        batch = {name: tensor.to(place) for name, tensor in batch.items()}
        return _online(out, about, config, dtype, batch, weights, encoder)
    return _rows(out, about, config, dtype, place, weights, encoder)


def _read(path: Path) -> tuple[dict[str, Any], Any, torch.dtype, dict[str, Tensor], dict[str, Tensor]]:
    """(what failed, the run's config, its models' dtype, the batch, the trained weights)."""
    folder = path if path.is_dir() else path.parent
    for file in (folder / "batch.json", folder / "weights.safetensors", folder.parent / "run.json"):
        if not file.is_file():
            raise ConfigError(
                f"{path} is no failed step of a run: {file} is missing; name failed-step-000003 of one"
            )
    try:
        about = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
        before = json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))
        config: Any = config_base.build(
            configs.COMMANDS[before["stage"]], before["config"], str(folder.parent / "run.json")
        )
        dtype = models.pick_dtype(before.get("dtype", config.dtype))
        tensors = [load_file(folder / f"{name}.safetensors") for name in ("batch", "weights")]
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder} cannot be read: {error}") from error
    return about, config, dtype, tensors[0], tensors[1]


def describe(tensor: Tensor) -> str:
    """What is wrong with a tensor's first number that is not finite; empty if all are."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return ""
    bad = (~torch.isfinite(tensor)).nonzero()
    first = tuple(int(i) for i in bad[0])
    return f"{float(tensor[first])} at {list(first)}, {len(bad)} of {tensor.numel()} numbers"


# -------------------------------------------------------------------------------------------------- the forward


@contextlib.contextmanager
def _watch(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Notes the first module whose output is not finite, in the order of the forward."""
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if found or not isinstance(value, Tensor):
                return
            if bad := describe(value):
                largest = [
                    float(x.abs().max()) for x in inputs if isinstance(x, Tensor) and x.is_floating_point()
                ]
                entered = f"; largest number that went in: {max(largest):.3g}" if largest else ""
                found.append(f"{name} ({type(module).__name__}) gives {bad}{entered}")

        return look

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _forward(out: Replay, what: str, model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether the model gives finite numbers for every row, each alone and without padding."""
    device = next(model.parameters()).device
    for number, ids in enumerate(rows):
        found: list[str] = []
        with _watch(model, found):
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        if found:
            out.stop(what, f"row {number}: {found[0]}")
            return False
    out.ok(f"{what}, {len(rows)} rows through every module")
    return True


def _gradients(out: Replay, modules: Mapping[str, nn.Module]) -> Replay:
    """The gradients, in the order in which a backward pass reaches them."""
    count = 0
    for kind, module in modules.items():
        for name, parameter in reversed(list(module.named_parameters())):
            if parameter.grad is None:
                continue
            count += 1
            if bad := describe(parameter.grad):
                return out.stop(f"gradient of {kind}.{name}", bad)
    out.ok(f"{count} gradients")
    out.lines.append("everything is finite this time: look at the machine, or at what differs from the run")
    return out


def _last_scale(config: Any) -> LossScale:
    """The loss scale at which an overflow ends a run of float16: the fixed one, or the smallest."""
    return LossScale(config.loss_scale or config.min_loss_scale)


# ------------------------------------------------------------------------------------ SFT, reward model and DPO


def _rows(
    out: Replay, about: Mapping[str, Any], config: Any, dtype: torch.dtype, device: torch.device,
    weights: Mapping[str, Tensor], encoder: conversations.Encoder,
) -> Replay:  # fmt: skip
    examples = [
        data.Example(
            r["prompt_ids"], r["answers"], "", dict(r.get("columns", {})), r["where"], r.get("learnt", [])
        )
        for r in about["rows"]
    ]
    scale = _last_scale(config) if dtype == torch.float16 else None
    if config.command == "reward":
        model = devices.place(models.load_scorer(config.model, dtype, config.seed), device)
        models.set_scorer_padding(model, encoder.tokenizer, encoder)
        model = models.make_trainable(model, config, "SEQ_CLS")
        stepper = Stepper(None, scale)
        checkpoint.load_module_state("reward", model, weights)
        modules = {"reward": model}
    else:
        model = devices.place(models.load_policy(config.model, dtype), device)
        reference = None
        if config.command == "dpo":
            reference = dpo.Reference(config, model, encoder.pad_id, device)
        model = models.make_trainable(model, config, "CAUSAL_LM")
        engine = HybridEngine(model, dtype=rollout_dtype(config, dtype, device), loss_scale=scale)
        if reference is not None:
            reference.attach(engine)
            reference.cache = _start_reference(config, reference, examples, engine)
        checkpoint.load_module_state("policy", model, weights)
        modules = {"policy": model}
    texts = [[*e.prompt_ids, *answer] for e in examples for answer in e.answers]
    if not _forward(out, "forward of the model", model, texts):
        return out
    if config.command == "reward":
        scorer = models.Scorer(model)
        loss = 0.0
        for piece in batching.chunks(examples, config.batch_size):
            part, _ = reward.pair_loss(scorer, piece, encoder.pad_id, config, len(examples))
            stepper.backward(part)
            loss += float(part.detach())
    elif config.command == "dpo":
        assert reference is not None
        rows = range(len(examples))
        loss = dpo.accumulate(engine, reference, examples, rows, encoder.pad_id, config)["loss"]
    else:
        loss = sft.accumulate(engine, examples, encoder.pad_id, config)["loss"]
    if bad := describe(torch.tensor([loss], device="cpu")):
        return out.stop("loss", bad)
    out.ok(f"loss {loss:.6g}")
    return _gradients(out, modules)


def _start_reference(
    config: Any, reference: dpo.Reference, examples: Sequence[data.Example], engine: HybridEngine
) -> dict[str, Tensor]:
    """The reference's log-probs of the pairs while the policy is still as it was at the start."""
    pieces = [reference.compute(piece) for piece in batching.chunks(examples, config.batch_size)]
    return {"train": torch.stack([torch.cat([p[i] for p in pieces]) for i in range(2)])}


# --------------------------------------------------------------------------------------------- PPO, GRPO, RLOO


def _silent(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Stands for a reward function that was given in Python, which no file names."""
    return [0.0] * len(completions)


def _online(
    out: Replay, about: Mapping[str, Any], config: Any, dtype: torch.dtype, batch: Mapping[str, Tensor],
    weights: Mapping[str, Tensor], encoder: conversations.Encoder,
) -> Replay:  # fmt: skip
    functions = () if config.reward or config.environment else (_silent,)
    alone = replace(config, inference_tp_size=1, offload_reference=False, offload_reward=False)
    trainer = online.assemble(alone, BUILD[config.command], encoder, dtype, None, functions)
    modules = trainer.modules()
    for stepper in trainer.steppers().values():
        if stepper.loss_scale is not None:
            stepper.loss_scale = _last_scale(config)
    for name, module in modules.items():
        checkpoint.load_module_state(name, module, weights)
    rollout = _rollout(batch, config)
    rows = list(about.get("minibatch", range(len(rollout))))
    chosen = rollout.select(rows)
    real = [
        ids[mask.bool()].tolist() for ids, mask in zip(chosen.input_ids, chosen.attention_mask, strict=True)
    ]
    if not _forward(out, "forward of the policy", trainer.engine.model, real):
        return out
    if "completions" in about:
        return _scores(out, about, config, trainer, rollout, real)
    for name in BATCH:
        if bad := describe(batch.get(name, torch.zeros(0, device="cpu"))):
            return out.stop(f"the batch's {name}", bad)
    out.ok(f"what the batch was given ({', '.join(n for n in BATCH if n in batch)})")
    experience = Experience(
        rollout, batch["mask"], batch["old_logp"], batch["ref_logp"], {}, float("inf"), about["kl_coef"],
        batch.get("weights"), batch["advantages"], batch["values"], batch["returns"],
    )  # fmt: skip
    if isinstance(trainer, ppo.PPO):
        experience.features = trainer.critic.features(rollout)
    ends = rollout.completion_mask.sum(1).cumsum(0).cpu()
    for name, value in trainer.minibatch(experience, rows, ends).items():
        if not name.endswith("/loss"):
            continue
        said = logged(config.command, name)
        if bad := describe(torch.tensor([value], device="cpu")):
            return out.stop(said, bad)
        out.ok(f"{said} {value:.6g}")
    return _gradients(out, modules)


def _rollout(batch: Mapping[str, Tensor], config: Any) -> Rollout:
    values: dict[str, Any] = {k.partition(".")[2]: v for k, v in batch.items() if k.startswith("rollout.")}
    kind = environments.Episodes if "actions" in values else Rollout
    return kind(**values, sampling=SamplingConfig(temperature=config.temperature))


def _episode(out: Replay, episode: Mapping[str, Any], config: Any, encoder: conversations.Encoder) -> Replay:
    """The environment once more, with the row and the actions that it failed on."""
    try:
        environments.play_again(environments.load_environment(config.environment), episode, encoder)
    except environments.EpisodeError as error:
        return out.fail("environment", error)
    out.lines.append(
        f"the environment answers all {len(episode['actions'])} actions of {episode.get('where', 'the row')} this time"
    )
    return out


def _scores(
    out: Replay, about: Mapping[str, Any], config: Any, trainer: online.Trainer, rollout: Rollout,
    rows: Sequence[Sequence[int]],
) -> Replay:  # fmt: skip
    """Where a score came from that was no number: the reward model's modules, or what a source said."""
    for name, source in trainer.rewards.sources:
        scorer = getattr(source, "scorer", source)
        if isinstance(scorer, models.Scorer) and not hasattr(source, "rate_texts"):
            what = f"forward of the reward model {name}"
            if not _forward(out, what, scorer.model, rows):
                return out
    try:
        progress = TrainerState(**about.get("progress", {}))
        trainer.rewards(rollout, about["prompts"], about["completions"], about["columns"], progress)
    except RewardError as error:
        return out.fail("rewards", error)
    named = [n for n in config.reward if is_function_name(n)]
    out.lines.append(
        "the rewards are numbers this time"
        + (
            "; functions given in Python were not called"
            if not config.reward and not config.environment
            else ""
        )
        + (f"; {', '.join(named)} may depend on something else" if named else "")
    )
    return out
