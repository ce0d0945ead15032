"""What the machine allows: bytes over its measured read rate, arithmetic over its measured peak, the slower of both.

    seconds(work) = max(bytes / read rate, FLOPs / peak)

Every step reads the packed weights once, and the keys and values that its rows look at once; prefill computes every
prompt token and reaches the head with the last one of each row. It is a lower bound of a step's time whatever the
implementation, as long as weights and cache have these dtypes and come from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dschat_kernels.cache import SCALE_BYTES
from dschat_kernels.models.spec import DecoderSpec
from dschat_kernels.plan import Decoder


@dataclass(frozen=True)
class Machine:
    """Bytes read a second and floating-point operations a second, as measured."""

    read: float
    flops: float


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and floating-point operations that must be done."""

    bytes: float
    flops: float

    def seconds(self, machine: Machine) -> float:
        """The least time on `machine`."""
        return max(self.bytes / machine.read, self.flops / machine.flops)

    def limit(self, machine: Machine) -> str:
        """What the time is spent on: "memory" or "arithmetic"."""
        return "memory" if self.bytes / machine.read >= self.flops / machine.flops else "arithmetic"


def decode_step(decoder: Decoder, contexts: Sequence[float]) -> Work:
    """One token for rows that hold `contexts` tokens each, the new one included. The decoder has its packs."""
    spec = decoder.spec
    rows, weights = len(contexts), _weights(decoder)
    keys = sum(_keys(spec, context) for context in contexts)
    return Work(
        bytes=decoder.packed_bytes + keys * 2 * spec.num_kv_heads * _key_bytes(decoder),
        flops=2 * rows * sum(weights.values()) + keys * 4 * spec.num_heads * spec.head_dim,
    )


def prefill(decoder: Decoder, lengths: Sequence[int]) -> Work:
    """The prompts of `lengths` tokens, up to the logits of the last token of each."""
    spec, weights = decoder.spec, _weights(decoder)
    head = weights.pop("lm_head", 0)
    pairs = sum(_causal_pairs(spec, length) for length in lengths)
    return Work(
        bytes=decoder.packed_bytes,
        flops=2 * sum(lengths) * sum(weights.values())
        + 2 * len(lengths) * head
        + pairs * 4 * spec.num_heads * spec.head_dim,
    )


def generation_seconds(decoder: Decoder, machine: Machine, rows: int, prompt: int, new: int) -> float:
    """Least time of `new` tokens after `rows` prompts of `prompt` tokens each; the first comes with the prefill."""
    steps = sum(
        decode_step(decoder, [context] * rows).seconds(machine) for context in range(prompt + 1, prompt + new)
    )
    return prefill(decoder, [prompt] * rows).seconds(machine) + steps


def _weights(decoder: Decoder) -> dict[str, int]:
    """Numbers in every packed matrix, by its name."""
    return {name: g.packed.total * g.packed.k for name, g in decoder.groups.items() if g.packed is not None}


def _key_bytes(decoder: Decoder) -> int:
    """Of a token's key, or its value, in one head."""
    dim, dtype = decoder.spec.head_dim, decoder.cache_dtype
    return dim + SCALE_BYTES if dtype == torch.int8 else dim * dtype.itemsize


def _keys(spec: DecoderSpec, context: float) -> float:
    """Keys that the last token of a row sees, over all layers."""
    return sum(context if layer.window is None else min(context, layer.window) for layer in spec.layers)


def _causal_pairs(spec: DecoderSpec, length: int) -> int:
    """(query, key) pairs of a prompt, over all layers."""
    total = 0
    for layer in spec.layers:
        seen = length if layer.window is None else min(length, layer.window)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total
