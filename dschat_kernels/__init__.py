"""Fused kernels for Hugging Face decoders: ops, and how they get into a model. Knows nothing of RL.

    import dschat_kernels as dk
    patch = dk.patch(model)        # this instance only
    print(patch.report())          # every module: patched with what, or left alone and why
    patch.undo()

Importing this package compiles nothing and does not import torch; each name is imported when first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dschat_kernels.backends import backends as backends

# public name -> the module that defines it
_EXPORTS = {
    "backends": "backends",
    "layer_norm": "ops.layer_norm",
    "rms_norm": "ops.rms_norm",
    "bias_act": "ops.bias_act",
    "gated_act": "ops.gated_act",
    "rope": "ops.rope_append",
    "rope_append": "ops.rope_append",
    "attention": "ops.attention",
    "attention_decode": "ops.attention_decode",
    "packed_attention": "ops.attention",
    "linear": "ops.linear",
    "lora_linear": "ops.lora_linear",
    "fuse_lora": "ops.lora_linear",
    "sample": "ops.sample",
    "token_logprobs": "ops.token_logprobs",
    "patch": "patch",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `dk.patch` the function: importing the submodule `dschat_kernels.patch` would replace it.

    `from dschat_kernels.patch import ...` works all the same.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
