"""lora_linear and fuse_lora: against float64, gradients, one rounding, the base untouched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dschat_kernels import fuse_lora, lora_linear
from dschat_kernels.ops.lora_linear import (
    fuse_lora_reference,
    lora_linear_reference,
    low_rank_grads,
    low_rank_grads_reference,
)
from tests.helpers import assert_close_to_fp64, native_threads

DTYPES = [torch.float32, torch.bfloat16]


def make(rows: int, n: int, k: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(rows + 7 * n + 11 * k + rank)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return (
        draw(rows, k).to(dtype),
        (draw(n, k) / k**0.5).to(dtype),
        draw(n).to(dtype),
        draw(rank, k) / k**0.5,
        draw(n, rank),
    )


@given(
    rows=st.integers(1, 30), n=st.integers(1, 70), k=st.integers(1, 300), rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(),
)  # fmt: skip
def test_against_float64(rows: int, n: int, k: int, rank: int, dtype: torch.dtype, bias: bool) -> None:
    x, w, b, la, lb = make(rows, n, k, rank, dtype)
    b = b if bias else None
    y = lora_linear(x, w, b, la, lb, 0.7, backend="cpu")
    exact = lora_linear_reference(
        x.double(), w.double(), None if b is None else b.double(), la.double(), lb.double(), 0.7
    )
    torch_way = torch.nn.functional.linear(x, w, b) + 0.7 * (x.to(la.dtype) @ la.t() @ lb.t()).to(dtype)
    # Few results can cancel to far below their terms, and torch on one element can be lucky: rounding is measured
    # at the size that partial sums reach, the root of the sum of the squared terms, those of the side path included.
    squares, side = x.double() ** 2, la.double() ** 2
    terms = (
        (squares @ (w.double() ** 2).t() + 0.49 * (squares @ side.t()) @ (lb.double() ** 2).t())
        .sqrt()
        .max()
        .item()
    )
    assert_close_to_fp64(y, exact, torch_way, size=terms)


@given(
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    t=st.booleans(),
)
def test_fuse_rounds_once_and_leaves_the_base(n: int, k: int, rank: int, dtype: torch.dtype, t: bool) -> None:
    _, w, _, la, lb = make(1, n, k, rank, dtype)
    if t:
        w = w.t().contiguous().t()
    before = w.clone()
    fused = fuse_lora(w, la, lb, 0.3, backend="cpu")
    assert torch.equal(w, before)
    exact = fuse_lora_reference(w.double(), la.double(), lb.double(), 0.3)
    assert_close_to_fp64(fused, exact, exact.to(dtype))


def test_rows_do_not_depend_on_the_batch() -> None:
    x, w, b, la, lb = make(29, 100, 64, 8, torch.bfloat16)
    whole = lora_linear(x, w, b, la, lb, 2.0, backend="cpu")
    assert torch.equal(lora_linear(x[5:6], w, b, la, lb, 2.0, backend="cpu"), whole[5:6])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients(backend: str) -> None:
    x, w, b, la, lb = make(6, 20, 30, 4, torch.float32)
    leaves = [x.clone().requires_grad_(), la.clone().requires_grad_(), lb.clone().requires_grad_()]
    weights = torch.randn(6, 20)
    (lora_linear(leaves[0], w, b, leaves[1], leaves[2], 0.5, backend=backend) * weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = lora_linear_reference(exact[0], w.double(), b.double(), exact[1], exact[2], 0.5)
    (y * weights.double()).sum().backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 300])), n=st.integers(1, 70), k=st.integers(1, 100),
    rank=st.integers(1, 20), dtype=st.sampled_from(DTYPES), strided=st.booleans(), threads=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_low_rank_grads_against_float64(
    rows: int, n: int, k: int, rank: int, dtype: torch.dtype, strided: bool, threads: int
) -> None:
    x, _, _, la, lb = make(rows, n, k, rank, dtype)
    dy = torch.randn(rows, n, generator=torch.Generator().manual_seed(rows)).to(dtype)
    if strided:
        x, dy = (torch.cat([t, t + 1], 1)[:, : t.shape[1]] for t in (x, dy))
    with native_threads(1):
        alone = low_rank_grads(x, dy, la, lb, 0.7, backend="cpu")
    with native_threads(threads):
        ours = low_rank_grads(x, dy, la, lb, 0.7, backend="cpu")
    wide = [t.double() for t in (x, dy, la, lb)]
    exact = low_rank_grads_reference(*wide, 0.7)
    own = low_rank_grads_reference(x, dy, la, lb, 0.7)
    sizes = (
        0.7 * ((wide[1] ** 2 @ wide[3] ** 2).t() @ wide[0] ** 2).sqrt().max().item(),
        0.7 * (wide[1].t() ** 2 @ (wide[0] ** 2 @ wide[2].t() ** 2)).sqrt().max().item(),
    )
    for a, b, e, t, size in zip(ours, alone, exact, own, sizes, strict=True):
        assert torch.equal(a, b)
        assert_close_to_fp64(a, e, t, size=size)


def test_low_rank_grads_keep_the_dtype_of_the_factors_and_name_bad_input() -> None:
    x, _, _, la, lb = make(5, 20, 16, 4, torch.bfloat16)
    dy = torch.randn(5, 20).bfloat16()
    d_a, d_b = low_rank_grads(x, dy, la.bfloat16(), lb, 1.0)
    assert d_a.dtype == torch.bfloat16 and d_b.dtype == torch.float32
    with pytest.raises(ValueError, match="do not fit"):
        low_rank_grads(x, dy[:4], la, lb, 1.0)
    with pytest.raises(TypeError, match="give one dtype"):
        low_rank_grads(x, dy.float(), la, lb, 1.0)


def test_gradcheck_of_the_reference() -> None:
    x, w, b, la, lb = (t.double() for t in make(3, 5, 4, 2, torch.float32))
    for t in (x, la, lb):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, c: lora_linear_reference(x, w, b, a, c, 0.5), (x, la, lb))


def test_opcheck() -> None:
    x, w, b, la, lb = make(3, 20, 16, 4, torch.float32)
    torch.library.opcheck(
        torch.ops.dschat.lora_linear,
        (x.requires_grad_(), w, b, la.requires_grad_(), lb.requires_grad_(), 0.5),
    )
    torch.library.opcheck(torch.ops.dschat.fuse_lora, (w, la.detach(), lb.detach(), 0.5))
    torch.library.opcheck(
        torch.ops.dschat.low_rank_grads, (x.detach(), torch.randn(3, 20), la.detach(), lb.detach(), 0.5)
    )


def test_bad_input_is_named() -> None:
    x, w, b, la, lb = make(3, 20, 16, 4, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(x, w, b, la[:, :5], lb, 1.0)
    with pytest.raises(ValueError, match="last dimension must be 16"):
        lora_linear(x[:, :5], w, b, la, lb, 1.0)
    with pytest.raises(ValueError, match="freeze the base"):
        lora_linear(x, w.requires_grad_(), b, la, lb, 1.0)
    with pytest.raises(ValueError, match=r"lora_b has shape \[20\]; give a matrix"):
        fuse_lora(w.detach(), la, lb[:, 0], 1.0)
