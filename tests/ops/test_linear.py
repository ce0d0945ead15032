"""linear: against float64, bits that do not depend on batch, threads or fusion, packing and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dschat_kernels import linear
from dschat_kernels.ops._common import kernels
from dschat_kernels.ops.bias_act import bias_act
from dschat_kernels.ops.gated_act import gated_act
from dschat_kernels.ops.linear import linear_input_grad, linear_reference, linear_sums
from dschat_kernels.packing import LoraUpdate, PackedLinear, ResolvedLinear
from tests.helpers import assert_close_to_fp64, native_threads

DTYPES = [torch.float32, torch.bfloat16]


def make(
    n: int, k: int, dtype: torch.dtype, seed: int = 0, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, k, generator=g) / k**0.5).to(dtype)
    return w, torch.randn(n, generator=g).to(dtype) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 7, 11, 12, 13, 25, 64, 130])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 7), (33, 300), (96, 576), (257, 255)])
def test_against_float64(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    w, b = make(n, k, dtype)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear(x, PackedLinear.from_weight(w, b), backend="cpu")
    assert y.shape == (rows, n) and y.dtype == dtype
    assert_close_to_fp64(y, x.double() @ w.double().t() + b.double(), torch.nn.functional.linear(x, w, b))


@given(
    rows=st.integers(1, 40), n=st.integers(1, 80), k=st.integers(1, 200), dtype=st.sampled_from(DTYPES),
    gated=st.booleans(), threads=st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_transposed_panels_hold_the_same_matrix(
    rows: int, n: int, k: int, dtype: torch.dtype, gated: bool, threads: int
) -> None:
    parts = [ResolvedLinear(make(n + (0 if gated else s), k, dtype, s, False)[0], None, ()) for s in range(2)]
    packed = PackedLinear.from_parts(parts, gated=gated)
    grads = [torch.randn(rows, p.weight.shape[0]).to(dtype) for p in parts]
    with native_threads(threads):
        dx = linear_input_grad(grads, packed)
    dy, weight = torch.cat(grads, 1), torch.cat([p.weight for p in parts])
    assert torch.equal(dx, linear(dy, PackedLinear.from_weight(weight.t()), backend="cpu"))
    dense = PackedLinear.from_parts(parts, gated=gated, dense=True)
    assert_close_to_fp64(dx, dy.double() @ weight.double(), linear_input_grad(grads, dense))


@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 80),
    k=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_dense_is_the_inverse_of_packing(
    rows: int, n: int, k: int, dtype: torch.dtype, gated: bool, bias: bool
) -> None:
    parts = [ResolvedLinear(*make(n, k, dtype, s, bias), ()) for s in range(2)]
    packed = PackedLinear.from_parts(parts, gated=gated)
    assert torch.equal(packed.to_dense(), torch.cat([p.weight for p in parts]))
    if bias:
        assert torch.equal(packed.plain_bias(), torch.cat([p.bias for p in parts]).float())
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(3)).to(dtype)
    for part, y in zip(parts, linear_sums(x, packed), strict=True):
        alone = linear(x, PackedLinear.from_parts([part]), backend="cpu")
        assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 1500])
def test_a_row_has_the_same_bits_in_every_batch_and_on_any_number_of_threads(
    dtype: torch.dtype, k: int
) -> None:
    w, b = make(200, k, dtype)
    packed = PackedLinear.from_weight(w, b)
    x = torch.randn(77, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = linear(x, packed, backend="cpu")
    threads = kernels().num_threads()
    try:
        for count in (1, 2, 3):
            kernels().set_num_threads(count)
            for begin, end in ((0, 1), (3, 5), (10, 23), (40, 77)):
                assert torch.equal(linear(x[begin:end], packed, backend="cpu"), whole[begin:end])
    finally:
        kernels().set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_fused_epilogues_have_the_bits_of_separate_ops(dtype: torch.dtype, activation: str) -> None:
    parts = [ResolvedLinear(*make(83, 64, dtype, s), ()) for s in range(2)]
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    residual = torch.randn(9, 83, generator=torch.Generator().manual_seed(2)).to(dtype)
    plain = PackedLinear.from_parts(parts[:1])
    z = linear(x, plain, backend="cpu")
    fused = linear(x, plain, activation=activation, residual=residual, backend="cpu")
    assert torch.equal(fused, residual + bias_act(z, None, activation, backend="cpu"))
    gated = linear(x, PackedLinear.from_parts(parts, gated=True), activation=activation, backend="cpu")
    up = linear(x, PackedLinear.from_parts(parts[1:]), backend="cpu")
    assert torch.equal(gated, gated_act(z, up, activation, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees(dtype: torch.dtype) -> None:
    parts = [ResolvedLinear(*make(40, 64, dtype, s), ()) for s in range(2)]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for gated, activation in ((False, "none"), (False, "gelu"), (True, "silu")):
        packed = PackedLinear.from_parts(parts, gated=gated)
        ours = linear(x, packed, activation=activation, backend="cpu")
        torch.testing.assert_close(
            ours, linear_reference(x, packed, activation=activation), rtol=1e-2, atol=1e-5
        )


def test_logits_are_float32_and_unrounded() -> None:
    w, _ = make(70, 32, torch.bfloat16)
    x = torch.randn(4, 32).to(torch.bfloat16)
    y = linear(x, PackedLinear.from_weight(w), float_output=True, backend="cpu")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.double() @ w.double().t(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(y, y.to(torch.bfloat16).float())


def test_strided_input_and_transposed_weight() -> None:
    w = torch.randn(24, 40).t()  # Conv1D keeps [in, out]
    x = torch.randn(6, 100)[:, 10:34]
    y = linear(x, PackedLinear.from_weight(w), backend="cpu")
    torch.testing.assert_close(y, x @ w.t(), rtol=1e-5, atol=1e-5)
    wide = torch.randn(2, 3, 24)
    assert torch.equal(
        linear(wide, PackedLinear.from_weight(w))[1], linear(wide[1], PackedLinear.from_weight(w))
    )


def test_packing_fuses_lora_with_one_rounding() -> None:
    w, _ = make(50, 70, torch.bfloat16)
    a, b = torch.randn(8, 70), torch.randn(50, 8)
    packed = PackedLinear.from_parts([ResolvedLinear(w, None, (LoraUpdate(a, b, 0.5),))])
    exact = w.double() + 0.5 * b.double() @ a.double()
    error = (packed.to_dense().double() - exact).abs()
    assert float((error / exact.abs().clamp_min(1e-3)).max()) <= 2.0**-8  # half a unit in the last place


def test_opcheck() -> None:
    w, b = make(40, 16, torch.float32)
    p = PackedLinear.from_weight(w, b)
    torch.library.opcheck(
        torch.ops.dschat.linear,
        (torch.randn(3, 16), p.panels, p.bias, p.n, p.k, False, "relu", torch.randn(3, 40), False),
    )


def test_bad_input_is_named() -> None:
    p = PackedLinear.from_weight(torch.randn(8, 4))
    with pytest.raises(ValueError, match="last dimension must be 4"):
        linear(torch.randn(2, 5), p)
    with pytest.raises(TypeError, match="pack the weight in the dtype of x"):
        linear(torch.randn(2, 4, dtype=torch.bfloat16), p)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        linear(torch.randn(2, 4), p, activation="tanh")
    with pytest.raises(ValueError, match=r"residual has shape \[2, 4\]; give \[2, 8\]"):
        linear(torch.randn(2, 4), p, residual=torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"cannot be packed as torch\.float16"):
        PackedLinear.from_weight(torch.randn(8, 4).half())
    with pytest.raises(TypeError, match="give a PackedLinear"):
        linear(torch.randn(2, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="make a new one"):
        p.fill([ResolvedLinear(torch.randn(8, 5), None, ())])
