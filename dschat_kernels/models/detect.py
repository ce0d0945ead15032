"""Find the decoder inside whatever the user holds, and the adapter that covers it."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import parts
from . import trunk as trunks
from .source import mechanism
from .spec import DecoderSpec, Unsupported


def hf_model(model: Any) -> Any:
    """The transformers model inside `model`: itself, or what a PEFT model with LoRA adapters wraps."""
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        for name, config in model.peft_config.items():
            kind = getattr(config.peft_type, "value", config.peft_type)
            if kind != "LORA":
                raise Unsupported(f"adapter {name!r} is {kind}, and only LORA adapters are fused")
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(
            f"{type(model).__name__} is no transformers model; pass the PreTrainedModel or PEFT model itself "
            "(unwrap DistributedDataParallel and the like)"
        )
    return model


def _path(root: nn.Module, wanted: nn.Module) -> str:
    """The name of `wanted` inside `root` with a trailing dot; empty for the root."""
    for name, module in root.named_modules():
        if module is wanted:
            return name + "." if name else ""
    return ""


def describe(model: Any) -> DecoderSpec:
    """See `decoder_spec`."""
    inner = hf_model(model)
    config: Any = inner.config
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"config.is_encoder_decoder=True: {parts.class_name(inner)} is not a decoder-only model"
        )
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            raise Unsupported(
                f"config.{part} is set: {parts.class_name(inner)} takes more than text, and only decoders of text are "
                "fused (load the text model by itself)"
            )
    if getattr(inner, "_use_kernels", False):
        raise Unsupported(
            "the model was loaded with use_kernels=True, which rewrites forwards at every train() or eval(); "
            "load it with use_kernels=False"
        )
    if any(p.device.type == "meta" for p in inner.parameters()):
        raise Unsupported("some weights are on the meta device; load them before fusing")

    trunk: Any = inner
    if mechanism(trunk) not in trunks.TRUNKS:
        trunk = getattr(inner, getattr(inner, "base_model_prefix", "") or "", inner)
    if mechanism(trunk) == "wrapper.opt":
        trunk = trunk.decoder
    kind = mechanism(trunk)
    if "forward" in vars(trunk):
        parts.unhooked(trunk, _path(model, trunk).rstrip(".") or "the model")
    if kind not in trunks.TRUNKS:
        raise Unsupported(
            f"{parts.class_name(trunk)} (model_type={getattr(config, 'model_type', None)!r}) is built "
            "in a way that no adapter covers exactly"
        )

    lm_head, logits = None, {}
    head = inner.get_output_embeddings() if trunk is not inner else None
    if head is not None:
        logits = _logits(inner, config)
        lm_head = parts.linear(head, _path(model, head).rstrip("."))
    return trunks.describe(kind, trunk, config, lm_head, _path(model, trunk), **logits)


def _logits(model: Any, config: Any) -> dict[str, float | None]:
    """What a causal language model does to its logits, as fields of `DecoderSpec`."""
    kinds = ("head.plain", "head.softcap", "head.logit_scale", "head.logits_scaling")
    kind = parts.require(model, kinds, parts.class_name(model), "its logits")
    if kind == "head.softcap":
        return {"logit_softcap": config.final_logit_softcapping}
    if kind == "head.logit_scale":
        return {"logit_scale": float(model.logit_scale)}
    return {"logit_scale": 1.0 / float(config.logits_scaling)} if kind == "head.logits_scaling" else {}
