"""GPT-2: layer norms with bias, one fused Conv1D for q, k and v, learned positions, plain MLP."""

from __future__ import annotations

from typing import Any

from . import parts
from .spec import DecoderSpec, LayerSpec, LinearSpec, Unsupported


def describe(trunk: Any, config: Any, lm_head: LinearSpec | None, prefix: str) -> DecoderSpec:
    if config.add_cross_attention:
        raise Unsupported(
            "config.add_cross_attention=True: cross-attention is not part of a decoder-only model"
        )
    hidden = int(trunk.embed_dim)
    dropout = parts.DropoutLog()
    dropout.see(f"{prefix}drop", trunk.drop)
    layers = []
    intermediate = 0
    for index, block in enumerate(trunk.h):
        name = f"{prefix}h.{index}"
        parts.require(block, ("layer.gpt2",), name, "a decoder layer")
        attn, mlp = block.attn, block.mlp
        parts.require(attn, ("attention.gpt2",), f"{name}.attn", "attention")
        parts.attention_call(attn, config, f"{name}.attn")
        if attn.is_cross_attention:
            raise Unsupported(f"{name}.attn is a cross-attention")
        parts.require(mlp, ("mlp.gpt2",), f"{name}.mlp", "the MLP")
        q, k, v = (
            parts.linear(attn.c_attn, f"{name}.attn.c_attn", (part * hidden, (part + 1) * hidden))
            for part in range(3)
        )
        o = parts.linear(attn.c_proj, f"{name}.attn.c_proj")
        up = parts.linear(mlp.c_fc, f"{name}.mlp.c_fc")
        down = parts.linear(mlp.c_proj, f"{name}.mlp.c_proj")
        size = int(parts.base_linear(mlp.c_fc).nf)
        if (intermediate or size) != size:
            raise Unsupported(f"{name}.mlp has another size than layer 0")
        intermediate = size
        dropout.see(f"{name}.attn.attn_dropout", attn.attn_dropout)
        dropout.see(f"{name}.attn.resid_dropout", attn.resid_dropout)
        dropout.see(f"{name}.mlp.dropout", mlp.dropout)
        for spec, place in ((q, "attn.c_attn"), (o, "attn.c_proj"), (up, "mlp.c_fc"), (down, "mlp.c_proj")):
            dropout.see_lora(spec, f"{name}.{place}")
        layers.append(
            LayerSpec(
                attn_norm=parts.norm(block.ln_1, f"{name}.ln_1"),
                mlp_norm=parts.norm(block.ln_2, f"{name}.ln_2"),
                q=q,
                k=k,
                v=v,
                o=o,
                gate=None,
                up=up,
                down=down,
                activation=parts.activation(mlp.act, f"{name}.mlp.act"),
                scale=float(attn.scaling),
                window=None,
                name=name,
                module=block,
            )
        )
    if not layers:
        raise Unsupported(f"{prefix}h is empty")
    heads = int(trunk.h[0].attn.num_heads)
    return DecoderSpec(
        model_type=str(config.model_type),
        hidden_size=hidden,
        vocab_size=int(trunk.wte.num_embeddings),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_positions=int(trunk.wpe.num_embeddings),
        embed=parts.embedding(trunk.wte, f"{prefix}wte"),
        positions=parts.embedding(trunk.wpe, f"{prefix}wpe"),
        position_offset=0,
        project_in=None,
        project_out=None,
        rope=None,
        layers=tuple(layers),
        final_norm=parts.norm(trunk.ln_f, f"{prefix}ln_f"),
        lm_head=lm_head,
        dropout=dropout,
        trunk=trunk,
    )
