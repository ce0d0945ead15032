"""Where the weights of a frozen model (reference, reward model) lie while it does not score.

They stay on the run's device, or lie in the host's memory (offload), or under ZeRO-3 in shards over the processes, on
the device or in the host's memory. Wherever they lie, the forward reads them on the device, whole, a segment at a
time (what is before the layers, each layer, the end, the head): of such a model the device holds one layer, and no
copy of anything is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..device import CPU
from .hybrid_engine import HybridEngine
from .packed import PackedModel
from .zero import ZeroSettings, gather_modules, shard, sharded_segment


class HostWeights:
    """Parameters in the host's memory, and what computes with them on `device`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        _put(_places([model]), CPU)

    @contextlib.contextmanager
    def fetched(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, the parameters of these modules are on the device."""
        places = [place for place in _places(modules) if place[2].device != self.device]
        try:
            _put(places, self.device)
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def segment(self, modules: Sequence[Any], f: Callable[[Tensor], Any], x: Tensor) -> Any:
        """f(x), with the parameters of `modules` on the device while f runs."""
        with self.fetched(modules):
            return f(x)


def _places(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every place where these modules hold a parameter: (module, name there, parameter)."""
    return [
        (module, name, parameter)
        for outer in modules
        for module in outer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _put(places: Sequence[tuple[nn.Module, str, nn.Parameter]], device: torch.device) -> None:
    """Parameters of the same values on `device` into these places, one for each that was there."""
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in places:
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        module._parameters[name] = made[id(parameter)]


def put_away(packed: PackedModel, offload: bool, zero: ZeroSettings | None) -> None:
    """The frozen model, which lies whole on its device, to where its weights are to lie. All processes call.

    offload: in the host's memory; nothing on the CPU. zero: under ZeRO-3 in shards.
    """
    embed: Any = packed.spec.embed
    if zero is not None and zero.stage == 3:
        shard(packed.model, embed.weight.dtype, embed.weight.device, offload)
        packed.segment = sharded_segment
    elif offload and embed.weight.device != CPU:
        packed.segment = HostWeights(packed.model, embed.weight.device).segment


def frozen_engine(
    model: nn.Module, offload: bool, zero: ZeroSettings | None, **keywords: Any
) -> HybridEngine:
    """The engine of a frozen model on the run's device, put away. keywords: HybridEngine's."""
    engine = HybridEngine(model.requires_grad_(False), **keywords)
    put_away(engine.packed, offload, zero)
    if engine.packed.segment is sharded_segment:
        engine.decoder.gather = gather_modules
    return engine
