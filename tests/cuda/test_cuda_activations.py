"""bias_act and gated_act of csrc/cuda: values far out, layouts, registration (errors: tests/backends)."""

from __future__ import annotations

import pytest
import torch
from helpers import non_contiguous
from paged import same_bits

from dschat_kernels.ops._common import ACTIVATIONS
from dschat_kernels.ops.bias_act import bias_act, bias_act_reference
from dschat_kernels.ops.gated_act import gated_act

pytestmark = pytest.mark.usefixtures("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_far_out(activation: str) -> None:
    """Nothing overflows, and NaN and infinity stay what they are."""
    x = torch.tensor([[float("nan"), float("inf"), 1e30, -1e30, 88.0, -88.0, 0.0, -0.0, 11.0]])
    y, expected = bias_act(x, None, activation, backend="cuda"), bias_act_reference(x, None, activation)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y.nan_to_num(), expected.nan_to_num(), rtol=1e-6, atol=1e-30)


def test_layouts_and_no_rows() -> None:
    x, up = torch.randn(7, 20).half(), torch.randn(7, 20).half()
    y = bias_act(x, None, "silu", backend="cuda")
    z = gated_act(x, up, "silu", backend="cuda")
    for view, other in zip(non_contiguous(x), non_contiguous(up), strict=True):
        assert same_bits(bias_act(view, None, "silu", backend="cuda"), y)
        assert same_bits(gated_act(view, other, "silu", backend="cuda"), z)
    assert bias_act(torch.zeros(0, 5), backend="cuda").shape == (0, 5)
    assert gated_act(torch.zeros(2, 0, 6), backend="cuda").shape == (2, 0, 3)


def test_registered_ops_pass_opcheck() -> None:
    x, b = torch.randn(3, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.dschat_cuda.bias_act.default, (x, b, "gelu"))
    torch.library.opcheck(torch.ops.dschat_cuda.gated_act.default, (x, None, None, None, "silu"))
