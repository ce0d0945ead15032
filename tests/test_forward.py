"""The packed training forward: HF's gradients without padding, and in exact mode the rollout's bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dschat.engine.packed import PackedModel, pack_rows
from dschat_kernels import forward
from dschat_kernels.forward import exact_linear, exact_weight, packed_hidden
from dschat_kernels.models import decoder_spec
from dschat_kernels.ops.sample import sample
from dschat_kernels.packing import LoraUpdate, PackedLinear, ResolvedLinear
from dschat_kernels.plan import Decoder
from tests.helpers import assert_close_to_fp64
from tests.test_packing import lora
from tests.tiny_models import MECHANISMS, build, stories

NAMES = MECHANISMS


def batch(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids with rubbish in the padding, and the mask."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocab, (3, 19), generator=generator)
    lengths = torch.tensor([19, 4, 11])
    return ids, torch.arange(19)[None] >= 19 - lengths[:, None]


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A loss that every logit matters to."""
    return F.cross_entropy(logits.float(), ids, reduction="sum") / 10 + logits.float().square().mean()


def hf_gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    arguments = {"attention_mask": mask.long(), "use_cache": False}
    if model.config.model_type not in ("opt", "bloom"):
        arguments["position_ids"] = positions
    logits = model(ids, **arguments).logits[mask]
    return gradients(model, loss_of(logits, ids[mask]))


