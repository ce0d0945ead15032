"""The certificate: it holds for good models, and every one of its checks fails on a model that is broken in its way."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch

import dschat
import dschat_kernels as dk
from dschat.engine import hybrid_engine, packed, rollout
from dschat.engine import verify as module
from dschat.engine.verify import Certificate, Check, first_divergence, verify
from dschat_kernels import executors, plan
from dschat_kernels.hf_cache import PagedDynamicCache
from dschat_kernels.hf_generate import FusedForward
from dschat_kernels.packing import PackedLinear
from dschat_kernels.patch import Patch
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
    assert "LoRA fused against unfused, logits" in {c.name for c in certificate.checks}
    assert [m.training for m in peft.modules()] == training
    assert all(torch.equal(t, before[n]) for n, t in peft.state_dict().items())
    assert all(p.grad is None for p in peft.parameters())


def test_reference_backend_and_own_prompts() -> None:
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7])]
    certificate = verify(stories(), prompts=prompts, max_new_tokens=NEW, backend="reference")
    assert certificate.facts["backend"] == "reference"
    assert certificate.passed and not [c for c in certificate.checks if "(bits)" in c.name], str(certificate)


def test_deep_runs_every_backend_and_longer_prompts() -> None:
    certificate = verify(build("qwen3"), max_new_tokens=NEW, deep=True)
    assert certificate.passed and [c.facts["backend"] for c in (certificate, *certificate.others)] == [
        "cpu",
        "reference",
    ]
    assert str(certificate).count("certificate: the fused model is the model") == 2
    assert certificate.to_dict()["others"][0]["facts"]["backend"] == "reference"
    certificate.others[0].checks.append(Check("wrong", 2.0, 1.0))
    assert not certificate.passed


def test_deep_on_a_gpu_runs_the_gpus_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(op: str, backend: str, weight: Any) -> str:
        asked.append(backend)
        if backend == "cuda":
            raise RuntimeError("there is no nvcc")
        return backend

    monkeypatch.setattr(module, "resolve_backend", resolve)
    weight = SimpleNamespace(device=torch.device("cuda"))
    model: Any = SimpleNamespace(parameters=lambda: iter([weight]))
    assert module._backends(model) == ["triton", "reference"]
    assert asked == ["cuda", "triton", "reference"]


def test_of_a_patched_model_a_copy_is_certified() -> None:
    """Its own forward is the fused one: compared with itself, anything would pass."""
    model = build("llama")
    with dk.patch(model) as patch:
        certificate = dschat.verify(model, max_new_tokens=NEW)
        assert certificate.passed and patch.active
        assert "forwards of the patched model left to transformers" in {c.name for c in certificate.checks}


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

    add = executors.NativeExecutor._add
    certificate = broken(monkeypatch, build("llama"), executors.NativeExecutor, "_add", wrong)
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
    def wrong(self: Any, t: Any, cache: Any, keep: bool = True) -> torch.Tensor:
        return run(self, t, cache, keep) + (1e-6 if len(t.slots) > 1 else 0.0)

    def wrong_decode(self: Any, t: Any, *given: Any) -> Any:
        drawn = decode(self, t, *given)
        return replace(drawn, log_probs=drawn.log_probs + (1e-6 if len(t.slots) > 1 else 0.0))

    run, decode = executors.NativeExecutor.run, executors.NativeExecutor.decode
    monkeypatch.setattr(executors.NativeExecutor, "decode", wrong_decode)
    certificate = broken(monkeypatch, build("llama"), executors.NativeExecutor, "run", wrong)
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
    def wrong(self: Any, t: Any, cache: Any, keep: bool = True) -> torch.Tensor:
        return run(self, t, cache, keep) + (1e-6 if len(t.token_ids) == 1 and t.positions[0] > 0 else 0.0)

    run = executors.NativeExecutor.run
    certificate = broken(monkeypatch, build("llama"), executors.NativeExecutor, "run", wrong)
    assert "decode against prefill, logits (bits)" in failed(certificate)


def test_logprobs_at_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, *given: Any, **named: Any) -> Any:
        drawn = decode(self, *given, **named)
        return replace(drawn, log_probs=drawn.log_probs * 0.7)

    decode = plan.Decoder.decode
    certificate = broken(monkeypatch, build("llama"), plan.Decoder, "decode", wrong)
    assert failed(certificate) >= {"mean |d|", "rollout against training log-probs, exact mode (bits)"}
    assert "logits, mean error" not in failed(certificate)


def test_a_pack_that_forgets_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, parts: Any) -> None:
        fill(self, [type(p)(p.weight, p.bias, ()) for p in parts])

    fill = PackedLinear.fill
    certificate = broken(monkeypatch, lora(build("llama")), PackedLinear, "fill", wrong)
    assert failed(certificate) >= {"logits, mean error", "LoRA fused against unfused, logits"}


@pytest.mark.parametrize("forgotten", ["temperature", "top_k"])
def test_sampling_that_forgets_a_setting(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**settings: Any) -> Any:
        return replace(executors.Draw(**settings), **{forgotten: {"temperature": 1.0, "top_k": 0}[forgotten]})

    certificate = broken(monkeypatch, build("llama"), rollout, "Draw", wrong)
    assert "sampling statistics, temperature 0.7, top_k 8" in failed(certificate)
    assert "sampling statistics" not in failed(certificate)


def test_samples_that_feel_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(prompts: Any, n: int) -> Any:
        return streams(prompts, n) + n

    streams = rollout.row_streams
    certificate = broken(monkeypatch, build("llama"), rollout, "row_streams", wrong)
    assert failed(certificate) == {"first of 3 samples of a prompt against a single one (bits)"}


def test_beams_that_are_not_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, rows: Any) -> None: ...

    certificate = broken(monkeypatch, build("llama"), PagedDynamicCache, "reorder_cache", wrong)
    assert failed(certificate) == {"beams, score of the best against HF's", "beams that differ from HF's"}


def test_a_patched_forward_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, *arguments: Any) -> torch.Tensor:
        return step(self, *arguments) + 1e-6

    step = FusedForward._step
    certificate = broken(monkeypatch, build("llama"), FusedForward, "_step", wrong)
    assert "patched forward against the engine's, logits (bits)" in failed(certificate)


def test_an_undo_that_leaves_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any) -> None:
        self.model.lm_head.forgotten = 1
        restore(self)

    restore = Patch._restore
    certificate = broken(monkeypatch, build("llama"), Patch, "_restore", wrong)
    assert failed(certificate) == {"undo leaves no trace, modules and logits changed"}


def test_a_model_that_transformers_runs_itself() -> None:
    model = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    certificate = verify(model, max_new_tokens=NEW)
    (row,) = (c for c in certificate.checks if c.name.startswith("forwards of the patched model"))
    assert not row.passed and "model.layers.1.mlp has a forward hook" in row.note
    assert certificate.diverges.startswith("output of model.layers.1, although every op agrees")


@pytest.mark.parametrize("name", ["llama", "opt-350m", "gemma2"])
def test_a_wrong_adapter_is_named_by_its_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op does what the spec says, and the spec says another scale than the model."""

    def wrong(model: Any) -> Any:
        spec = decoder_spec(model)
        layers = (*spec.layers[:1], replace(spec.layers[1], scale=0.9), *spec.layers[2:])
        return replace(spec, layers=layers)

    decoder_spec = packed.decoder_spec
    certificate = broken(monkeypatch, build(name), packed, "decoder_spec", wrong)
    layer = decoder_spec(build(name)).layers[1].name
    assert certificate.diverges.startswith(f"output of {layer}, although every op agrees with its reference")


