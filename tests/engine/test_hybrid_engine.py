"""The hybrid engine: log-probs and gradients of a rollout, steps that the next rollout sees, references, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import dschat_kernels as dk
from dschat import HybridEngine, Rollout, SamplingConfig
from dschat.engine import PackedModel, pack_rows, sequence_hidden
from dschat.engine.hybrid_engine import greedy
from dschat_kernels.models.spec import Unsupported
from tests.engine.test_rollout import PROMPTS, left
from tests.test_packing import lora
from tests.tiny_models import build

SAMPLING = SamplingConfig(
    max_new_tokens=10, temperature=0.7, n=2, eos_token_id=[7, 21, 40], pad_token_id=7, seed=2
)
DTYPES = (torch.float32, torch.bfloat16)


def rollout_of(
    model: Any, sampling: SamplingConfig = SAMPLING, **options: Any
) -> tuple[HybridEngine, Rollout]:
    engine = HybridEngine(model, **options)
    return engine, engine.generate(*left(PROMPTS), sampling)


def hf_distribution(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """log softmax [rows, C, vocab] of HF in float64 for every completion token, row by row without padding."""
    wide = copy.deepcopy(model).double()
    rows = []
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        with torch.no_grad():
            logits = wide(torch.cat([prompt, rollout.completion_ids[i]])[None]).logits[
                0, len(prompt) - 1 : -1
            ]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
def test_logprobs_entropy_and_gap_are_hf_at_the_temperature(name: str, exact: bool) -> None:
    model = build(name)
    engine, rollout = rollout_of(model, exact=exact)
    mask = rollout.completion_mask
    assert not mask.all() and mask.sum(1).max() > mask.sum(1).min()
    for temperature in (None, 1.0, 1.9):
        logp, entropy, gap = engine.logprobs(rollout, temperature=temperature, entropy=True, gap=True)
        every = hf_distribution(model, rollout, temperature or 0.7)
        expected = every.gather(2, rollout.completion_ids[..., None])[..., 0]
        torch.testing.assert_close(logp[mask].double(), expected[mask], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            entropy[mask].double(), -(every.exp() * every).sum(-1)[mask], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            gap[mask].double(), (every.amax(-1) - expected)[mask], rtol=1e-4, atol=1e-4
        )
        (alone,) = engine.logprobs(rollout, temperature=temperature, gap=True)[1:]
        assert torch.equal(alone, gap) and not gap.requires_grad
        assert logp.dtype == entropy.dtype == torch.float32 and logp.requires_grad and entropy.requires_grad
        assert (logp[~mask] == 0).all() and (entropy[~mask] == 0).all()
    torch.testing.assert_close(engine.logprobs(rollout)[mask], rollout.logprobs[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peft", [False, True])
def test_exact_logprobs_are_the_rollouts_and_the_first_ratio_is_one(peft: bool, dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    engine, rollout = rollout_of(lora(model) if peft else model, exact=True)
    logp = engine.logprobs(rollout)
    assert torch.equal(logp, rollout.logprobs)
    assert ((logp - rollout.logprobs).exp() == 1.0).all()
    assert torch.equal(engine.logprobs(rollout.select([3, 1])), rollout.logprobs[[3, 1]])
    zero = engine.generate(*left(PROMPTS), replace(SAMPLING, temperature=0.0))
    assert torch.equal(engine.logprobs(zero), zero.logprobs)


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_flow_and_a_step_reaches_the_next_rollout(exact: bool) -> None:
    peft = lora(build("llama"))
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    engine, rollout = rollout_of(peft, optimizer=optimizer, exact=exact)
    before = engine.logprobs(rollout)
    engine.backward(-before[0].sum())
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    expected = float(torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm())
    assert engine.step() == pytest.approx(expected, rel=1e-5)
    assert engine.epoch == 1 and all(p.grad is None for p in trained)
    after = engine.logprobs(rollout)
    assert after[0].sum() > before[0].sum()

    again = engine.generate(*left(PROMPTS), SAMPLING)
    fresh = HybridEngine(copy.deepcopy(peft)).generate(*left(PROMPTS), SAMPLING)
    assert torch.equal(again.completion_ids, fresh.completion_ids)
    assert torch.equal(again.logprobs, fresh.logprobs)
    assert not torch.equal(again.logprobs, rollout.logprobs)


def test_gradient_is_hf() -> None:
    model = build("qwen2")
    engine, rollout = rollout_of(model)
    engine.backward(engine.logprobs(rollout).sum())
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        tokens = rollout.completion_ids[i][rollout.completion_mask[i]]
        logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        logits.log_softmax(-1).gather(1, tokens[:, None]).sum().backward()
    for n, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(ours[n], p.grad, rtol=2e-3, atol=3e-4 * float(p.grad.abs().max()))


def test_clipping() -> None:
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, rollout = rollout_of(model, optimizer=optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine.backward(engine.logprobs(rollout).sum())
    norm = engine.step(max_grad_norm=0.5)
    moved = torch.stack([(p.detach() - before[n]).norm() for n, p in model.named_parameters()]).norm()
    assert norm > 0.5 and float(moved) == pytest.approx(0.5, rel=1e-3)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"max_grad_norm is {bad}: give a number above 0, or None"):
            engine.step(max_grad_norm=bad)
    assert engine.epoch == 1


@pytest.mark.parametrize("exact", [False, True])
def test_reference_is_the_model_without_adapters(exact: bool) -> None:
    base = build("llama")
    engine, rollout = rollout_of(lora(copy.deepcopy(base)), exact=exact)
    plain = HybridEngine(base, exact=exact)
    policy = engine.logprobs(rollout)
    with engine.reference(), torch.no_grad():
        reference = engine.logprobs(rollout)
    assert torch.equal(reference, plain.logprobs(rollout).detach())
    assert not torch.equal(reference, policy)
    assert torch.equal(engine.logprobs(rollout), policy)
    with pytest.raises(RuntimeError, match="boom"), engine.reference():
        raise RuntimeError("boom")
    assert engine.exact is exact and torch.equal(engine.logprobs(rollout), policy)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to switch off"), plain.reference():
        pass


def test_rollout_in_another_dtype() -> None:
    """float32 training, bfloat16 rollouts; exact mode is refused."""
    engine, rollout = rollout_of(build("llama"), dtype=torch.bfloat16)
    assert engine.decoder.dtype == torch.bfloat16
    gap = (engine.logprobs(rollout) - rollout.logprobs).abs()
    assert 0 < float(gap.max()) < 1.0
    with pytest.raises(ValueError, match=r"dtype is torch.bfloat16 and the model torch.float32: exact mode"):
        HybridEngine(build("llama"), dtype=torch.bfloat16, exact=True)
    with pytest.raises(
        ValueError, match=r"runs in torch.bfloat16 and the model is torch.float32: exact mode"
    ):
        engine.logprobs(rollout, exact=True)


def test_padding_ids_and_what_follows_the_end_do_not_matter() -> None:
    engine, rollout = rollout_of(build("gpt2"))
    expected = engine.logprobs(rollout)
    prompts, completions = rollout.prompt_ids.clone(), rollout.completion_ids.clone()
    prompts[~rollout.prompt_mask] = 13
    completions[~rollout.completion_mask] = 66
    tampered = replace(rollout, prompt_ids=prompts, completion_ids=completions)
    assert torch.equal(engine.logprobs(tampered), expected)
    again = engine.generate(prompts[::2], rollout.prompt_mask[::2], SAMPLING)
    assert torch.equal(again.completion_ids, rollout.completion_ids)


def test_rows_without_completion() -> None:
    engine, rollout = rollout_of(build("llama"))
    mask = rollout.completion_mask.clone()
    mask[[0, 4]] = False
    part = engine.logprobs(replace(rollout, completion_mask=mask))
    full = engine.logprobs(rollout)
    assert (part[[0, 4]] == 0).all()
    keep = [1, 2, 3, 5, 6, 7, 8, 9]
    torch.testing.assert_close(part[keep], full[keep], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the rollout has no completion token"):
        engine.logprobs(replace(rollout, completion_mask=torch.zeros_like(mask)))
    holes = rollout.completion_mask.clone()
    holes[3] = torch.arange(holes.shape[1]) % 2 == 0
    with pytest.raises(ValueError, match="completion_mask of row 3 has tokens after a gap"):
        engine.logprobs(replace(rollout, completion_mask=holes))
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=f"temperature is {bad}: give a number above 0"):
            engine.logprobs(rollout, temperature=bad)


@pytest.mark.parametrize(
    ("name", "fields", "place"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, "attn_dropout"),
        ("llama", {"attention_dropout": 0.2}, "layers.0"),  # a functional dropout, no nn.Dropout
        ("opt", {"dropout": 0.1}, "layers.0"),
    ],
)
def test_active_dropout_gets_a_sentence(name: str, fields: dict[str, Any], place: str) -> None:
    model = build(name, **fields)
    engine, rollout = rollout_of(model)  # eval mode
    expected = engine.logprobs(rollout)
    model.train()
    with pytest.raises(
        ValueError, match=rf"dropout is active in .*{place}.* \(p = 0\.\d\): call model.eval\(\)"
    ):
        engine.logprobs(rollout)
    engine.generate(*left(PROMPTS), SAMPLING)  # rollouts never drop
    model.eval()
    assert torch.equal(engine.logprobs(rollout), expected)
    peft = lora(build("llama"), lora_dropout=0.3).train()
    with pytest.raises(ValueError, match=r"dropout is active in .*lora_dropout.* \(p = 0.3\)"):
        HybridEngine(peft).logprobs(rollout)
    assert HybridEngine(build("llama").train()).logprobs(rollout).requires_grad


def test_adapters_added_later_are_not_bypassed() -> None:
    model = build("llama")
    engine, rollout = rollout_of(model)
    peft = lora(model)
    fresh = HybridEngine(peft)
    assert torch.equal(engine.logprobs(rollout), fresh.logprobs(rollout))
    a, b = (e.generate(*left(PROMPTS), SAMPLING) for e in (engine, fresh))
    assert torch.equal(a.logprobs, b.logprobs) and not torch.equal(a.logprobs, rollout.logprobs)
    assert torch.equal(engine.logprobs(a, exact=True), a.logprobs)


def test_flip_memory_and_helpers() -> None:
    engine, rollout = rollout_of(build("llama"))
    assert engine.flip().changed == 0
    weights = sum(p.numel() * 4 for p in engine.model.parameters())
    memory = engine.memory()
    assert memory["weights"] == weights and weights / 2 < memory["packs"] < 2 * weights
    assert rollout.stats.packed_bytes == memory["packs"]
    assert rollout.stats.cache_bytes == memory["cache"] > 0
    engine.release()
    assert engine.memory() == memory | {"cache": 0}
    assert greedy(SAMPLING) == replace(SAMPLING, temperature=0.0, n=1)


@pytest.mark.parametrize("adapters", [False, True])
def test_packs_are_shared_with_a_patch(adapters: bool) -> None:
    """One decoder for both while the model changes under them; the rollouts are those without a patch."""
    model = lora(build("llama")) if adapters else build("llama")
    alone = HybridEngine(model).generate(*left(PROMPTS), SAMPLING)
    with dk.patch(model, strict=True) as patch:
        engine = HybridEngine(model)
        assert torch.equal(engine.generate(*left(PROMPTS), SAMPLING).logprobs, alone.logprobs)
        assert engine.decoder is patch.fused.decoder and patch.report().pack_bytes > 0
        with torch.no_grad():
            next(iter(engine.spec.layers[0].q.module.parameters())).mul_(1.5)
        prompt = torch.tensor([[5, 6, 7]])
        hf = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        greedily = engine.generate(prompt, None, SamplingConfig(max_new_tokens=4, temperature=0.0))
        assert torch.equal(hf[:, 3:], greedily.completion_ids)
        engine.model.get_output_embeddings().weight = nn.Parameter(torch.ones(67, 48))
        engine.spec.layers[1].module.mlp.act_fn = nn.GELU()
        engine.flip()
        assert engine.decoder is patch.fused.decoder and engine.decoder.spec.layers[1].activation == "gelu"
        others = (HybridEngine(model, dtype=torch.bfloat16), HybridEngine(model, rollout_weights="int8"),
                  HybridEngine(model, backend="reference"), HybridEngine(model, kv_cache="int8"))  # fmt: skip
        assert all(other.decoder is not patch.fused.decoder for other in others)
    changed = engine.generate(*left(PROMPTS), SAMPLING)
    assert not torch.equal(changed.logprobs, alone.logprobs)
    assert torch.equal(changed.logprobs, HybridEngine(model).generate(*left(PROMPTS), SAMPLING).logprobs)


def test_refusals() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="max_slots is 0: give at least 1 row"):
        HybridEngine(model, max_slots=0)
    wrapped = SimpleNamespace(module=model, zero_optimization=lambda: True)
    with pytest.raises(
        ValueError, match=r"is a DeepSpeed engine: give the model to dschat\.engine\.zero\.ZeroEngine"
    ):
        HybridEngine(wrapped)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no optimizer: give HybridEngine\(model, optimizer="):
        HybridEngine(model).step()
    with pytest.raises(Unsupported, match=r"Linear is no transformers model"):
        HybridEngine(nn.Linear(2, 2))
    mamba = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(Unsupported, match=r"MambaModel .* is built in a way that no adapter covers"):
        HybridEngine(transformers.AutoModelForCausalLM.from_config(mamba))
    with pytest.raises(Unsupported, match=r"the model's dtype is torch.float16: the fused decoder runs"):
        HybridEngine(build("llama").half())
    with pytest.raises(Unsupported, match="LlamaModel has no language head: generation needs a causal"):
        HybridEngine(build("llama", auto=transformers.AutoModel))


# ------------------------------------------------------------------------------------------ packed rows


def test_hidden_states_of_a_trunk_are_hf() -> None:
    model = build("llama", auto=transformers.AutoModel)
    ids, mask = left(PROMPTS, extra=2)
    hidden, rows = sequence_hidden(model, ids, mask)
    assert len(hidden) == int(mask.sum()) and rows.shape == tuple(ids.shape)
    index = rows.index()
    assert (index[~mask] == -1).all() and torch.equal(rows.ids[index[mask]], ids[mask])
    for i, prompt in enumerate(PROMPTS):
        hf = model(torch.tensor([prompt])).last_hidden_state[0]
        torch.testing.assert_close(hidden[index[i][mask[i]]], hf, rtol=1e-4, atol=1e-4)
    assert torch.equal(sequence_hidden(PackedModel(model), ids, mask)[0], hidden)
    with pytest.raises(ValueError, match="LlamaModel has no language head: log-probs need a causal"):
        PackedModel(model).head_weight()
    with pytest.raises(ValueError, match="row 0 of the batch has no token"):
        pack_rows(ids, torch.zeros_like(mask))
