"""What a decoder is, independent of who wrote it: the vocabulary between adapters and the planner.

An adapter (one file a mechanism, in this package) reads a Hugging Face model's modules, config fields and the
code of its forwards, and returns a `DecoderSpec`. The planner and the packed training forward read nothing
else of the model. A spec holds the modules themselves, never copies of their weights: weights may change
under it at any time.

One layer computes, with x the residual stream [T, hidden] and every product rounded to the model's dtype:

    A(n) = attn_out_norm(o(attention(rope(q_norm(q(n))), rope(k_norm(k(n))), v(n))))
    M(m) = mlp_out_norm(down(act(gate(m)) * up(m)))          without a gate: down(act(up(m)))

    pre:       n = attn_norm(x),  x = r + s A(n),  m = mlp_norm(x),  x = r + s M(m)
               r: what the norm read, or (residual_from_norm) what it gave; s: residual_scale
    post:      x = attn_norm(x + A(x)),  x = mlp_norm(x + M(x))                  (OPT-350m)
    parallel:  n = attn_norm(x),  m = mlp_norm(x),  x = (x + s A(n)) + s M(m)

A norm that is None leaves its input as it is; in a parallel layer without mlp_norm the MLP reads n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn


class Unsupported(ValueError):
    """The fused decoder does not cover this model exactly; the message names the module and the config
    value."""


@dataclass(frozen=True, eq=False)
class NormSpec:
    """A normalisation of rows, in the words of `ops.rms_norm` and `ops.layer_norm`.

    `weight` and `bias` are attribute names on `module` (None: the norm has none); "norms.*.weight" is one row
    for every member of the list `module.norms`. `groups`: a row is cut into so many equal slices, each
    normalised by itself (the heads of q or k); the weight is [width of a slice] for all of them, or [groups,
    width].
    """

    kind: Literal["rms", "layer"]
    module: nn.Module
    weight: str | None
    bias: str | None
    eps: float
    weight_offset: float = 0.0
    rounding: Literal["llama", "gemma"] = "llama"
    groups: int = 1

    def sources(self) -> list[torch.Tensor]:
        """The parameters that the norm is computed from, as they are now."""
        return [t for name in (self.weight, self.bias) for t in self._parameters(name)]

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(weight, bias) as they are now."""
        weight, bias = (self._parameters(name) for name in (self.weight, self.bias))
        return _one(weight), _one(bias)

    def _parameters(self, name: str | None) -> list[torch.Tensor]:
        if name is None:
            return []
        if ".*." not in name:
            return [getattr(self.module, name)]
        members, leaf = name.split(".*.")
        return [getattr(member, leaf) for member in getattr(self.module, members)]


