"""Frozen models whose weights lie elsewhere while they do not score. With a device: tests/cuda/test_device_training.py;
in shards of several processes: tests/distributed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dschat.engine import HybridEngine, SamplingConfig
from dschat.engine import zero as sharded
from dschat.engine.frozen import HostWeights, frozen_engine
from dschat.engine.zero import ZeroSettings
from tests.tiny_models import stories

META = torch.device("meta")


def where(model: nn.Module) -> set[str]:
    return {p.device.type for p in model.parameters()}


def test_only_what_is_fetched_is_on_the_device_and_only_inside():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    held = HostWeights(model, META)
    before = [dict(m._parameters) for m in model]
    with held.fetched([model[0], model[2], model[0]]):
        assert where(model[0]) == where(model[2]) == {"meta"} and where(model[1]) == {"cpu"}
        assert model[2].weight is model[0].weight, "weights that are one stay one"
        with held.fetched([model[2]]):
            pass
        assert where(model[2]) == {"meta"}, "who fetched them first still reads them"
    assert all(m._parameters[n] is p for m, own in zip(model, before, strict=True) for n, p in own.items())
    with pytest.raises(RuntimeError, match="mixed"), held.fetched([model[1]]):
        raise RuntimeError("mixed")
    assert where(model) == {"cpu"} and not any(p.requires_grad for p in model.parameters())


def test_a_segment_computes_with_what_it_fetched():
    model = nn.Linear(3, 2)
    held = HostWeights(model, META)
    out = held.segment([model], model, torch.zeros(5, 3, device="meta"))
    assert out.device == META and out.shape == (5, 2) and where(model) == {"cpu"}


@pytest.mark.parametrize("exact", [False, True])
def test_shards_of_zero_3_score_as_whole_weights(exact):
    """Bit for bit, with packs too; nothing stays gathered, also after a failure; torch's linear is its own."""
    model = stories()
    plain = HybridEngine(copy.deepcopy(model), exact=exact)
    rollout = plain.generate(torch.tensor([[5, 6, 7, 8]]), None, SamplingConfig(max_new_tokens=6, seed=1))
    linear = torch.nn.functional.linear
    own = frozen_engine(model, False, ZeroSettings(3), exact=exact)
    with torch.no_grad():
        assert torch.equal(own.logprobs(rollout), plain.logprobs(rollout))
    parameters = list(own.model.parameters())
    assert all(p.ds_status.name == "NOT_AVAILABLE" and p.numel() == 0 for p in parameters)
    down = own.spec.layers[1].down.module
    down.forward = None
    with pytest.raises(TypeError), torch.no_grad():
        own.logprobs(rollout, exact=False)
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in parameters)
    assert torch.nn.functional.linear is linear
    assert sum(sharded.held(p).numel() for p in parameters) == sum(
        p.numel() for p in plain.model.parameters()
    )
