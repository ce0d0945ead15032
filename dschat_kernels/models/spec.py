"""What a decoder is, independent of who wrote it: the vocabulary between adapters and the planner.

An adapter (one file a layout, in this package) reads a Hugging Face model's modules, config fields and the
code of its forwards, and returns a `DecoderSpec`. The planner and the packed training forward read nothing
else of the model. A spec holds the modules themselves, never copies of their weights: weights may change
under it at any time.

One layer computes, with x the residual stream [T, hidden] and every product rounded to the model's dtype:

    pre:   x = x + o(attention(rope(q(n)), rope(k(n)), v(n)))       n = attn_norm(x)
           x = x + down(act(gate(m)) * up(m))                       m = mlp_norm(x)
           (without a gate: down(act(up(m))))
    post:  x = attn_norm(x + o(attention(q(x), k(x), v(x))))        (OPT-350m)
           x = mlp_norm(x + down(act(up(x))))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn


class Unsupported(ValueError):
    """The fused decoder does not cover this model exactly; the message names the module and the config
    value."""


@dataclass(frozen=True, eq=False)
class NormSpec:
    """A normalisation over the hidden size, in the words of `ops.rms_norm` and `ops.layer_norm`.

    `weight` and `bias` are attribute names on `module` (None: the norm has none).
    """

    kind: Literal["rms", "layer"]
    module: nn.Module
    weight: str | None
    bias: str | None
    eps: float
    weight_offset: float = 0.0
    rounding: Literal["llama", "gemma"] = "llama"

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(weight, bias) as they are now."""
        weight = getattr(self.module, self.weight) if self.weight else None
        bias = getattr(self.module, self.bias) if self.bias else None
        return weight, bias


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """A projection. `module` is an `nn.Linear` (weight [out, in]), a transformers `Conv1D` (weight [in, out])
    or a PEFT LoRA layer around one of them; training calls `module(x)`, so adapters and hooks stay in play.

    `rows` is the slice of *output* features that this projection owns when the module is fused (qkv,
    gate/up); None: all of them."""

    module: nn.Module
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """Rotary positions: angle = position * inv_freq, cos and sin multiplied by `scaling`; the first
    `rotary_dim` features of a head rotate. inv_freq: fp32 [rotary_dim / 2]."""

    inv_freq: torch.Tensor
    scaling: float
    style: Literal["half", "interleaved"]
    rotary_dim: int

    def tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions 0 .. positions - 1, float32 [positions, rotary_dim / 2] on the CPU."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.inv_freq.float().cpu()[None]
        return angles.cos() * self.scaling, angles.sin() * self.scaling


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One decoder layer (formula in the module docstring). `window`: a query sees itself and the window - 1
    keys before it; None: all. `scale` multiplies q.k. `name` is the layer's path in the model that was
    given."""

    attn_norm: NormSpec
    mlp_norm: NormSpec
    q: LinearSpec
    k: LinearSpec
    v: LinearSpec
    o: LinearSpec
    gate: LinearSpec | None
    up: LinearSpec
    down: LinearSpec
    activation: str
    scale: float
    window: int | None
    norm_position: Literal["pre", "post"] = "pre"
    name: str = ""
    module: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder-only transformer.

    Input is `project_in(embed(ids)) + positions.weight[position + position_offset]` (each part where
    present), output `lm_head(project_out(final_norm(x)))`. `positions` is only a weight holder: its own
    forward may take other arguments. `max_positions` is how many positions exist: a hard limit for learned
    positions, the trained context for rotary. `dropout` lists every probability above zero by its place
    ("layers.0.attn.attn_dropout": 0.1): active in training mode only, and not part of the fused decoder."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    embed: nn.Module
    positions: nn.Module | None
    position_offset: int
    project_in: LinearSpec | None
    project_out: LinearSpec | None
    rope: RopeSpec | None
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    lm_head: LinearSpec | None
    embed_norm: NormSpec | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    dropout: Mapping[str, float] = field(default_factory=dict)
    trunk: nn.Module | None = None

    def norms(self) -> list[NormSpec]:
        """Every norm, in the order of execution."""
        found = [n for layer in self.layers for n in (layer.attn_norm, layer.mlp_norm)]
        return found + ([self.final_norm] if self.final_norm is not None else [])

    def linears(self) -> list[LinearSpec]:
        """Every projection, in the order of execution, head last."""
        found = [self.project_in] if self.project_in else []
        for layer in self.layers:
            found += [layer.q, layer.k, layer.v, layer.o]
            found += ([layer.gate] if layer.gate else []) + [layer.up, layer.down]
        found += [s for s in (self.project_out, self.lm_head) if s is not None]
        return found


def decoder_spec(model: nn.Module) -> DecoderSpec:
    """Describe `model`: a CausalLM, its trunk, a sequence classifier (its score head stays outside: `lm_head`
    is None), or a PEFT model around one of these.

    Raises `Unsupported` (a ValueError) naming the module and the config value that no adapter covers exactly.
    """
    from . import detect

    return detect.describe(model)
