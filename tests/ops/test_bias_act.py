from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    ODD_SIZES,
    assert_close_to_fp64,
    check_gradients,
    native_threads,
    non_contiguous,
    ulp_error,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from dschat_kernels.ops._common import ACTIVATIONS, kernels
from dschat_kernels.ops.bias_act import activate, bias_act, bias_act_reference

# The activations that HF's configs name.
HF_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "linear": "none",
}

VECTOR_FUNCTIONS = ("exp", "tanh", "erf")  # csrc/cpu/vector_math.h


def bias_act_cpu(x: Tensor, bias: Tensor | None, activation: str = "gelu") -> Tensor:
    return bias_act(x, bias, activation, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", ODD_SIZES)
def test_forward_and_gradients(dtype: torch.dtype, activation: str, columns: int) -> None:
    for rows, with_bias in ((1, False), (40, True), (0, True)):
        x = (3 * torch.randn(rows, columns)).to(dtype)
        inputs = {"x": x, "bias": torch.randn(columns).to(dtype) if with_bias else None}
        check_gradients(bias_act_cpu, bias_act_reference, inputs, activation=activation)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    with_bias=st.booleans(),
)
def test_any_shape(shape: list[int], dtype: torch.dtype, activation: str, with_bias: bool) -> None:
    inputs = {
        "x": torch.randn(shape).to(dtype),
        "bias": torch.randn(shape[-1]).to(dtype) if with_bias else None,
    }
    check_gradients(bias_act_cpu, bias_act_reference, inputs, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradcheck(activation: str) -> None:
    x, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (5,)))
    torch.autograd.gradcheck(lambda x, b: bias_act_reference(x, b, activation), [x, b])


