"""Rollouts on int8 weights or an int8 cache: what is generated, what a flip does, the certificate, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dschat import HybridEngine, SamplingConfig
from dschat.engine.verify import Certificate, logprob_gap, verify
from dschat_kernels.cache import padded_head_dim
from dschat_kernels.executors import NativeExecutor, PythonExecutor
from dschat_kernels.models import decoder_spec
from dschat_kernels.packing import PackedLinear, fused_weight
from dschat_kernels.plan import Decoder
from dschat_kernels.quantise import quantise
from tests.engine.test_rollout import PROMPTS, left
from tests.test_packing import lora
from tests.test_plan import decoder_of, prefill, rows_of
from tests.tiny_models import build, stories

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("int8", "int8_dynamic")
HOW = (
    {"weights": "int8"},
    {"weights": "int8_dynamic"},
    {"kv_cache": "int8"},
    {"weights": "int8", "kv_cache": "int8"},
)
SAMPLING = SamplingConfig(max_new_tokens=8, n=2, seed=3)


def int8(model: Any, **options: Any) -> HybridEngine:
    return HybridEngine(model, rollout_weights="int8", **options)


def failed(certificate: Certificate) -> set[str]:
    return {c.name.strip() for c in certificate.checks if not c.passed}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_its_ops_in_any_batch(name: str, dtype: torch.dtype, how: dict[str, str]) -> None:
    model = build(name).to(dtype)
    decoder = decoder_of(model, **how)
    assert isinstance(decoder.executor, NativeExecutor)
    rows = rows_of(decoder)
    together = prefill(decoder, rows)
    assert torch.equal(torch.cat([prefill(decoder, [r]) for r in rows]), together)
    cache = decoder.new_cache(1, len(rows[2]))
    decoded = torch.cat([decoder.step(t[None], cache, [0]) for t in rows[2]])
    begin = sum(map(len, rows[:2]))
    assert torch.equal(decoded, together[begin : begin + len(rows[2])])
    decoder.executor = PythonExecutor(decoder)
    assert torch.equal(prefill(decoder, rows), together)
    reference = prefill(decoder_of(model, **how, backend="reference"), rows)
    scale = float(reference.abs().max())
    # An activation that lies between two integers may be rounded to either: a step of one in a few dozen.
    bound = 0.06 if dtype == torch.bfloat16 else (1e-5 if how == {"weights": "int8"} else 0.02)
    assert float((together - reference).abs().max()) <= bound * scale


def test_dequantised_weights_in_hf_give_the_same_logits() -> None:
    """Against HF itself: its own modules, holding scale * value."""
    model = build("llama")
    decoder = decoder_of(model, weights="int8")
    rows = rows_of(decoder)
    twin = copy.deepcopy(model)
    head = twin.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied: the embedding stays as it is
    for module in twin.modules():
        if isinstance(module, torch.nn.Linear):
            values, scales = quantise(module.weight.detach())
            module.weight.data = values.float() * scales[:, None]
    hf = torch.cat([twin(r[None]).logits[0] for r in rows]).detach()
    torch.testing.assert_close(prefill(decoder, rows), hf, rtol=1e-4, atol=1e-4)


def test_a_flip_quantises_what_changed_and_fuses_lora_first() -> None:
    peft = lora(build("llama"))
    before = {n: t.clone() for n, t in peft.state_dict().items()}
    engine = int8(peft)
    first = engine.generate(*left(PROMPTS), SAMPLING)
    assert all(torch.equal(t, before[n]) for n, t in peft.state_dict().items())
    for name, group in engine.decoder.groups.items():
        fused = torch.cat([fused_weight(p, torch.float32) for p in group.resolve(name)])
        scales = engine.decoder.packed(name).plain_scales()
        step = (fused - engine.decoder.packed(name).to_dense()).abs() / scales[:, None]
        assert float(step.max()) <= 0.501, name
    assert engine.flip().changed == 0
    with torch.no_grad():
        peft.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight.mul_(-3.0)
    assert engine.flip().changed == 1
    second, fresh = engine.generate(*left(PROMPTS), SAMPLING), int8(peft).generate(*left(PROMPTS), SAMPLING)
    assert torch.equal(second.logprobs, fresh.logprobs) and not torch.equal(second.logprobs, first.logprobs)


def test_the_gap_is_that_of_the_weights_and_is_reported() -> None:
    model = stories()
    engine = int8(model)
    rollout = engine.generate(*left(PROMPTS), SAMPLING)
    assert rollout.stats.weights == "int8"
    plain = HybridEngine(model)
    assert rollout.stats.packed_bytes < 0.3 * plain.generate(*left(PROMPTS), SAMPLING).stats.packed_bytes
    with torch.no_grad():
        gap = logprob_gap(engine.logprobs(rollout), rollout)
        assert torch.equal(
            engine.logprobs(rollout), plain.logprobs(rollout)
        )  # the training forward is as ever
    assert 1e-4 < gap["mean"] < 0.2


def test_the_gap_of_an_int8_cache_is_reported_and_its_memory_is_half() -> None:
    model = stories().bfloat16()
    plain, engine = HybridEngine(model), HybridEngine(model, kv_cache="int8")
    rollout, ordinary = (e.generate(*left(PROMPTS), SAMPLING) for e in (engine, plain))
    assert rollout.stats.kv_cache == "int8" and ordinary.stats.kv_cache == "auto"
    dim = engine.spec.head_dim
    numbers = dim + padded_head_dim(dim)
    assert rollout.stats.cache_bytes == ordinary.stats.cache_bytes * (numbers + 2 * 4) / (2 * numbers)
    with torch.no_grad():
        gap, rounding = (logprob_gap(engine.logprobs(r), r) for r in (rollout, ordinary))
        assert torch.equal(engine.logprobs(rollout), plain.logprobs(rollout))
    assert rounding["mean"] < gap["mean"] < 0.05


def test_samples_of_an_int8_cache_fork_and_take_each_others_slots() -> None:
    """Four slots for nine rows, prompts that end inside a page: a row is the same as alone."""
    model = stories()
    sampling = SamplingConfig(max_new_tokens=70, n=3, seed=3)
    together = HybridEngine(model, kv_cache="int8", max_slots=4).generate(*left(PROMPTS), sampling)
    engine = HybridEngine(model, kv_cache="int8")
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate(torch.as_tensor(prompt)[None], None, sampling)
        assert torch.equal(alone.completion_ids, together.completion_ids[3 * i : 3 * i + 3])
        assert torch.equal(alone.logprobs, together.logprobs[3 * i : 3 * i + 3])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_certificate(dtype: torch.dtype, how: dict[str, str]) -> None:
    weights, kv_cache = how.get("weights", "model"), how.get("kv_cache", "auto")
    model = lora(build("llama").to(dtype))
    certificate = verify(model, max_new_tokens=4, rollout_weights=weights, kv_cache=kv_cache)
    assert certificate.passed, str(certificate)
    assert certificate.facts["weights"] == weights and certificate.facts["kv_cache"] == kv_cache
    assert "the fused model is the model within int8" in str(certificate)


@pytest.mark.parametrize("broken", ["scale", "value", "order"])
def test_certificate_of_broken_packs(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, parts: Any) -> None:
        fill(self, parts)
        if self.panels is None:  # the reference stays right
            return
        if broken == "scale":
            self.scales[3] *= 1.02
        elif broken == "value":
            self.panels[:1] += 4
        else:
            self.panels[:64] = self.panels[:64].flip(0)

    fill = PackedLinear.fill
    monkeypatch.setattr(PackedLinear, "fill", wrong)
    certificate = verify(build("llama"), max_new_tokens=2, rollout_weights="int8")
    assert "weights, largest error of quantising, in steps" in failed(certificate), str(certificate)


def test_refused() -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match="exact mode trains on the rollout's weights"):
        int8(model, exact=True)
    engine = int8(model)
    rollout = engine.generate(*left(PROMPTS), SAMPLING)
    with pytest.raises(ValueError, match="needs rollout_weights='model'"):
        engine.logprobs(rollout, exact=True)
    with pytest.raises(ValueError, match="weights is 'int4': give one of 'model', 'int8', 'int8_dynamic'"):
        HybridEngine(model, rollout_weights="int4")
    with pytest.raises(
        ValueError, match="'int8_dynamic' and backend 'triton': it runs on 'cpu' and 'reference'; give"
    ):
        Decoder(decoder_spec(model), weights="int8_dynamic", backend="triton")


def test_refused_of_the_cache() -> None:
    model = build("gpt2")
    with pytest.raises(ValueError, match="kv_cache is 'int8': exact mode trains on the keys and values"):
        HybridEngine(model, kv_cache="int8", exact=True)
    engine = HybridEngine(model, kv_cache="int8")
    rollout = engine.generate(*left(PROMPTS), SAMPLING)
    with pytest.raises(ValueError, match="needs kv_cache='auto'"):
        engine.logprobs(rollout, exact=True)
    with pytest.raises(ValueError, match="kv_cache is 'int4': give one of 'auto', 'int8'"):
        HybridEngine(model, kv_cache="int4")
    for backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"kv_cache is 'int8' and the rollout runs on '{backend}'"):
            HybridEngine(model, kv_cache="int8", backend=backend)
