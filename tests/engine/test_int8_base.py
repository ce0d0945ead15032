"""A frozen base held as int8 under LoRA: its products, its packs, its gradients, its rollouts, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig
from dschat_kernels.int8 import Int8Linear, fuse_linears, quantise_linears
from dschat_kernels.quantise import quantise
from tests.helpers import assert_close_to_fp64
from tests.tiny_models import build

SAMPLING = SamplingConfig(max_new_tokens=8, seed=3)
DTYPES = (torch.float32, torch.bfloat16)


def adapted(name: str, dtype: torch.dtype, trained: bool = True) -> Any:
    """A tiny model with int8 linears and an adapter; trained: its B is not zero."""
    model = build(name).to(dtype).eval()
    assert quantise_linears(model, ("lm_head", "embed_out")) > 0
    targets = [n for n, m in model.named_modules() if isinstance(m, Int8Linear)]
    model = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=0.0)
    ).eval()
    for key, p in model.named_parameters():
        if "lora_B" in key and trained:
            nn.init.normal_(p, std=0.02)
    return model


def prompts(model: Any) -> torch.Tensor:
    high = model.get_input_embeddings().num_embeddings
    return torch.randint(3, high, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_layer_is_the_product_with_its_dequantised_weight(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = (nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)).to(dtype)
    held = Int8Linear(layer)
    dense = layer.weight.detach().t() if kind is Conv1D else layer.weight.detach()
    values, scales = quantise(dense.float())
    assert torch.equal(held.weight, values) and torch.equal(held.scales, scales)
    weight = (values.float() * scales[:, None]).to(dtype)
    error = (values.float() * scales[:, None] - dense.float()).abs()
    assert bool((error <= 0.5001 * scales[:, None]).all())
    x = torch.randn(2, 3, 24).to(dtype).requires_grad_()
    y = held(x)
    assert torch.equal(y, nn.functional.linear(x, weight, layer.bias))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_close_to_fp64(dx, dy.double() @ weight.double(), dy @ weight)
    back = held.plain(weight)
    assert type(back) is kind and torch.equal(Int8Linear(back).weight, values)
    assert torch.allclose(back(x.float().to(dtype)).float(), y.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "bloom"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rollouts_hold_the_dequantised_weight_with_lora_fused(name: str, dtype: torch.dtype) -> None:
    """Packs round scale * Q + s B A once; log-probs of rollout and training are as near as those of a plain model, and
    equal in exact mode. The training forward is Hugging Face's on the same modules."""
    model = adapted(name, dtype)
    engine = HybridEngine(model)
    ids = prompts(model)
    rollout = engine.generate(ids, None, SAMPLING)
    pack = engine.decoder.packed("layers.0.o")
    part = engine.decoder.groups["layers.0.o"].resolve("layers.0.o")[0]
    assert part.scales is not None and len(part.updates) == 1
    update = part.updates[0]
    whole = part.weight.float() * part.scales[:, None] + update.scale * (update.b @ update.a)
    assert torch.allclose(pack.to_dense(), whole.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.no_grad():
        logp = engine.logprobs(rollout)
        gap = float((logp - rollout.logprobs).abs().max())
        assert gap < (2e-4 if dtype == torch.float32 else 0.25)
        logits = model(rollout.input_ids).logits[:, 6:-1].float().log_softmax(-1)
        hf = logits.gather(-1, rollout.completion_ids[..., None])[..., 0] * rollout.completion_mask
        assert float((hf - logp).abs().max()) < (2e-4 if dtype == torch.float32 else 0.25)
    exact = HybridEngine(model, exact=True)
    rollout = exact.generate(ids, None, SAMPLING)
    logp = exact.logprobs(rollout)
    assert torch.equal(logp.detach(), rollout.logprobs)
    logp.sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert grads and all(g is not None and bool(g.isfinite().all()) for g in grads)


def test_gradients_of_the_adapter_are_those_of_the_dense_base() -> None:
    """float32: the same model with round(scale * Q) in plain layers."""
    model = adapted("llama", torch.float32)
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if isinstance(getattr(module, "base_layer", None), Int8Linear):
            module.base_layer = module.base_layer.plain(module.base_layer.dense(torch.float32))
    engines = [HybridEngine(m) for m in (model, plain)]
    rollout = engines[0].generate(prompts(model), None, SAMPLING)
    for engine in engines:
        engine.logprobs(rollout).sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if "lora_" in name:
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


def test_int8_packs_of_an_int8_base_are_its_integers() -> None:
    """While B is 0 quantising again changes nothing; the flip sees a change of the adapter."""
    model = adapted("llama", torch.float32, trained=False)
    engine = HybridEngine(model, rollout_weights="int8")
    engine.flip()
    base = model.base_model.model.model.layers[0].self_attn.o_proj.base_layer
    pack = engine.decoder.packed("layers.0.o")
    assert torch.equal(pack.stored(), base.weight)
    assert torch.allclose(pack.plain_scales(), base.scales, rtol=1e-6)
    assert engine.flip().changed == 0
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.o_proj.lora_B["default"].weight, std=0.5)
    assert engine.flip().changed == 1
    assert not torch.equal(engine.decoder.packed("layers.0.o").stored(), base.weight)


def test_memory_is_what_the_integers_take() -> None:
    whole, held = build("llama").float(), build("llama").float()
    linear = sum(
        m.weight.numel() for n, m in whole.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    quantise_linears(held, ("lm_head",))
    before, after = (HybridEngine(m).memory()["weights"] for m in (whole, held))
    assert before - after == 3 * linear


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_and_unloaded_it_is_a_plain_model(name: str, tmp_path: Any) -> None:
    """What is saved: weights that the packs hold, in the layers that from_pretrained expects."""
    model = adapted(name, torch.bfloat16)
    engine = HybridEngine(model)
    engine.flip()
    down = [engine.decoder.packed(f"layers.{i}.down").to_dense() for i in range(2)]
    fuse_linears(model)
    plain = model.unload()
    assert not any(isinstance(m, Int8Linear) for m in plain.modules())
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path, dtype=torch.bfloat16)
    after = HybridEngine(loaded)
    after.flip()
    assert all(
        torch.equal(after.decoder.packed(f"layers.{i}.down").to_dense(), w) for i, w in enumerate(down)
    )


def test_a_patched_model_generates_hugging_faces_tokens() -> None:
    model = adapted("llama", torch.float32)
    ids = prompts(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    with dk.patch(model, strict=True) as patch:
        assert "transformers" not in patch.report().decoder
        assert torch.equal(
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), plain
        )
