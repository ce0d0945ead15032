"""Packs: what a projection resolves to, the packed values, and the digest that decides what is repacked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat import HybridEngine, SamplingConfig
from dschat_kernels import packing
from dschat_kernels.models import decoder_spec
from dschat_kernels.models.spec import LinearSpec, Unsupported
from dschat_kernels.packing import WEIGHTS, PackedLinear, ResolvedLinear, digests, resolve_linear
from tests.tiny_models import build


def lora(model: Any, *, targets: Any = "all-linear", seed: int = 0, **options: Any) -> Any:
    """The model with random LoRA adapters (B is not zero)."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)).eval()
    randomise_lora(peft)
    return peft


def randomise_lora(peft: Any) -> None:
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape))


def merged_weight(layer: Any, adapters: list[str]) -> torch.Tensor:
    """PEFT's own idea of W + delta, [out, in]."""
    weight = layer.get_base_layer().weight.detach() + sum(layer.get_delta_weight(a) for a in adapters)
    return weight.t() if isinstance(layer.get_base_layer(), Conv1D) else weight


def resolved(part: ResolvedLinear) -> torch.Tensor:
    return packing.fused_weight(part, torch.float32)


# ------------------------------------------------------------------------------------------------- resolution


def test_plain_linear_and_conv1d() -> None:
    linear, conv = nn.Linear(5, 7), Conv1D(7, 5)
    assert resolve_linear(LinearSpec(linear)).weight.data_ptr() == linear.weight.data_ptr()
    part = resolve_linear(LinearSpec(conv, rows=(2, 6)))
    assert torch.equal(part.weight, conv.weight.t()[2:6])
    assert part.bias is not None and torch.equal(part.bias, conv.bias[2:6])
    assert not part.updates


def test_active_several_disabled_and_merged_adapters() -> None:
    peft = lora(build("llama"), targets=["q_proj"])
    peft.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    randomise_lora(peft)
    layer = peft.base_model.model.model.layers[0].self_attn.q_proj
    spec = LinearSpec(layer)
    plain = layer.get_base_layer().weight.detach().clone()

    torch.testing.assert_close(resolved(resolve_linear(spec)), merged_weight(layer, ["default"]))
    peft.base_model.set_adapter(["default", "other"])
    both = merged_weight(layer, ["default", "other"])
    assert len(resolve_linear(spec).updates) == 2
    torch.testing.assert_close(resolved(resolve_linear(spec)), both)
    with peft.disable_adapter():
        assert torch.equal(resolved(resolve_linear(spec)), plain)
    layer.merge()  # the base weight holds the updates now: they must not be counted twice
    assert not resolve_linear(spec).updates
    torch.testing.assert_close(resolved(resolve_linear(spec)), both)


def test_slices_of_fused_qkv_with_lora() -> None:
    peft = lora(build("gpt2"), targets=["c_attn"], fan_in_fan_out=True)
    layer = peft.base_model.model.transformer.h[1].attn.c_attn
    whole = merged_weight(layer, ["default"])
    described = decoder_spec(peft).layers[1]
    for spec, rows in ((described.q, (0, 48)), (described.k, (48, 96)), (described.v, (96, 144))):
        assert spec.rows == rows
        part = resolve_linear(spec)
        torch.testing.assert_close(resolved(part), whole[slice(*rows)])
        x = torch.randn(3, 48)
        torch.testing.assert_close(x @ resolved(part).t() + part.bias, layer(x)[:, slice(*rows)])


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_are_refused(options: dict[str, bool]) -> None:
    peft = lora(build("llama"), targets=["q_proj"], **options)
    layer = peft.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(
        Unsupported, match=r"layer 0 q uses DoRA.*merge it|layer 0 q has a LoRA bias.*lora_bias"
    ):
        resolve_linear(LinearSpec(layer), "layer 0 q")


def test_other_modules_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"head is a Bilinear: only nn\.Linear, Conv1D"):
        resolve_linear(LinearSpec(nn.Bilinear(2, 2, 2)), "head")


