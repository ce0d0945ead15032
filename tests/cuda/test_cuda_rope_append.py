"""rope and rope_append of csrc/cuda: the bits of the reference, and writes only where they belong."""

from __future__ import annotations

import pytest
import torch
from paged import same_bits

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops.rope_append import rope, rope_append, rope_append_reference, rope_reference

pytestmark = pytest.mark.usefixtures("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tables(dim: int, positions: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(positions)[:, None] / 100.0 ** (torch.arange(dim // 2) / (dim // 2))
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim, rotary_dim", [(2, 2), (20, 6), (64, 64), (33, 32)])
def test_rope_has_the_bits_of_the_reference(
    dim: int, rotary_dim: int, style: str, dtype: torch.dtype
) -> None:
    cos, sin = tables(rotary_dim)
    x, positions = torch.randn(5, 3, dim).to(dtype), torch.tensor([0, 199, 7, 7, 64])
    x.requires_grad_()
    y = rope(x, cos, sin, positions, style=style, backend="cuda")
    expected = rope_reference(x, cos, sin, positions, style=style)
    assert same_bits(y.detach(), expected.detach())
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [0, 8, 20])
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope_append_is_the_reference(rotary_dim: int, style: str, dtype: torch.dtype) -> None:
    """q, and every byte of the cache; tokens on both sides of a page, slices of a packed qkv."""
    caches = []
    qkv = torch.randn(6, 4 + 2 + 2, 20).to(dtype)
    q, k, v = qkv.split([4, 2, 2], dim=1)
    cos, sin = tables(rotary_dim) if rotary_dim else (None, None)
    for op in (rope_append_reference, rope_append):
        cache = PagedKVCache(1, 2, 20, 5, 2, 2, dtype)
        cache.prepare_append([0, 1], [66, 3])
        where = (torch.tensor([62, 63, 64, 65, 0, 2]), torch.tensor([0, 0, 0, 0, 1, 1]))
        options = {"backend": "cuda"} if op is rope_append else {}
        arguments = (q, k, v, cos, sin, *where, cache.k[0], cache.v[0], cache.block_table)
        out = op(*arguments, style=style, rotary_dim=rotary_dim or None, **options)
        caches.append((out, cache.k, cache.v))
    assert all(same_bits(a, b) for a, b in zip(*caches, strict=True))


def test_no_tokens() -> None:
    cos, sin = tables(4)
    nothing = torch.zeros(0, dtype=torch.int32)
    assert rope(torch.zeros(0, 2, 4), cos, sin, nothing, backend="cuda").shape == (0, 2, 4)
