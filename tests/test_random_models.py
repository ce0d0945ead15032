"""Random architectures against Hugging Face: layers put together from the modules of different families, and families
at random sizes.

DSCHAT_RANDOM_MODELS says how many models are drawn: 150 in every run of the tests, 2000 in `make test-full`.
"""

from __future__ import annotations

import copy
import importlib
import os
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dschat_kernels as dk
from dschat.engine.packed import PackedModel, pack_rows
from dschat_kernels.executors import PythonExecutor
from dschat_kernels.models import decoder_spec
from dschat_kernels.ops.sample import sample
from dschat_kernels.plan import Decoder
from tests.test_forward import compare, gradients, loss_of
from tests.tiny_models import CONFIGS, randomise

MODELS = int(os.environ.get("DSCHAT_RANDOM_MODELS", "150"))


def hf(family: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


# What can stand for what inside a decoder with Llama's calls.
TRUNKS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "gemma2": "Gemma2Config",
}
LAYERS = (
    ("llama", "LlamaDecoderLayer"),
    ("gemma2", "Gemma2DecoderLayer"),
    ("olmo2", "Olmo2DecoderLayer"),
    ("granite", "GraniteDecoderLayer"),
    ("cohere", "CohereDecoderLayer"),
    ("stablelm", "StableLmDecoderLayer"),
    ("phi", "PhiDecoderLayer"),
    ("phi3", "Phi3DecoderLayer"),
)
ATTENTIONS = (
    ("llama", "LlamaAttention"),
    ("qwen3", "Qwen3Attention"),
    ("olmo2", "Olmo2Attention"),
    ("smollm3", "SmolLM3Attention"),
    ("granite", "GraniteAttention"),
    ("phi3", "Phi3Attention"),
    ("starcoder2", "Starcoder2Attention"),
    ("gemma2", "Gemma2Attention"),
)
MLPS = (
    ("llama", "LlamaMLP"),
    ("phi3", "Phi3MLP"),
    ("phi", "PhiMLP"),
    ("starcoder2", "Starcoder2MLP"),
    ("gpt_neox", "GPTNeoXMLP"),
)
NORMS = (
    ("llama", "LlamaRMSNorm"),
    ("gemma", "GemmaRMSNorm"),
    ("olmo2", "Olmo2RMSNorm"),
    ("cohere", "CohereLayerNorm"),
    ("olmo", "OlmoLayerNorm"),
    ("torch", "LayerNorm"),
    ("torch", "LayerNorm without bias"),
)
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@st.composite
def mixtures(draw: st.DrawFn) -> Any:
    """A model of a family's trunk whose layers are made of other families' parts."""
    family = draw(st.sampled_from(sorted(TRUNKS)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    # transformers' own cache keeps everything for a window of 1 (a slice that begins at -0).
    window = draw(st.one_of(st.none(), st.integers(2, 9)))
    kinds = draw(
        st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    )
    attention = draw(st.sampled_from(ATTENTIONS))
    rope = draw(st.sampled_from(ROPES))
    fields = {
        "vocab_size": draw(st.integers(11, 90)),
        "hidden_size": kv_heads * group * draw(st.integers(2, 12)),
        "intermediate_size": draw(st.integers(1, 60)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        # transformers' dynamic frequencies divide by head_dim - 2
        "head_dim": 2 * draw(st.integers(2 if rope["rope_type"] == "dynamic" else 1, 20)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
            **rope,
        },
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "llama":
        fields["sliding_window"] = 9 if window is None and family == "gemma2" else window
    if family in ("qwen2", "gemma2"):
        fields["layer_types"] = kinds if window is not None else ["full_attention"] * layers
    if family == "qwen2":
        fields["use_sliding_window"] = window is not None
    if family == "gemma2":
        fields["final_logit_softcapping"] = draw(st.one_of(st.none(), st.floats(2.0, 20.0)))
    config = getattr(transformers, TRUNKS[family])(**fields)
    extra = {
        "hidden_activation": config.hidden_act,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "resid_pdrop": 0.0,
        "residual_dropout": 0.0,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "layer_norm_eps": 1e-5,
        "norm_epsilon": 1e-5,
        "use_bias": config.attention_bias,
        "use_parallel_residual": draw(st.booleans()),
        "use_qkv_bias": config.attention_bias,
        "residual_multiplier": draw(st.floats(0.2, 1.5)),
        "attention_multiplier": draw(st.floats(0.05, 0.5)),
        "query_pre_attn_scalar": draw(st.integers(2, 60)),
        "attn_logit_softcapping": draw(st.one_of(st.none(), st.floats(0.5, 20.0))),
        "no_rope_layers": draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers)),
        "use_sliding_window": False,
        "qk_layernorm": False,
        "use_qk_norm": False,
    }
    for name, value in extra.items():
        setattr(config, name, value)
    if not hasattr(config, "layer_types") or config.layer_types is None:
        config.layer_types = ["full_attention"] * layers
    if not hasattr(config, "sliding_window"):
        config.sliding_window = None
    if family in ("mistral", "qwen2") or not hasattr(config, "mlp_bias"):
        config.mlp_bias = fields["mlp_bias"]

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    layer_class = hf(*draw(st.sampled_from(LAYERS)))
    norm = draw(st.sampled_from(NORMS))
    for i in range(layers):
        model.model.layers[i] = _layer(
            layer_class, hf(*attention), draw(st.sampled_from(MLPS)), norm, config, i
        )
    model.model.norm = _norm(draw(st.sampled_from(NORMS)), config.hidden_size, 1e-5)
    model.eval()
    randomise(model, draw(st.integers(0, 9)))
    return model


def _layer(layer_class: Any, attention_class: Any, mlp: Any, norm: Any, config: Any, index: int) -> nn.Module:
    """A layer of one family with attention, MLP and norms of others."""
    # Its own attention may not be possible with these sizes; it is replaced anyway.
    shell = layer_class.__new__(layer_class)
    nn.Module.__init__(shell)
    names = {
        "Gemma2DecoderLayer": [
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ],
        "Olmo2DecoderLayer": ["post_attention_layernorm", "post_feedforward_layernorm"],
        "CohereDecoderLayer": ["input_layernorm"],
        "PhiDecoderLayer": ["input_layernorm"],
    }.get(layer_class.__name__, ["input_layernorm", "post_attention_layernorm"])  # fmt: skip
    for name in names:
        setattr(shell, name, _norm(norm, config.hidden_size, config.rms_norm_eps))
    shell.hidden_size = config.hidden_size
    shell.config = config
    shell.residual_multiplier = config.residual_multiplier
    shell.use_parallel_residual = config.use_parallel_residual
    for name in {
        "StableLmDecoderLayer": ["dropout"],
        "PhiDecoderLayer": ["resid_dropout"],
        "Phi3DecoderLayer": ["resid_attn_dropout", "resid_mlp_dropout"],
    }.get(layer_class.__name__, []):
        setattr(shell, name, nn.Dropout(0.0))
    shell.self_attn = attention_class(config, index)
    shell.mlp = hf(*mlp)(config)
    return shell


def _norm(kind: tuple[str, str], width: int, eps: float) -> nn.Module:
    family, name = kind
    if family == "torch":
        return nn.LayerNorm(width, eps=eps, bias="without" not in name)
    if name == "OlmoLayerNorm":
        return hf(family, name)(width)
    return hf(family, name)(width, eps=eps)


@st.composite
def families(draw: st.DrawFn) -> Any:
    """A family at random sizes, with the options of one of its tiny models."""
    config_class, fields = CONFIGS[draw(st.sampled_from([n for n in CONFIGS if n not in _FIXED]))]
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    grouped = "num_key_value_heads" in fields
    heads = kv_heads * group
    even = "rope_parameters" in fields or grouped or "rotary_dim" in fields
    dim = draw(st.integers(1, 8)) * (4 if even else 1)
    sizes = {
        "vocab_size": draw(st.integers(11, 90)),
        _name(fields, "hidden_size", "n_embd"): heads * dim,
        _name(fields, "num_attention_heads", "n_head", "num_heads"): heads,
    }
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if fields.get(name) is not None:
            sizes[name] = draw(st.integers(1, 60))
    if grouped:
        sizes["num_key_value_heads"] = kv_heads
    if "head_dim" in fields:
        sizes["head_dim"] = dim
    if "rotary_dim" in fields:
        sizes["rotary_dim"] = 2 * draw(st.integers(1, dim // 2))
    if "word_embed_proj_dim" in fields:
        projected = fields["word_embed_proj_dim"] != fields["hidden_size"]
        sizes["word_embed_proj_dim"] = draw(st.integers(1, 20)) if projected else heads * dim
    if "ffn_hidden_size" in fields:
        shared = fields.get("new_decoder_architecture") or fields.get("multi_query", True)
        sizes["num_kv_heads"] = kv_heads if shared else heads  # transformers cannot run others
    for name in ("sliding_window", "window_size"):
        if fields.get(name) is not None:
            sizes[name] = draw(st.integers(2, 9))
    config = config_class(**{**fields, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, draw(st.integers(0, 9)))
    return model


def _name(fields: dict[str, Any], *names: str) -> str:
    """What a family calls a field."""
    return next(name for name in names if name in fields)


_FIXED = ("phi3-longrope", "phi3-longrope-factor")  # their factors fix the size of a head


def check(model: Any) -> None:
    """Everything that is claimed of a fused decoder, on three rows."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, vocab, (n,), generator=generator) for n in (19, 1, 8)]
    lens = [len(row) for row in rows]
    spec = decoder_spec(model)
    decoder = Decoder(spec)
    decoder.refresh()

    def prefill(some: list[torch.Tensor]) -> torch.Tensor:
        cache = decoder.new_cache(len(some), 32)
        return decoder.step(torch.cat(some), cache, range(len(some)), [len(row) for row in some], "all")

    logits = prefill(rows)
    with torch.no_grad():
        theirs = torch.cat([model(row[None]).logits[0] for row in rows])
        wide = copy.deepcopy(model).double()
        exact = torch.cat([wide(row[None]).logits[0] for row in rows])
    error, own = (float((x.double() - exact).abs().max()) for x in (logits, theirs))
    if error > 2 * own + 2e-5 * float(exact.abs().max()):
        # A norm of a nearly zero branch magnifies any rounding: no further than it does that of the weights.
        assert error <= 4 * _rounding(wide, rows, exact), (error, own)

    assert torch.equal(torch.cat([prefill([row]) for row in rows]), logits)
    cache = decoder.new_cache(1, 32)
    steps = [decoder.step(token[None], cache, [0]) for token in rows[0]]
    assert torch.equal(torch.cat(steps), logits[: lens[0]])
    native, decoder.executor = decoder.executor, PythonExecutor(decoder)
    assert torch.equal(prefill(rows), logits)
    decoder.executor = native

    width = max(lens)
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.arange(width)[None] >= width - torch.tensor(lens)[:, None]
    packed = PackedModel(model)
    _exact_bits(packed, decoder, logits, ids, mask)
    _gradients(model, packed, ids, mask)
    _greedy(model, ids, mask)


@torch.no_grad()
def _rounding(wide: Any, rows: list[torch.Tensor], exact: torch.Tensor) -> float:
    """How far the logits of a float64 model move where float32 rounds each of its weights, at most of four times."""
    moved = []
    for seed in range(4):
        generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(wide)
        for p in other.parameters():
            p.mul_(1 + 2.0**-24 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        moved.append((torch.cat([other(row[None]).logits[0] for row in rows]) - exact).abs().max())
    return float(max(moved))


def _exact_bits(packed: Any, decoder: Any, logits: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    streams = torch.arange(len(logits))
    chosen, expected = sample(
        logits, temperature=0.7, seed=1, streams=streams, positions=torch.zeros_like(streams)
    )
    with torch.no_grad():
        ours = packed.token_logprobs(pack_rows(ids, mask), streams, chosen, temperature=0.7, exact=decoder)
    assert torch.equal(ours, expected)


def _gradients(model: Any, packed: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    rows = pack_rows(ids, mask)
    hidden = packed.hidden(rows)
    logits, cap = F.linear(hidden, *packed.head_weight()), packed.spec.logit_softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    ours = gradients(model, loss_of(logits, rows.ids))
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)

    def hf(m: Any) -> dict[str, torch.Tensor]:
        out = m(ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits[mask]
        return gradients(m, loss_of(out, ids[mask]))

    theirs = hf(model)
    try:
        compare(ours, theirs)
    except AssertionError:
        # A norm of a nearly zero branch magnifies rounding in both: float64 judges, as for the logits.
        for name, exact in hf(copy.deepcopy(model).double()).items():
            error, own = (float((g[name].double() - exact).abs().max()) for g in (ours, theirs))
            if error > 2 * own + 2e-4 * float(exact.abs().max()):
                raise


def _greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """The tokens are transformers'; they may part only where its own logits tie to rounding (a saturated softcap)."""
    options = {
        "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    theirs = model.generate(ids, attention_mask=mask.long(), **options)
    with dk.patch(model, strict=True) as patch:
        ours = model.generate(ids, attention_mask=mask.long(), **options)
        notes = patch.report().notes
    assert notes == []
    for row in range(len(ids)):
        tokens = theirs.sequences[row, ids.shape[1] :]
        differs = (ours.sequences[row, ids.shape[1] :] != tokens).nonzero().flatten().tolist()
        if differs:
            logits = theirs.logits[differs[0]][row]
            gap = float(logits.max() - logits[ours.sequences[row, ids.shape[1] + differs[0]]])
            assert gap <= 1e-5 * float(logits.abs().max())


@pytest.mark.slow
@hypothesis.settings(max_examples=MODELS * 5 // 8)
@given(mixtures())
def test_layers_of_mixed_parts(model: Any) -> None:
    check(model)


@pytest.mark.slow
@hypothesis.settings(max_examples=MODELS - MODELS * 5 // 8)
@given(families())
def test_families_at_random_sizes(model: Any) -> None:
    check(model)
