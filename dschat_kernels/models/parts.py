"""The parts every layout shares, each recognised exactly or refused: projections, norms, activations,
dropout, windows."""

from __future__ import annotations

from typing import Any

from torch import nn

from .source import global_of, mechanism, original_class, recognise
from .spec import LinearSpec, NormSpec, Unsupported

ATTENTION_IMPLEMENTATIONS = {
    None,
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
}


def class_name(module: Any) -> str:
    return original_class(module).__name__


def unhooked(module: Any, name: str) -> Any:
    """`module`, if calling it does nothing but its class's forward."""
    if "forward" in vars(module):
        raise Unsupported(
            f"{name} ({class_name(module)}) carries an instance-level forward (accelerate or device hooks); "
            "remove the hook to fuse it"
        )
    return module


def _lora_layers() -> tuple[type, ...]:
    """PEFT's plain LoRA layer of a linear; empty when peft is not installed."""
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError:
        return ()
    return (Linear,)


def base_linear(module: Any) -> Any:
    """The `nn.Linear` or `Conv1D` at the bottom of a projection."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def bloom_linear(owner: Any, place: str, name: str) -> LinearSpec:
    """The projection at `place` of a part of BLOOM. Its slow but exact form sums slices of the product with the weight
    of the base layer: no bias and no adapter takes part."""
    spec = linear(getattr(owner, place), f"{name}.{place}")
    if owner.pretraining_tp > 1 and owner.slow_but_exact:
        return LinearSpec(base_linear(spec.module), weight_only=True)
    return spec


def linear(module: Any, name: str, rows: Any = None) -> LinearSpec:
    """A projection: exactly `nn.Linear`, `Conv1D` or `Int8Linear`, or plain LoRA around one of them."""
    from transformers.pytorch_utils import Conv1D

    from ..int8 import Int8Linear  # which reads specs itself

    unhooked(module, name)
    if type(module) in _lora_layers():
        variants = getattr(module, "lora_variant", {})
        if variants:
            adapter, variant = next(iter(variants.items()))
            raise Unsupported(
                f"{name}: adapter {adapter!r} is {type(variant).__name__}, and only plain LoRA is fused; "
                "train it through HF or set use_dora and other LoRA variants off"
            )
        biased = [adapter for adapter, bias in module.lora_bias.items() if bias]
        if biased:
            raise Unsupported(f"{name}: adapter {biased[0]!r} has lora_bias=True, which is not fused")
        base = unhooked(module.get_base_layer(), name + ".base_layer")
    else:
        base = module
    plain = type(base) in (nn.Linear, Conv1D, Int8Linear)
    if not plain and mechanism(base) != "linear.falcon":
        raise Unsupported(
            f"{name} is a {type(base).__module__}.{class_name(base)}, and only nn.Linear, Conv1D and plain "
            "LoRA around them are fused (quantised and wrapped linears stay with HF)"
        )
    return LinearSpec(module, rows)


def embedding(module: Any, name: str) -> Any:
    """A token embedding: exactly `nn.Embedding` (or one that multiplies by its `embed_scale`), not
    renormalising."""
    unhooked(module, name)
    if type(module) is not nn.Embedding and mechanism(module) != "embedding.scaled":
        raise Unsupported(f"{name} is a {class_name(module)}; only a plain nn.Embedding is fused")
    if module.max_norm is not None:
        raise Unsupported(f"{name} has max_norm={module.max_norm}, which rewrites its weight in the forward")
    return module


_NORMS: dict[str, dict[str, Any]] = {
    "norm.rms_llama": {"kind": "rms"},
    "norm.rms_gemma": {"kind": "rms", "weight_offset": 1.0, "rounding": "gemma"},
    "norm.rms_wide": {"kind": "rms", "rounding": "gemma"},
    "norm.layer_cohere": {"kind": "layer"},
    "norm.layer_plain": {"kind": "layer", "weight": None, "eps": 1e-5},
}


def norm(module: Any, name: str, width: int | None = None, groups: int = 1) -> NormSpec:
    """A norm over one dimension, of `width` elements where that is given: `nn.LayerNorm`, or one whose forward is
    known. `groups`: how many slices of a row it normalises one by one."""
    unhooked(module, name)
    if original_class(module) is nn.LayerNorm:
        if len(module.normalized_shape) != 1:
            raise Unsupported(
                f"{name} normalises over {tuple(module.normalized_shape)}, not over one dimension"
            )
        weight = "weight" if module.weight is not None else None
        bias = "bias" if module.bias is not None else None
        spec = NormSpec("layer", module, weight, bias, float(module.eps), groups=groups)
    else:
        kind = mechanism(module)
        if kind == "norm.layer_per_head":
            return _norm_per_head(module, name, width, groups)
        inner = getattr(original_class(module), "_norm", None)
        if kind not in _NORMS or (inner is not None and recognise(inner) != f"{kind}._norm"):
            raise Unsupported(
                f"{name} is a {class_name(module)}, whose forward is no norm that the kernels know"
            )
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
        fields: dict[str, Any] = {"weight": "weight", "bias": None, "eps": float(eps), **_NORMS[kind]}
        spec = NormSpec(module=module, groups=groups, **fields)
    for weights in spec.sources():
        rows = weights.shape[-1] if width is None else width
        if tuple(weights.shape) not in {(rows,), *([] if width is None else [(groups, rows)])}:
            raise Unsupported(
                f"{name} has weights of shape {tuple(weights.shape)} where rows of {rows} are normalised"
            )
    return spec


def _norm_per_head(module: Any, name: str, width: int | None, groups: int) -> NormSpec:
    """One LayerNorm a head."""
    members = [norm(member, f"{name}.norms.{i}", width) for i, member in enumerate(module.norms)]
    kinds = {(m.eps, m.weight, m.bias) for m in members}
    if len(kinds) != 1 or len(members) != groups:
        raise Unsupported(f"{name} has {len(members)} norms of {len(kinds)} kinds for {groups} heads")
    first = members[0]
    weight, bias = (None if leaf is None else f"norms.*.{leaf}" for leaf in (first.weight, first.bias))
    return NormSpec("layer", module, weight, bias, first.eps, groups=groups)


def activation(module: Any, name: str) -> str:
    """The kernel's name of an activation module, recognised by its exact class."""
    from transformers import activations as hf

    names: dict[type, str] = {
        nn.SiLU: "silu",
        hf.SiLUActivation: "silu",
        nn.ReLU: "relu",
        hf.NewGELUActivation: "gelu_tanh",
        hf.FastGELUActivation: "gelu_tanh",
        hf.AccurateGELUActivation: "gelu_tanh",
        hf.GELUTanh: "gelu_tanh",
        hf.GELUActivation: "gelu",
        hf.QuickGELUActivation: "quick_gelu",
    }
    cls = original_class(module)
    if cls is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if mechanism(module) == "activation.bloom":
        if (
            recognise(global_of(module, "bloom_gelu_forward") or (lambda: None))
            == "activation.bloom.function"
        ):
            return "gelu_tanh"
    if cls not in names or "forward" in getattr(module, "__dict__", {}):
        raise Unsupported(f"{name} is {cls.__name__}, an activation that the kernels do not have")
    return names[cls]


