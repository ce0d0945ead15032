"""The hybrid engine: one model that is both the trainer and the fast generator."""

from .hybrid_engine import HybridEngine
from .packed import PackedModel, PackedRows, pack_rows, sequence_hidden
from .rollout import Rollout, RolloutStats, SamplingConfig

__all__ = [
    "HybridEngine",
    "PackedModel",
    "PackedRows",
    "Rollout",
    "RolloutStats",
    "SamplingConfig",
    "pack_rows",
    "sequence_hidden",
]