@pytest.mark.parametrize("name", HF_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_hf_activation(name: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(64, 111)).to(dtype)
    actual = bias_act(x, None, HF_NAMES[name], backend="cpu")
    assert_close_to_fp64(actual, ACT2FN[name](x.double()), ACT2FN[name](x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_range(activation: str) -> None:
    """Every exponent and the far tails, elementwise: no overflow inside where the value itself is finite."""
    x = torch.cat([torch.linspace(-120, 120, 48001), 10.0 ** torch.linspace(-40, 38, 400)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0])]).requires_grad_()
    y = bias_act(x, None, activation, backend="cpu")
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    exact = bias_act_reference(wide, None, activation)
    exact.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    small = wide.detach().abs() < 1e3
    # The tails of gelu are differences with 1: their error is relative to x, in torch's own kernels too.
    scale = wide.detach().abs().clamp_min(1e-30)
    assert ((y.detach() - exact).abs() / scale).max() < 5e-7
    exact_grad = torch.where(small, wide.grad, (wide.detach() > 0).double() if activation != "none" else 1.0)
    assert (x.grad - exact_grad).abs().max() < 2e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(40).to(dtype)
    x[[0, 17, 39]] = float("nan")
    assert torch.equal(bias_act(x, None, activation, backend="cpu").isnan(), x.isnan())


@pytest.mark.parametrize("name, low, high", [("exp", -87.3, 88.7), ("tanh", -12.0, 12.0), ("erf", -5.0, 5.0)])
def test_vector_functions_are_accurate(name: str, low: float, high: float) -> None:
    """Within about two units in the last place of float64's result, densely over the range that matters."""
    small = torch.logspace(-30, 0, 20001)
    x = torch.cat([torch.linspace(low, high, 2_000_003), small, -small])
    x = x[(x >= low) & (x <= high)]
    y = torch.empty_like(x)
    kernels().vector_function(VECTOR_FUNCTIONS.index(name), x.data_ptr(), y.data_ptr(), x.numel())
    exact = getattr(torch, name)(x.double())
    worst = ulp_error(y, exact)
    assert worst.max() <= 2.5, f"{worst.max():.2f} ulp at {x[worst.argmax()]:.9g}"
    assert worst.mean() < 0.6


def test_vector_functions_at_the_edges() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, 200.0, -200.0, 88.8, -87.4])
    expected = {
        "exp": [inf, 0.0, nan, 1.0, inf, 0.0, inf, 0.0],
        "tanh": [1.0, -1.0, nan, 0.0, 1.0, -1.0, 1.0, -1.0],
        "erf": [1.0, -1.0, nan, 0.0, 1.0, -1.0, 1.0, -1.0],
    }
    for name, values in expected.items():
        y = torch.empty_like(x)
        kernels().vector_function(VECTOR_FUNCTIONS.index(name), x.data_ptr(), y.data_ptr(), x.numel())
        torch.testing.assert_close(y, torch.tensor(values), rtol=0, atol=6e-8, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_batch_position_or_threads(dtype: torch.dtype) -> None:
    x, bias, dy = torch.randn(150, 577).to(dtype), torch.randn(577).to(dtype), torch.randn(150, 577).to(dtype)

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, bias)]
        y = bias_act(*leaves, "gelu_tanh", backend="cpu")
        y.backward(dy)
        return y.detach(), *(t.grad for t in leaves)

    with native_threads(1):
        expected = run(x, dy)
    for threads in (2, 3, 7):
        with native_threads(threads):
            assert all(torch.equal(g, e) for g, e in zip(run(x, dy), expected, strict=True))
    order = torch.randperm(150)
    assert all(torch.equal(g, e[order]) for g, e in zip(run(x[order], dy[order])[:2], expected, strict=False))
    assert all(torch.equal(g, e[149]) for g, e in zip(run(x[149], dy[149])[:2], expected, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype) -> None:
    x, bias = torch.randn(6, 37).to(dtype), torch.randn(37).to(dtype)
    leaf = x.clone().requires_grad_()
    expected = bias_act(leaf, bias, "silu", backend="cpu")
    expected.backward(torch.ones_like(x))
    for view in non_contiguous(x):
        view = view.detach().requires_grad_()
        got = bias_act(view, torch.stack([bias, bias], 1)[:, 0], "silu", backend="cpu")
        got.sum().backward()
        assert torch.equal(got, expected) and torch.equal(view.grad, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(dtype: torch.dtype, with_bias: bool) -> None:
    x = torch.randn(3, 21).to(dtype).requires_grad_()
    bias = torch.randn(21).to(dtype).requires_grad_() if with_bias else None
    torch.library.opcheck(torch.ops.dschat.bias_act.default, (x, bias, "gelu"))
    bias = bias.detach() if with_bias else None
    arguments = (x.detach(), x.detach(), bias, "gelu", with_bias)
    torch.library.opcheck(torch.ops.dschat.bias_act_backward.default, arguments)


def test_compiles_without_graph_break() -> None:
    def f(x: Tensor, bias: Tensor) -> Tensor:
        return bias_act(torch.tanh(x), bias, "gelu").square().sum()

    leaves = [torch.randn(4, 33, requires_grad=True), torch.randn(33, requires_grad=True)]
    f(*leaves).backward()
    expected = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves).backward()
    for t, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(t.grad, e)


def test_activation_table_is_the_kernels() -> None:
    """The numbers behind the names are the order of csrc/cpu/activation.h: every name computes its own
    function."""
    x = torch.linspace(-3, 3, 50)
    for name in ACTIVATIONS:
        torch.testing.assert_close(bias_act(x, None, name, backend="cpu"), activate(x, name))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "bias_act: x is a NoneType; give a torch.Tensor."),
        ({"x": torch.ones(2, 8).long()}, TypeError, "x has dtype int64; give a floating point tensor"),
        ({"x": torch.tensor(1.0)}, ValueError, "x is a number without dimensions"),
        ({"bias": torch.ones(9)}, ValueError, r"bias has shape \[9\]; give \[8\]"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta and the input on cpu"),
        (
            {"activation": "mish"},
            ValueError,
            "activation is 'mish'; choose one of none, gelu, gelu_tanh, relu",
        ),
        ({"activation": None}, ValueError, "activation is None; choose one of"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; choose one of"),
        ({"x": torch.ones(2, 8).half(), "backend": "cpu"}, ValueError, "float32 and bfloat16, not float16"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "bias": torch.ones(8), "activation": "gelu", **change}
    with pytest.raises(error, match=message) as caught:
        bias_act(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
