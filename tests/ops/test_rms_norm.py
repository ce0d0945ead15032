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
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dschat_kernels.ops.rms_norm import rms_norm, rms_norm_reference
from tests.helpers import cuda_refusal

MODES = [("llama", 0.0), ("gemma", 1.0), ("llama", 1.0), ("gemma", 0.0)]


def term_size(x: Tensor, weight: Tensor, **_: object) -> float:
    """Size of the terms of dx; for a row of one or a few columns they cancel."""
    if x.numel() == 0 or x.shape[-1] > 8:
        return 0.0
    return float(4 * (weight.abs().max() + 1) * (x.double().pow(2).mean(-1) + 1e-6).rsqrt().max())


def rms_norm_cpu(x: Tensor, weight: Tensor, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    return rms_norm(x, weight, backend="cpu", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding, offset", MODES)
@pytest.mark.parametrize("hidden", ODD_SIZES)
def test_forward_and_gradients(dtype: torch.dtype, rounding: str, offset: float, hidden: int) -> None:
    for rows, with_residual in ((1, False), (37, True), (0, False)):
        inputs = {
            "x": 3 * torch.randn(rows, hidden).to(dtype),
            "weight": (torch.randn(hidden) + 1.0).to(dtype),
            "residual": torch.randn(rows, hidden).to(dtype) if with_residual else None,
        }
        options = {"weight_offset": offset, "rounding": rounding, "cancelling": term_size(**inputs)}
        check_gradients(rms_norm_cpu, rms_norm_reference, inputs, **options)


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    hidden=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    with_residual=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_any_shape(
    shape: list[int],
    hidden: int,
    dtype: torch.dtype,
    mode: tuple[str, float],
    with_residual: bool,
    scale: float,
) -> None:
    x, residual = (scale * torch.randn(*shape, hidden)).to(dtype), (torch.randn(*shape, hidden)).to(dtype)
    inputs = {
        "x": x,
        "weight": torch.randn(hidden).to(dtype),
        "residual": residual if with_residual else None,
    }
    options = {"weight_offset": mode[1], "rounding": mode[0], "cancelling": term_size(**inputs)}
    check_gradients(rms_norm_cpu, rms_norm_reference, inputs, **options)


def test_reference_gradcheck() -> None:
    x, r = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    w = torch.randn(5, dtype=torch.float64)
    for rounding, offset in MODES:

        def f(x: Tensor, w: Tensor, r: Tensor, rounding: str = rounding, offset: float = offset) -> object:
            return rms_norm_reference(x, w, residual=r, weight_offset=offset, rounding=rounding)

        torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, w, r)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_equals_hf_class(dtype: torch.dtype, weight_dtype: torch.dtype, kind: str) -> None:
    """Of mixed dtypes, too: the result's dtype is HF's, which for Llama is torch's promotion."""
    module = (LlamaRMSNorm if kind == "llama" else Gemma2RMSNorm)(576, eps=1e-5)
    with torch.no_grad():
        module.weight.copy_(torch.randn(576))
    module = module.to(weight_dtype)
    x = torch.randn(9, 576).to(dtype)
    expected = module(x)
    x64, w64 = x.double(), module.weight.detach().double()
    exact = rms_norm_reference(x64, w64, 1e-5, rounding=kind, weight_offset=float(kind == "gemma"))
    actual = rms_norm(
        x, module.weight, 1e-5, rounding=kind, weight_offset=float(kind == "gemma"), backend="cpu"
    )
    assert actual.dtype == expected.dtype
    assert_close_to_fp64(actual, exact, expected)
    # Not only as good as HF's, but rounded at the same places: hardly a value differs.
    assert (actual != expected).float().mean() < (0.002 if actual.dtype == torch.bfloat16 else 0.5)


def test_mixed_dtypes_have_gradients() -> None:
    for kind in ("llama", "gemma"):
        inputs = {"x": torch.randn(40, 111).bfloat16(), "weight": torch.randn(111)}
        check_gradients(rms_norm_cpu, rms_norm_reference, inputs, rounding=kind)
        inputs = {"x": torch.randn(40, 111), "weight": torch.randn(111).bfloat16()}
        check_gradients(rms_norm_cpu, rms_norm_reference, inputs, rounding=kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_is_the_rounded_sum(dtype: torch.dtype) -> None:
    """Fusion changes no bit: the sum is rounded before it is normalised."""
    x, r, w = torch.randn(5, 111).to(dtype), torch.randn(5, 111).to(dtype), torch.randn(111).to(dtype)
    y, h = rms_norm(x, w, residual=r, backend="cpu")
    assert torch.equal(h, x + r)
    assert torch.equal(y, rms_norm(h, w, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_batch_position_or_threads(dtype: torch.dtype) -> None:
    x, w, dy = torch.randn(150, 576).to(dtype), torch.randn(576).to(dtype), torch.randn(150, 576).to(dtype)

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = rms_norm(x, weight, backend="cpu")
        y.backward(dy)
        return y.detach(), x.grad, weight.grad

    with native_threads(1):
        y, dx, dw = run(x, dy)
    for threads in (2, 3, 7):
        with native_threads(threads):
            for got, expected in zip(run(x, dy), (y, dx, dw), strict=True):
                assert torch.equal(got, expected)
    order = torch.randperm(150)
    for got, expected in zip(run(x[order], dy[order])[:2], (y[order], dx[order]), strict=True):
        assert torch.equal(got, expected)
    for row in (0, 64, 149):
        for got, expected in zip(run(x[row], dy[row])[:2], (y[row], dx[row]), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype) -> None:
    x, w, r = torch.randn(6, 37).to(dtype), torch.randn(37).to(dtype), torch.randn(6, 37).to(dtype)
    expected = rms_norm(x, w, residual=r, backend="cpu")
    strided_w = torch.stack([w, w], 1)[:, 0]
    for x_view in non_contiguous(x):
        for r_view in non_contiguous(r):
            got = rms_norm(x_view, strided_w, residual=r_view, backend="cpu")
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    # A gradient that is not contiguous (here: expanded).
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, w, backend="cpu").sum().backward()
    again = x.clone().requires_grad_()
    rms_norm(again, w, backend="cpu").backward(torch.ones_like(x))
    assert torch.equal(leaf.grad, again.grad)


def test_extreme_rows() -> None:
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e-30), torch.full((40,), 1e18), torch.randn(40)])
    x = torch.cat([x, torch.full((1, 40), float("nan"))])
    w = torch.ones(40)
    y = rms_norm(x, w, backend="cpu")
    assert torch.equal(y[0], torch.zeros(40))
    assert y[4].isnan().all() and not y[:4].isnan().any()
    assert_close_to_fp64(y[:4], rms_norm_reference(x.double(), w.double())[:4], rms_norm_reference(x, w)[:4])
    # Not the square alone overflows: mean(h^2) is infinite, as in PyTorch.
    huge = torch.full((1, 40), 1e30)
    assert torch.equal(rms_norm(huge, w, backend="cpu"), rms_norm_reference(huge, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(dtype: torch.dtype, with_residual: bool) -> None:
    x = torch.randn(3, 21).to(dtype).requires_grad_()
    w = torch.randn(21).to(dtype).requires_grad_()
    r = torch.randn(3, 21).to(dtype).requires_grad_() if with_residual else None
    torch.library.opcheck(torch.ops.dschat.rms_norm.default, (x, w, r, 1e-6, 1.0, "gemma"))
    h, dy, rstd = x.detach(), torch.randn(3, 21).to(dtype), torch.rand(3)
    torch.library.opcheck(
        torch.ops.dschat.rms_norm_backward.default,
        (dy, dy if with_residual else None, h, w.detach(), rstd, 0.0, "llama", with_residual),
    )


def test_compiles_without_graph_break() -> None:
    def f(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        y, h = rms_norm(torch.tanh(x), w, residual=r)
        return (y + h).sum()

    inputs = [torch.randn(4, 33, requires_grad=True), torch.randn(33, requires_grad=True), torch.randn(4, 33)]
    f(*inputs).backward()
    expected = [t.grad for t in inputs[:2]]
    for t in inputs:
        t.grad = None
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled(*inputs).backward()
    for t, e in zip(inputs, expected, strict=False):
        torch.testing.assert_close(t.grad, e)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, w, backend="cpu").sum().backward()
    assert x.grad is not None and w.grad is None
    with torch.no_grad():
        assert not rms_norm(x, w, backend="cpu").requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "rms_norm: x is a list; give a torch.Tensor."),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x has dtype int64; give a floating point"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\]; give \[..., hidden\] with hidden > 0"),
        ({"x": torch.ones(2, 0)}, ValueError, r"x has shape \[2, 0\]; give \[..., hidden\] with hidden > 0"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\]; give \[8\]"),
        ({"weight": torch.ones(1, 8)}, ValueError, r"weight has shape \[1, 8\]; give \[8\]"),
        ({"weight": None}, TypeError, "weight is a NoneType; give a torch.Tensor"),
        (
            {"weight": torch.ones(8, device="meta")},
            ValueError,
            "weight is on meta and the input on cpu; move them",
        ),
        ({"residual": torch.ones(3, 8)}, ValueError, r"residual has shape \[3, 8\] and x \[2, 8\]"),
        (
            {"residual": torch.ones(2, 8).bfloat16()},
            TypeError,
            "residual is torch.bfloat16 and x is torch.float32",
        ),
        (
            {"residual": torch.ones(2, 8, device="meta")},
            ValueError,
            "residual is on meta and the input on cpu",
        ),
        ({"eps": -1e-6}, ValueError, "eps is -1e-06; give a number that is not negative"),
        ({"rounding": "lama"}, ValueError, "rounding is 'lama'; choose one of llama, gemma"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; choose one of reference, cpu, triton, cuda"),
        ({"backend": "triton"}, ValueError, "the triton backend needs tensors on a GPU, not on cpu"),
        (
            {"x": torch.ones(2, 8).double(), "backend": "cpu"},
            ValueError,
            "has float32 and bfloat16, not float64",
        ),
        (
            {"x": torch.ones(2, 8).half(), "backend": "cpu"},
            ValueError,
            "has float32 and bfloat16, not float16",
        ),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=message) as caught:
        rms_norm(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_cuda_refuses_cpu_tensors() -> None:
    error, message = cuda_refusal()
    with pytest.raises(error, match=f"rms_norm: {message}") as caught:
        rms_norm(torch.ones(2, 8), torch.ones(8), backend="cuda")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_other_dtypes_fall_back_and_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dschat_kernels.ops._common._said", set())
    x, w = torch.randn(2, 8, dtype=torch.float16), torch.ones(8, dtype=torch.float16)
    with pytest.warns(UserWarning, match="not float16; the PyTorch reference runs instead") as caught:
        y = rms_norm(x, w)
        rms_norm(x, w)
    assert len(caught) == 1
    assert torch.equal(y, rms_norm_reference(x, w))


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dschat_kernels.ops._common.native", lambda: None)
    monkeypatch.setattr("dschat_kernels.ops._common._said", set())
    x, w = torch.randn(2, 8), torch.ones(8)
    with pytest.warns(UserWarning, match="native CPU kernels are not available"):
        assert torch.equal(rms_norm(x, w), rms_norm_reference(x, w))
    with pytest.raises(RuntimeError, match="native CPU kernels are not available"):
        rms_norm(x, w, backend="cpu")
