"""docs/models.md, made from the tiny models that the tests run: `python -m tests.models_page` writes it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dschat_kernels.models import DecoderSpec, decoder_spec, versions
from dschat_kernels.models.parts import base_linear
from tests.tiny_models import CONFIGS, build

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = """# Models

Decoders that are fused, each with the options that its tiny random models in the tests switch on. Every line is
compared with transformers: the description in plain PyTorch, logits and greedy tokens of a left-padded batch, and,
for every mechanism, beams, bits across batches, padding and steps, gradients, LoRA, undo and the certificate of
`dschat verify`. The table is written by `python -m tests.models_page`, and a test holds it against the code.

A mechanism is recognised by the code of its forward, not by a name: a model type that is not listed runs fused all
the same if it is built of these. `dk.patch(model).report()` says what was recognised; [add your
model](add_your_model.md) says what to do where something was not.

"""
TAIL = """
Left to transformers, and named in the report: mixtures of experts, latent attention, state spaces and linear
attention, encoder-decoders, models that take more than text, OLMo with `clip_qkv`, DoRA and other variants of LoRA,
quantised linears, decoders whose layers differ in size. Norms, gates and activations of such a model are fused where
they are known; `strict=True` raises instead. What bad input does is in [bad_input.md](bad_input.md).
"""


def features(spec: DecoderSpec, model: Any) -> list[str]:
    """What a decoder has beyond a plain one, in words."""
    layer = spec.layers[-1]
    found = []
    if spec.num_kv_heads == 1 < spec.num_heads:
        found.append("multi-query")
    elif spec.num_kv_heads < spec.num_heads:
        found.append("grouped queries")
    found += _positions(spec, model)
    if any(one.window for one in spec.layers):
        found.append("windows in some layers" if not all(one.window for one in spec.layers) else "window")
    residual = {"post": "norms after the residual", "parallel": "parallel residual"}.get(layer.order)
    if layer.attn_norm is None and layer.attn_out_norm is not None:
        residual = "norms of the branches only"
    elif layer.attn_out_norm is not None:
        residual = "sandwich norms"
    found += [residual] if residual else []
    if layer.residual_from_norm:
        found.append("residual from the norm")
    if layer.attn_norm is not None and layer.attn_norm.weight_offset:
        found.append("offset norms")
    if layer.q_norm is not None:
        found.append("q and k normalised" + ("" if layer.q_norm.groups > 1 else " as one row"))
    found.append(f"gated {layer.activation}" if layer.gate is not None else layer.activation)
    if any(getattr(base_linear(s.module), "bias", None) is not None for s in (layer.q, layer.up)):
        found.append("biases")
    if any(isinstance(s.rows, tuple) for s in (layer.q, layer.gate) if s is not None):
        found.append("fused projections")
    numbers = {
        "softcap of scores": spec.attn_softcap is not None,
        "softcap of logits": spec.logit_softcap is not None,
        "embedding scale": spec.embed_scale != 1.0,
        "residual scale": layer.residual_scale != 1.0,
        "logit scale": spec.logit_scale != 1.0,
        "projections of the embedding": spec.project_in is not None,
    }
    return found + [name for name, there in numbers.items() if there]


def _positions(spec: DecoderSpec, model: Any) -> list[str]:
    if spec.alibi is not None:
        return ["ALiBi"]
    if not (ropes := spec.ropes()):
        return ["learned positions"]
    parameters = getattr(model.config, "rope_parameters", None) or {}
    kinds = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    names = sorted({str(p.get("rope_type", "default")) for p in kinds} - {"default"})
    style = "partial rotary" if ropes[0].rotary_dim < spec.head_dim else "rotary"
    text = style + (" in pairs" if ropes[0].style == "interleaved" else "")
    text += f" ({', '.join(names)})" if names else ""
    return [text, *(["layers without rotary"] if any(layer.rope is None for layer in spec.layers) else [])]


def page() -> str:
    """The text of docs/models.md."""
    rows: dict[str, dict[str, list[str]]] = {}
    for name in CONFIGS:
        model = build(name)
        spec = decoder_spec(model)
        rows.setdefault(spec.model_type, {})[name] = features(spec, model)
    lines = [
        f"transformers {versions.FIRST} to {versions.LAST}.",
        "",
        "| model type | with |",
        "| --- | --- |",
    ]
    for kind in sorted(rows):
        variants = list(rows[kind].values())
        common = [text for text in variants[0] if all(text in other for other in variants)]
        own = ["; ".join(t for t in v if t not in common) for v in variants]
        cells = [", ".join(common), *dict.fromkeys(text for text in own if text)]
        lines.append(f"| `{kind}` | {' / '.join(cell for cell in cells if cell)} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
