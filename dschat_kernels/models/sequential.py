"""The Llama layout: RMS norms before attention and MLP, rotary positions, gated MLP (Llama, Mistral, Qwen2,
SmolLM2, Phi-3).

What varies is read from the modules: biases, grouped heads, fused or separate projections, windows, partial
rotary."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from . import parts
from .rotary import rope
from .source import mechanism
from .spec import DecoderSpec, LayerSpec, LinearSpec, Unsupported


def _window(trunk_kind: str, config: Any, layer_idx: int) -> int | None:
    """Keys a query sees, itself included, as the trunk's mask functions cut them."""
    window = getattr(config, "sliding_window", None)
    if trunk_kind == "trunk.causal":
        return None
    if trunk_kind == "trunk.window":
        return None if window is None else int(window)
    kind = config.layer_types[layer_idx]
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" and window is not None:
        return int(window)
    raise Unsupported(
        f"config.layer_types[{layer_idx}]={kind!r} with sliding_window={window} is no known attention pattern"
    )


def _attention(module: Any, config: Any, head_dim: int, name: str) -> tuple[LinearSpec, ...]:
    kind = parts.require(module, ("attention.separate", "attention.fused"), name, "attention")
    parts.attention_call(module, config, name)
    output = parts.linear(module.o_proj, f"{name}.o_proj")
    if kind == "attention.separate":
        q, k, v = (parts.linear(getattr(module, f"{p}_proj"), f"{name}.{p}_proj") for p in "qkv")
        return q, k, v, output
    query = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    ends = (0, query, query + keys, query + 2 * keys)
    q, k, v = (parts.linear(module.qkv_proj, f"{name}.qkv_proj", rows) for rows in pairwise(ends))
    return q, k, v, output


def _mlp(module: Any, name: str) -> tuple[LinearSpec, LinearSpec, LinearSpec, str, int]:
    kind = parts.require(module, ("mlp.gated", "mlp.gated_packed"), name, "the MLP")
    down = parts.linear(module.down_proj, f"{name}.down_proj")
    if kind == "mlp.gated":
        act = parts.gated_activation(module.act_fn, f"{name}.act_fn")
        gate = parts.linear(module.gate_proj, f"{name}.gate_proj")
        up = parts.linear(module.up_proj, f"{name}.up_proj")
        return gate, up, down, act, int(parts.base_linear(module.up_proj).out_features)
    act = parts.gated_activation(module.activation_fn, f"{name}.activation_fn")
    size = int(parts.base_linear(module.gate_up_proj).out_features) // 2
    gate = parts.linear(module.gate_up_proj, f"{name}.gate_up_proj", (0, size))
    up = parts.linear(module.gate_up_proj, f"{name}.gate_up_proj", (size, 2 * size))
    return gate, up, down, act, size


def describe(trunk: Any, config: Any, lm_head: LinearSpec | None, prefix: str) -> DecoderSpec:
    trunk_kind = mechanism(trunk)
    assert trunk_kind is not None
    layers = []
    dropout = parts.DropoutLog()
    used = list(trunk.layers)[: config.num_hidden_layers]
    if not used:
        raise Unsupported(f"{prefix}layers is empty")
    first = used[0].self_attn
    head_dim = int(first.head_dim)
    intermediate = 0
    for index, layer in enumerate(used):
        name = f"{prefix}layers.{index}"
        parts.require(layer, ("layer.sequential", "layer.sequential_dropout"), name, "a decoder layer")
        if parts.rotation(layer.self_attn, f"{name}.self_attn") != parts.rotation(
            first, f"{prefix}layers.0.self_attn"
        ):
            raise Unsupported(f"{name} rotates q and k differently from layer 0")
        q, k, v, o = _attention(layer.self_attn, config, head_dim, f"{name}.self_attn")
        gate, up, down, act, size = _mlp(layer.mlp, f"{name}.mlp")
        if (intermediate or size) != size or int(layer.self_attn.head_dim) != head_dim:
            raise Unsupported(f"{name} has another size than layer 0")
        intermediate = size
        dropout.see(f"{name}.self_attn.attention_dropout", layer.self_attn.attention_dropout)
        for place in ("resid_attn_dropout", "resid_mlp_dropout"):
            if hasattr(layer, place):
                dropout.see(f"{name}.{place}", getattr(layer, place))
        for spec, place in (
            (q, "q"),
            (k, "k"),
            (v, "v"),
            (o, "o"),
            (gate, "gate"),
            (up, "up"),
            (down, "down"),
        ):
            dropout.see_lora(spec, f"{name}.{place}")
        layers.append(
            LayerSpec(
                attn_norm=parts.norm(layer.input_layernorm, f"{name}.input_layernorm"),
                mlp_norm=parts.norm(layer.post_attention_layernorm, f"{name}.post_attention_layernorm"),
                q=q,
                k=k,
                v=v,
                o=o,
                gate=gate,
                up=up,
                down=down,
                activation=act,
                scale=float(layer.self_attn.scaling),
                window=_window(trunk_kind, config, index),
                name=name,
                module=layer,
            )
        )
    return DecoderSpec(
        model_type=str(config.model_type),
        hidden_size=int(config.hidden_size),
        vocab_size=int(trunk.embed_tokens.num_embeddings),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_positions=int(config.max_position_embeddings),
        embed=parts.embedding(trunk.embed_tokens, f"{prefix}embed_tokens"),
        positions=None,
        position_offset=0,
        project_in=None,
        project_out=None,
        rope=rope(
            trunk.rotary_emb,
            config,
            head_dim,
            parts.rotation(first, f"{prefix}layers.0.self_attn"),
            f"{prefix}rotary_emb",
        ),
        layers=tuple(layers),
        final_norm=parts.norm(trunk.norm, f"{prefix}norm"),
        lm_head=lm_head,
        dropout=dropout,
        trunk=trunk,
    )
