"""Which transformers the adapters know, and what of it they rely on beyond the forwards that `source.py` pins.

`check` runs when the adapters are imported. A version older than `FIRST` is refused. In one newer than `LAST` every
forward that changed is refused by its hash; what has no hash (caches, outputs, generation's hooks) is held against
`broken_contract`, so that a change there is one sentence at import and not a wrong number later."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from typing import Any

FIRST, LAST = "5.23", "5.24"
"""Minor versions of transformers that the adapters know."""


def minor(version: str) -> tuple[int, int]:
    """(5, 23) of "5.23.0"."""
    major, second = version.split(".")[:2]
    return int(major), int(second)


@functools.cache
def installed() -> str:
    """Version of the installed transformers."""
    return importlib.metadata.version("transformers")


def requirement() -> str:
    """What pip has to be asked for."""
    major, second = minor(LAST)
    return f"transformers>={FIRST},<{major}.{second + 1}"


def check(version: str | None = None) -> None:
    """Raises ImportError, one sentence, for a transformers that the adapters cannot run with; warns, once, of one that
    is newer than they are. version: None asks for the installed one."""
    try:
        version = version or installed()
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"transformers is not installed: run pip install '{requirement()}'") from None
    if minor(version) < minor(FIRST):
        raise ImportError(
            f"transformers {version} is older than {FIRST}, the first that dschat's adapters know: "
            f"run pip install '{requirement()}'"
        )
    if minor(version) <= minor(LAST):
        return
    if broken := broken_contract():
        raise ImportError(
            f"transformers {version} is newer than {LAST}, the last that dschat's adapters know, and {broken[0]}: "
            f"run pip install '{requirement()}'"
        )
    warnings.warn(
        f"transformers {version} is newer than {LAST}, the last that dschat's adapters know: a decoder whose code "
        f"changed stays with transformers and is reported so (pip install '{requirement()}' is tested)",
        stacklevel=2,
    )


@functools.cache
def cache_name() -> str:
    """What a forward and its output call the cache: "past_key_values", since 5.24 "cache"."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# object -> arguments that we pass to it, or that it passes to what we put in its place.
_CALLS = {
    "cache_utils:DynamicCache": ("config",),
    "cache_utils:DynamicCache.update": ("key_states", "value_states", "layer_idx"),
    "cache_utils:DynamicCache.get_seq_length": ("layer_idx",),
    "cache_utils:DynamicCache.get_mask_sizes": ("query_length", "layer_idx"),
    "cache_utils:DynamicCache.reorder_cache": ("beam_idx",),
    "cache_utils:DynamicCache.crop": ("tokens_to_remove",),
    "cache_utils:DynamicCache.batch_repeat_interleave": ("repeats",),
    "cache_utils:DynamicCache.batch_select_indices": ("indices",),
    "cache_utils:DynamicCache.is_recording_past": ("layer_idx",),
    "cache_utils:DynamicCache.activate_past_recording": (),
    "cache_utils:DynamicCache.reset": (),
    "generation.utils:GenerationMixin._prepare_cache_for_generation": (
        "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length",
    ),
    "models.llama.modeling_llama:LlamaForCausalLM.forward": (
        "input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "use_cache", "logits_to_keep",
    ),
    "models.llama.modeling_llama:LlamaDecoderLayer.forward": (
        "hidden_states", "attention_mask", "position_ids", "use_cache", "position_embeddings",
    ),
    "models.llama.modeling_llama:LlamaAttention.forward": (
        "hidden_states", "position_embeddings", "attention_mask",
    ),
    "modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface": ("attn_implementation", "default"),
    "integrations.sdpa_attention:sdpa_attention_forward": (
        "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal",
    ),
    "modeling_utils:PreTrainedModel.set_attn_implementation": ("attn_implementation",),
    "configuration_utils:PreTrainedConfig.get_text_config": ("decoder",),
}  # fmt: skip
_ATTRIBUTES = {
    "cache_utils:DynamicCache": ("batch_size", "is_initialized", "is_croppable"),
    "modeling_utils:PreTrainedModel": (
        "is_activation_checkpointing",
        "get_output_embeddings",
        "base_model_prefix",
    ),
    "pytorch_utils:Conv1D": ("forward",),
    "activations:GELUTanh": (),
    "activations:SiLUActivation": (),
    "activations:AccurateGELUActivation": (),
    "modeling_outputs:CausalLMOutputWithCrossAttentions": ("to_tuple",),
}


def broken_contract() -> list[str]:
    """Each thing of the installed transformers that is not as the adapters, the fused forward and its cache need it,
    as half a sentence; empty where all is well."""
    broken = []
    for place, arguments in _CALLS.items():
        found = _find(place)
        if found is None:
            broken.append(f"{place} is gone")
            continue
        parameters = inspect.signature(found).parameters
        names = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n != "self"]
        missing = [name for name in arguments if name not in names]
        if missing:
            broken.append(f"{place} takes no {missing[0]} (it takes {', '.join(names)})")
    for place, attributes in _ATTRIBUTES.items():
        found = _find(place)
        missing = ["itself"] if found is None else [name for name in attributes if not hasattr(found, name)]
        broken += [f"{place} lacks {name}" for name in missing]
    return broken + _broken_outputs()


def _broken_outputs() -> list[str]:
    """The cache of an output, and of the models' forwards, has one of the names that we know."""
    broken = []
    name = cache_name()
    for place in (
        "modeling_outputs:CausalLMOutputWithPast",
        "modeling_outputs:CausalLMOutputWithCrossAttentions",
    ):
        fields = getattr(_find(place), "__dataclass_fields__", {})
        broken += [f"{place} has no field {field}" for field in ("logits", name) if field not in fields]
    for model in ("llama:Llama", "gpt2:GPT2LMHead", "bloom:Bloom"):
        folder, _, prefix = model.partition(":")
        cls = f"{prefix}Model" if prefix.endswith("Head") else f"{prefix}ForCausalLM"
        place = f"models.{folder}.modeling_{folder}:{cls}.forward"
        found = _find(place)
        if found is None or name not in inspect.signature(found).parameters:
            broken.append(f"{place} takes no {name}")
    return broken


def _find(place: str) -> Any:
    """The object at "module:path" inside transformers, or None."""
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(f"transformers.{module}")
    except ImportError:
        return None
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    return found
