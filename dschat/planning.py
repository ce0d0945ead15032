"""`dschat plan`: memory by part, tokens a step and times of a recipe, before anything is loaded. All of it is an
estimate: shapes times bytes for memory, and a roofline (the larger of bytes / bandwidth and operations / peak) for
time. Nothing is measured.

The machine is given by its memory, bandwidth and peak (default: an A100-80's data sheet) and the share of the peak
that matrix products are taken to reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config as configs
from . import config_text
from .config import ConfigError, PlanConfig, PPOConfig, StageConfig

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A decoder: what its weights and its cache are counted by, norms and biases apart (a thousandth).

    kv: numbers that a token's keys have in a layer. matrices: weights that a token is multiplied with, the head apart.
    sides: inputs and outputs of all of them, which an adapter has for each rank. head: weights of the head.
    embeddings: of all tables, the head among them where it is one.
    """

    layers: int
    hidden: int
    kv: int
    matrices: int
    sides: int
    head: int
    embeddings: int

    @property
    def parameters(self) -> int:
        return self.matrices + self.embeddings

    def cache_bytes(self, tokens: int, size: int) -> int:
        """Keys and values of some tokens."""
        return 2 * self.layers * self.kv * tokens * size

    def lora(self, rank: int) -> int:
        """Weights of an adapter on every projection."""
        return rank * self.sides


def _published(
    layers: int, hidden: int, intermediate: int, vocab: int, kv: int, mlp: int = 2, tied: bool = True,
    positions: int = 0, embedded: int = 0,
) -> Shape:  # fmt: skip
    """The shape of OPT and Llama from their numbers. mlp: matrices of an MLP, 3 where it is gated. positions: rows of
    a table of them. embedded: width of the embedding, which a matrix brings to the hidden size and another back; 0:
    the hidden size."""
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv + mlp * hidden * intermediate)
    sides = layers * (2 * (hidden + hidden) + 2 * (hidden + kv) + mlp * (hidden + intermediate))
    if embedded:
        matrices, sides = matrices + 2 * embedded * hidden, sides + 2 * (embedded + hidden)
    head = vocab * (embedded or hidden)
    tables = (head if tied else 2 * head) + positions * hidden
    return Shape(layers, hidden, kv, matrices, sides, head, tables)


PUBLISHED = {
    "facebook/opt-350m": _published(24, 1024, 4096, 50272, 1024, positions=2050, embedded=512),
    "facebook/opt-1.3b": _published(24, 2048, 8192, 50272, 2048, positions=2050),
    "facebook/opt-6.7b": _published(32, 4096, 16384, 50272, 4096, positions=2050),
    "facebook/opt-13b": _published(40, 5120, 20480, 50272, 5120, positions=2050),
    "meta-llama/Llama-2-7b-hf": _published(32, 4096, 11008, 32000, 4096, mlp=3, tied=False),
}
"""The models of DeepSpeed-Chat's recipes, from their published configurations."""


