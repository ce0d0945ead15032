"""A decoder in parts: every part holds some of the attention heads and some of the columns of every matrix, and puts
what it computes together with the others' before a product needs all of it.

Matrices are cut by output columns only: q, k and v by heads, everything else into nearly equal parts. So a sum over
inputs is never split, every number is computed in one place as it would be in one piece, and a decoder in parts gives
the bits of a whole one (on the reference backend: up to the shapes that PyTorch's products see). The price is one more
gathering a branch than cutting down-projections by rows would need.

Embedding, positions, norms and the projections around the layers are whole in every part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache import PagedKVCache
from .executors import PythonExecutor, StepTensors
from .models.spec import DecoderSpec, LayerSpec, LinearSpec, NormSpec, Unsupported
from .plan import Decoder, OpCall

Gather = Callable[[Tensor, Sequence[int]], Tensor]
"""gather(own, widths): the columns of all parts side by side; part i gives widths[i] of them."""


def pieces(n: int, parts: int) -> list[int]:
    """n columns in nearly equal parts, the first ones one more."""
    size, more = divmod(n, parts)
    return [size + (i < more) for i in range(parts)]


def part_of(spec: DecoderSpec, part: int, parts: int) -> DecoderSpec:
    """The spec of one of `parts` parts; its matrices are slices of the same modules, hidden_size stays.

    Raises Unsupported where heads cannot be divided, or a norm of q or k cannot.
    """
    check_heads(spec.num_heads, spec.num_kv_heads, parts)
    heads, kv_heads = spec.num_heads // parts, spec.num_kv_heads // parts
    layers = [_Layer(layer, spec, part, parts).cut() for layer in spec.layers]
    return replace(
        spec,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=pieces(spec.intermediate_size, parts)[part],
        layers=tuple(layers),
        alibi=None if spec.alibi is None else spec.alibi[part * heads :][:heads],
        lm_head=None
        if spec.lm_head is None
        else _columns(spec.lm_head, pieces(spec.vocab_size, parts), part),
    )


def check_heads(heads: int, kv_heads: int, parts: int) -> None:
    """Raises Unsupported where `parts` processes cannot share a model's heads alike."""
    for name, n in (("attention", heads), ("key and value", kv_heads)):
        if n % parts:
            near = max(i for i in range(1, parts) if heads % i == kv_heads % i == 0)
            raise Unsupported(
                f"the model has {n} {name} heads, which {parts} processes cannot share alike: set inference_tp_size "
                f"to {near}."
            )


class _Layer:
    """One layer of a part."""

    def __init__(self, layer: LayerSpec, spec: DecoderSpec, part: int, parts: int):
        self.layer, self.spec, self.part, self.parts = layer, spec, part, parts

    def cut(self) -> LayerSpec:
        spec, layer = self.spec, self.layer
        return replace(
            layer,
            q=self.columns(layer.q, spec.num_heads * spec.head_dim),
            k=self.columns(layer.k, spec.num_kv_heads * spec.head_dim),
            v=self.columns(layer.v, spec.num_kv_heads * spec.head_dim),
            o=self.columns(layer.o, spec.hidden_size),
            gate=None if layer.gate is None else self.columns(layer.gate, spec.intermediate_size),
            up=self.columns(layer.up, spec.intermediate_size),
            down=self.columns(layer.down, spec.hidden_size),
            q_norm=self.norm(layer.q_norm, spec.num_heads, "q"),
            k_norm=self.norm(layer.k_norm, spec.num_kv_heads, "k"),
        )

    def columns(self, linear: LinearSpec, n: int) -> LinearSpec:
        return _columns(linear, pieces(n, self.parts), self.part)

    def norm(self, norm: NormSpec | None, heads: int, which: str) -> NormSpec | None:
        """A norm of every head by itself, with one weight for all of them, is cut with the heads."""
        if norm is None:
            return None
        shared = all(t is None or t.dim() == 1 for t in norm.tensors())
        if norm.groups != heads or not shared:
            how = "has a weight for every head" if norm.groups == heads else "spans the heads"
            raise Unsupported(
                f"the norm of {which} in {self.layer.name or 'a layer'} {how}, which cannot be divided among "
                "processes: leave inference_tp_size at 1."
            )
        return replace(norm, groups=heads // self.parts)


def _columns(linear: LinearSpec, widths: Sequence[int], part: int) -> LinearSpec:
    """The output features of one part."""
    begin = sum(widths[:part])
    end = begin + widths[part]
    rows: list[Any] = []
    place = 0
    for piece in linear.pieces():
        rows_of: Any = piece.rows or (0, sum(widths))
        first, last = rows_of
        a, b = max(begin, place), min(end, place + last - first)
        if a < b:
            rows.append((first + a - place, first + b - place))
        place += last - first
    return replace(linear, rows=rows[0] if len(rows) == 1 else tuple(rows))


class ShardedExecutor(PythonExecutor):
    """Walks a part's plan op by op and gathers what the next product needs whole: the heads' outputs, and the columns
    of every product but q, k and v. All parts have to take the same steps."""

    def __init__(self, decoder: Decoder, whole: DecoderSpec, parts: int, gather: Gather):
        super().__init__(decoder)
        self.gather = gather
        intermediate = pieces(whole.intermediate_size, parts)
        self.widths = {
            "ctx": pieces(whole.num_heads * whole.head_dim, parts),
            "up": intermediate,
            "gate_up": intermediate,
            "o": pieces(whole.hidden_size, parts),
            "down": pieces(whole.hidden_size, parts),
            "lm_head": pieces(whole.vocab_size, parts),
        }

    def execute(
        self, c: OpCall, buffers: Mapping[str, Tensor], t: StepTensors, cache: PagedKVCache
    ) -> Tensor:
        if c.op == "attention":
            return self.gather(super().execute(c, buffers, t, cache), self.widths["ctx"])
        widths = self.widths.get(c.weights.rpartition(".")[2]) if c.op == "linear" else None
        if widths is None:
            return super().execute(c, buffers, t, cache)
        own = super().execute(replace(c, residual=""), buffers, t, cache)
        out = self.gather(own, widths)
        return buffers[c.residual] + out if c.residual else out


def sharded_decoder(
    spec: DecoderSpec,
    part: int,
    parts: int,
    gather: Gather,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    weights: str = "model",
    kv_cache: str = "auto",
) -> Decoder:
    """The decoder of one part. Arguments and errors: as Decoder and `part_of`."""
    own = part_of(spec, part, parts)
    decoder = Decoder(own, dtype=dtype, backend=backend, weights=weights, kv_cache=kv_cache)
    decoder.executor = ShardedExecutor(decoder, spec, parts, gather)
    return decoder
