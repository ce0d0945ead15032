"""RLHF with one model that is both the trainer and the fast generator.

    from dschat import HybridEngine, SamplingConfig
    engine = HybridEngine(model, optimizer=optimizer)
    rollout = engine.generate(input_ids, attention_mask, SamplingConfig(max_new_tokens=128, n=4, seed=0))
    logprobs = engine.logprobs(rollout)          # with grad, by the same kernels
    engine.backward(loss(logprobs, rollout.logprobs))
    engine.step()                                # the next generate sees the new weights

The stages are functions of dschat.rlhf, their command line is dschat.cli. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_EXPORTS = {
    "HybridEngine": "engine.hybrid_engine",
    "Rollout": "engine.rollout",
    "SamplingConfig": "engine.rollout",
    "Certificate": "engine.verify",
    "verify": "engine.verify",
}
__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
