"""layer_norm and rms_norm of csrc/cuda: what is special to them, and a row's bits (errors: tests/backends)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from emulated import Order, emulated_cuda
from helpers import assert_close_to_fp64, check_gradients, non_contiguous
from paged import same_bits
from torch import Tensor

from dschat_kernels.ops.layer_norm import layer_norm, layer_norm_reference
from dschat_kernels.ops.rms_norm import rms_norm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
layer_norm_cuda = partial(layer_norm, backend="cuda")
rms_norm_cuda = partial(rms_norm, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_read_again(dtype: torch.dtype) -> None:
    """Too long for shared memory: later passes read global memory."""
    n = 24001
    inputs = {"x": torch.randn(1, n).to(dtype) + 3, "weight": torch.randn(n).to(dtype),
              "residual": torch.randn(1, n).to(dtype)}  # fmt: skip
    check_gradients(rms_norm_cuda, rms_norm_reference, inputs, cancelling=1.0)
    check_gradients(layer_norm_cuda, layer_norm_reference, {**inputs, "bias": None}, cancelling=1.0)


@pytest.mark.parametrize(
    "x_dtype, weight_dtype", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_rms_norm_of_mixed_dtypes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for rounding in ("llama", "gemma"):
        inputs = {"x": torch.randn(9, 111).to(x_dtype), "weight": torch.randn(111).to(weight_dtype)}
        check_gradients(rms_norm_cuda, rms_norm_reference, inputs, rounding=rounding)


def test_many_rows_sum_their_gradients() -> None:
    """More rows than a partial sum has."""
    inputs = {"x": torch.randn(200, 9), "weight": torch.randn(9), "bias": torch.randn(9)}
    check_gradients(layer_norm_cuda, layer_norm_reference, inputs)
    inputs.pop("bias")
    check_gradients(rms_norm_cuda, rms_norm_reference, inputs)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, w = torch.zeros(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    for y in (layer_norm(x, w, None, backend="cuda"), rms_norm(x, w, backend="cuda")):
        assert isinstance(y, Tensor) and y.shape == shape
        w.grad = None
        y.sum().backward()
        assert torch.equal(w.grad, torch.zeros(8))


def test_large_mean() -> None:
    x, w = torch.randn(3, 300) * 0.01 + 1000, torch.ones(300)
    y = layer_norm(x, w, None, backend="cuda")
    assert_close_to_fp64(y, layer_norm_reference(x.double(), None, None), layer_norm_reference(x, None, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [96, 111])
def test_rows_do_not_depend_on_batch_layout_or_order(dtype: torch.dtype, hidden: int) -> None:
    x, w = torch.randn(7, hidden).to(dtype), torch.randn(hidden).to(dtype)
    for op in (partial(layer_norm_cuda, weight=w, bias=None), partial(rms_norm_cuda, weight=w)):
        y = op(x)
        assert all(same_bits(op(x[i : i + 1]), y[i : i + 1]) for i in range(7))
        assert all(same_bits(op(view), y) for view in non_contiguous(x))
        for order in Order:
            with emulated_cuda(order, seed=9):
                assert same_bits(op(x), y)


def test_registered_ops_pass_opcheck() -> None:
    x, w = torch.randn(3, 9, requires_grad=True), torch.randn(9, requires_grad=True)
    torch.library.opcheck(torch.ops.dschat_cuda.layer_norm.default, (x, w, None, None, 1e-5))
    torch.library.opcheck(torch.ops.dschat_cuda.rms_norm.default, (x, w, None, 1e-5, 0.0, "llama"))
