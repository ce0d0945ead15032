"""Paged caches with known contents, for the tests of attention and rope_append."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dschat_kernels.cache import PagedKVCache, pages_for
from dschat_kernels.ops._common import native


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs the native kernels on n threads."""
    module: Any = native()
    before = module.num_threads()
    module.set_num_threads(n)
    try:
        yield
    finally:
        module.set_num_threads(before)


@dataclass
class Batch:
    """Rows whose last q_lens[r] of kv_lens[r] tokens are queries."""

    q: Tensor  # [T, Hq, D]
    k: list[Tensor]  # one [kv_len, Hkv, D] a row
    v: list[Tensor]
    cache: PagedKVCache
    q_lens: list[int]
    kv_lens: list[int]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What attention takes in front of its options."""
        table = self.cache.block_table[: len(self.kv_lens)]
        return (
            self.q,
            self.cache.k[0],
            self.cache.v[0],
            table,
            cumulative(self.q_lens),
            int_tensor(self.kv_lens),
        )


def cumulative(lens: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def int_tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def fill(cache: PagedKVCache, slot: int, k: Tensor, v: Tensor, layer: int = 0) -> None:
    """Puts k, v [n, Hkv, D] into an empty slot."""
    cache.prepare_append([slot], len(k))
    cache.write(slot, layer, 0, k.transpose(0, 1), v.transpose(0, 1))
    cache.advance([slot], len(k))


def make_batch(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    cache_dtype: torch.dtype | None = None,
) -> Batch:
    """Random rows; the pages of a row lie anywhere in the cache, and everything that no row owns is NaN.

    cache_dtype int8: k and v are what the cache holds, float32.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, device="cpu") * scale).to(device, dtype)

    device = torch.get_default_device()
    rows, widest = len(kv_lens), max([1, *(pages_for(n) for n in kv_lens)])
    pages = sum(pages_for(n) for n in kv_lens) + 3
    cache = PagedKVCache(1, kv_heads, head_dim, pages, max(rows, 1), widest, cache_dtype or dtype, device)
    cache._free = torch.randperm(pages, generator=g, device="cpu").tolist()
    if cache_dtype == torch.int8:
        cache.k.fill_(-1)  # of scales: NaN
        cache.v.fill_(-1)
    else:
        cache.k.fill_(float("nan"))
        cache.v[..., :head_dim] = float("nan")
    k = [normal(n, kv_heads, head_dim) for n in kv_lens]
    v = [normal(n, kv_heads, head_dim) for n in kv_lens]
    for row in range(rows):
        fill(cache, row, k[row], v[row])
        if cache_dtype == torch.int8:
            k[row], v[row] = (x.transpose(0, 1) for x in cache.gather(row, 0))
    cache.sync()
    return Batch(normal(sum(q_lens), q_heads, head_dim), k, v, cache, list(q_lens), list(kv_lens))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, signs of zeros and NaN payloads included."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )
