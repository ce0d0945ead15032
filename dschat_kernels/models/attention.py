"""Attention modules: where q, k and v come from, what is normalised, how much of a head rotates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import parts
from .rotary import Rotation, rotation, table_rope
from .source import global_of, mechanism
from .spec import LinearSpec, NormSpec, RopeSpec, Unsupported


@dataclass(frozen=True)
class Attention:
    """What one attention module computes; the words are those of `LayerSpec`.

    `rotation` None: it does not rotate, or brings its own `rope`. `rotary_width`: features of a head handed to
    the rotation (None: all).
    """

    q: LinearSpec
    k: LinearSpec
    v: LinearSpec
    o: LinearSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotation: Rotation | None = None
    rotary_width: int | None = None
    rope: RopeSpec | None = None
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    softcap: float | None = None
    alibi: tuple[float, ...] | None = None
    cache_repeats: int = 1


Reader = Callable[[Any, Any, str, parts.DropoutLog], Attention]


def read(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """The attention `module`; refused where its forward is none of the known ones."""
    if mechanism(module) == "wrapper.gpt_neo":
        parts.unhooked(module, name)
        module, name = module.attention, f"{name}.attention"
    kind = parts.require(module, tuple(READERS), name, "attention")
    attention = READERS[kind](module, config, name, dropout)
    for part in ("q", "k", "v", "o"):
        dropout.see_lora(getattr(attention, part), f"{name}.{part}")
    return attention


# ------------------------------------------------------------------------------------- separate q, k and v


def _projections(module: Any, name: str, output: str = "o_proj") -> dict[str, Any]:
    places = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": output}
    return {part: parts.linear(getattr(module, n), f"{name}.{n}") for part, n in places.items()}


def _separate(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """q, k and v of their own, all features of a head rotated."""
    parts.attention_call(module, config, name)
    output = "o_proj" if hasattr(module, "o_proj") else "dense"
    for place in ("attention_dropout", "residual_dropout"):
        if hasattr(module, place):
            dropout.see(f"{name}.{place}", getattr(module, place))
    dim = int(module.head_dim)
    linears = _projections(module, name, output)
    return Attention(
        **linears,
        num_heads=_width(linears["q"]) // dim,
        num_kv_heads=_width(linears["k"]) // dim,
        head_dim=dim,
        scale=float(module.scaling),
        rotation=rotation(module, name),
    )


def _width(spec: LinearSpec) -> int:
    """Output features of the whole module."""
    base = parts.base_linear(spec.module)
    return int(base.nf if hasattr(base, "nf") else base.out_features)


def _clipped(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    if config.clip_qkv is not None:
        raise Unsupported(f"config.clip_qkv={config.clip_qkv}: clamping q, k and v is not fused")
    return _separate(module, config, name, dropout)


def _with_norms(base: Attention, module: Any, name: str, suffix: str, full: bool) -> Attention:
    """Norms of q and k before the rotation: of every head, or (`full`) of all heads as one row."""
    norms: dict[str, Any] = {}
    for part, heads in (("q", base.num_heads), ("k", base.num_kv_heads)):
        place = f"{part}_{suffix}"
        width, groups = (heads * base.head_dim, 1) if full else (base.head_dim, heads)
        norms[f"{part}_norm"] = parts.norm(getattr(module, place), f"{name}.{place}", width, groups)
    return replace(base, **norms)


def _norm_heads(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    return _with_norms(_separate(module, config, name, dropout), module, name, "norm", full=False)


def _norm_full(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    return _with_norms(_separate(module, config, name, dropout), module, name, "norm", full=True)


def _cohere(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    base = _separate(module, config, name, dropout)
    return _with_norms(base, module, name, "norm", full=False) if module.use_qk_norm else base


def _softcap(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    cap = module.attn_logit_softcapping
    return replace(_separate(module, config, name, dropout), softcap=None if cap is None else float(cap))


def _use_rope(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    base = _separate(module, config, name, dropout)
    return base if module.use_rope else replace(base, rotation=None)


def _rope_in_window(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    base = _separate(module, config, name, dropout)
    return base if module.sliding_window is not None else replace(base, rotation=None)


def _partial(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """The first `rotary_ndims` features of a head rotate."""
    base = replace(_separate(module, config, name, dropout), rotary_width=int(module.rotary_ndims))
    return _with_norms(base, module, name, "layernorm", full=False) if module.qk_layernorm else base


def _opt(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    parts.attention_call(module, config, name)
    dropout.see(f"{name}.dropout", module.dropout)
    heads = int(module.num_heads)
    linears = _projections(module, name, "out_proj")
    return Attention(
        **linears,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=int(module.head_dim),
        scale=float(module.scaling),
    )


def _gpt_neo(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """Scores are not scaled."""
    parts.require_helpers(module, name, "attention.gpt_neo", ("_attn", "_split_heads", "_merge_heads"))
    for place in ("attn_dropout", "resid_dropout"):
        dropout.see(f"{name}.{place}", getattr(module, place))
    heads = int(module.num_heads)
    linears = _projections(module, name, "out_proj")
    return Attention(**linears, num_heads=heads, num_kv_heads=heads, head_dim=int(module.head_dim), scale=1.0)


def _gptj(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """Its own table of sines; the first `rotary_dim` features rotate, in neighbouring pairs."""
    helpers = ("_attn", "_split_heads", "_merge_heads", "_get_embed_positions")
    parts.require_helpers(module, name, "attention.gptj", helpers)
    parts.require_globals(module, name, create_sinusoidal_positions="rotary.table")
    dropout.see(f"{name}.attn_dropout", module.attn_dropout)
    base = _gptj_parts(module, name, dropout, 1.0 / float(module.scale_attn))
    make = global_of(module, "create_sinusoidal_positions")
    return replace(
        base, rope=table_rope(module.embed_positions, make, base.head_dim, f"{name}.embed_positions")
    )


def _gptj_trunk_table(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """As `_gptj`; the trunk holds the table."""
    parts.attention_call(module, config, name)
    dropout.see(f"{name}.attention_dropout", module.attention_dropout)
    base = _gptj_parts(module, name, dropout, float(module.scaling))
    width = None if module.rotary_dim is None else int(module.rotary_dim)
    return replace(base, rotation=Rotation("interleaved", "table", partial=False), rotary_width=width)


def _gptj_parts(module: Any, name: str, dropout: parts.DropoutLog, scale: float) -> Attention:
    parts.require_globals(module, name, apply_rotary_pos_emb="rotate.gptj", rotate_every_two="rotate_pairs")
    dropout.see(f"{name}.resid_dropout", module.resid_dropout)
    heads = int(module.num_attention_heads)
    return Attention(
        **_projections(module, name, "out_proj"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=int(module.head_dim),
        scale=scale,
    )


# ---------------------------------------------------------------------------------------- fused q, k and v


def _rows(module: Any, name: str, sizes: list[tuple[str, int]]) -> dict[str, Any]:
    """The parts of a fused projection whose output features are `sizes` = (part, features), in this order. A part
    may come several times."""
    rows: dict[str, list[tuple[int, int]]] = {}
    begin = 0
    for part, size in sizes:
        own = rows.setdefault(part, [])
        if own and own[-1][1] == begin:
            own[-1] = (own[-1][0], begin + size)
        else:
            own.append((begin, begin + size))
        begin += size
    base = parts.base_linear(module)
    features = int(base.nf if hasattr(base, "nf") else base.out_features)
    if features != begin:
        raise Unsupported(f"{name} has {features} output features where q, k and v take {begin}")
    return {
        part: parts.linear(module, name, own[0] if len(own) == 1 else tuple(own))
        for part, own in rows.items()
    }


def _fused(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """All of q, then all of k, then all of v."""
    parts.attention_call(module, config, name)
    dropout.see(f"{name}.attention_dropout", module.attention_dropout)
    heads, kv_heads, dim = (
        int(config.num_attention_heads),
        int(config.num_key_value_heads),
        int(module.head_dim),
    )
    sizes = [("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)]
    return Attention(
        **_rows(module.qkv_proj, f"{name}.qkv_proj", sizes),
        o=parts.linear(module.o_proj, f"{name}.o_proj"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=float(module.scaling),
        rotation=rotation(module, name),
    )


def _gpt2(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    parts.attention_call(module, config, name)
    parts.require_helpers(module, name, "attention.gpt2", ("_upcast_and_reordered_attn",))
    if module.is_cross_attention:
        raise Unsupported(f"{name} is a cross-attention")
    for place in ("attn_dropout", "resid_dropout"):
        dropout.see(f"{name}.{place}", getattr(module, place))
    heads, dim = int(module.num_heads), int(module.head_dim)
    return Attention(
        **_rows(module.c_attn, f"{name}.c_attn", [(part, heads * dim) for part in "qkv"]),
        o=parts.linear(module.c_proj, f"{name}.c_proj"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=float(module.scaling),
    )


def _neox(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """q, k and v of a head side by side, head after head."""
    parts.attention_call(module, config, name)
    dropout.see(f"{name}.attention_dropout", module.attention_dropout)
    heads, dim = int(config.num_attention_heads), int(module.head_size)
    return Attention(
        **_rows(module.query_key_value, f"{name}.query_key_value", [(part, dim) for part in "qkv"] * heads),
        o=parts.linear(module.dense, f"{name}.dense"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=float(module.scaling),
        rotation=rotation(module, name),
    )


def _bloom(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """As `_neox`, with ALiBi."""
    parts.require_helpers(module, name, "attention.bloom", ("_reshape", "_merge_heads"))
    parts.require_globals(
        module,
        name,
        dropout_add="dropout_add",
        build_alibi_tensor="alibi",
        _get_alibi_slopes="alibi.slopes",
    )
    if module.beta != 1.0:
        raise Unsupported(f"{name}.beta={module.beta}: scaled position biases are not fused")
    dropout.see(f"{name}.attention_dropout", module.attention_dropout)
    dropout.see(f"{name}.hidden_dropout", module.hidden_dropout)
    heads, dim = int(module.num_heads), int(module.head_dim)
    slopes = global_of(module, "_get_alibi_slopes")(heads, torch.device("cpu"))
    return Attention(
        **_rows(module.query_key_value, f"{name}.query_key_value", [(part, dim) for part in "qkv"] * heads),
        o=parts.bloom_linear(module, "dense", name),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=float(module.inv_norm_factor),
        alibi=tuple(slopes.tolist()),
    )


def _falcon(module: Any, config: Any, name: str, dropout: parts.DropoutLog) -> Attention:
    """Heads in groups that end with their k and v (new decoder), one k and v behind all heads (multi-query), or as
    `_neox`."""
    parts.require_helpers(module, name, "attention.falcon", ("_split_heads",))
    if config._attn_implementation not in ("eager", "sdpa"):
        raise Unsupported(
            f"{name} runs under attn_implementation={config._attn_implementation!r}; use 'sdpa'"
        )
    if module.is_causal is not True:
        raise Unsupported(f"{name} is not causal (is_causal={module.is_causal})")
    dropout.see(f"{name}.attention_dropout", module.attention_dropout)
    heads, dim = int(module.num_heads), int(module.head_dim)
    kv_heads = int(module.num_kv_heads) if module.new_decoder_architecture or module.multi_query else heads
    if module.new_decoder_architecture:
        sizes = [("q", heads // kv_heads * dim), ("k", dim), ("v", dim)] * kv_heads
    elif module.multi_query:
        sizes = [("q", heads * dim), ("k", dim), ("v", dim)]
    else:
        sizes = [(part, dim) for part in "qkv"] * heads
    return Attention(
        **_rows(module.query_key_value, f"{name}.query_key_value", sizes),
        o=parts.linear(module.dense, f"{name}.dense"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        rotation=None if config.alibi else rotation(module, name),
        alibi=_falcon_slopes(module, config, name) if config.alibi else None,
        cache_repeats=heads // kv_heads if module.new_decoder_architecture else 1,
    )


def _falcon_slopes(module: Any, config: Any, name: str) -> tuple[float, ...]:
    """Negative: the biases are rounded. Doubled where the attention adds them to scores whose mask has them already."""
    parts.require_globals(module, name, build_alibi_tensor="alibi.falcon")
    ones = torch.ones(1, 2, dtype=torch.int64, device="cpu")
    biases = global_of(module, "build_alibi_tensor")(ones, int(module.num_heads), torch.float32)
    times = 2.0 if config._attn_implementation == "eager" else 1.0
    return tuple((-times * biases[:, 0, 1]).tolist())


READERS: dict[str, Reader] = {
    "attention.separate": _separate,
    "attention.clipped": _clipped,
    "attention.norm_heads": _norm_heads,
    "attention.norm_full": _norm_full,
    "attention.softcap": _softcap,
    "attention.use_rope": _use_rope,
    "attention.cohere": _cohere,
    "attention.rope_in_window": _rope_in_window,
    "attention.partial": _partial,
    "attention.fused": _fused,
    "attention.neox": _neox,
    "attention.gpt2": _gpt2,
    "attention.gpt_neo": _gpt_neo,
    "attention.gptj": _gptj,
    "attention.gptj_trunk_table": _gptj_trunk_table,
    "attention.bloom": _bloom,
    "attention.falcon": _falcon,
    "attention.opt": _opt,
}