# ------------------------------------------------------------------------------------------------------ packs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_pack_holds_the_fused_weight_bit_for_bit(dtype: torch.dtype, transposed: bool) -> None:
    parts, expected = [], []
    for n in (33, 7, 64):
        weight = torch.randn(50, n, dtype=dtype).t() if transposed else torch.randn(n, 50, dtype=dtype)
        a, b = torch.randn(3, 50), torch.randn(n, 3)
        parts.append(ResolvedLinear(weight, torch.randn(n), (packing.LoraUpdate(a, b, 0.5),)))
        expected.append(weight.double() + 0.5 * (b.double() @ a.double()))
    packed = PackedLinear.from_parts(parts)
    dense, exact = packed.to_dense(), torch.cat(expected)
    # One rounding of a float32 sum: half a unit in the last place, and a little for the float32 sum.
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    assert ((dense.double() - exact).abs() <= unit * exact.abs() + 1e-6).all()
    bias = packed.plain_bias()
    assert bias is not None and torch.equal(bias, torch.cat([p.bias for p in parts if p.bias is not None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_without_updates_is_the_weight(dtype: torch.dtype) -> None:
    pair = [ResolvedLinear(torch.randn(37, 19, dtype=dtype), torch.randn(37), ()) for _ in range(2)]
    for gated in (False, True):
        packed = PackedLinear.from_parts(pair, gated=gated)
        assert torch.equal(packed.to_dense(), torch.cat([p.weight for p in pair]))
        assert torch.equal(packed.plain_bias(), torch.cat([p.bias for p in pair]))  # type: ignore[arg-type]


def test_refill_keeps_the_place() -> None:
    weight = torch.randn(40, 24)
    packed = PackedLinear.from_weight(weight)
    assert packed.panels is not None
    place = packed.panels.data_ptr()
    weight.mul_(-2)
    packed.fill([ResolvedLinear(weight, None, ())])
    assert packed.panels.data_ptr() == place
    assert torch.equal(packed.to_dense(), weight)


@given(
    shapes=st.sampled_from([[(64, 50)], [(1, 3)], [(16, 32), (48, 32), (5, 32)], [(33, 17)], [(576, 576)]]),
    dtypes=st.sampled_from([(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2]),
    weights=st.sampled_from(WEIGHTS),
    gated=st.booleans(),
    rank=st.sampled_from([0, 1, 8]),
)
def test_packing_gives_the_digests_of_the_weights(
    shapes: list[tuple[int, int]],
    dtypes: tuple[torch.dtype, torch.dtype],
    weights: str,
    gated: bool,
    rank: int,
) -> None:
    shapes = [shapes[-1]] * 2 if gated else shapes
    parts = []
    for n, k in shapes:
        updates = (packing.LoraUpdate(torch.randn(rank, k), torch.randn(n, rank), 0.5),) if rank else ()
        parts.append(ResolvedLinear(torch.randn(n, k).to(dtypes[0]), None, updates))
    packed = PackedLinear(shapes, dtypes[1], gated=gated, weights=weights)
    assert packed.fill(parts, digest=True) == digests([p.weight for p in parts])
    first = packed.to_dense()
    assert packed.fill(parts) == []
    assert torch.equal(packed.to_dense(), first)


def test_packing_gives_no_digests_of_what_it_does_not_read_row_by_row() -> None:
    uneven = [ResolvedLinear(torch.randn(n, 8), None, ()) for n in (17, 16)]
    transposed = [ResolvedLinear(torch.randn(8, 32).t(), None, ())]
    strided = [ResolvedLinear(torch.randn(32, 16)[:, :8], None, ())]
    half = [ResolvedLinear(torch.randn(32, 8).half(), None, ())]
    for parts in (uneven, transposed, strided, half):
        packed = PackedLinear([tuple(p.weight.shape) for p in parts], torch.float32)  # type: ignore[misc]
        assert packed.fill(parts, digest=True) == []
        assert torch.equal(packed.to_dense(), torch.cat([p.weight.float() for p in parts]))


def test_bad_parts_get_a_sentence() -> None:
    part = ResolvedLinear(torch.randn(4, 3), None, ())
    with pytest.raises(TypeError, match=r"cannot be packed as torch\.float16: use"):
        PackedLinear([(4, 3)], torch.float16)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 3\), \(4, 5\)\] cannot be packed together"):
        PackedLinear([(4, 3), (4, 5)], torch.float32)
    with pytest.raises(ValueError, match="gated: two alike"):
        PackedLinear([(4, 3)], torch.float32, gated=True)
    packed = PackedLinear.from_parts([part])
    for bad in (ResolvedLinear(torch.randn(5, 3), None, ()), ResolvedLinear(part.weight, torch.ones(4), ())):
        before = packed.to_dense()
        with pytest.raises(ValueError, match=r"the pack was made for shapes .* without bias.*make a new one"):
            packed.fill([bad])
        assert torch.equal(packed.to_dense(), before)
    two = PackedLinear.from_parts([part, part])
    with pytest.raises(TypeError, match=r"torch.bfloat16, torch.float32 cannot be packed together"):
        two.fill([part, ResolvedLinear(part.weight.bfloat16(), None, ())])
    with pytest.raises(TypeError, match=r"torch.float64 cannot be packed together"):
        packed.fill([ResolvedLinear(part.weight.double(), None, ())])


def test_a_thousand_flips_leave_the_base_alone() -> None:
    model = build("llama", num_hidden_layers=1).bfloat16()
    peft = lora(model)
    base = {n: p.detach().clone() for n, p in peft.named_parameters() if "lora_" not in n}
    engine = HybridEngine(peft)
    ids = torch.arange(3, 9)[None]
    adapters = [p for n, p in peft.named_parameters() if "lora_" in n]
    changed = 0
    for flip in range(1000):
        with torch.no_grad():
            adapters[flip % len(adapters)].add_(0.01 * (-1) ** flip)
        changed += engine.flip().changed > 0
        if flip % 250 == 0:
            engine.generate(ids, None, SamplingConfig(max_new_tokens=3, n=2, seed=flip))
    assert changed == 1000
    for name, p in peft.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p.view(torch.int16), base[name].view(torch.int16)), name


# ----------------------------------------------------------------------------------------------------- digest


def digest(tensor: torch.Tensor) -> int:
    return digests([tensor])[0]


@pytest.fixture(params=["native", "reference", "triton"])
def digest_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param != "native":
        monkeypatch.setattr(packing, "native", lambda: None)
    if request.param != "triton":
        yield digest
        return
    pytest.importorskip("triton")
    from tests.triton_kernels.interpreter import interpreter

    with interpreter():
        yield digest


def test_digest_of_triton_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.triton_kernels.interpreter import interpreter

    monkeypatch.setattr(packing, "native", lambda: None)
    for size in (1, 5, 4096, 131075):
        values = torch.randn(size)
        plain = digest(values)
        with interpreter():
            assert digest(values) == plain


SIZES = st.sampled_from([1, 2, 3, 5, 63, 64, 65, 129, 1023, 4097, 70001])


@given(size=SIZES, where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 2**32 - 1))
@example(size=1, where=0.0, flip=2**31)
@example(size=70001, where=0.999999, flip=0xFF02)  # two bytes of one word
def test_digest_sees_any_changed_word(digest_of: Any, size: int, where: float, flip: int) -> None:
    values = torch.randint(-(2**31), 2**31, (size,), dtype=torch.int64).to(torch.int32)
    before = digest_of(values.view(torch.float32))
    assert digest_of(values.clone().view(torch.float32)) == before
    values[int(where * size)] ^= flip - 2**32 if flip >= 2**31 else flip
    assert digest_of(values.view(torch.float32)) != before


