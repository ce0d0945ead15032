"""Rollouts on int8 weights: what is generated, what a flip does, what the certificate says, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dschat import HybridEngine, SamplingConfig
from dschat.engine.verify import Certificate, logprob_gap, verify
from dschat_kernels.executors import NativeExecutor, PythonExecutor
from dschat_kernels.models import decoder_spec
from dschat_kernels.packing import PackedLinear, fused_weight
from dschat_kernels.quantise import quantise
from dschat_kernels.plan import Decoder
from tests.engine.test_rollout import PROMPTS, left
from tests.test_packing import lora
from tests.test_plan import decoder_of, prefill, rows_of
from tests.tiny_models import build, stories

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("int8", "int8_dynamic")
SAMPLING = SamplingConfig(max_new_tokens=8, n=2, seed=3)


def int8(model: Any, **options: Any) -> HybridEngine:
    return HybridEngine(model, rollout_weights="int8", **options)


def failed(certificate: Certificate) -> set[str]:
    return {c.name.strip() for c in certificate.checks if not c.passed}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_its_ops_in_any_batch(name: str, dtype: torch.dtype, kind: str) -> None:
    model = build(name).to(dtype)
    decoder = decoder_of(model, weights=kind)
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
    reference = prefill(decoder_of(model, weights=kind, backend="reference"), rows)
    scale = float(reference.abs().max())
    # An activation that lies between two integers may be rounded to either: a step of one in a few dozen.
    bound = 0.06 if dtype == torch.bfloat16 else (1e-5 if kind == "int8" else 0.02)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_certificate(dtype: torch.dtype, kind: str) -> None:
    certificate = verify(lora(build("llama").to(dtype)), max_new_tokens=4, rollout_weights=kind)
    assert certificate.passed, str(certificate)
    assert certificate.facts["weights"] == kind
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
