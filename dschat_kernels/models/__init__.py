"""Adapters: a Hugging Face decoder described by its config and modules as a `DecoderSpec`."""

from . import versions
from .spec import DecoderSpec, LayerSpec, LinearSpec, NormSpec, RopeSpec, Unsupported, decoder_spec

__all__ = ["DecoderSpec", "LayerSpec", "LinearSpec", "NormSpec", "RopeSpec", "Unsupported", "decoder_spec"]

versions.check()