def shape_of(name: str) -> Shape:
    """Of a published model, or of a folder with a config.json. Raises ConfigError for what is neither."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if not Path(name).expanduser().joinpath("config.json").is_file():
        raise ConfigError(
            f"the shape of {name} is not known; give a model folder, or one of {', '.join(PUBLISHED)}"
        )
    from .rlhf import models  # PyTorch, which the published shapes do without

    model = models.outline(name)
    if model is None:
        raise ConfigError(
            f"{name}/config.json is of no language model that transformers can build, see dschat verify"
        )
    model.config.pad_token_id = None  # some forwards look for it in the ids, which have no values here
    return measured(model)


def measured(model: Any) -> Shape:
    """The shape of a Hugging Face model, by its modules; its weights may be on the meta device."""
    import torch
    from torch import nn

    from .rlhf.models import linear_modules

    linear: list[torch.Tensor] = [m.weight for m in linear_modules(model).values()]  # type: ignore[misc]
    head: torch.Tensor = model.get_output_embeddings().weight
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    token = torch.zeros(1, 1, dtype=torch.long, device=head.device)
    keys = model(input_ids=token, use_cache=True).past_key_values.layers[0].keys  # as the cache keeps them
    config = model.config.get_text_config()
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv=keys.numel(),
        matrices=sum(w.numel() for w in linear),
        sides=sum(sum(w.shape) for w in linear),
        head=head.numel(),
        embeddings=sum(w.numel() for w in {id(w): w for w in (*tables, head)}.values()),
    )


@dataclass(frozen=True)
class Part:
    """Bytes of one thing on each GPU, or in each GPU's part of the host's memory."""

    name: str
    bytes: float
    host: bool = False


@dataclass
class Estimate:
    """What `plan` found. seconds: by phase of one step."""

    parts: list[Part]
    tokens: int
    seconds: dict[str, float]

    @property
    def gpu_bytes(self) -> float:
        return sum(p.bytes for p in self.parts if not p.host)


def plan(config: PlanConfig) -> tuple[StageConfig, Estimate]:
    """The recipe as it is with that many processes, and its estimate."""
    if config.stage == "ppo":
        recipe = config_text.load(PPOConfig, config.recipe, processes=config.gpus)
        if recipe.kv_cache != "auto":
            raise ConfigError(
                f"kv_cache is {recipe.kv_cache} in {config.recipe}, which rollouts on GPUs do not have; set it to auto"
            )
        return recipe, estimate(recipe, config)
    cls: Any = configs.COMMANDS[config.stage]
    run = config_text.load(cls, config.recipe, processes=config.gpus)
    return run, estimate_rows(run, config)


def answers(run: StageConfig) -> int:
    """Sequences of one step; a pair is two."""
    if isinstance(run, PPOConfig):
        return run.prompts_per_step * run.samples_per_prompt
    return run.batch_size * run.gradient_accumulation_steps * (2 if run.command == "reward" else 1)


def estimate_rows(run: Any, machine: PlanConfig) -> Estimate:
    """Memory and times of one step of SFT or of a reward model, whose head is left out."""
    model, gpus, stage = shape_of(run.model), machine.gpus, run.zero_stage or 0
    size = 4 if run.dtype == "float32" else 2
    trained = model.lora(run.lora_r) if run.lora_r else model.parameters
    fed = -(-run.batch_size // gpus) * run.max_length * (2 if run.command == "reward" else 1)
    again = stage == 3 or run.gradient_checkpointing
    parts = _trained("model", model.parameters, trained, run.dtype, stage, run.offload, gpus)
    parts.append(_activations(model, fed, size, again))
    tokens = answers(run) * run.max_length
    peak = machine.tflops * 1e12 * machine.efficiency
    weights = model.matrices + (model.head if run.command == "sft" else 0)
    return Estimate(parts, tokens, {"update": 2 * (3 + again) * weights * tokens / gpus / peak})


def _activations(model: Shape, fed: int, size: int, again: bool) -> Part:
    """What waits for the backward of `fed` tokens: of a layer 18 rows of its width (Korthikanti et al. 2022, less the
    scores, which attention computes again); of a segment that is computed again only its input."""
    kept = 1 if again else 18
    one = 18 * fed * model.hidden * size
    return Part("activations", kept * fed * model.hidden * model.layers * size + one)


def estimate(run: PPOConfig, machine: PlanConfig) -> Estimate:
    """Memory and times of one PPO step."""
    policy = shape_of(run.model)
    scorer = shape_of(run.critic or (run.reward[0] if run.reward and ":" not in run.reward[0] else run.model))
    size, gpus = 4 if run.dtype == "float32" else 2, machine.gpus
    stage = run.zero_stage or 0
    rows = answers(run)
    own = -(-rows // gpus)
    length = run.max_prompt_length + run.max_new_tokens

    trained = policy.lora(run.lora_r) if run.lora_r else policy.parameters
    parts = _trained("policy", policy.parameters, trained, run.dtype, stage, run.offload, gpus)
    if run.base_weights == "int8":  # linear layers, a number a byte; scales are a thousandth
        parts[0] = Part("policy: weights", policy.matrices + policy.embeddings * size + trained * 4)
    packed = size if run.rollout_weights == "model" else 1
    parts_of = min(run.inference_tp_size, gpus)
    share = "whole" if parts_of == 1 else f"1/{parts_of}"
    parts.append(Part(f"rollout packs ({share} on each GPU)", policy.parameters * packed / parts_of))
    parts.append(Part(f"cache of {own} rows", policy.cache_bytes(own * length, size)))
    if run.own_reference:
        reference = shape_of(run.reference) if run.reference else policy
        parts.append(_frozen("reference", reference.parameters * size, stage, run.offload_reference, gpus))
    critic_stage = stage if run.critic_zero_stage is None else run.critic_zero_stage
    scores, on_policy = scorer.parameters * size, run.critic_trunk == "policy"
    if run.critic_update != "head":
        critic = scorer.parameters if run.critic_update == "all" else scorer.lora(run.critic_lora_r)
        parts += _trained("critic", scorer.parameters, critic, run.dtype, critic_stage, run.offload, gpus)
        if on_policy:  # its base is the policy's
            parts[-3] = Part("critic: weights", critic * 4)
    elif not on_policy:  # a head is a few numbers, which are not counted
        away = run.offload_reward and not run.critic
        parts.append(_frozen("critic and reward model", scores, critic_stage, away, gpus))
    alone = on_policy and run.reward_trunk == "own" and any(":" not in name for name in run.reward)
    if run.critic_update == "all" or alone:
        parts.append(_frozen("reward model", scores, critic_stage, run.offload_reward, gpus))
    fed = -(-run.batch_size // gpus) * length
    again = stage == 3 or run.gradient_checkpointing
    parts.append(_activations(policy, fed, size, again))

    peak, bandwidth = machine.tflops * 1e12 * machine.efficiency, machine.bandwidth * GB
    tokens = rows * length
    weights = policy.matrices + policy.head
    step = max(weights * packed / bandwidth, 2 * weights * own / peak)
    cache = policy.cache_bytes(own * (run.max_prompt_length + run.max_new_tokens // 2), size) / bandwidth
    passes = 3 + again  # forward, backward twice it, and where layers are computed again the forward
    critic_again = run.critic_gradient_checkpointing
    critic_again = run.gradient_checkpointing if critic_again is None else critic_again
    critic_passes = 1 if run.critic_update == "head" else 3 + (critic_stage == 3 or critic_again)
    own_tokens = tokens / gpus
    seconds = {
        "prefill": 2 * weights * own * run.max_prompt_length / peak,
        "decode": run.max_new_tokens * (step + cache),
        "score, log-probs, values": (2 * 2 * weights + 2 * 2 * scorer.parameters) * own_tokens / peak,
        "update": run.ppo_epochs
        * 2
        * (passes * weights + critic_passes * scorer.parameters)
        * own_tokens
        / peak,
    }
    return Estimate(parts, tokens, seconds)


def _trained(
    name: str, all_: int, trained: int, dtype: str, stage: int, offload: bool, gpus: int
) -> list[Part]:
    """Weights, gradients and optimizer state: float32 masters beside weights of 16 bits, and two moments. DeepSpeed
    adds float16's gradients up in float32."""
    host = offload and stage > 0
    size = 4 if dtype == "float32" else 2
    summed = 4 if dtype == "float16" and stage else size
    state = trained * (8 if size == 4 or trained != all_ else 12)
    return [
        Part(f"{name}: weights", all_ * size / (gpus if stage == 3 else 1), host and stage == 3),
        Part(f"{name}: gradients", trained * summed / (gpus if stage >= 2 else 1)),
        Part(f"{name}: optimizer", state / (gpus if stage >= 1 else 1), host),
    ]


