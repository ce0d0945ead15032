"""The repairs of Triton's interpreter against torch, and that they end with the block."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from dschat_kernels import rms_norm
from dschat_kernels.triton import _launch
from dschat_kernels.triton._launch import Config
from tests.triton_kernels.interpreter import interpreter


@triton.jit
def _cast(x, y, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y + place, tl.load(x + place).to(y.dtype.element_ty))


@triton.jit
def _product(a, b, c, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place), input_precision="ieee"))


@triton.jit
def _masked(y, n, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y + place, tl.full([SIZE], 1.0, tl.float32), mask=(place < 3) & (tl.program_id(0) < n))


def run(kernel: object, **arguments: object) -> None:
    with interpreter():
        _launch.launch(kernel, (1,), arguments, Config())


def test_casts_to_bfloat16_round_to_nearest_even() -> None:
    special = [0.0, -0.0, float("inf"), float("-inf"), 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9]
    x = torch.cat([torch.tensor(special), torch.randn(1024 - len(special)) * 1e3])
    y = torch.empty(1024, dtype=torch.bfloat16)
    run(_cast, x=x, y=y, SIZE=1024)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))
    back = torch.empty(1024)
    run(_cast, x=y, y=back, SIZE=1024)
    assert torch.equal(back.view(torch.int32), y.float().view(torch.int32))
    nan = torch.full((1024,), float("nan"))
    run(_cast, x=nan, y=y, SIZE=1024)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_widens(dtype: torch.dtype) -> None:
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    c = torch.empty(32, 32)
    run(_product, a=a, b=b, c=c, SIZE=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_a_scalar_comparison_is_a_mask(n: int) -> None:
    y = torch.zeros(4)
    run(_masked, y=y, n=n, SIZE=4)
    assert y.tolist() == [n, n, n, 0]


def test_the_block_leaves_nothing_behind() -> None:
    before = dict(tl.__dict__), dict(tl.core.__dict__), dict(tl.tensor.__dict__), triton.JITFunction.__call__
    x, weight = torch.randn(2, 8), torch.ones(8)
    with interpreter():
        rms_norm(x, weight, backend="triton")
    assert (
        dict(tl.__dict__),
        dict(tl.core.__dict__),
        dict(tl.tensor.__dict__),
        triton.JITFunction.__call__,
    ) == before
    with pytest.raises(ValueError, match="needs tensors on a GPU, not on cpu"):
        rms_norm(x, weight, backend="triton")
