"""What the kernel tests share: the correctness criterion and inputs that are awkward on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

# Sizes that are no multiple of any vector width, and size one.
ODD_SIZES = (1, 7, 111, 576, 4109)
DTYPES = (torch.float32, torch.bfloat16)


def assert_close_to_fp64(
    actual: Tensor, exact: Tensor, torch_result: Tensor, *, factor: float = 2.0, floor: float | None = None
) -> None:
    """error(actual) <= factor * error(torch_result) + floor, errors being the largest distance to float64.

    `exact` is the float64 result of the same formula on the same (already rounded) inputs and `torch_result`
    what PyTorch computes from them in the dtype of `actual`. The floor, by default, is one rounding of the
    largest value (four in float32, where a sum of a few terms is legitimately ordered otherwise). NaN and
    infinities must agree.
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
    if floor is None:
        roundings = 0.5 if actual.dtype == torch.bfloat16 else 2.0
        floor = roundings * torch.finfo(actual.dtype).eps * e.abs().max().item()
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
    """Views that equal `tensor` [rows, n] and are laid out otherwise: strided rows, strided columns,
    transposed."""
    rows, n = tensor.shape
    wide = tensor.new_zeros(rows, n + 3)
    wide[:, 1 : n + 1] = tensor
    spread = tensor.new_zeros(rows, 2 * n)
    spread[:, ::2] = tensor
    return [wide[:, 1 : n + 1], spread[:, ::2], tensor.t().contiguous().t()]
