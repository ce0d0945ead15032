"""Rotary positions: which features pair up (read from the attention's code), and the angles (read from the
model's rotary module)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .parts import class_name, require, require_globals
from .source import global_of, recognise
from .spec import RopeSpec, Unsupported

# Kinds whose frequencies are fixed when the model is built.
FIXED_KINDS = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class Rotation:
    """How an attention rotates: pairs of "half" or "interleaved" features, from cos and sin laid out by a rotary
    module of kind `source` (a "table" holds one row of sines and cosines a position); `partial`: features beyond cos
    and sin pass through."""

    style: Literal["half", "interleaved"]
    source: Literal["halves", "pairs", "table"]
    partial: bool


# (apply_rotary_pos_emb, rotate_half) -> what they do together
_ROTATIONS = {
    ("rotate.half", "rotate_half"): Rotation("half", "halves", False),
    ("rotate.half_partial", "rotate_half"): Rotation("half", "halves", True),
    ("rotate.pairs", "rotate_pairs"): Rotation("interleaved", "pairs", False),
    ("rotate.pairs_from_halves", "rotate_pairs"): Rotation("interleaved", "halves", False),
    ("rotate.pairs_from_halves_partial", "rotate_pairs"): Rotation("interleaved", "halves", True),
}
_SOURCES = {
    "rotary": "halves",
    "rotary.layer_types": "halves",
    "rotary.pairs": "pairs",
    "rotary.table_module": "table",
}


def rotation(module: Any, name: str) -> Rotation:
    """What the functions that the attention sees do to q and k."""
    kinds = tuple(
        recognise(global_of(module, function) or (lambda: None))
        for function in ("apply_rotary_pos_emb", "rotate_half")
    )
    if kinds not in _ROTATIONS:
        raise Unsupported(
            f"{name} ({class_name(module)}) rotates q and k in a way that no adapter covers exactly"
        )
    return _ROTATIONS[kinds]


def rope(
    module: Any,
    head_dim: int,
    how: Rotation,
    width: int | None,
    name: str,
    layer_type: str | None = None,
) -> RopeSpec:
    """Frequencies and scaling exactly as the module will use them (the buffer itself, not a recomputation).

    `width`: features of a head that the attention hands to the rotation (None: all). `layer_type`: whose
    frequencies, where the module has several.
    """
    source = _SOURCES[require(module, tuple(_SOURCES), name, "cos and sin")]
    if source != how.source:
        raise Unsupported(f"{name} ({class_name(module)}) lays cos and sin out as {source}, not {how.source}")
    if source == "table":
        require_globals(module, name, create_sinusoidal_positions="rotary.table")
        make = global_of(module, "create_sinusoidal_positions")
        return table_rope(module.embed_positions, make, head_dim if width is None else width, name)
    prefix = "" if layer_type is None else f"{layer_type}_"
    kind = module.rope_type if layer_type is None else module.rope_type.get(layer_type)
    limit, reason = _limit(module, kind, layer_type, name)
    inv_freq = getattr(module, f"{prefix}inv_freq" if limit is None else f"{prefix}original_inv_freq", None)
    if not isinstance(inv_freq, torch.Tensor) or inv_freq.ndim != 1:
        raise Unsupported(f"{name}.{prefix}inv_freq is not one vector of frequencies")
    scaling = float(getattr(module, f"{prefix}attention_scaling"))
    rotary_dim = 2 * inv_freq.numel()
    given = head_dim if width is None else width
    if rotary_dim > given or (rotary_dim < given and not how.partial):
        raise Unsupported(f"{name} rotates {rotary_dim} features where the attention hands over {given}")
    return RopeSpec(inv_freq.detach().to(torch.float32), scaling, how.style, rotary_dim, limit, reason)


def _limit(module: Any, kind: Any, layer_type: str | None, name: str) -> tuple[int | None, str]:
    """Up to how many positions the original frequencies are the ones in use, and why not beyond."""
    if kind in FIXED_KINDS:
        return None, ""
    if kind == "dynamic":
        # At exactly the trained length transformers keeps what a longer sequence before it left behind.
        return int(module.original_max_seq_len) - 1, (
            f"{name} has rope_type='dynamic': beyond the trained context its frequencies depend on the longest "
            "row of the batch"
        )
    if kind == "longrope":
        parameters = module.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        return int(parameters["original_max_position_embeddings"]), (
            f"{name} has rope_type='longrope': beyond the original context its frequencies depend on the longest "
            "row of the batch"
        )
    raise Unsupported(
        f"{name} ({class_name(module)}) has rope_type={kind!r}, which no adapter covers exactly"
    )


def table_rope(
    table: torch.Tensor, make: Callable[[int, int], torch.Tensor], width: int, name: str
) -> RopeSpec:
    """The rotation of neighbouring pairs by a table of sines and cosines, [positions, rotary_dim], that
    `make(positions, rotary_dim)` made; `width`: features of a head that may rotate."""
    rotary_dim = table.shape[1]
    if rotary_dim > width:
        raise Unsupported(
            f"{name} rotates {rotary_dim} features of heads with {width}; set config.rotary_dim"
        )
    expected = make(len(table), rotary_dim)
    if float((table.cpu().double() - expected.double()).abs().max()) > 2.0**-8:  # a cast may have rounded it
        raise Unsupported(f"{name} does not hold the sines and cosines it is built with")
    inv_freq = 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu") / rotary_dim)
    return RopeSpec(inv_freq, 1.0, "interleaved", rotary_dim)
