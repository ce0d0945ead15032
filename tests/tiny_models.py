"""Tiny random models of each family, with every option that the family has switched on in some case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HeliumConfig,
    InternLM3Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

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
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 9.0],
}
_LOCAL = {"rope_type": "default", "rope_theta": 500.0}
_GPTJ = {k: v for k, v in _GPT2.items() if k != "n_embd"} | {"n_embd": 48, "rotary_dim": 8}
_NEOX = {**_LLAMA, "hidden_dropout": 0.0, "attention_dropout": 0.0}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_FALCON = {**_LLAMA, "ffn_hidden_size": 56, "attention_dropout": 0.0, "hidden_dropout": 0.0}
# 16 heads: slopes that are no powers of two, whose biases bfloat16 rounds from the third token on
_SLOPES = {"hidden_size": 64, "num_attention_heads": 16, "num_kv_heads": 16}
_BLOOM = {
    "vocab_size": 67,
    "hidden_size": 48,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT_NEO = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "window_size": 5,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS.update(
    {
        "llama-dynamic": (LlamaConfig, {**_LLAMA, "rope_parameters": _DYNAMIC}),
        "llama-proportional": (LlamaConfig, {**_LLAMA, "rope_parameters": _PROPORTIONAL}),
        "phi3-longrope": (
            Phi3Config,
            {**_LLAMA, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64},
        ),
        "qwen3": (Qwen3Config, {**_LLAMA, "head_dim": 20, "attention_bias": True}),
        "qwen3-window": (
            Qwen3Config,
            {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        ),
        "gemma": (GemmaConfig, {**_LLAMA, "head_dim": 20, "attention_bias": True}),
        "gemma2": (
            Gemma2Config,
            {
                **_LLAMA,
                "head_dim": 16,
                "sliding_window": 6,
                "query_pre_attn_scalar": 30,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            },
        ),
        "gemma2-plain": (
            Gemma2Config,
            {
                **_LLAMA,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention_bias": True,
            },
        ),
        "gemma3": (
            Gemma3TextConfig,
            {
                **_LLAMA,
                "head_dim": 16,
                "num_hidden_layers": 4,
                "sliding_window": 5,
                "layer_types": [
                    "sliding_attention",
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                ],
                "rope_parameters": {
                    "sliding_attention": _LOCAL,
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
                },
                "final_logit_softcapping": 4.0,
            },
        ),
        "olmo": (OlmoConfig, {**_LLAMA, "attention_bias": True}),
        "olmo2": (Olmo2Config, {**_LLAMA, "attention_bias": True}),
        "smollm3": (
            SmolLM3Config,
            {
                **_LLAMA,
                "num_hidden_layers": 4,
                "no_rope_layers": [1, 0, 1, 0],
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            },
        ),
        "starcoder2": (Starcoder2Config, {**_LLAMA, "sliding_window": 7, "use_bias": True}),
        "starcoder2-plain": (Starcoder2Config, {**_LLAMA, "sliding_window": None, "use_bias": False}),
        "cohere": (CohereConfig, {**_LLAMA, "logit_scale": 0.3, "use_qk_norm": True, "attention_bias": True}),
        "cohere-plain": (CohereConfig, {**_LLAMA, "logit_scale": 0.0625}),
        "cohere2": (
            Cohere2Config,
            {
                **_LLAMA,
                "logit_scale": 0.3,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        "granite": (
            GraniteConfig,
            {
                **_LLAMA,
                "embedding_multiplier": 3.3,
                "logits_scaling": 2.7,
                "residual_multiplier": 0.7,
                "attention_multiplier": 0.2,
                "attention_bias": True,
                "mlp_bias": True,
            },
        ),
        "phi": (PhiConfig, {**_LLAMA, "rope_parameters": _PARTIAL, "qk_layernorm": True}),
        "phi-plain": (PhiConfig, {**_LLAMA, "num_key_value_heads": 4, "hidden_act": "gelu"}),
        "stablelm": (
            StableLmConfig,
            {
                **_LLAMA,
                "rope_parameters": _PARTIAL,
                "use_qkv_bias": True,
                "qk_layernorm": True,
                "use_parallel_residual": True,
            },
        ),
        "stablelm-sequential": (StableLmConfig, {**_LLAMA, "rope_parameters": _PARTIAL}),
        "neox": (GPTNeoXConfig, {**_NEOX, "rope_parameters": _PARTIAL}),
        "neox-sequential": (
            GPTNeoXConfig,
            {**_NEOX, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
        ),
        "gptj": (GPTJConfig, {**_GPTJ, "n_inner": 40}),
        "gptj-full": (GPTJConfig, {**_GPTJ, "rotary_dim": 12, "activation_function": "gelu"}),
        "gpt-neo": (GPTNeoConfig, _GPT_NEO),
        "gpt-neo-wide": (
            GPTNeoConfig,
            {**_GPT_NEO, "intermediate_size": None, "activation_function": "relu"},
        ),
        "bloom": (BloomConfig, _BLOOM),
        "bloom-residual": (
            BloomConfig,
            {**_BLOOM, "apply_residual_connection_post_layernorm": True, "n_head": 6, "hidden_size": 36},
        ),
        "bloom-slices": (BloomConfig, {**_BLOOM, "pretraining_tp": 2, "slow_but_exact": True}),
        "falcon": (FalconConfig, {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": True}),
        "falcon-new": (FalconConfig, {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
        "falcon-new-one-norm": (
            FalconConfig,
            {
                **_FALCON,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
                "bias": True,
                "activation": "relu",
            },
        ),
        "falcon-sequential": (
            FalconConfig,
            {**_FALCON, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
        ),
        "falcon-alibi": (
            FalconConfig,
            {**_FALCON, **_SLOPES, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        ),
        "falcon-alibi-queries": (FalconConfig, {**_FALCON, **_SLOPES, "multi_query": True, "alibi": True}),
        "glm": (GlmConfig, {**_LLAMA, "head_dim": 16, "attention_bias": True}),
        "glm-plain": (GlmConfig, {**_LLAMA, "head_dim": 16, "attention_bias": False}),
        "helium": (HeliumConfig, {**_LLAMA, "head_dim": 12, "attention_bias": True, "mlp_bias": True}),
        "internlm3": (InternLM3Config, {**_LLAMA, "head_dim": 16, "qkv_bias": True, "bias": True}),
        "llama-yarn-options": (
            LlamaConfig,
            {
                **_LLAMA,
                "rope_parameters": {
                    **_YARN,
                    "beta_fast": 8.0,
                    "beta_slow": 2.0,
                    "mscale": 1.3,
                    "mscale_all_dim": 0.4,
                    "truncate": False,
                },
            },
        ),
        "mistral-yarn-factor": (
            MistralConfig,
            {**_LLAMA, "sliding_window": 9, "rope_parameters": {**_YARN, "attention_factor": 1.7}},
        ),
        "phi3-longrope-factor": (
            Phi3Config,
            {
                **_LLAMA,
                "tie_word_embeddings": True,
                "rope_parameters": {**_LONGROPE, "attention_factor": 0.8},
                "original_max_position_embeddings": 64,
            },
        ),
        "gemma3-options": (
            Gemma3TextConfig,
            {
                **_LLAMA,
                "head_dim": 20,
                "sliding_window": 5,
                "attention_bias": True,
                "query_pre_attn_scalar": 30,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "tie_word_embeddings": False,
            },
        ),
        "smollm3-bias": (
            SmolLM3Config,
            {**_LLAMA, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [0, 1, 1]},
        ),
        "cohere2-bias": (
            Cohere2Config,
            {**_LLAMA, "attention_bias": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
        ),
        "stablelm-options": (
            StableLmConfig,
            {
                **_LLAMA,
                "rope_parameters": _PARTIAL,
                "qk_layernorm": True,
                "use_qkv_bias": True,
                "hidden_act": "gelu",
            },
        ),
        "falcon-queries-sequential": (
            FalconConfig,
            {**_FALCON, "multi_query": True, "parallel_attn": False, "bias": True},
        ),
        "gpt2-quick-gelu": (GPT2Config, {**_GPT2, "activation_function": "quick_gelu"}),
    }
)
# Between them every mechanism that a decoder can be built of.
MECHANISMS = (
    "llama-bias",
    "qwen2-window",
    "mistral",
    "phi3",
    "gpt2",
    "opt",
    "opt-350m",
    "qwen3",
    "gemma2",
    "gemma3",
    "olmo2",
    "smollm3",
    "starcoder2",
    "cohere",
    "cohere2",
    "granite",
    "phi",
    "stablelm",
    "neox",
    "gptj",
    "gpt-neo",
    "bloom",
    "bloom-residual",
    "falcon",
    "falcon-new",
    "falcon-alibi",
    "glm",
)


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
