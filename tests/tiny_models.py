"""Tiny random models of each family, with every option that the family has switched on in some case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Phi3Config, Qwen2Config

STORIES = Path(__file__).parent / "data" / "stories260k"

_LLAMA = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
_GPT2 = {
    "vocab_size": 67,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_OPT = {
    "vocab_size": 67,
    "hidden_size": 48,
    "ffn_dim": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 48,
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_LLAMA, "tie_word_embeddings": True}),
    "llama-bias": (LlamaConfig, {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama-mha-gelu": (LlamaConfig, {**_LLAMA, "num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": (
        LlamaConfig,
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama-llama3": (LlamaConfig, {**_LLAMA, "rope_parameters": _LLAMA3}),
    "llama-yarn": (LlamaConfig, {**_LLAMA, "rope_parameters": _YARN}),
    "mistral": (MistralConfig, {**_LLAMA, "sliding_window": 7, "num_key_value_heads": 1}),
    "mistral-full": (MistralConfig, {**_LLAMA, "sliding_window": None}),
    "qwen2": (Qwen2Config, {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "phi3": (
        Phi3Config,
        {
            **_LLAMA,
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt2": (GPT2Config, _GPT2),
    "gpt2-options": (
        GPT2Config,
        {
            **_GPT2,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "n_inner": 40,
            "activation_function": "gelu",
        },
    ),
    "gpt2-unscaled": (GPT2Config, {**_GPT2, "scale_attn_weights": False, "activation_function": "relu"}),
    "opt": (OPTConfig, _OPT),
    "opt-350m": (OPTConfig, {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-plain": (
        OPTConfig,
        {
            **_OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "_remove_final_layer_norm": True,
            "activation_function": "gelu",
        },
    ),
}
FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "opt", "opt-350m")


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights far from their initial zeros and ones, so that no bias, norm weight or offset can be forgotten
    unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            is_norm_weight = p.ndim == 1 and name.endswith("weight")
            p.copy_(1.0 + 0.3 * noise if is_norm_weight else 0.25 * noise)


def build(
    name: str, *, auto: Any = transformers.AutoModelForCausalLM, seed: int = 0, **overrides: Any
) -> Any:
    """A random fp32 model in eval mode."""
    config_class, fields = CONFIGS[name]
    torch.manual_seed(seed)
    model = auto.from_config(config_class(**{**fields, **overrides})).eval()
    randomise(model, seed)
    return model


def stories() -> Any:
    """The real 260k-parameter Llama that writes small stories."""
    return transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
