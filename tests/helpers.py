"""What the kernel tests share: the correctness criterion and inputs that are awkward on purpose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dschat_kernels import cuda
from dschat_kernels.ops._common import kernels

# Sizes that are no multiple of any vector width, and size one.
ODD_SIZES = (1, 7, 111, 576, 4109)
DTYPES = (torch.float32, torch.bfloat16)
CPU_ONLY = {"token_logprobs_gradient"}
"""Ops of torch.library that run on the cpu backend only: elsewhere the gradient by a frozen head waits for the
backward."""


def assert_close_to_fp64(
    actual: Tensor, exact: Tensor, torch_result: Tensor, *, factor: float = 2.0, size: float = 0.0
) -> None:
    """error(actual) <= factor * error(torch_result) + floor, errors being the largest distance to float64.

    `exact` is the float64 result of the same formula on the same (already rounded) inputs and `torch_result`
    what PyTorch computes from them in the dtype of `actual`. The floor is one rounding of the largest value,
    or of `size` if that is larger (four in float32, where a sum of a few terms may be ordered otherwise). NaN
    and infinities must agree.
    """
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == torch_result.dtype, f"dtype {actual.dtype}, expected {torch_result.dtype}"
    if actual.numel() == 0:
        return
    a, e, t = actual.detach().double(), exact.detach().double(), torch_result.detach().double()
    assert torch.equal(a.isnan(), e.isnan()), "NaN in different places"
    finite = e.isfinite() & (e.abs() < torch.finfo(actual.dtype).max)
    assert torch.equal(a[~finite].nan_to_num(), e[~finite].nan_to_num()) or not (~finite).any()
    a, e, t = a[finite], e[finite], t[finite]
    if a.numel() == 0:
        return
    ours, theirs = (a - e).abs().max().item(), (t - e).abs().max().item()
    roundings = 2.0 if actual.dtype == torch.float32 else 0.5
    floor = roundings * torch.finfo(actual.dtype).eps * max(e.abs().max().item(), size)
    assert ours <= factor * theirs + floor, (
        f"error {ours:.3e} against float64; torch's own is {theirs:.3e}, "
        f"allowed {factor} times that + {floor:.1e}"
    )


def ulp_error(actual: Tensor, exact: Tensor) -> Tensor:
    """Distance of float32 `actual` to float64 `exact` in units of the last place of float32 at `exact`."""
    rounded = exact.float().abs().clamp_min(torch.finfo(torch.float32).tiny)
    ulp = torch.nextafter(rounded, torch.tensor(float("inf"))).double() - rounded.double()
    return (actual.double() - exact).abs() / ulp


def non_contiguous(tensor: Tensor) -> list[Tensor]:
    """Views equal to `tensor` [rows, n] in other layouts: strided rows, strided columns, transposed."""
    rows, n = tensor.shape
    wide = tensor.new_zeros(rows, n + 3)
    wide[:, 1 : n + 1] = tensor
    spread = tensor.new_zeros(rows, 2 * n)
    spread[:, ::2] = tensor
    return [wide[:, 1 : n + 1], spread[:, ::2], tensor.t().contiguous().t()]


def cuda_refusal() -> tuple[type[Exception], str]:
    """Error and message (a pattern) of backend="cuda" on CPU tensors: on a machine that cannot run it that reason, on
    one with a GPU that they are not there."""
    if (reason := cuda.unavailable()) is not None:
        return RuntimeError, f"the cuda backend cannot run, because {re.escape(reason)}"
    return ValueError, "the cuda backend needs tensors on a CUDA GPU, not on cpu"


@contextmanager
def native_threads(count: int) -> Iterator[None]:
    """The native kernels run on `count` threads, more than there are cores if need be."""
    module = kernels()
    before = module.num_threads()
    module.set_num_threads(count)
    try:
        yield
    finally:
        module.set_num_threads(before)


def check_gradients(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Tensor | None],
    *,
    cancelling: float = 0.0,
    output_size: float = 0.0,
    **options: Any,
) -> None:
    """Gradients of `ours(**inputs)` meet the criterion: exact is autograd of `reference` in float64, torch's
    own is autograd of `reference` in the inputs' dtypes. Every output gets a random gradient; the forward is
    compared too. Where a gradient is the small difference of large terms, `cancelling` is the size of the
    terms; `output_size` is the same for the outputs.
    """

    def run(function: Callable[..., Any], wide: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        leaves = {
            name: None if t is None else (t.double() if wide else t).detach().clone().requires_grad_()
            for name, t in inputs.items()
        }
        outputs = function(**leaves, **options)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        generator = torch.Generator().manual_seed(1)
        grads = [
            torch.randn(out.shape, generator=generator, device="cpu")
            .to(native.dtype)
            .to(out.device, out.dtype)
            for out, native in zip(outputs, native_outputs or outputs, strict=True)
        ]
        torch.autograd.backward(outputs, grads)
        return [out.detach() for out in outputs], {n: t.grad for n, t in leaves.items() if t is not None}

    native_outputs: list[Tensor] = []
    torch_outputs, torch_grads = run(reference, wide=False)
    native_outputs = torch_outputs  # every run gets the same output gradients, rounded to these dtypes
    our_outputs, our_grads = run(ours, wide=False)
    exact_outputs, exact_grads = run(reference, wide=True)
    for out, exact, own in zip(our_outputs, exact_outputs, torch_outputs, strict=True):
        assert_close_to_fp64(out, exact, own, size=output_size)
    for name in torch_grads:
        size = cancelling
        if exact_grads[name].dim() == 1:  # a sum over rows: its running value is what gets rounded
            size = max(size, 2 * (exact_outputs[0].numel() / max(1, exact_grads[name].numel())) ** 0.5)
        try:
            assert_close_to_fp64(our_grads[name], exact_grads[name], torch_grads[name], size=size)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
