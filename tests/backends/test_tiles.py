"""The number of rows chooses the tile of a weight product: a row's bits must not tell which."""

from __future__ import annotations

import pytest
import torch

from dschat_kernels import linear
from dschat_kernels.packing import PackedLinear
from dschat_kernels.triton import installed
from tests.backends.backends import BACKENDS, Backend
from tests.paged import same_bits

COMPILED = [b.parameter() for b in BACKENDS if b.name in ("triton-sm_80", "triton-gpu")]


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("weights", ["model", "int8"])
def test_a_row_has_the_bits_of_every_tile(weights: str, backend: Backend) -> None:
    """Rows of tiles for up to 64, up to 1024 and more rows, by the compiled kernels, and against float64."""
    from dschat_kernels.triton._gemm import tile

    if backend.missing:
        pytest.skip(backend.missing)
    counts, depth, columns = (1025, 65, 3), 160, 24
    assert len({str(tile(torch.bfloat16, n, columns, depth)) for n in counts}) == len(counts)
    with backend.within(), torch.device(backend.device):
        x = torch.randn(counts[0], depth).bfloat16()
        weight = (torch.randn(columns, depth) / depth**0.5).bfloat16()
        packed = PackedLinear.from_weight(weight, dense=True, weights=weights)
        whole = linear(x, packed, backend="triton", float_output=True)
        for n in counts[1:]:
            assert same_bits(linear(x[-n:], packed, backend="triton", float_output=True), whole[-n:]), n
    torch.testing.assert_close(
        whole.double(), x.double() @ packed.to_dense().double().t(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("rows", [3, 65, 1025])
def test_a_row_has_the_bits_of_every_pipeline(
    rows: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tuning may choose for a tile; the kernels of that tile, on few rows."""
    from dschat_kernels.triton import _gemm, _launch
    from dschat_kernels.triton import linear as module

    if backend.missing:
        pytest.skip(backend.missing)
    depth, columns, dtype = 160, 24, torch.bfloat16
    chosen = _gemm.tile(dtype, rows, columns, depth)
    number = len(module.pipelines(chosen))
    monkeypatch.setattr(module, "tile", lambda *_: chosen)
    monkeypatch.setattr(_launch, "_tuning", lambda _: True)
    found = []
    with backend.within(), torch.device(backend.device):
        x = torch.randn(5, depth).to(dtype)
        packed = PackedLinear.from_weight((torch.randn(columns, depth) / depth**0.5).to(dtype), dense=True)
        for i in range(number):
            monkeypatch.setattr(_launch, "_fastest", lambda *a, i=i: a[-1][i])
            found.append(linear(x, packed, backend="triton", float_output=True))
    assert number == 4 and all(same_bits(y, found[0]) for y in found)