def gated_activation(module: Any, name: str) -> str:
    """As `activation`, of the kinds that `ops.gated_act` has."""
    kind = activation(module, name)
    if kind == "quick_gelu":
        raise Unsupported(f"{name} is {class_name(module)}, which the gated kernel does not have")
    return kind


def require(module: Any, wanted: tuple[str, ...], name: str, what: str) -> str:
    """The mechanism of `module`, which must be one of `wanted`."""
    unhooked(module, name)
    kind = mechanism(module)
    if kind not in wanted:
        raise Unsupported(
            f"{name} ({class_name(module)}) computes {what} in a way that no adapter covers exactly"
        )
    return kind


def attention_call(module: Any, config: Any, name: str) -> None:
    """The attention function behind the registry is one of HF's own, causal, and its eager form is the known
    one."""
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise Unsupported(
            f"config._attn_implementation={implementation!r} is not one of transformers' own; "
            "use model.set_attn_implementation('sdpa')"
        )
    if getattr(module, "is_causal", True) is not True or getattr(config, "is_causal", None) is False:
        raise Unsupported(f"{name} is not causal (is_causal=False)")
    eager = global_of(module, "eager_attention_forward")
    if eager is None or recognise(eager) not in ("eager", "eager.softcap"):
        raise Unsupported(f"{name} ({class_name(module)}) has an attention formula of its own")


def require_helpers(module: Any, name: str, kind: str, helpers: tuple[str, ...]) -> None:
    """The methods that a forward of `kind` calls are the known ones too."""
    for helper in helpers:
        method = getattr(original_class(module), helper, None)
        if helper in vars(module) or method is None or recognise(method) != f"{kind}.{helper}":
            raise Unsupported(
                f"{name}.{helper} ({class_name(module)}) is not the code that the adapter describes"
            )


def require_globals(module: Any, name: str, **wanted: str) -> None:
    """The functions that a forward finds in its module are the known ones."""
    for function, kind in wanted.items():
        if recognise(global_of(module, function) or (lambda: None)) != kind:
            raise Unsupported(
                f"{name} ({class_name(module)}) calls a {function} that no adapter covers exactly"
            )


class DropoutLog(dict[str, float]):
    """Collects probabilities above zero by place."""

    def see(self, name: str, value: Any) -> None:
        """Record a probability, or the one of an `nn.Dropout`; anything else in its place is refused."""
        if isinstance(value, nn.Module):
            unhooked(value, name)
            if isinstance(value, nn.Identity):
                return
            if type(value) is not nn.Dropout:
                raise Unsupported(f"{name} is a {class_name(value)} where a dropout is expected")
            value = value.p
        if float(value) > 0.0:
            self[name] = float(value)

    def see_lora(self, spec: LinearSpec | None, name: str) -> None:
        """Record the LoRA dropout of a projection's adapters."""
        for adapter, module in getattr(spec.module if spec else None, "lora_dropout", {}).items():
            self.see(f"{name}.lora_dropout.{adapter}", module)
