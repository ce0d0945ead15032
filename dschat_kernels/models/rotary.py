"""Rotary positions, read from the model's rotary module."""

from __future__ import annotations

from typing import Any

import torch

from .parts import class_name, require
from .spec import RopeSpec, Unsupported

# Kinds whose frequencies are fixed when the model is built; "dynamic" and "longrope" change them with the
# length seen.
FIXED_KINDS = ("default", "linear", "llama3", "yarn")


def rope(module: Any, config: Any, head_dim: int, rotation: str, name: str) -> RopeSpec:
    """Frequencies and scaling exactly as the module will use them (the buffer itself, not a
    recomputation)."""
    require(module, ("rotary",), name, "cos and sin")
    kind = getattr(module, "rope_type", None)
    if kind not in FIXED_KINDS:
        raise Unsupported(
            f"{name} ({class_name(module)}) has rope_type={kind!r}, whose frequencies are not fixed; "
            f"fused are {FIXED_KINDS}"
        )
    inv_freq = module.inv_freq
    if not isinstance(inv_freq, torch.Tensor) or inv_freq.ndim != 1:
        raise Unsupported(f"{name}.inv_freq is not one vector of frequencies")
    rotary_dim = 2 * inv_freq.numel()
    if rotary_dim > head_dim or (rotary_dim < head_dim and rotation != "rotate.half_partial"):
        raise Unsupported(f"{name} rotates {rotary_dim} features of heads with {head_dim}")
    return RopeSpec(inv_freq.detach().to(torch.float32), float(module.attention_scaling), "half", rotary_dim)
