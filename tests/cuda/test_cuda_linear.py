"""linear and lora_linear of csrc/cuda: epilogues, gradients, a row's bits (errors: tests/backends)."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_fp64, non_contiguous
from paged import same_bits
from torch import Tensor

from dschat_kernels.ops._common import ACTIVATIONS
from dschat_kernels.ops.linear import linear, linear_reference
from dschat_kernels.ops.lora_linear import lora_linear, lora_linear_reference
from dschat_kernels.packing import PackedLinear, ResolvedLinear

pytestmark = pytest.mark.usefixtures("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack(weight: Tensor, bias: Tensor | None = None, weights: str = "model") -> PackedLinear:
    return PackedLinear.from_parts([ResolvedLinear(weight, bias, ())], dense=True, weights=weights)


def make(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues_round_where_the_reference_does(activation: str, dtype: torch.dtype) -> None:
    """From the very sums: activation, gate and residual are the separate ops', up to their own last bit."""
    x, w, b = make(19, 45, 24, dtype)
    _, w2, b2 = make(1, 45, 24, dtype)
    residual = torch.randn(19, 45).to(dtype)
    options = {"activation": activation, "residual": residual}
    gated = PackedLinear.from_parts(
        [ResolvedLinear(w, b, ()), ResolvedLinear(w2, b2, ())], gated=True, dense=True
    )
    for packed in (pack(w, b), gated):
        y, expected = linear(x, packed, backend="cuda", **options), linear_reference(x, packed, **options)
        exact = (
            linear_reference(x.double().float(), packed, activation=activation).double() + residual.double()
        )
        assert_close_to_fp64(y, exact, expected, factor=2.0, size=4.0)
        assert (y != expected).float().mean() < (0.02 if dtype != torch.float32 else 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weights", "k"), [("model", 40), ("model", 41), ("int8", 144), ("int8", 41)])
def test_a_row_has_the_same_bits_in_every_batch_and_layout(dtype: torch.dtype, weights: str, k: int) -> None:
    """Low and high tiles, aligned rows and not, whatever their neighbours."""
    x, w, b = make(35, 70, k, dtype)
    packed = pack(w, b, weights)
    whole = linear(x, packed, backend="cuda")
    for begin, end in ((0, 1), (3, 5), (10, 27), (34, 35)):
        assert same_bits(linear(x[begin:end], packed, backend="cuda"), whole[begin:end])
    assert all(same_bits(linear(view, packed, backend="cuda"), whole) for view in non_contiguous(x))


def test_no_rows_and_leading_dimensions() -> None:
    x, w, b = make(6, 5, 8, torch.float32)
    assert linear(x[:0], pack(w, b), backend="cuda").shape == (0, 5)
    y = linear(x, pack(w, b), backend="cuda")
    assert torch.equal(linear(x.view(2, 3, 8), pack(w, b), backend="cuda"), y.view(2, 3, 5))


# -------------------------------------------------------------------------------------------------------- LoRA


def test_lora_gradients() -> None:
    x, w, b = make(9, 12, 20, torch.float32)
    leaves = [t.requires_grad_() for t in (x, torch.randn(4, 20), torch.randn(12, 4))]
    grad = torch.randn(9, 12)
    ours = torch.autograd.grad(lora_linear(x, w, b, *leaves[1:], 0.5, backend="cuda"), leaves, grad)
    theirs = torch.autograd.grad(lora_linear_reference(x, w, b, *leaves[1:], 0.5), leaves, grad)
    for a, t in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, t, rtol=1e-5, atol=1e-5)
