"""`dschat plan`: memory by part, tokens a step and times of a PPO recipe, before anything is loaded. All of it is an
estimate: shapes times bytes for memory, and a roofline (the larger of bytes / bandwidth and operations / peak) for
time. Nothing is measured.

The machine is given by its memory, bandwidth and peak (default: an A100-80's data sheet) and the share of the peak
that matrix products are taken to reach.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from . import config as configs
from .config import ConfigError, PlanConfig, PPOConfig

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A decoder: what its parameters and its cache are counted by. mlp: matrices of an MLP (3 when gated)."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    mlp: int = 2
    tied: bool = True

    @property
    def matrices(self) -> int:
        """Weights that a token is multiplied with, the head apart."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (
            2 * self.hidden * self.hidden + 2 * self.hidden * kv + self.mlp * self.hidden * self.intermediate
        )

    @property
    def parameters(self) -> int:
        """Weights, without norms and biases (a thousandth)."""
        return self.matrices + self.vocab * self.hidden * (1 if self.tied else 2)

    def cache_bytes(self, tokens: int, size: int) -> int:
        """Keys and values of some tokens."""
        return 2 * self.layers * self.hidden * self.kv_heads // self.heads * tokens * size

    def lora(self, rank: int) -> int:
        """Weights of an adapter on every projection."""
        kv = self.hidden * self.kv_heads // self.heads
        sides = (
            2 * (self.hidden + self.hidden)
            + 2 * (self.hidden + kv)
            + self.mlp * (self.hidden + self.intermediate)
        )
        return self.layers * rank * sides


PUBLISHED = {
    "facebook/opt-350m": Shape(24, 1024, 4096, 50272, 16, 16),
    "facebook/opt-1.3b": Shape(24, 2048, 8192, 50272, 32, 32),
    "facebook/opt-6.7b": Shape(32, 4096, 16384, 50272, 32, 32),
    "facebook/opt-13b": Shape(40, 5120, 20480, 50272, 40, 40),
    "meta-llama/Llama-2-7b-hf": Shape(32, 4096, 11008, 32000, 32, 32, mlp=3, tied=False),
}
"""The models of DeepSpeed-Chat's recipes, from their published configurations."""


def shape_of(name: str) -> Shape:
    """Of a published model, or of a folder with a config.json. Raises ConfigError for what is neither."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"the shape of {name} is not known; give a model folder, or one of {', '.join(PUBLISHED)}"
        )
    c = json.loads(file.read_text(encoding="utf-8"))
    try:
        heads = c["num_attention_heads"]
        return Shape(
            c["num_hidden_layers"], c["hidden_size"], c.get("intermediate_size") or c["ffn_dim"], c["vocab_size"],
            heads, c.get("num_key_value_heads") or heads, 3 if c.get("hidden_act") == "silu" else 2,
            bool(c.get("tie_word_embeddings", True)),
        )  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"{file} has no {error}, so the model's shape is not known") from None


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


def plan(config: PlanConfig) -> tuple[PPOConfig, Estimate]:
    """The recipe as it is with that many processes, and its estimate."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(config.gpus)}):  # per_device_... are multiplied by it
        recipe = configs.load(PPOConfig, config.recipe)
    return recipe, estimate(recipe, config)


def estimate(run: PPOConfig, machine: PlanConfig) -> Estimate:
    """Memory and times of one PPO step."""
    policy = shape_of(run.model)
    scorer = shape_of(run.critic or (run.reward[0] if run.reward and ":" not in run.reward[0] else run.model))
    size, gpus = 4 if run.dtype == "float32" else 2, machine.gpus
    stage = run.zero_stage or 0
    rows = run.prompts_per_step * run.samples_per_prompt
    own = -(-rows // gpus)
    length = run.max_prompt_length + run.max_new_tokens

    trained = policy.lora(run.lora_r) if run.lora_r else policy.parameters
    parts = _trained("policy", policy.parameters, trained, size, stage, run.offload, gpus)
    parts_of = min(run.inference_tp_size, gpus)
    share = "whole" if parts_of == 1 else f"1/{parts_of}"
    parts.append(Part(f"rollout packs ({share} on each GPU)", policy.parameters * size / parts_of))
    parts.append(Part(f"cache of {own} rows", policy.cache_bytes(own * length, size)))
    if not run.lora_r:
        parts.append(Part("reference (whole on each GPU)", policy.parameters * size))
    critic = {"all": scorer.parameters, "lora": scorer.lora(run.critic_lora_r), "head": scorer.hidden}[
        run.critic_update
    ]
    critic_stage = stage if run.critic_zero_stage is None else run.critic_zero_stage
    parts += _trained("critic", scorer.parameters, critic, size, critic_stage, run.offload, gpus)
    if run.critic_update == "all":
        parts.append(Part("reward model (whole on each GPU)", scorer.parameters * size))
    fed = -(-run.batch_size // gpus) * length
    # Of a layer 18 rows of its width wait for the backward (Korthikanti et al. 2022, less the scores, which attention
    # computes again); of a segment that is computed again only its input.
    again = stage == 3 or run.gradient_checkpointing
    kept = 1 if again else 18
    one = 18 * fed * policy.hidden * size
    parts.append(Part("activations", kept * fed * policy.hidden * policy.layers * size + one))

    peak, bandwidth = machine.tflops * 1e12 * machine.efficiency, machine.bandwidth * GB
    tokens = rows * length
    weights = policy.matrices + policy.vocab * policy.hidden
    step = max(weights * size / bandwidth, 2 * weights * own / peak)
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
    name: str, all_: int, trained: int, size: int, stage: int, offload: bool, gpus: int
) -> list[Part]:
    """Weights, gradients and optimizer state: float32 masters beside bfloat16 weights, and two moments."""
    host = offload and stage > 0
    state = trained * (8 if size == 4 or trained != all_ else 12)
    return [
        Part(f"{name}: weights", all_ * size / (gpus if stage == 3 else 1), host and stage == 3),
        Part(f"{name}: gradients", trained * size / (gpus if stage >= 2 else 1)),
        Part(f"{name}: optimizer", state / (gpus if stage >= 1 else 1), host),
    ]


def lines(recipe: PPOConfig, found: Estimate, config: PlanConfig) -> list[str]:
    """The estimate as text."""
    out = [
        f"ESTIMATE of {config.recipe} on {config.gpus} GPUs of {config.memory:g} GB, {config.bandwidth:g} GB/s, "
        f"{config.tflops:g} TFLOP/s at {config.efficiency:.0%}; nothing was measured",
        "", "memory of each GPU",
    ]  # fmt: skip
    out += [f"  {p.bytes / GB:8.2f} GB  {p.name}{' (in host memory)' if p.host else ''}" for p in found.parts]
    fits = "fits" if found.gpu_bytes <= config.memory * GB else "does NOT fit"
    out += [f"  {found.gpu_bytes / GB:8.2f} GB  together on the GPU: {fits} into {config.memory:g} GB", ""]
    out.append(f"tokens a step: {found.tokens} ({recipe.prompts_per_step * recipe.samples_per_prompt} rows)")
    out += ["seconds a step, at the roofline"]
    out += [f"  {s:8.2f} s   {name}" for name, s in found.seconds.items()]
    total = sum(found.seconds.values())
    return [*out, f"  {total:8.2f} s   together, {found.tokens / total:,.0f} tokens/s"]
