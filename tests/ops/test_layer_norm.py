from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    DTYPES,
    ODD_SIZES,
    assert_close_to_fp64,
    check_gradients,
    native_threads,
    non_contiguous,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dschat_kernels.ops.layer_norm import layer_norm, layer_norm_reference


def layer_norm_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: object) -> object:
    return layer_norm(x, weight, bias, backend="cpu", **options)


def make(
    shape: list[int], hidden: int, dtype: torch.dtype, parts: tuple[bool, bool, bool], mean: float = 0.0
) -> dict[str, Tensor | None]:
    """Inputs, with weight, bias and residual as `parts` says."""
    return {
        "x": (2 * torch.randn(*shape, hidden) + mean).to(dtype),
        "weight": (torch.randn(hidden) + 1).to(dtype) if parts[0] else None,
        "bias": torch.randn(hidden).to(dtype) if parts[1] else None,
        "residual": torch.randn(*shape, hidden).to(dtype) if parts[2] else None,
    }


def term_size(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float = 1e-5, **_: object
) -> float:
    """Size of the terms of dx; for a row of one or a few columns they cancel."""
    if x.numel() == 0 or x.shape[-1] > 8:
        return 0.0
    h = (x if residual is None else x + residual).double()
    rstd = (h.var(-1, correction=0) + eps).rsqrt().max()
    return float(8 * rstd * (1.0 if weight is None else weight.double().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parts", [(True, True, False), (True, True, True), (True, False, False), (False, False, True)]
)
@pytest.mark.parametrize("hidden", ODD_SIZES)
def test_forward_and_gradients(dtype: torch.dtype, parts: tuple[bool, bool, bool], hidden: int) -> None:
    for rows in (1, 37, 0):
        inputs = make([rows], hidden, dtype, parts)
        check_gradients(layer_norm_cpu, layer_norm_reference, inputs, cancelling=term_size(**inputs))


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    hidden=st.integers(2, 130),
    dtype=st.sampled_from(DTYPES),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_shape(shape: list[int], hidden: int, dtype: torch.dtype, parts: tuple[bool, bool, bool]) -> None:
    inputs = make(shape, hidden, dtype, parts)
    check_gradients(layer_norm_cpu, layer_norm_reference, inputs, cancelling=term_size(**inputs))


def test_reference_gradcheck() -> None:
    inputs = make([2, 3], 5, torch.float64, (True, True, True))

    def f(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> object:
        return layer_norm_reference(x, w, b, residual=r)

    torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [*DTYPES, None])
def test_equals_torch_layer_norm(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    module = nn.LayerNorm(576, eps=1e-5, elementwise_affine=weight_dtype is not None)
    if weight_dtype is not None:
        with torch.no_grad():
            module.weight.copy_(torch.randn(576))
            module.bias.copy_(torch.randn(576))
        module = module.to(weight_dtype)
    x = torch.randn(9, 576).to(dtype)
    actual = layer_norm(x, module.weight, module.bias, 1e-5, backend="cpu")
    wide = nn.LayerNorm(576, eps=1e-5, elementwise_affine=weight_dtype is not None).double()
    wide.load_state_dict(module.state_dict())
    # torch has float32 weights with bfloat16 activations, not the reverse.
    mixed_up = dtype == torch.float32 and weight_dtype == torch.bfloat16
    expected = module.float()(x) if mixed_up else module(x)
    assert actual.dtype == dtype
    assert_close_to_fp64(actual, wide(x.double()), expected)


def test_mixed_dtypes_have_gradients() -> None:
    inputs = make([40], 111, torch.float32, (True, True, False))
    check_gradients(layer_norm_cpu, layer_norm_reference, {**inputs, "x": inputs["x"].bfloat16()})
    check_gradients(layer_norm_cpu, layer_norm_reference, {**inputs, "weight": inputs["weight"].bfloat16()})


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_large_mean_does_not_cancel(mean: float) -> None:
    """mean(x^2) - mean(x)^2 would have no correct digit here."""
    x, w, b = torch.randn(64, 4109) + mean, torch.ones(4109), torch.zeros(4109)
    exact = layer_norm_reference(x.double(), w.double(), b.double())
    actual = layer_norm(x, w, b, backend="cpu")
    assert_close_to_fp64(actual, exact, nn.functional.layer_norm(x, (4109,)))
    # Of the mean itself half a unit in the last place is lost, nothing more: no error of its sum is left.
    last_place = 2.0 ** (math.floor(math.log2(mean)) - 23)
    assert (actual - exact).abs().max() < 0.6 * last_place


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_rounded_sum(dtype: torch.dtype) -> None:
    """Fusion changes no bit: the sum is rounded before it is normalised."""
    x, w, b, r = make([5], 111, dtype, (True, True, True)).values()
    y, h = layer_norm(x, w, b, residual=r, backend="cpu")
    assert torch.equal(h, x + r)
    assert torch.equal(y, layer_norm(h, w, b, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_batch_position_or_threads(dtype: torch.dtype) -> None:
    x, w, b, dy = make([150], 576, dtype, (True, True, True)).values()

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = layer_norm(*leaves, backend="cpu")
        y.backward(dy)
        return y.detach(), *(t.grad for t in leaves)

    with native_threads(1):
        expected = run(x, dy)
    for threads in (2, 3, 7):
        with native_threads(threads):
            assert all(torch.equal(g, e) for g, e in zip(run(x, dy), expected, strict=True))
    order = torch.randperm(150)
    assert all(torch.equal(g, e[order]) for g, e in zip(run(x[order], dy[order])[:2], expected, strict=False))
    for row in (0, 64, 149):
        assert all(torch.equal(g, e[row]) for g, e in zip(run(x[row], dy[row])[:2], expected, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype) -> None:
    x, w, b, r = make([6], 37, dtype, (True, True, True)).values()
    expected = layer_norm(x, w, b, residual=r, backend="cpu")
    strided = torch.stack([w, b], 1)
    for x_view in non_contiguous(x):
        for r_view in non_contiguous(r):
            got = layer_norm(x_view, strided[:, 0], strided[:, 1], residual=r_view, backend="cpu")
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_extreme_rows() -> None:
    x = torch.stack(
        [torch.zeros(40), torch.full((40,), 3e7), torch.full((40,), float("nan")), torch.randn(40)]
    )
    b = torch.randn(40)
    y = layer_norm(x, torch.ones(40), b, backend="cpu")
    assert torch.equal(y[0], b) and torch.equal(y[1], b)  # a constant row is its mean
    assert y[2].isnan().all() and not y[3].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(True, True, True), (True, False, False), (False, False, False)])
def test_opcheck(dtype: torch.dtype, parts: tuple[bool, bool, bool]) -> None:
    inputs = make([3], 21, dtype, parts)
    leaves = [None if t is None else t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.dschat.layer_norm.default, (*leaves, 1e-5))
    h, w, _, r = (None if t is None else t.detach() for t in leaves)
    torch.library.opcheck(
        torch.ops.dschat.layer_norm_backward.default,
        (torch.randn(3, 21).to(dtype), r, h, w, torch.rand(3), torch.rand(3), parts[0], parts[1]),
    )


def test_compiles_without_graph_break() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        y, h = layer_norm(torch.tanh(x), w, b, residual=r)
        return (y * y + h).sum()

    inputs = [t.requires_grad_() for t in make([4], 33, torch.float32, (True, True, True)).values()]
    f(*inputs).backward()
    expected = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs).backward()
    for t, e in zip(inputs, expected, strict=True):
        torch.testing.assert_close(t.grad, e)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": 1.0}, TypeError, "layer_norm: x is a float; give a torch.Tensor."),
        ({"x": torch.ones(2, 8).int()}, TypeError, "x has dtype int32; give a floating point tensor"),
        ({"x": torch.ones(2, 0)}, ValueError, r"x has shape \[2, 0\]; give"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\]; give \[8\]"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias has shape \[8, 1\]; give \[8\]"),
        ({"bias": torch.ones(8).int()}, TypeError, "bias has dtype int32; give a floating point tensor"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta and the input on cpu"),
        ({"residual": torch.ones(2, 7)}, ValueError, r"residual has shape \[2, 7\] and x \[2, 8\]"),
        ({"eps": float("nan")}, ValueError, "eps is nan; give a number that is not negative"),
        ({"backend": "onednn"}, ValueError, "backend is 'onednn'; choose one of"),
        (
            {"x": torch.ones(2, 8).half(), "backend": "cpu"},
            ValueError,
            "has float32 and bfloat16, not float16",
        ),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8), **change}
    with pytest.raises(error, match=message) as caught:
        layer_norm(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
