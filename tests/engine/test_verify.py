"""The certificate: it holds for good models, and every one of its checks fails on a model that is broken in its way."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dschat.engine import hybrid_engine, rollout
from dschat.engine import verify as module
from dschat.engine.verify import Certificate, Check, first_divergence, verify
from dschat_kernels import plan
from dschat_kernels.packing import PackedLinear
from tests.test_packing import lora
from tests.tiny_models import MECHANISMS, build, stories

NEW = 4


def failed(certificate: Certificate) -> set[str]:
    return {c.name.strip() for c in certificate.checks if not c.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MECHANISMS)
def test_good_models_pass(name: str, dtype: torch.dtype) -> None:
    certificate = verify(build(name).to(dtype), max_new_tokens=NEW)
    assert certificate.passed, str(certificate)
    assert certificate.diverges == "" and len(certificate.checks) >= 12
    assert "certificate: the fused model is the model" in str(certificate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_passes_and_the_model_is_left_unchanged(dtype: torch.dtype) -> None:
    peft = lora(build("llama").to(dtype))
    peft.train()
    peft.base_model.model.model.layers[1].eval()
    training = [m.training for m in peft.modules()]
    before = {n: t.clone() for n, t in peft.state_dict().items()}
    certificate = verify(peft, max_new_tokens=NEW)
    assert certificate.passed, str(certificate)
    assert certificate.facts["LoRA layers"] == 21
    assert [m.training for m in peft.modules()] == training
    assert all(torch.equal(t, before[n]) for n, t in peft.state_dict().items())
    assert all(p.grad is None for p in peft.parameters())


def test_reference_backend_and_own_prompts() -> None:
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7])]
    certificate = verify(stories(), prompts=prompts, max_new_tokens=NEW, backend="reference")
    assert certificate.facts["backend"] == "reference"
    assert not {n for n in failed(certificate) if "(bits)" not in n}, str(certificate)


def test_round_trip_and_text() -> None:
    certificate = verify(build("gpt2"), max_new_tokens=NEW)
    data = json.loads(certificate.to_json())
    assert data == certificate.to_dict()
    checks = [Check(*(c[k] for k in ("name", "value", "bound", "note"))) for c in data["checks"]]
    assert Certificate(data["facts"], checks, data["diverges"]).to_json() == certificate.to_json()
    assert not Certificate({}).passed
    assert not Check("not a number", float("nan"), 1.0).passed
    certificate.checks.append(Check("wrong", 2.0, 1.0))
    assert "FAIL wrong" in str(certificate) and "NOT the same model" in str(certificate)
    with pytest.raises(
        ValueError, match=r"there is no prompt to verify with \(max_new_tokens 4, context 128\)"
    ):
        verify(build("gpt2"), prompts=[], max_new_tokens=NEW)


# ------------------------------------------------------------------------------------- every check can fail


def broken(
    monkeypatch: pytest.MonkeyPatch, model: Any, owner: Any, name: str, replacement: Any
) -> Certificate:
    monkeypatch.setattr(owner, name, replacement)
    certificate = verify(model, max_new_tokens=NEW)
    assert not certificate.passed, str(certificate)
    return certificate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pack", ["layers.1.qkv", "layers.2.gate_up", "layers.0.o", "lm_head"])
def test_a_damaged_pack_is_named(pack: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Any) -> Any:
        stats = refresh(self)
        if stats.changed and self.backend == "cpu":
            self.packed(pack).panels[:64] += 1
        return stats

    refresh = plan.Decoder.refresh
    certificate = broken(monkeypatch, build("llama").to(dtype), plan.Decoder, "refresh", damaged)
    assert certificate.diverges.startswith(f"linear {pack}: error"), certificate.diverges
    assert "logits, max error against HF in float64" in failed(certificate) or dtype == torch.bfloat16


def test_a_broken_native_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is in what the native plan does, where the ops called from Python are right."""

    def wrong(self: Any, p: Any, c: Any, index: Any) -> None:
        if c.op == "attention" and c.layer == 1:
            p.attention(index[c.input], index[c.out], c.layer, 2.0, 0, 0.0, 0)
        elif c.op == "norm" and c.weights == "layers.2.mlp_norm":
            n = self.decoder.norms[c.weights]
            p.norm(True, index[c.input], index[c.out], n.scale.data_ptr(), 0, n.width, 0.5, 0)
        else:
            add(self, p, c, index)

    add = plan.NativeExecutor._add
    certificate = broken(monkeypatch, build("llama"), plan.NativeExecutor, "_add", wrong)
    assert certificate.diverges.startswith("attention of layer 1: error"), certificate.diverges
    assert failed(certificate) >= {
        "logits, max error against HF in float64",
        "logits, mean error",
        "greedy rows that differ from HF's",
        "greedy tokens, HF's logit gap where they part",
        "rollout against training log-probs, max |d|",
        "mean |d|",
        "mean exp|d|",
        "share of ratios outside [0.9, 1.1]",
        "rollout against training log-probs, exact mode (bits)",
    }


