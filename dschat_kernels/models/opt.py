"""OPT: layer norms before (or, in the 350m, after) attention and MLP, biases, learned positions with an
offset of 2, projections around the trunk when the word embeddings are smaller than the hidden size."""

from __future__ import annotations

from typing import Any

from . import parts
from .spec import DecoderSpec, LayerSpec, LinearSpec, Unsupported


def describe(trunk: Any, config: Any, lm_head: LinearSpec | None, prefix: str) -> DecoderSpec:
    hidden = int(config.hidden_size)
    dropout = parts.DropoutLog()
    dropout.see(f"{prefix}layerdrop", trunk.layerdrop)
    layers = []
    intermediate = 0
    for index, layer in enumerate(trunk.layers):
        name = f"{prefix}layers.{index}"
        parts.require(layer, ("layer.opt",), name, "a decoder layer")
        attn = layer.self_attn
        parts.require(attn, ("attention.opt",), f"{name}.self_attn", "attention")
        parts.attention_call(attn, config, f"{name}.self_attn")
        q, k, v, o = (
            parts.linear(getattr(attn, place), f"{name}.self_attn.{place}")
            for place in ("q_proj", "k_proj", "v_proj", "out_proj")
        )
        up, down = parts.linear(layer.fc1, f"{name}.fc1"), parts.linear(layer.fc2, f"{name}.fc2")
        size = int(parts.base_linear(layer.fc1).out_features)
        if (intermediate or size) != size:
            raise Unsupported(f"{name}.fc1 has another size than layer 0")
        intermediate = size
        dropout.see(f"{name}.self_attn.dropout", attn.dropout)
        dropout.see(f"{name}.dropout", layer.dropout)
        for spec, place in (
            (q, "q_proj"),
            (k, "k_proj"),
            (v, "v_proj"),
            (o, "out_proj"),
            (up, "fc1"),
            (down, "fc2"),
        ):
            dropout.see_lora(spec, f"{name}.{place}")
        layers.append(
            LayerSpec(
                attn_norm=parts.norm(layer.self_attn_layer_norm, f"{name}.self_attn_layer_norm"),
                mlp_norm=parts.norm(layer.final_layer_norm, f"{name}.final_layer_norm"),
                q=q,
                k=k,
                v=v,
                o=o,
                gate=None,
                up=up,
                down=down,
                activation=parts.activation(layer.activation_fn, f"{name}.activation_fn"),
                scale=float(attn.scaling),
                window=None,
                norm_position="pre" if layer.do_layer_norm_before else "post",
                name=name,
                module=layer,
            )
        )
    if not layers:
        raise Unsupported(f"{prefix}layers is empty")
    positions = trunk.embed_positions
    parts.require(positions, ("positions.opt",), f"{prefix}embed_positions", "learned positions")
    heads = int(trunk.layers[0].self_attn.num_heads)
    return DecoderSpec(
        model_type=str(config.model_type),
        hidden_size=hidden,
        vocab_size=int(trunk.embed_tokens.num_embeddings),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_positions=int(positions.num_embeddings) - int(positions.offset),
        embed=parts.embedding(trunk.embed_tokens, f"{prefix}embed_tokens"),
        positions=positions,
        position_offset=int(positions.offset),
        project_in=None
        if trunk.project_in is None
        else parts.linear(trunk.project_in, f"{prefix}project_in"),
        project_out=None
        if trunk.project_out is None
        else parts.linear(trunk.project_out, f"{prefix}project_out"),
        rope=None,
        layers=tuple(layers),
        final_norm=None
        if trunk.final_layer_norm is None
        else parts.norm(trunk.final_layer_norm, f"{prefix}final_layer_norm"),
        lm_head=lm_head,
        dropout=dropout,
        trunk=trunk,
    )
