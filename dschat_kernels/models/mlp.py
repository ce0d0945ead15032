"""MLPs: gated (two projections or one packed) and plain ones, under whatever names their authors gave the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import parts
from .source import mechanism
from .spec import LinearSpec


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))); `size`: features between."""

    gate: LinearSpec | None
    up: LinearSpec
    down: LinearSpec
    activation: str
    size: int


# kind -> names of (up, activation, down, dropout) of a plain MLP
PLAIN: dict[str, tuple[str, str, str, str | None]] = {
    "mlp.gpt2": ("c_fc", "act", "c_proj", "dropout"),
    "mlp.starcoder2": ("c_fc", "act", "c_proj", "residual_dropout"),
    "mlp.phi": ("fc1", "activation_fn", "fc2", None),
    "mlp.gptj": ("fc_in", "act", "fc_out", "dropout"),
    "mlp.neox": ("dense_h_to_4h", "act", "dense_4h_to_h", None),
    "mlp.bloom": ("dense_h_to_4h", "gelu_impl", "dense_4h_to_h", "hidden_dropout"),
    "mlp.falcon": ("dense_h_to_4h", "act", "dense_4h_to_h", "hidden_dropout"),
    "layer.opt": ("fc1", "activation_fn", "fc2", None),  # the layer itself
}


def read(module: Any, name: str, dropout: parts.DropoutLog) -> Mlp:
    """The MLP `module`; refused where its forward is none of the known ones."""
    kind = mechanism(module)
    if kind in PLAIN:
        mlp = _plain(module, kind, name, dropout)
    else:
        kind = parts.require(module, ("mlp.gated", "mlp.gated_packed"), name, "the MLP")
        mlp = _gated(module, name) if kind == "mlp.gated" else _packed(module, name)
    for part in ("gate", "up", "down"):
        dropout.see_lora(getattr(mlp, part), f"{name}.{part}")
    return mlp


def _gated(module: Any, name: str) -> Mlp:
    act = parts.gated_activation(module.act_fn, f"{name}.act_fn")
    gate, up, down = (
        parts.linear(getattr(module, place), f"{name}.{place}")
        for place in ("gate_proj", "up_proj", "down_proj")
    )
    return Mlp(gate, up, down, act, int(parts.base_linear(module.up_proj).out_features))


def _packed(module: Any, name: str) -> Mlp:
    act = parts.gated_activation(module.activation_fn, f"{name}.activation_fn")
    size = int(parts.base_linear(module.gate_up_proj).out_features) // 2
    gate = parts.linear(module.gate_up_proj, f"{name}.gate_up_proj", (0, size))
    up = parts.linear(module.gate_up_proj, f"{name}.gate_up_proj", (size, 2 * size))
    return Mlp(gate, up, parts.linear(module.down_proj, f"{name}.down_proj"), act, size)


def _plain(module: Any, kind: str, name: str, dropout: parts.DropoutLog) -> Mlp:
    parts.unhooked(module, name)
    up_name, act_name, down_name, dropout_name = PLAIN[kind]
    up = parts.linear(getattr(module, up_name), f"{name}.{up_name}")
    if kind == "mlp.bloom":
        down = parts.bloom_linear(module, down_name, name)
    else:
        down = parts.linear(getattr(module, down_name), f"{name}.{down_name}")
    act = parts.activation(getattr(module, act_name), f"{name}.{act_name}")
    if dropout_name is not None:
        dropout.see(f"{name}.{dropout_name}", getattr(module, dropout_name))
    base = parts.base_linear(getattr(module, up_name))
    size = int(base.nf if hasattr(base, "nf") else base.out_features)
    return Mlp(None, up, down, act, size)