def test_chi_square() -> None:
    """Against its exact tail: the deviate of the true distribution is small, of a slightly wrong one it is not."""
    p = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0], dtype=torch.float64)
    drawn = torch.multinomial(p, 2000, replacement=True, generator=torch.Generator().manual_seed(1))
    statistic = ((torch.bincount(drawn, minlength=4) - 2000 * p[:4]) ** 2 / (2000 * p[:4])).sum()
    tail = scipy.stats.chi2.sf(float(statistic), 3)
    assert module.chi_square(drawn, p) == pytest.approx(scipy.stats.norm.isf(tail), abs=0.05)
    assert module.chi_square(drawn, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).double()) > 5
    assert module.chi_square(drawn, torch.tensor([0.6, 0.2, 0.2, 0.0, 0.0]).double()) == float("inf")
    assert module.chi_square(torch.zeros(9).long(), torch.tensor([1.0, 0.0]).double()) == 0.0


def test_the_search_leaves_the_engine_alone() -> None:
    engine = hybrid_engine.HybridEngine(build("gpt2"))
    engine.flip()
    executor = engine.decoder.executor
    assert first_divergence(engine, torch.arange(9)) == ""
    assert engine.decoder.executor is executor
    assert module.ROUNDING[torch.bfloat16] == torch.finfo(torch.bfloat16).eps / 2
