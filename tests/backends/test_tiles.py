"""The number of rows chooses the tile of a weight product: a row's bits must not tell which."""

from __future__ import annotations

import pytest
import torch

from dschat_kernels import linear
from dschat_kernels.packing import PackedLinear
from dschat_kernels.triton import installed
from tests.backends.backends import BACKENDS, Backend
from tests.paged import same_bits

COMPILED = [b for b in BACKENDS if b.name in ("triton-sm_80", "triton-gpu")]


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
@pytest.mark.parametrize("backend", COMPILED, ids=lambda b: b.name)
def test_a_row_has_the_bits_of_every_tile(backend: Backend) -> None:
    """Rows of tiles for up to 64, up to 1024 and more rows, by the compiled kernels, and against float64."""
    from dschat_kernels.triton._gemm import tile

    if backend.missing:
        pytest.skip(backend.missing)
    counts, depth, columns = (1025, 65, 3), 160, 24
    assert len({str(tile(torch.bfloat16, n, columns, depth)) for n in counts}) == len(counts)
    with backend.within(), torch.device(backend.device):
        x = torch.randn(counts[0], depth).bfloat16()
        weight = (torch.randn(columns, depth) / depth**0.5).bfloat16()
        packed = PackedLinear.from_weight(weight, dense=True)
        whole = linear(x, packed, backend="triton", float_output=True)
        for n in counts[1:]:
            assert same_bits(linear(x[-n:], packed, backend="triton", float_output=True), whole[-n:]), n
    torch.testing.assert_close(whole.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
