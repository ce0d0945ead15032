"""linear over int8 weights, and activations: what quantising may lose, products against float64, bits that depend on
nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dschat_kernels import linear, packing
from dschat_kernels.ops.bias_act import bias_act
from dschat_kernels.ops.gated_act import gated_act
from dschat_kernels.ops.linear import linear_reference, linear_sums
from dschat_kernels.packing import LoraUpdate, PackedLinear, ResolvedLinear, quantised_rows
from dschat_kernels.quantise import quantise
from tests.helpers import assert_close_to_fp64, native_threads

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["int8", "int8_dynamic"]


def part(n: int, k: int, dtype: torch.dtype, seed: int = 0, bias: bool = True) -> ResolvedLinear:
    """Rows of very different sizes, as trained matrices have them."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * torch.logspace(-3, 1, n)[:, None]
    return ResolvedLinear(w.to(dtype), torch.randn(n, generator=g).to(dtype) if bias else None, ())


def pack(
    *parts: ResolvedLinear, kind: str = "int8", gated: bool = False, dense: bool | None = None
) -> PackedLinear:
    return PackedLinear.from_parts(parts, gated=gated, weights=kind, dense=dense)


def inputs(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(9)).to(dtype)


@given(
    n=st.integers(1, 80),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_quantising_loses_half_a_step_at_most(
    n: int, k: int, dtype: torch.dtype, gated: bool, bias: bool, kind: str
) -> None:
    parts = [part(n, k, dtype, seed, bias) for seed in range(2)]
    packed = pack(*parts, kind=kind, gated=gated)
    weight = torch.cat([p.weight for p in parts]).double()
    scales = packed.plain_scales().double()
    torch.testing.assert_close(scales, weight.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert torch.equal(packed.stored().abs().amax(1), torch.full((2 * n,), 127, dtype=torch.int8))
    loss = (weight - scales[:, None] * packed.stored().double()).abs()
    assert bool((loss <= 0.5 * scales[:, None] * (1 + 1e-4)).all())
    torch.testing.assert_close(packed.to_dense(), weight.float(), rtol=0, atol=float(scales.max()))
    if bias:
        assert torch.equal(packed.plain_bias(), torch.cat([p.bias for p in parts]).float())
    dense = pack(*parts, gated=gated, dense=True)  # what the reference quantises to
    assert torch.equal(dense.stored(), packed.stored()) and torch.equal(dense.scales, packed.plain_scales())
    assert torch.equal(quantise(parts[0].weight.float())[0], packed.stored()[:n])


def test_dense_packs_are_quantised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part's rows, with its biases and its integers' scales; again in place."""
    parts = [
        part(23, 40, torch.float32),
        ResolvedLinear(*quantise(torch.randn(9, 40))[:1], None, (), torch.rand(9)),
    ]
    whole = pack(*parts, dense=True)
    monkeypatch.setattr(packing, "QUANTISE_PIECE", 200)  # five rows
    packed = pack(*parts, dense=True)
    assert torch.equal(packed.stored(), whole.stored()) and torch.equal(packed.scales, whole.scales)
    assert torch.equal(packed.bias, whole.bias)
    places = packed.dense.data_ptr(), packed.scales.data_ptr()
    packed.fill([ResolvedLinear(-2.0 * p.weight.float(), p.bias, (), p.scales) for p in parts])
    assert (packed.dense.data_ptr(), packed.scales.data_ptr()) == places
    assert torch.equal(packed.stored(), -whole.stored()) and torch.equal(packed.scales, 2.0 * whole.scales)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_is_fused_before_quantising(dtype: torch.dtype, dense: bool) -> None:
    base = part(50, 70, dtype)
    a, b = torch.randn(8, 70), torch.randn(50, 8)
    packed = pack(ResolvedLinear(base.weight, None, (LoraUpdate(a, b, 0.5),)), dense=dense)
    exact = base.weight.double() + 0.5 * b.double() @ a.double()
    torch.testing.assert_close(packed.scales[:50].double(), exact.abs().amax(1) / 127, rtol=1e-5, atol=0)
    step = exact.abs().amax(1, keepdim=True) / 127
    assert bool(((packed.to_dense().double() - exact).abs() <= 0.5 * step * (1 + 1e-3)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 11, 12, 13, 25, 64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 7), (33, 300), (257, 255)])
def test_against_float64_of_what_was_quantised(
    rows: int, n: int, k: int, dtype: torch.dtype, kind: str
) -> None:
    p, x = part(n, k, dtype), inputs(rows, k, dtype)
    packed = pack(p, kind=kind)
    y = linear(x, packed, backend="cpu")
    assert y.shape == (rows, n) and y.dtype == dtype
    q, scale = packed.stored(), packed.plain_scales()
    if kind == "int8_dynamic":
        values, scales = quantised_rows(x)
        wide = (values.double() * scales.double()[..., None]).flatten(1)[:, :k]
        torch.testing.assert_close(wide, x.double(), rtol=0, atol=0.02)  # half a step of groups up to 4
    else:
        wide = x.double()
    exact = (wide @ q.double().t()) * scale.double() + p.bias.double()
    own = ((wide.float() @ q.float().t()) * scale + p.bias.float()).to(dtype)
    if kind == "int8":
        own = (torch.nn.functional.linear(x, q.to(dtype)).float() * scale + p.bias.float()).to(dtype)
    assert_close_to_fp64(y, exact, own)
    assert_close_to_fp64(linear(x, pack(p, kind=kind, dense=True), backend="reference"), exact, own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 1501])
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_number_of_threads(
    dtype: torch.dtype, k: int, kind: str
) -> None:
    packed, x = pack(part(200, k, dtype), kind=kind), inputs(61, k, dtype)
    whole = linear(x, packed, backend="cpu")
    for count in (1, 2, 3):
        with native_threads(count):
            for begin, end in ((0, 1), (3, 5), (10, 23), (20, 61)):
                assert torch.equal(linear(x[begin:end], packed, backend="cpu"), whole[begin:end])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_epilogues_have_the_bits_of_separate_ops(dtype: torch.dtype, kind: str) -> None:
    parts = [part(83, 64, dtype, seed) for seed in range(2)]
    x, residual = inputs(9, 64, dtype), inputs(9, 83, dtype)
    one, pair = pack(parts[0], kind=kind), pack(*parts, kind=kind, gated=True)
    z, up = linear(x, one, backend="cpu"), linear(x, pack(parts[1], kind=kind), backend="cpu")
    fused = linear(x, one, activation="silu", residual=residual, backend="cpu")
    assert torch.equal(fused, residual + bias_act(z, None, "silu", backend="cpu"))
    gated = linear(x, pair, activation="silu", residual=residual, backend="cpu")
    assert torch.equal(gated, residual + gated_act(z, up, "silu", backend="cpu"))
    torch.testing.assert_close(
        gated, linear_reference(x, pair, activation="silu", residual=residual), rtol=2e-2, atol=1e-2
    )
    logits = linear(x, one, float_output=True, backend="cpu")
    assert logits.dtype == torch.float32 and torch.equal(logits.to(dtype), z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_zeros_subnormal_and_broken_ones(dense: bool, kind: str) -> None:
    w = torch.ones(6, 40)
    w[0] = 0.0
    w[1] = 1e-40
    w[2, 3] = torch.nan
    w[3, 39] = torch.inf
    w[4] = torch.finfo(torch.float32).max
    packed = pack(ResolvedLinear(w, None, ()), kind=kind, dense=dense)
    x = torch.ones(3, 40)
    x[1, 7], x[2] = torch.inf, 0.0
    one, broken, nothing = linear(x, packed, backend="reference" if dense else "cpu")
    assert one[0] == 0 and one[1] == 0 and one[2].isnan() and one[3].isnan() and one[4] == torch.inf
    assert abs(float(one[5]) - 40.0) < 1e-4
    assert not bool(broken[2:].isfinite().any()) and nothing[0] == 0 and nothing[5] == 0
    assert int(packed.stored()[:4].abs().max()) == 0


def test_half_the_bytes() -> None:
    p = part(96, 576, torch.bfloat16, bias=False)
    assert pack(p).nbytes < 0.51 * PackedLinear.from_parts([p]).nbytes


def test_opcheck() -> None:
    packed = pack(part(40, 16, torch.float32))
    torch.library.opcheck(
        torch.ops.dschat.linear_int8,
        (torch.randn(3, 16), packed.panels, 1, packed.scales, packed.bias, packed.n, packed.k, False, "relu",
         torch.randn(3, 40), False),
    )  # fmt: skip


def test_bad_input_is_named() -> None:
    packed = pack(part(8, 4, torch.float32))
    with pytest.raises(ValueError, match="weights is 'int4': give one of 'model', 'int8', 'int8_dynamic'"):
        PackedLinear([(4, 3)], torch.float32, weights="int4")
    with pytest.raises(TypeError, match="pack the weight in the dtype of x"):
        linear(torch.randn(2, 4, dtype=torch.bfloat16), packed)
    with pytest.raises(TypeError, match="holds int8 weights"):
        linear_sums(torch.randn(2, 4), packed)
