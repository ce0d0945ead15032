"""Recognise a mechanism by its code: a hash of what a forward computes.

Class names lie (a copy of Llama's module names with an interleaved rotary is not Llama), and config fields
only tell what their readers do with them. transformers writes one modelling file a model, so two models that
share a mechanism share its forward statement for statement. `fingerprint` hashes a function's syntax tree
without what does not compute: docstrings, annotations, decorators, log and error messages. `KNOWN` pins the
hashes of the forwards that the adapters describe; code that hashes to none of them is not guessed at, whoever
wrote it and whatever it is called. A transformers release that changes a forward therefore turns into a
refusal with a reason, never into wrong numbers.

`python -m dschat_kernels.models.source` prints the table of the installed transformers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

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


def reference_table() -> dict[str, set[str]]:
    """`KNOWN` as the installed transformers would have it."""
    from transformers.models.gemma import modeling_gemma as gemma
    from transformers.models.gpt2 import modeling_gpt2 as gpt2
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.opt import modeling_opt as opt
    from transformers.models.phi3 import modeling_phi3 as phi3
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    functions: list[tuple[str, Any]] = [
        ("head.plain", llama.LlamaForCausalLM.forward),
        ("head.plain", mistral.MistralForCausalLM.forward),
        ("head.plain", qwen2.Qwen2ForCausalLM.forward),
        ("head.plain", phi3.Phi3ForCausalLM.forward),
        ("head.plain", gpt2.GPT2LMHeadModel.forward),
        ("head.plain", opt.OPTForCausalLM.forward),
        ("trunk.causal", llama.LlamaModel.forward),
        ("trunk.window", mistral.MistralModel.forward),
        ("trunk.layer_types", qwen2.Qwen2Model.forward),
        ("trunk.window", phi3.Phi3Model.forward),
        ("trunk.gpt2", gpt2.GPT2Model.forward),
        ("trunk.opt", opt.OPTDecoder.forward),
        ("wrapper.opt", opt.OPTModel.forward),
        ("layer.sequential", llama.LlamaDecoderLayer.forward),
        ("layer.sequential", mistral.MistralDecoderLayer.forward),
        ("layer.sequential", qwen2.Qwen2DecoderLayer.forward),
        ("layer.sequential_dropout", phi3.Phi3DecoderLayer.forward),
        ("layer.gpt2", gpt2.GPT2Block.forward),
        ("layer.opt", opt.OPTDecoderLayer.forward),
        ("attention.separate", llama.LlamaAttention.forward),
        ("attention.separate", mistral.MistralAttention.forward),
        ("attention.separate", qwen2.Qwen2Attention.forward),
        ("attention.fused", phi3.Phi3Attention.forward),
        ("attention.gpt2", gpt2.GPT2Attention.forward),
        ("attention.opt", opt.OPTAttention.forward),
        ("eager", llama.eager_attention_forward),
        ("eager", gpt2.eager_attention_forward),
        ("eager", opt.eager_attention_forward),
        ("mlp.gated", llama.LlamaMLP.forward),
        ("mlp.gated_packed", phi3.Phi3MLP.forward),
        ("mlp.gpt2", gpt2.GPT2MLP.forward),
        ("norm.rms_llama", llama.LlamaRMSNorm.forward),
        ("norm.rms_gemma", gemma.GemmaRMSNorm.forward),
        ("norm.rms_gemma_inner", gemma.GemmaRMSNorm._norm),
        ("rotary", llama.LlamaRotaryEmbedding.forward),
        ("rotate.half", llama.apply_rotary_pos_emb),
        ("rotate.half_partial", phi3.apply_rotary_pos_emb),
        ("rotate_half", llama.rotate_half),
        ("positions.opt", opt.OPTLearnedPositionalEmbedding.forward),
    ]
    table: dict[str, set[str]] = {}
    for name, function in functions:
        table.setdefault(name, set()).add(fingerprint(function) or f"no source: {function}")
    return table


# transformers 5.23
KNOWN.update(
    {
        "head.plain": {"09999c771af42fb9", "b784e11e3056249a", "bb5012fb68702388"},
        "trunk.causal": {"9fc8395833b33c8a"},
        "trunk.window": {"eb04301a0277319b"},
        "trunk.layer_types": {"a3844b26032f0765"},
        "trunk.gpt2": {"9baa94b35c42e139"},
        "trunk.opt": {"23fa6c3fda9731b1"},
        "wrapper.opt": {"f5aba2cbc21487d8"},
        "layer.sequential": {"56851eb5314fe49a"},
        "layer.sequential_dropout": {"e2393a56cb8c3bdc"},
        "layer.gpt2": {"0fac52ee7aa3df5c"},
        "layer.opt": {"c1d4c827fd116cae"},
        "attention.separate": {"a35c9b3d8c61409f", "b2e82656f0335455", "f9a024617a7fd2f0"},
        "attention.fused": {"a4352cad3e358b64"},
        "attention.gpt2": {"f3b1d38eab6ec609"},
        "attention.opt": {"2f2eec21437ba801"},
        "eager": {"2d6a6a26181984bc", "4dafb2bac9e63886", "81d83095525c718c"},
        "mlp.gated": {"c667e32817f752bd"},
        "mlp.gated_packed": {"89b34cccf0d0e128"},
        "mlp.gpt2": {"e0cb41d12c40e7b1"},
        "norm.rms_llama": {"f5c95295c0f85e5a"},
        "norm.rms_gemma": {"6178835fbd029fcd"},
        "norm.rms_gemma_inner": {"020b369189b2455f"},
        "rotary": {"fdf4680dfba67887"},
        "rotate.half": {"137d5361594161b5"},
        "rotate.half_partial": {"f43e6c870a47442d"},
        "rotate_half": {"d13566b44750b3cc"},
        "positions.opt": {"65c759363d4b3a9d"},
    }
)

if __name__ == "__main__":
    import transformers

    print(f"# transformers {transformers.__version__}")
    for mechanism_name, hashes in reference_table().items():
        print(
            f'        "{mechanism_name}": {{{", ".join(repr(h) for h in sorted(hashes))}}},'.replace("'", '"')
        )
    sys.exit(0)