def _frozen(name: str, weights: float, stage: int, offload: bool, gpus: int) -> Part:
    """Bytes of a model that only scores; the layer that is whole on the GPU while it does is left out."""
    shards = gpus if stage == 3 else 1
    share = "whole" if shards == 1 else f"1/{shards}"
    return Part(f"{name} ({share}{'' if offload else ' on each GPU'})", weights / shards, offload)


def lines(recipe: StageConfig, found: Estimate, config: PlanConfig) -> list[str]:
    """The estimate as text."""
    out = [
        f"ESTIMATE of {config.recipe} on {config.gpus} GPUs of {config.memory:g} GB, {config.bandwidth:g} GB/s, "
        f"{config.tflops:g} TFLOP/s at {config.efficiency:.0%}; nothing was measured",
        "", "memory of each GPU",
    ]  # fmt: skip
    out += [f"  {p.bytes / GB:8.2f} GB  {p.name}{' (in host memory)' if p.host else ''}" for p in found.parts]
    fits = "fits" if found.gpu_bytes <= config.memory * GB else "does NOT fit"
    out += [f"  {found.gpu_bytes / GB:8.2f} GB  together on the GPU: {fits} into {config.memory:g} GB", ""]
    out.append(f"tokens a step: {found.tokens} ({answers(recipe)} rows)")
    out += ["seconds a step, at the roofline"]
    out += [f"  {s:8.2f} s   {name}" for name, s in found.seconds.items()]
    total = sum(found.seconds.values())
    return [*out, f"  {total:8.2f} s   together, {found.tokens / total:,.0f} tokens/s"]