def our_gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor, exact: bool) -> dict[str, torch.Tensor]:
    packed, rows = PackedModel(model), pack_rows(ids, mask)
    decoder = None
    if exact:
        decoder = Decoder(packed.spec)
        decoder.refresh()
    hidden = packed.hidden(rows, decoder)
    weight, bias = packed.head_weight(decoder)
    logits, cap = F.linear(hidden, weight, bias), packed.spec.logit_softcap
    return gradients(model, loss_of(logits if cap is None else cap * torch.tanh(logits / cap), rows.ids))


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 0
    largest = max(float(g.abs().max()) for g in theirs.values())  # some gradients are 0 but for rounding
    for name, grad in ours.items():
        atol = 2e-4 * float(theirs[name].abs().max()) + 1e-6 * largest
        torch.testing.assert_close(grad, theirs[name], rtol=2e-3, atol=atol, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_full_training_are_hf(name: str, exact: bool) -> None:
    model = build(name)
    ids, mask = batch(67)
    compare(our_gradients(model, ids, mask, exact), hf_gradients(model, ids, mask))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
def test_gradients_of_lora_are_hf(name: str, exact: bool) -> None:
    options: dict[str, Any] = (
        {"targets": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} if name == "gpt2" else {}
    )
    peft = lora(build(name), **options)
    ids, mask = batch(67)
    ours, theirs = our_gradients(peft, ids, mask, exact), hf_gradients(peft, ids, mask)
    assert all("lora_" in n for n in ours)
    compare(ours, theirs)


@pytest.mark.parametrize("exact", [False, True])
def test_lora_on_the_head(exact: bool) -> None:
    peft = lora(build("llama", tie_word_embeddings=False), targets=["lm_head", "q_proj"])
    ids, mask = batch(67)
    ours = our_gradients(peft, ids, mask, exact)
    assert any("lm_head" in n for n in ours)
    compare(ours, hf_gradients(peft, ids, mask))


@pytest.mark.parametrize("exact", [False, True])
def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    ids, mask = batch(67)
    plain = our_gradients(model, ids, mask, exact)
    calls: list[int] = []
    layer = forward._Walk.layer

    def counted(self: Any, i: int, *rest: Any) -> Any:
        calls.append(i)
        return layer(self, i, *rest)

    monkeypatch.setattr(forward._Walk, "layer", counted)
    model.gradient_checkpointing_enable()
    again = our_gradients(model, ids, mask, exact)
    assert calls[:3] == [0, 1, 2] and sorted(calls[3:]) == [0, 1, 2]  # once forward, once for the backward
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    calls.clear()
    with torch.no_grad():
        PackedModel(model).hidden(pack_rows(ids, mask))
    assert calls == [0, 1, 2]
    model.gradient_checkpointing_disable()
    calls.clear()
    our_gradients(model, ids, mask, exact)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "stories",
        "stories-lora",
        "head-lora",
        "gpt2-lora",
        "neox-lora",
        "bloom-lora",
        "falcon-new-lora",
        *MECHANISMS,
    ],
)
@torch.no_grad()
def test_exact_mode_has_the_bits_of_the_rollout(name: str, dtype: torch.dtype) -> None:
    if name.startswith("stories"):
        model = stories()
    elif name == "head-lora":
        model = build("llama", tie_word_embeddings=False)
    else:
        model = build(name.removesuffix("-lora"))
    model = model.to(dtype)
    if name.endswith("lora"):
        targets = ["lm_head", "q_proj", "down_proj"] if name == "head-lora" else "all-linear"
        fan = {"fan_in_fan_out": True} if name == "gpt2-lora" else {}
        model = lora(model, targets=targets, **fan)
    packed = PackedModel(model)
    decoder = Decoder(packed.spec)
    decoder.refresh()
    ids, mask = batch(packed.spec.vocab_size)
    rows = pack_rows(ids, mask)
    lens = rows.cu_seqlens.diff().tolist()
    logits = decoder.step(rows.ids, decoder.new_cache(3, 19), range(3), lens, "all")
    chosen, expected = sample(
        logits,
        temperature=0.7,
        seed=1,
        streams=torch.arange(len(logits)),
        positions=torch.zeros(len(logits)).long(),
    )

    select = torch.arange(len(logits))
    ours = packed.token_logprobs(rows, select, chosen, temperature=0.7, exact=decoder)
    assert torch.equal(ours, expected)
    loose = packed.token_logprobs(rows, select, chosen, temperature=0.7)
    assert float((loose - expected).abs().mean()) < (1e-4 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_gradient_of_exact_linear_against_float64(dtype: torch.dtype, gated: bool) -> None:
    """Every input's gradient is that of x (W + s B A)^T + b; the packed rounding is passed straight through."""
    torch.manual_seed(2)
    sizes = (24, 24) if gated else (24, 9)
    x = torch.randn(13, 40).to(dtype)
    names, leaves = ["x"], [x]
    for p, n in enumerate(sizes):
        names += [f"{part}{p}" for part in ("w", "bias", "a", "b")]
        leaves += [
            torch.randn(n, 40).to(dtype),
            torch.randn(n).to(dtype),
            torch.randn(3, 40),
            torch.randn(n, 3),
        ]
    dys = [torch.randn(13, n).to(dtype) for n in sizes]

    def formula(x: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        parts = [rest[4 * p : 4 * p + 4] for p in range(2)]
        return [x @ (w + (0.3 * (b @ a)).to(w.dtype)).t() + bias for w, bias, a, b in parts]

    def packed(x: torch.Tensor, *rest: torch.Tensor) -> Any:
        groups = [rest[4 * p : 4 * p + 4] for p in range(2)]
        parts = [ResolvedLinear(w, bias, (LoraUpdate(a, b, 0.3),)) for w, bias, a, b in groups]
        return exact_linear(x, PackedLinear.from_parts(parts, gated=gated), parts)

    def run(function: Any, wide: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = [(t.double() if wide else t).detach().clone().requires_grad_() for t in leaves]
        out = list(function(*own))
        torch.autograd.backward(out, [d.to(o.dtype) for d, o in zip(dys, out, strict=True)])
        return out, [t.grad for t in own if t.grad is not None]

    exact_out, exact = run(formula, True)
    torch_out, torch_own = run(formula, False)
    our_out, ours = run(packed, False)
    assert len(ours) == len(names)
    for a, e, t in zip(our_out + ours, exact_out + exact, torch_out + torch_own, strict=True):
        assert_close_to_fp64(a, e, t)


def test_gradient_of_exact_weight() -> None:
    w, a, b = torch.randn(9, 7), torch.randn(2, 7), torch.randn(9, 2)
    leaves = [t.requires_grad_() for t in (w, a, b)]
    part = ResolvedLinear(w, None, (LoraUpdate(a, b, 0.3),))
    packed = PackedLinear.from_parts([part])
    weight = exact_weight(packed, part)
    assert torch.equal(weight, packed.to_dense())
    d = torch.randn(9, 7)
    weight.backward(d)
    ours = [t.grad.clone() for t in leaves if t.grad is not None]
    exact = torch.autograd.grad(w + 0.3 * b @ a, leaves, d)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_weights_get_no_gradient() -> None:
    model = build("llama")
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    ids, mask = batch(67)
    for exact in (False, True):
        assert list(our_gradients(model, ids, mask, exact)) == ["model.layers.1.mlp.down_proj.weight"]


def test_bad_rows_get_a_sentence() -> None:
    spec = decoder_spec(build("gpt2"))
    ids, cu = torch.arange(6), torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"input_ids are torch.int32 of shape \(6,\): give int64"):
        packed_hidden(spec, ids.int(), cu)
    with pytest.raises(ValueError, match="input_ids run from 0 to 67: the vocabulary has 67"):
        packed_hidden(spec, torch.tensor([0, 67]), torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"cu_seqlens is torch.int64 of shape \(3,\): give int32"):
        packed_hidden(spec, ids, cu.long())
    for bounds in ([0, 5], [1, 6], [0, 7, 6]):
        with pytest.raises(ValueError, match="do not cut 6 tokens into rows: begin with 0"):
            packed_hidden(spec, ids, torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(
        ValueError, match="a row would reach 129 tokens and the model has 128 positions: shorten it"
    ):
        packed_hidden(spec, torch.zeros(129).long(), torch.tensor([0, 129], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="the decoder has no packs yet: call refresh"):
        packed_hidden(spec, ids, cu, exact=Decoder(spec))
    with pytest.raises(
        ValueError, match=r"runs in torch.bfloat16 and the model is torch.float32: exact mode"
    ):
        packed_hidden(spec, ids, cu, exact=Decoder(spec, dtype=torch.bfloat16))
    elsewhere = build("gpt2")
    spec = decoder_spec(elsewhere)
    elsewhere.to("meta")
    with pytest.raises(
        ValueError, match="input_ids are on cpu and the model on meta: move them to one device"
    ):
        packed_hidden(spec, ids, cu)
    part = ResolvedLinear(torch.randn(4, 3), None, ())
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 and the packed weight torch.float32"):
        exact_linear(torch.zeros(2, 3).bfloat16(), PackedLinear.from_parts([part]), [part])


def test_an_empty_row_between_others() -> None:
    spec = decoder_spec(build("llama"))
    ids = torch.arange(6)
    with torch.no_grad():
        a = packed_hidden(spec, ids, torch.tensor([0, 2, 2, 6], dtype=torch.int32))
        b = packed_hidden(spec, ids, torch.tensor([0, 2, 6], dtype=torch.int32))
    assert torch.equal(a, b)


def test_the_model_is_left_as_it_was() -> None:
    model = build("gpt2")
    before = copy.deepcopy(model.state_dict())
    ids, mask = batch(67)
    our_gradients(model, ids, mask, True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
