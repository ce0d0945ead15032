"""Decoder layers: which norms stand where, and how attention and MLP join the residual stream."""

from __future__ import annotations

from typing import Any

from . import attention, mlp, parts
from .attention import Attention
from .mlp import Mlp
from .spec import NormSpec, Unsupported

# kind -> names of attention and MLP in the layer; "" is the layer itself
BODIES = {
    "layer.gpt2": ("attn", "mlp"),
    "layer.gpt_neo": ("attn", "mlp"),
    "layer.gptj": ("attn", "mlp"),
    "layer.neox": ("attention", "mlp"),
    "layer.bloom": ("self_attention", "mlp"),
    "layer.falcon": ("self_attention", "mlp"),
    "layer.opt": ("self_attn", ""),
}
_USUAL = ("self_attn", "mlp")

# kind -> field of `LayerSpec`: name of the norm in the layer
NORMS: dict[str, dict[str, str]] = {
    "layer.sequential": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "layer.sequential_dropout": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "layer.multiplier": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "layer.bloom": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "layer.neox": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "layer.sandwich": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "layer.branch_norm": {
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "layer.parallel": {"attn_norm": "input_layernorm"},
    "layer.gptj": {"attn_norm": "ln_1"},
    "layer.gpt2": {"attn_norm": "ln_1", "mlp_norm": "ln_2"},
    "layer.gpt_neo": {"attn_norm": "ln_1", "mlp_norm": "ln_2"},
    "layer.opt": {"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"},
}
# kind -> fields of `LayerSpec` that are the same in every layer of the kind
FIELDS: dict[str, dict[str, Any]] = {
    "layer.parallel": {"order": "parallel"},
    "layer.gptj": {"order": "parallel"},
}
_DROPOUTS = (
    "resid_attn_dropout",
    "resid_mlp_dropout",
    "resid_dropout",
    "post_attention_dropout",
    "post_mlp_dropout",
    "hidden_dropout",
    "dropout",
)


def read(
    layer: Any, config: Any, name: str, dropout: parts.DropoutLog
) -> tuple[Attention, Mlp, dict[str, Any]]:
    """(attention, MLP, the fields of `LayerSpec` that say how they are joined) of a decoder layer."""
    kind = parts.require(layer, (*NORMS, "layer.stablelm", "layer.falcon"), name, "a decoder layer")
    for place in _DROPOUTS:
        if hasattr(layer, place):
            dropout.see(f"{name}.{place}", getattr(layer, place))
    attn_name, mlp_name = BODIES.get(kind, _USUAL)
    attn = attention.read(getattr(layer, attn_name), config, f"{name}.{attn_name}", dropout)
    body = getattr(layer, mlp_name) if mlp_name else layer
    mlp_spec = mlp.read(body, f"{name}.{mlp_name}" if mlp_name else name, dropout)
    names, fields = _wiring(kind, layer, config, name)
    norms: dict[str, NormSpec] = {
        field: parts.norm(getattr(layer, place), f"{name}.{place}") for field, place in names.items()
    }
    return attn, mlp_spec, {"attn_norm": None, "mlp_norm": None, **norms, **fields}


def _wiring(kind: str, layer: Any, config: Any, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(field: name of the norm, other fields)."""
    if kind == "layer.stablelm":
        if layer.use_parallel_residual:
            return {"attn_norm": "input_layernorm"}, {"order": "parallel"}
        return NORMS["layer.sequential"], {}
    if kind == "layer.falcon":
        return _falcon(config, name)
    fields = dict(FIELDS.get(kind, {}))
    if kind == "layer.neox" and layer.use_parallel_residual:
        fields["order"] = "parallel"
    if kind == "layer.opt" and not layer.do_layer_norm_before:
        fields["order"] = "post"
    if kind == "layer.multiplier":
        fields["residual_scale"] = float(layer.residual_multiplier)
    if kind == "layer.bloom":
        fields["residual_from_norm"] = bool(layer.apply_residual_connection_post_layernorm)
    return NORMS[kind], fields


def _falcon(config: Any, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
        if not config.parallel_attn:
            raise Unsupported(
                f"{name}: config.parallel_attn=False with new_decoder_architecture=True has no norms to run with"
            )
        return {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}, {"order": "parallel"}
    if config.parallel_attn:
        if config.num_ln_in_parallel_attn == 2:
            raise Unsupported(
                f"{name}: config.num_ln_in_parallel_attn=2 without new_decoder_architecture=True has no norm to run "
                "with"
            )
        return {"attn_norm": "input_layernorm"}, {"order": "parallel"}
    if config.new_decoder_architecture:
        raise Unsupported(
            f"{name}: config.parallel_attn=False with new_decoder_architecture=True has no norms to run with"
        )
    return NORMS["layer.sequential"], {}