def test_a_wrong_rotary_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, positions: int) -> Any:
        tables = rope_tables(self, positions)
        if self.backend == "cpu":
            tables[0][0][3] = 0.0
        return tables

    rope_tables = plan.Decoder.rope_tables
    certificate = broken(monkeypatch, build("qwen2"), plan.Decoder, "rope_tables", wrong)
    assert certificate.diverges.startswith("rope_append of layer 0: error"), certificate.diverges


def test_rows_that_feel_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, t: Any, cache: Any) -> torch.Tensor:
        return run(self, t, cache) + (1e-6 if len(t.slots) > 1 else 0.0)

    run = plan.NativeExecutor.run
    certificate = broken(monkeypatch, build("llama"), plan.NativeExecutor, "run", wrong)
    assert failed(certificate) >= {
        "batch 1 against batch N, logits (bits)",
        "sampled alone against sampled in a batch (bits)",
    }
    assert certificate.diverges == "none, every op of a step agrees with its reference"


def test_rows_that_feel_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        rows = pack_rows(ids, mask)
        rows.ids[0] = (rows.ids[0] + ids.shape[1]) % 67
        return rows

    pack_rows = hybrid_engine.pack_rows
    certificate = broken(monkeypatch, build("llama"), hybrid_engine, "pack_rows", wrong)
    assert "padded against unpadded, tokens and log-probs (bits)" in failed(certificate)


def test_a_decode_that_is_not_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, t: Any, cache: Any) -> torch.Tensor:
        return run(self, t, cache) + (1e-6 if len(t.token_ids) == 1 and t.positions[0] > 0 else 0.0)

    run = plan.NativeExecutor.run
    certificate = broken(monkeypatch, build("llama"), plan.NativeExecutor, "run", wrong)
    assert "decode against prefill, logits (bits)" in failed(certificate)


def test_logprobs_at_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: torch.Tensor, **options: Any) -> Any:
        tokens, logprobs = sample(logits, **options)
        return tokens, logprobs * 0.7

    sample = rollout.sample
    certificate = broken(monkeypatch, build("llama"), rollout, "sample", wrong)
    assert failed(certificate) >= {"mean |d|", "rollout against training log-probs, exact mode (bits)"}
    assert "logits, mean error" not in failed(certificate)


def test_a_pack_that_forgets_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, parts: Any) -> None:
        fill(self, [type(p)(p.weight, p.bias, ()) for p in parts])

    fill = PackedLinear.fill
    certificate = broken(monkeypatch, lora(build("llama")), PackedLinear, "fill", wrong)
    assert "logits, mean error" in failed(certificate)


def test_the_search_leaves_the_engine_alone() -> None:
    engine = hybrid_engine.HybridEngine(build("gpt2"))
    engine.flip()
    executor = engine.decoder.executor
    assert first_divergence(engine, torch.arange(9)) == ""
    assert engine.decoder.executor is executor
    assert module.ROUNDING[torch.bfloat16] == torch.finfo(torch.bfloat16).eps / 2