@given(size=SIZES, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 15))
def test_digest_sees_any_changed_half_word(digest_of: Any, size: int, where: float, bit: int) -> None:
    """bfloat16, odd sizes included: the tail is not a whole word."""
    values = torch.randn(size).bfloat16()
    before = digest_of(values)
    words = values.view(torch.int16)
    words[int(where * size)] ^= (1 << bit) - (2**16 if bit == 15 else 0)
    assert digest_of(values) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digest_sees_changes_of_many_words(digest_of: Any, dtype: torch.dtype) -> None:
    """Changes with a pattern: all signs, a swap, a shift, zeros of either sign, one more element."""
    values = torch.randn(64, 64).to(dtype)
    others = [
        -values,
        values.flip(0),
        values.roll(1),
        values.roll(16),
        values.roll(64),
        values * 2,
        values[:-1],
    ]
    others += [torch.zeros(64, 64, dtype=dtype), -torch.zeros(64, 64, dtype=dtype)]
    swapped = values.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    digests = {digest_of(t) for t in [values, swapped, *others]}
    assert len(digests) == len(others) + 2


def test_digest_of_views(digest_of: Any) -> None:
    weight = torch.randn(12, 10)
    assert digest_of(weight.t()) == digest_of(weight)  # one memory
    assert digest_of(weight[:, 2:5]) != digest_of(weight[:, 3:6])
    part = weight.t()[3:7]
    before = digest_of(part)
    weight[4, 8] += 1  # outside the slice
    assert digest_of(part) == before
    weight[4, 5] += 1
    assert digest_of(part) != before


def test_copies_have_equal_digests() -> None:
    weight = torch.randn(30, 21)
    assert digest(copy.deepcopy(weight)) == digest(weight)
