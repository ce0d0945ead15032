"""Recognise a mechanism by its code: a hash of what a forward computes.

Class names lie (a copy of Llama's module names with an interleaved rotary is not Llama), and config fields
only tell what their readers do with them. transformers writes one modelling file a model, so two models that
share a mechanism share its forward statement for statement. `fingerprint` hashes a function's syntax tree
without what does not compute: docstrings, annotations, decorators, log and error messages. `KNOWN` pins the
hashes of the forwards that the adapters describe; code that hashes to none of them is not guessed at, whoever
wrote it and whatever it is called. A transformers release that changes a forward therefore turns into a
refusal with a reason, never into wrong numbers.

`python -m dschat_kernels.models.source` prints what the installed transformers has and the table has not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from .versions import installed, minor

# Wrappers defined in these packages only add bookkeeping around a forward (tuple outputs, hooks,
# checkpointing, no_grad).
_TRANSPARENT = ("transformers.", "torch.")
_DROPPED_FIELDS = {"ctx", "type_comment", "type_params", "kind", "annotation", "returns", "decorator_list"}


def _canonical(node: Any) -> str:
    """A text that is equal for equal computations, independent of the Python version's `ast.dump`."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, ast.Raise):
        return "raise"
    if isinstance(node, ast.Expr) and (
        isinstance(node.value, ast.Constant)
        or (isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("logger."))
    ):
        return ""
    if isinstance(node, ast.AST):
        parts = []
        for name, value in ast.iter_fields(node):
            if name in _DROPPED_FIELDS or value is None or value == []:
                continue
            parts.append(f"{name}={_canonical(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return "[" + ",".join(text for text in map(_canonical, node) if text) + "]"
    return repr(node)


@functools.cache
def _hash(function: FunctionType) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return hashlib.sha256(_canonical(tree.body[0]).encode()).hexdigest()[:16]


def fingerprint(function: Callable[..., Any]) -> str | None:
    """Hash of what `function` computes; None when its source is not at hand or something foreign is wrapped
    around it."""
    current: Any = function
    while hasattr(current, "__wrapped__"):
        scope = getattr(current, "__globals__", {}).get("__name__", "")
        if not scope.startswith(_TRANSPARENT):
            return None
        current = current.__wrapped__
    return _hash(current) if isinstance(current, FunctionType) else None


# mechanism -> hashes; filled in by the table at the end of this file.
KNOWN: dict[str, set[str]] = {}


@functools.cache
def _by_hash() -> dict[str, str]:
    return {value: name for name, values in KNOWN.items() for value in values}


def pin(name: str, *functions: Callable[..., Any]) -> None:
    """Say that `functions`, as they are now, implement the mechanism `name`. Raises ValueError for one whose source is
    not at hand, or that is pinned as another mechanism."""
    for function in functions:
        value, place = fingerprint(function), getattr(function, "__qualname__", function)
        if value is None:
            raise ValueError(
                f"{place} cannot be pinned: its source is not at hand, or it is wrapped by foreign code"
            )
        if (other := _by_hash().get(value, name)) != name:
            raise ValueError(f"{place} is pinned as {other!r} already, so it cannot be {name!r}")
        KNOWN.setdefault(name, set()).add(value)
        _by_hash.cache_clear()


def recognise(function: Callable[..., Any]) -> str | None:
    """The mechanism that `function` implements (a key of `KNOWN`), or None."""
    value = fingerprint(function)
    return None if value is None else _by_hash().get(value)


def original_class(module: Any) -> Any:
    """The class of `module` as its author made it, below any class that `dschat_kernels.patch` put there."""
    return getattr(type(module), "_dschat_original", type(module))


def mechanism(module: Any) -> str | None:
    """The mechanism of `module`'s forward, or None when its class is unknown or the instance carries its own
    `forward`."""
    if "forward" in vars(module):
        return None
    return recognise(original_class(module).forward)


def global_of(module: Any, name: str) -> Any:
    """The global `name` that `module`'s forward sees."""
    function = inspect.unwrap(original_class(module).forward)
    return function.__globals__.get(name)


# mechanism -> where transformers has it: "model:object", inside transformers.models.<model>.modeling_<model>; with
# " until 5.23" or " since 5.24" where not every supported version has it.
SOURCES: dict[str, tuple[str, ...]] = {
    "head.plain": (
        "llama:LlamaForCausalLM.forward",
        "gpt2:GPT2LMHeadModel.forward",
        "opt:OPTForCausalLM.forward",
        "gpt_neo:GPTNeoForCausalLM.forward",
        "gptj:GPTJForCausalLM.forward",
        "gpt_neox:GPTNeoXForCausalLM.forward",
        "bloom:BloomForCausalLM.forward",
        "falcon:FalconForCausalLM.forward",
        "stablelm:StableLmForCausalLM.forward",
    ),
    "head.softcap": ("gemma2:Gemma2ForCausalLM.forward",),
    "head.logit_scale": ("cohere:CohereForCausalLM.forward",),
    "head.logits_scaling": ("granite:GraniteForCausalLM.forward",),
    "trunk.causal": (
        "llama:LlamaModel.forward",
        "gemma:GemmaModel.forward",
        "stablelm:StableLmModel.forward",
    ),
    "trunk.multiplier": ("granite:GraniteModel.forward",),
    "trunk.window": (
        "mistral:MistralModel.forward",
        "starcoder2:Starcoder2Model.forward",
    ),
    "trunk.layer_types": (
        "qwen2:Qwen2Model.forward",
        "gemma2:Gemma2Model.forward",
        "cohere2:Cohere2Model.forward",
    ),
    "trunk.rope_types": ("gemma3:Gemma3TextModel.forward",),
    "trunk.phi": ("phi:PhiModel.forward",),
    "trunk.neox": ("gpt_neox:GPTNeoXModel.forward",),
    "trunk.gpt2": ("gpt2:GPT2Model.forward",),
    "trunk.gpt_neo": ("gpt_neo:GPTNeoModel.forward",),
    "trunk.gptj": ("gptj:GPTJModel.forward",),
    "trunk.bloom": ("bloom:BloomModel.forward",),
    "trunk.falcon": ("falcon:FalconModel.forward",),
    "trunk.opt": ("opt:OPTDecoder.forward",),
    "wrapper.opt": ("opt:OPTModel.forward",),
    "layer.sequential": ("llama:LlamaDecoderLayer.forward", "mistral:MistralDecoderLayer.forward"),
    "layer.sequential_dropout": ("phi3:Phi3DecoderLayer.forward",),
    "layer.sandwich": ("gemma2:Gemma2DecoderLayer.forward",),
    "layer.branch_norm": ("olmo2:Olmo2DecoderLayer.forward",),
    "layer.multiplier": ("granite:GraniteDecoderLayer.forward",),
    "layer.parallel": (
        "cohere:CohereDecoderLayer.forward",
        "cohere2:Cohere2DecoderLayer.forward",
        "phi:PhiDecoderLayer.forward",
    ),
    "layer.stablelm": ("stablelm:StableLmDecoderLayer.forward",),
    "layer.neox": ("gpt_neox:GPTNeoXLayer.forward",),
    "layer.gpt2": ("gpt2:GPT2Block.forward",),
    "layer.gpt_neo": ("gpt_neo:GPTNeoBlock.forward",),
    "layer.gptj": ("gptj:GPTJBlock.forward",),
    "layer.bloom": ("bloom:BloomBlock.forward",),
    "layer.falcon": ("falcon:FalconDecoderLayer.forward",),
    "layer.opt": ("opt:OPTDecoderLayer.forward",),
    "attention.separate": (
        "llama:LlamaAttention.forward",
        "mistral:MistralAttention.forward",
        "qwen2:Qwen2Attention.forward",
        "starcoder2:Starcoder2Attention.forward",
    ),
    "attention.clipped": ("olmo:OlmoAttention.forward",),
    "attention.norm_heads": ("qwen3:Qwen3Attention.forward", "gemma3:Gemma3Attention.forward"),
    "attention.norm_full": ("olmo2:Olmo2Attention.forward",),
    "attention.softcap": ("gemma2:Gemma2Attention.forward",),
    "attention.use_rope": ("smollm3:SmolLM3Attention.forward",),
    "attention.cohere": ("cohere:CohereAttention.forward",),
    "attention.rope_in_window": ("cohere2:Cohere2Attention.forward",),
    "attention.partial": ("phi:PhiAttention.forward", "stablelm:StableLmAttention.forward"),
    "attention.fused": ("phi3:Phi3Attention.forward",),
    "attention.neox": ("gpt_neox:GPTNeoXAttention.forward",),
    "attention.gpt2": ("gpt2:GPT2Attention.forward",),
    "attention.gpt2._upcast_and_reordered_attn": ("gpt2:GPT2Attention._upcast_and_reordered_attn",),
    "attention.gpt_neo": ("gpt_neo:GPTNeoSelfAttention.forward",),
    "attention.gpt_neo._attn": ("gpt_neo:GPTNeoSelfAttention._attn",),
    "attention.gpt_neo._split_heads": ("gpt_neo:GPTNeoSelfAttention._split_heads",),
    "attention.gpt_neo._merge_heads": ("gpt_neo:GPTNeoSelfAttention._merge_heads",),
    "wrapper.gpt_neo": ("gpt_neo:GPTNeoAttention.forward",),
    "attention.gptj": ("gptj:GPTJAttention.forward until 5.23",),
    "attention.gptj_trunk_table": ("gptj:GPTJAttention.forward since 5.24",),
    "attention.gptj._attn": ("gptj:GPTJAttention._attn until 5.23",),
    "attention.gptj._split_heads": ("gptj:GPTJAttention._split_heads until 5.23",),
    "attention.gptj._merge_heads": ("gptj:GPTJAttention._merge_heads until 5.23",),
    "attention.gptj._get_embed_positions": ("gptj:GPTJAttention._get_embed_positions until 5.23",),
    "attention.bloom": ("bloom:BloomAttention.forward",),
    "attention.bloom._reshape": ("bloom:BloomAttention._reshape",),
    "attention.bloom._merge_heads": ("bloom:BloomAttention._merge_heads",),
    "attention.falcon": ("falcon:FalconAttention.forward",),
    "attention.falcon._split_heads": ("falcon:FalconAttention._split_heads",),
    "attention.opt": ("opt:OPTAttention.forward",),
    "eager": (
        "llama:eager_attention_forward",
        "gpt2:eager_attention_forward",
        "opt:eager_attention_forward",
        "gpt_neox:eager_attention_forward",
        "gptj:eager_attention_forward since 5.24",
    ),
    "eager.softcap": ("gemma2:eager_attention_forward",),
    "mlp.gated": ("llama:LlamaMLP.forward",),
    "mlp.gated_packed": ("phi3:Phi3MLP.forward",),
    "mlp.gpt2": ("gpt2:GPT2MLP.forward",),
    "mlp.starcoder2": ("starcoder2:Starcoder2MLP.forward",),
    "mlp.phi": ("phi:PhiMLP.forward",),
    "mlp.gptj": ("gptj:GPTJMLP.forward",),
    "mlp.neox": ("gpt_neox:GPTNeoXMLP.forward",),
    "mlp.bloom": ("bloom:BloomMLP.forward",),
    "mlp.falcon": ("falcon:FalconMLP.forward",),
    "linear.falcon": ("falcon:FalconLinear.forward",),
    "embedding.scaled": ("gemma:GemmaTextScaledWordEmbedding.forward",),
    "activation.bloom": ("bloom:BloomGelu.forward",),
    "activation.bloom.function": ("bloom:bloom_gelu_forward",),
    "norm.rms_llama": ("llama:LlamaRMSNorm.forward",),
    "norm.rms_gemma": ("gemma:GemmaRMSNorm.forward",),
    "norm.rms_gemma._norm": ("gemma:GemmaRMSNorm._norm",),
    "norm.rms_wide": ("olmo2:Olmo2RMSNorm.forward", "helium:HeliumRMSNorm.forward"),
    "norm.layer_cohere": ("cohere:CohereLayerNorm.forward",),
    "norm.layer_plain": ("olmo:OlmoLayerNorm.forward",),
    "norm.layer_per_head": ("stablelm:StableLmLayerNormPerHead.forward",),
    "rotary": ("llama:LlamaRotaryEmbedding.forward", "olmo:OlmoRotaryEmbedding.forward"),
    "rotary.pairs": ("cohere:CohereRotaryEmbedding.forward",),
    "rotary.layer_types": ("gemma3:Gemma3RotaryEmbedding.forward",),
    "rotary.table_module": ("gptj:GPTJRotaryEmbedding.forward since 5.24",),
    "rotary.table": ("gptj:create_sinusoidal_positions",),
    "rotate.half": ("llama:apply_rotary_pos_emb", "olmo:apply_rotary_pos_emb"),
    "rotate.half_partial": ("phi3:apply_rotary_pos_emb", "gpt_neox:apply_rotary_pos_emb"),
    "rotate.pairs": ("cohere:apply_rotary_pos_emb",),
    "rotate.pairs_from_halves": ("helium:apply_rotary_pos_emb",),
    "rotate.pairs_from_halves_partial": ("glm:apply_rotary_pos_emb",),
    "rotate.gptj": ("gptj:apply_rotary_pos_emb",),
    "rotate_half": ("llama:rotate_half",),
    "rotate_pairs": ("cohere:rotate_half", "glm:rotate_half", "gptj:rotate_every_two"),
    "alibi": ("bloom:build_alibi_tensor",),
    "alibi.slopes": ("bloom:_get_alibi_slopes",),
    "alibi.falcon": ("falcon:build_alibi_tensor",),
    "dropout_add": ("bloom:dropout_add",),
    "positions.opt": ("opt:OPTLearnedPositionalEmbedding.forward",),
}


def reference_table() -> dict[str, set[str]]:
    """`KNOWN` as the installed transformers would have it."""
    table: dict[str, set[str]] = {}
    for name, places in SOURCES.items():
        for place in places:
            place, *bound = place.split(" ")
            if bound and not _within(*bound):
                continue
            model, _, path = place.partition(":")
            found: Any = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
            for attribute in path.split("."):
                found = getattr(found, attribute, None)
            value = fingerprint(found) if found is not None else None
            table.setdefault(name, set()).add(value or f"no source: {place}")
    return table


def _within(kind: str, bound: str) -> bool:
    """Whether the installed transformers is "until" or "since" a minor version."""
    ours, limit = minor(installed()), minor(bound)
    return ours <= limit if kind == "until" else ours >= limit


def _pin(table: dict[str, set[str]]) -> None:
    for name, hashes in table.items():
        KNOWN.setdefault(name, set()).update(hashes)


# transformers 5.23
_pin(
    {
        "head.plain": {
            "09999c771af42fb9",
            "107ada47601edbb2",
            "2ed5ff261d237d96",
            "4792934fb368ca7a",
            "b383d4794322110e",
            "b784e11e3056249a",
            "bb5012fb68702388",
            "cafee627cfc31dc7",
            "faf58e2a520bed1d",
        },
        "head.softcap": {"c9f3a223d137befb"},
        "head.logit_scale": {"f095779abe827079"},
        "head.logits_scaling": {"c7f3393af93af7e9"},
        "trunk.causal": {"9fc8395833b33c8a", "f0eeccaccfa90c3d", "f1197efac4bf0a31"},
        "trunk.multiplier": {"22d2ebfd99b2db0a"},
        "trunk.window": {"5ae086439374b85a", "eb04301a0277319b"},
        "trunk.layer_types": {"3a95a873173b0a86", "42a6758d526d11da", "a3844b26032f0765"},
        "trunk.rope_types": {"5d0cf8d09b7d50b2"},
        "trunk.phi": {"9fe552e98e558804"},
        "trunk.neox": {"0cf9dd7a859cc02d"},
        "trunk.gpt2": {"9baa94b35c42e139"},
        "trunk.gpt_neo": {"4a8d5b75a557c63e"},
        "trunk.gptj": {"389030a07c317902"},
        "trunk.bloom": {"29aec25a1303f018"},
        "trunk.falcon": {"58bc4cd23fdd6694"},
        "trunk.opt": {"23fa6c3fda9731b1"},
        "wrapper.opt": {"f5aba2cbc21487d8"},
        "layer.sequential": {"56851eb5314fe49a"},
        "layer.sequential_dropout": {"e2393a56cb8c3bdc"},
        "layer.sandwich": {"616c4cee5761dd86"},
        "layer.branch_norm": {"ddcc10218045b72c"},
        "layer.multiplier": {"c8eb9762287b7d1b"},
        "layer.parallel": {"0399fdc3b7910c0d", "1bd2a3f635eb5e95", "ece9ecec62c46a11"},
        "layer.stablelm": {"71231f0f39e46be5"},
        "layer.neox": {"e16b4ce891abeded"},
        "layer.gpt2": {"0fac52ee7aa3df5c"},
        "layer.gpt_neo": {"65114c999412c18f"},
        "layer.gptj": {"6f022a380a757880"},
        "layer.bloom": {"f92fd65ef63a5540"},
        "layer.falcon": {"8f6034f289aa9a78"},
        "layer.opt": {"c1d4c827fd116cae"},
        "attention.separate": {
            "a35c9b3d8c61409f",
            "b2e82656f0335455",
            "f9a024617a7fd2f0",
            "fd57a0651769b52b",
        },
        "attention.clipped": {"58f4039dc7aae30d"},
        "attention.norm_heads": {"2b0033a4f46149a0", "c9600c86b25b84dd"},
        "attention.norm_full": {"b602c894cd5a1b4d"},
        "attention.softcap": {"dec778ed880d48e1"},
        "attention.use_rope": {"96ded4e47e8fae79"},
        "attention.cohere": {"5dd5630d4a4f486b"},
        "attention.rope_in_window": {"10f00e1c6391ff07"},
        "attention.partial": {"0b748d73b7b55763", "f4963819f0ad076b"},
        "attention.fused": {"a4352cad3e358b64"},
        "attention.neox": {"0f2930261ff6ac26"},
        "attention.gpt2": {"f3b1d38eab6ec609"},
        "attention.gpt2._upcast_and_reordered_attn": {"9231a7835c9c68b8"},
        "attention.gpt_neo": {"871e3647f6b7dc56"},
        "attention.gpt_neo._attn": {"1ee757ebf21aaa1b"},
        "attention.gpt_neo._split_heads": {"9192f3d080391cfa"},
        "attention.gpt_neo._merge_heads": {"4d39513322190ea4"},
        "wrapper.gpt_neo": {"38907e9c135a855e"},
        "attention.gptj": {"549182418a79c2bf"},
        "attention.gptj._attn": {"ff531a1cef503c4f"},
        "attention.gptj._split_heads": {"36a282babd4480fd"},
        "attention.gptj._merge_heads": {"145ede8e6256464b"},
        "attention.gptj._get_embed_positions": {"fa122ab7329eebc2"},
        "attention.bloom": {"4405f2b30dc32c10"},
        "attention.bloom._reshape": {"feb65591d8b650e0"},
        "attention.bloom._merge_heads": {"305731f997499d88"},
        "attention.falcon": {"1a99b18c911619d3"},
        "attention.falcon._split_heads": {"07ff61340b10f4c2"},
        "attention.opt": {"2f2eec21437ba801"},
        "eager": {"1ade63d83562e0db", "2d6a6a26181984bc", "4dafb2bac9e63886", "81d83095525c718c"},
        "eager.softcap": {"89ff9939bbebc78e"},
        "mlp.gated": {"c667e32817f752bd"},
        "mlp.gated_packed": {"89b34cccf0d0e128"},
        "mlp.gpt2": {"e0cb41d12c40e7b1"},
        "mlp.starcoder2": {"48bdf6cd43a64ecd"},
        "mlp.phi": {"a8035f85cdc2625c"},
        "mlp.gptj": {"8e1af19ce781145d"},
        "mlp.neox": {"abce40abef665667"},
        "mlp.bloom": {"93a21eb7872ce384"},
        "mlp.falcon": {"935b9f767ae16929"},
        "linear.falcon": {"1ead38eea84a46b7"},
        "embedding.scaled": {"40d585f5fccf16ce"},
        "activation.bloom": {"6e59019cddcdab7f"},
        "activation.bloom.function": {"a6245e0c840b4bb3"},
        "norm.rms_llama": {"f5c95295c0f85e5a"},
        "norm.rms_gemma": {"6178835fbd029fcd"},
        "norm.rms_gemma._norm": {"020b369189b2455f"},
        "norm.rms_wide": {"9bb6bb8e55cf1713", "f8ed60cd782f6eeb"},
        "norm.layer_cohere": {"54673c4e19ebd9a4"},
        "norm.layer_plain": {"25b9e30b629fe043"},
        "norm.layer_per_head": {"4f02f28583f360b6"},
        "rotary": {"4f7632eb56738bce", "fdf4680dfba67887"},
        "rotary.pairs": {"cb8f2e3bd8593dc8"},
        "rotary.layer_types": {"aa5f8d996efa89a2"},
        "rotary.table": {"3d684d07a78a2328"},
        "rotate.half": {"137d5361594161b5", "c98b5941dddf6052"},
        "rotate.half_partial": {"ac79818ce30eb725", "f43e6c870a47442d"},
        "rotate.pairs": {"5e1e24c840fd324f"},
        "rotate.pairs_from_halves": {"2c1b53053e532f3c"},
        "rotate.pairs_from_halves_partial": {"9362fef7a258a43b"},
        "rotate.gptj": {"50dc365db7bd33f3"},
        "rotate_half": {"d13566b44750b3cc"},
        "rotate_pairs": {"0fee3e15bc25303e", "e94cde76e4232c7e", "f26eb4aac4a3db68"},
        "alibi": {"058d377e369da9e5"},
        "alibi.slopes": {"9868080626dac8c7"},
        "alibi.falcon": {"faeaac47fa30c54b"},
        "dropout_add": {"e6816a9ca634bf55"},
        "positions.opt": {"65c759363d4b3a9d"},
    }
)

# transformers 5.24: past_key_values became cache, and GPT-J was written anew
_pin(
    {
        "head.plain": {
            "3310b71be986fcb0",
            "4762c5b75fee1d41",
            "9e785cbb65466aad",
            "ab235c790165fb59",
            "b17885a36ceac0b0",
            "cc8ccf47d3e18809",
            "eca785c0d317c666",
            "f42d183e88bd140d",
            "f8860a41eb33f632",
        },
        "head.softcap": {"2d8c9539dada9819"},
        "head.logit_scale": {"15a80b38ae8bf91b"},
        "head.logits_scaling": {"7726a42a64745212"},
        "trunk.causal": {"0c8b8ec9b87a4e82", "7341a6a6793a8ae2", "f36c08e3e3eb73f2"},
        "trunk.multiplier": {"7b032d0eb341ccc8"},
        "trunk.window": {"02fdb7eb60caf7e6", "5ffcc2b7af6196c0"},
        "trunk.layer_types": {"c684b5d8badf0b87", "e1ded131e1a34ce2", "f55cf127a59c3856"},
        "trunk.rope_types": {"0616582a7e0512a5"},
        "trunk.phi": {"042c40b497ea97e5"},
        "trunk.neox": {"01f6929987b14df5"},
        "trunk.gpt2": {"e48d82cdd4902d8d"},
        "trunk.gpt_neo": {"5ac8f35de386ef89"},
        "trunk.gptj": {"394bf6d9bd158192"},
        "trunk.bloom": {"cc18e88d3b33ff0f"},
        "trunk.falcon": {"9ef5044e9b8ae759"},
        "trunk.opt": {"66866e001f87ad05"},
        "wrapper.opt": {"71c81cc6b747e8ab"},
        "layer.sequential": {"3de6c16874d68263"},
        "layer.sequential_dropout": {"be6904ba46b904b6"},
        "layer.sandwich": {"937c8486053f4d27"},
        "layer.branch_norm": {"6dc027daef0f9c8b"},
        "layer.multiplier": {"d21a8544c26addc7"},
        "layer.parallel": {"10e5c7af1d17e205", "bcae035a3966ac8c", "dae5360dacc37085"},
        "layer.stablelm": {"9cc886863ea82937"},
        "layer.gpt2": {"4c5aa5519bccb4cc"},
        "layer.gptj": {"421cc1bb31a7899c"},
        "layer.opt": {"85125201b9ce5977"},
        "attention.separate": {
            "9a49f36ab5a067b5",
            "bf618384a2a02d5a",
            "f977f133e3e62d39",
            "faf54a98a37c85c9",
        },
        "attention.clipped": {"dcdf8e29f86be1cc"},
        "attention.norm_heads": {"3b2eb3f12231267b", "755b8d9822f12758"},
        "attention.norm_full": {"19ea1409fd7eb1a3"},
        "attention.softcap": {"ded07fde05d05531"},
        "attention.use_rope": {"40d2fae8a3cdeb5f"},
        "attention.cohere": {"b47e098d9ba2564c"},
        "attention.rope_in_window": {"55a27882870d0b37"},
        "attention.partial": {"7d5cab0f2f945e29", "fa44c61f17ffd4f1"},
        "attention.fused": {"9470179ecdf4c080"},
        "attention.gpt2": {"9130ec45493963f5"},
        "attention.gptj_trunk_table": {"e5df16e0a9135062"},
        "attention.opt": {"b4aa9887e1f2b22b"},
        "eager": {"fa08c8ff51782af4"},
        "rotary.table_module": {"dd5f81836048baff"},
        "positions.opt": {"3e90760f444d4566"},
    }
)

if __name__ == "__main__":
    from dschat_kernels.models import source as _known  # not this copy of it, whose table is filled as well

    print(f"# transformers {installed()}: what is not pinned yet")
    for mechanism_name, hashes in reference_table().items():
        if new := sorted(hashes - _known.KNOWN.get(mechanism_name, set())):
            print(f'        "{mechanism_name}": {{{", ".join(repr(h) for h in new)}}},'.replace("'", '"'))
    sys.exit(0)
