"""Trunks: embedding, layers, final norm, positions, and which window and which rotary table a layer gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from . import layers, parts
from .attention import Attention
from .rotary import rope
from .spec import DecoderSpec, LayerSpec, LinearSpec, RopeSpec, Unsupported


@dataclass(frozen=True)
class Names:
    """What a trunk calls its parts. `sliced`: it runs the first config.num_hidden_layers of its layers.

    `windows`: where the window of a layer comes from. `rope_types`: every kind of layer has its own frequencies.
    `dropouts`: attributes that hold the probability of the embedding's dropout.
    """

    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    sliced: bool = False
    windows: Literal["none", "config", "layer_types", "attention_layers"] = "none"
    rope_types: bool = False
    dropouts: tuple[str, ...] = ()


UNBOUNDED = 1 << 20
"""Positions of a model whose config names no context (ALiBi)."""

_GPT = Names("wte", "h", "ln_f", dropouts=("drop",))
TRUNKS: dict[str, Names] = {
    "trunk.causal": Names(sliced=True),
    "trunk.multiplier": Names(sliced=True),
    "trunk.window": Names(sliced=True, windows="config", dropouts=("embedding_dropout",)),
    "trunk.layer_types": Names(sliced=True, windows="layer_types"),
    "trunk.rope_types": Names(sliced=True, windows="layer_types", rope_types=True),
    "trunk.phi": Names(norm="final_layernorm", sliced=True, dropouts=("embed_dropout",)),
    "trunk.neox": Names("embed_in", norm="final_layer_norm", dropouts=("emb_dropout",)),
    "trunk.gpt2": _GPT,
    "trunk.gpt_neo": Names("wte", "h", "ln_f", windows="attention_layers", dropouts=("drop",)),
    "trunk.gptj": _GPT,
    "trunk.bloom": Names("word_embeddings", "h", "ln_f"),
    "trunk.falcon": Names("word_embeddings", "h", "ln_f"),
    "trunk.opt": Names(norm="final_layer_norm", dropouts=("layerdrop",)),
}


def describe(
    kind: str, trunk: Any, config: Any, lm_head: LinearSpec | None, prefix: str, **head: Any
) -> DecoderSpec:
    """The decoder in `trunk`, a module of a kind in `TRUNKS`. prefix: its path in the model with a trailing dot.
    `head`: what the model does to its logits."""
    if getattr(config, "add_cross_attention", False):
        raise Unsupported(
            "config.add_cross_attention=True: cross-attention is not part of a decoder-only model"
        )
    names = TRUNKS[kind]
    dropout = parts.DropoutLog()
    for place in names.dropouts:
        if hasattr(trunk, place):
            dropout.see(f"{prefix}{place}", getattr(trunk, place))
    modules = list(getattr(trunk, names.layers))
    if names.sliced:
        modules = modules[: config.num_hidden_layers]
    if not modules:
        raise Unsupported(f"{prefix}{names.layers} is empty")

    ropes = _Ropes(trunk, config, names, prefix)
    specs = []
    first: Attention | None = None
    sizes: set[int] = set()
    for index, module in enumerate(modules):
        name = f"{prefix}{names.layers}.{index}"
        attn, mlp, wiring = layers.read(module, config, name, dropout)
        first = first or attn
        sizes.add(mlp.size)
        if len(sizes) > 1 or _shape(attn) != _shape(first):
            raise Unsupported(f"{name} has another size than layer 0")
        specs.append(
            LayerSpec(
                q=attn.q,
                k=attn.k,
                v=attn.v,
                o=attn.o,
                gate=mlp.gate,
                up=mlp.up,
                down=mlp.down,
                activation=mlp.activation,
                scale=attn.scale,
                window=_window(names.windows, config, index),
                rope=ropes.of(attn, index),
                q_norm=attn.q_norm,
                k_norm=attn.k_norm,
                name=name,
                module=module,
                **wiring,
            )
        )
    assert first is not None
    embed = parts.embedding(getattr(trunk, names.embed), f"{prefix}{names.embed}")
    norm = getattr(trunk, names.norm)
    return DecoderSpec(
        model_type=str(config.model_type),
        vocab_size=int(embed.num_embeddings),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        intermediate_size=sizes.pop(),
        embed=embed,
        layers=tuple(specs),
        final_norm=None if norm is None else parts.norm(norm, f"{prefix}{names.norm}"),
        lm_head=lm_head,
        attn_softcap=first.softcap,
        alibi=first.alibi,
        cache_repeats=first.cache_repeats,
        dropout=dropout,
        trunk=trunk,
        **_input(kind, trunk, config, embed, prefix),
        **head,
    )


def _shape(attn: Attention) -> tuple[Any, ...]:
    """What all layers of a decoder share."""
    return attn.num_heads, attn.num_kv_heads, attn.head_dim, attn.softcap, attn.alibi, attn.cache_repeats


class _Ropes:
    """The rotary tables of the layers; equal ones are one object."""

    def __init__(self, trunk: Any, config: Any, names: Names, prefix: str) -> None:
        self.module = getattr(trunk, "rotary_emb", None)
        self.config, self.names, self.name = config, names, f"{prefix}rotary_emb"
        self.known: dict[Any, RopeSpec] = {}

    def of(self, attn: Attention, index: int) -> RopeSpec | None:
        """The table of layer `index`, or None where nothing rotates."""
        spec = attn.rope
        if spec is not None:
            return self.known.setdefault((tuple(spec.inv_freq.tolist()), spec.rotary_dim), spec)
        if attn.rotation is None:
            return None
        layer_type = self.config.layer_types[index] if self.names.rope_types else None
        key = (layer_type, attn.rotation, attn.rotary_width)
        if key not in self.known:
            self.known[key] = rope(
                self.module, attn.head_dim, attn.rotation, attn.rotary_width, self.name, layer_type
            )
        return self.known[key]


def _window(kind: str, config: Any, index: int) -> int | None:
    """Keys a query sees, itself included, as the trunk's mask functions cut them; None: all."""
    if kind == "none":
        return None
    if kind == "attention_layers":
        return int(config.window_size) if config.attention_layers[index] == "local" else None
    window = getattr(config, "sliding_window", None)
    if kind == "config":
        return None if window is None else int(window)
    layer_type = config.layer_types[index]
    if layer_type == "full_attention":
        return None
    if layer_type == "sliding_attention" and window is not None:
        return int(window)
    raise Unsupported(
        f"config.layer_types[{index}]={layer_type!r} with sliding_window={window} is no known attention pattern"
    )


def _input(kind: str, trunk: Any, config: Any, embed: Any, prefix: str) -> dict[str, Any]:
    """Everything between the token ids and the first layer, and the sizes that go with it."""
    fields: dict[str, Any] = {
        "hidden_size": int(embed.embedding_dim),
        "max_positions": int(getattr(config, "max_position_embeddings", None) or UNBOUNDED),
        "positions": None,
        "position_offset": 0,
        "project_in": None,
        "project_out": None,
    }
    if hasattr(embed, "embed_scale"):
        fields["embed_scale"] = float(embed.embed_scale)
        fields["scale_in_embed"] = True
    if kind == "trunk.multiplier":
        fields["embed_scale"] = float(trunk.embedding_multiplier)
    elif kind == "trunk.bloom":
        name = f"{prefix}word_embeddings_layernorm"
        fields["embed_norm"] = parts.norm(trunk.word_embeddings_layernorm, name)
    elif kind in ("trunk.gpt2", "trunk.gpt_neo"):
        fields["positions"] = parts.embedding(trunk.wpe, f"{prefix}wpe")
        fields["max_positions"] = int(trunk.wpe.num_embeddings)
    elif kind == "trunk.gptj":
        fields["positions_end"] = True
    elif kind == "trunk.opt":
        positions = trunk.embed_positions
        parts.require(positions, ("positions.opt",), f"{prefix}embed_positions", "learned positions")
        fields["positions"], fields["position_offset"] = positions, int(positions.offset)
        fields["max_positions"] = int(positions.num_embeddings) - int(positions.offset)
        fields["hidden_size"] = int(config.hidden_size)
        for place in ("project_in", "project_out"):
            if (module := getattr(trunk, place)) is not None:
                fields[place] = parts.linear(module, f"{prefix}{place}")
    return fields