def _one(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(tensors) if len(tensors) > 1 else next(iter(tensors), None)


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """A projection. `module` is an `nn.Linear` (weight [out, in]), a transformers `Conv1D` (weight [in, out])
    or a PEFT LoRA layer around one of them; training calls `module(x)`, so adapters and hooks stay in play.

    `rows` is the slice of *output* features that this projection owns when the module is fused (qkv,
    gate/up), or several slices that follow each other (qkv interleaved by heads); None: all of them.
    `weight_only`: the model multiplies by the module's weight past the module; its bias takes no part."""

    module: nn.Module
    rows: tuple[int, int] | tuple[tuple[int, int], ...] | None = None
    weight_only: bool = False

    def pieces(self) -> list[LinearSpec]:
        """The projection as projections of one slice each."""
        if self.rows is None or isinstance(self.rows[0], int):
            return [self]
        slices: Any = self.rows
        return [LinearSpec(self.module, piece) for piece in slices]


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """Rotary positions: angle = position * inv_freq, cos and sin multiplied by `scaling`; the first
    `rotary_dim` features of a head rotate. inv_freq: fp32 [rotary_dim / 2]. `limit`: how many positions these
    frequencies hold for (None: all); `limit_reason` says why no more."""

    inv_freq: torch.Tensor
    scaling: float
    style: Literal["half", "interleaved"]
    rotary_dim: int
    limit: int | None = None
    limit_reason: str = ""

    def tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions 0 .. positions - 1, float32 [positions, rotary_dim / 2] on the CPU."""
        angles = (
            torch.arange(positions, dtype=torch.float32, device="cpu")[:, None]
            * self.inv_freq.float().cpu()[None]
        )
        return angles.cos() * self.scaling, angles.sin() * self.scaling


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One decoder layer (formula in the module docstring). `window`: a query sees itself and the window - 1
    keys before it; None: all. `scale` multiplies q.k. `rope` None: q and k do not rotate. `name` is the
    layer's path in the model that was given."""

    attn_norm: NormSpec | None
    mlp_norm: NormSpec | None
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
    order: Literal["pre", "post", "parallel"] = "pre"
    rope: RopeSpec | None = None
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    attn_out_norm: NormSpec | None = None
    mlp_out_norm: NormSpec | None = None
    residual_scale: float = 1.0
    residual_from_norm: bool = False
    name: str = ""
    module: nn.Module | None = None

    def norms(self) -> Iterator[tuple[str, NormSpec]]:
        """(name of the field, norm) of every norm there is, in the order of execution."""
        for part in ("attn_norm", "q_norm", "k_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"):
            if (norm := getattr(self, part)) is not None:
                yield part, norm

    def linears(self) -> list[LinearSpec]:
        """Its projections, in the order of execution."""
        gate = [] if self.gate is None else [self.gate]
        return [self.q, self.k, self.v, self.o, *gate, self.up, self.down]

    def modules(self) -> list[nn.Module]:
        """The modules whose parameters it reads."""
        return [s.module for s in self.linears()] + [norm.module for _, norm in self.norms()]


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder-only transformer.

    Input is `embed_norm(project_in(embed_scale * embed(ids)) + positions.weight[position + position_offset])`,
    output `softcap(lm_head(logit_scale * project_out(final_norm(x))))` (each part where present).
    `scale_in_embed`: the embedding module multiplies by embed_scale itself, rounded to the dtype of its
    weight. `positions` is only a weight holder: its own forward may take other arguments. `max_positions` is
    how many positions exist: a hard limit for learned positions and fixed tables (`positions_end`), the
    trained context for rotary. `alibi`: slope of every query head, which biases the scores as
    `ops.attention` says. `cache_repeats`: how often the model's own code repeats every kv head in its cache.
    `dropout` lists every probability above zero by its place ("layers.0.attn.attn_dropout": 0.1): active in
    training mode only, and not part of the fused decoder."""

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
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    lm_head: LinearSpec | None
    embed_norm: NormSpec | None = None
    embed_scale: float = 1.0
    scale_in_embed: bool = False
    positions_end: bool = False
    attn_softcap: float | None = None
    alibi: tuple[float, ...] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    cache_repeats: int = 1
    dropout: Mapping[str, float] = field(default_factory=dict)
    trunk: nn.Module | None = None

    def ropes(self) -> list[RopeSpec]:
        """The different rotary tables, in the order of the layers that use them first."""
        return list({id(rope): rope for layer in self.layers if (rope := layer.rope) is not None}.values())

    def position_limit(self) -> tuple[int, str] | None:
        """(how many positions a row may have, why no more) where there is such a limit."""
        limits = [(rope.limit, rope.limit_reason) for rope in self.ropes() if rope.limit is not None]
        if self.positions is not None or self.positions_end:
            limits.append((self.max_positions, ""))
        return min(limits, default=None)

    @property
    def context(self) -> int:
        """How many tokens a row should have at most: the trained context, or less where positions end before."""
        limit = self.position_limit()
        return self.max_positions if limit is None else min(self.max_positions, limit[0])

    def norms(self) -> list[NormSpec]:
        """Every norm, in the order of execution."""
        found = [self.embed_norm] if self.embed_norm is not None else []
        found += [norm for layer in self.layers for _, norm in layer.norms()]
        return found + ([self.final_norm] if self.final_norm is not None else [])

    def linears(self) -> list[LinearSpec]:
        """Every projection, in the order of execution, head last."""
        found = [self.project_in] if self.project_in else []
        for layer in self.layers:
            found += layer.linears()
        found += [s for s in (self.project_out, self.lm_head) if s is not None]
        return found

    def first_modules(self) -> list[nn.Module]:
        """The modules whose parameters are read before the first layer."""
        parts = [self.project_in, self.embed_norm]
        return [m for m in (self.embed, self.positions) if m is not None] + [p.module for p in parts if p]

    def last_modules(self) -> list[nn.Module]:
        """The modules whose parameters are read between the last layer and the head."""
        return [p.module for p in (self.final_norm, self.project_out) if p is not None]


def decoder_spec(model: nn.Module) -> DecoderSpec:
    """Describe `model`: a CausalLM, its trunk, a sequence classifier (its score head stays outside: `lm_head`
    is None), or a PEFT model around one of these.

    Raises `Unsupported` (a ValueError) naming the module and the config value that no adapter covers exactly.
    """
    from . import detect

    return detect.describe(model)
