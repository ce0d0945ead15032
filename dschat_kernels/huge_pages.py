"""CPU memory for what a decode step reads once: weights, keys and values, in huge pages where the system has them.

With pages of 4 KiB every 64th line that is read waits for the page tables first (in a virtual machine for two sets of
them), and neither a prefetch nor the reads around it hide that: products of 16 rows then take a fifth longer
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

__all__ = ["huge_zeros"]

HUGE = 2 << 20
"""Bytes of a huge page."""
BLOCK = 16 * HUGE
"""Bytes that small tensors share: alone each would waste half a huge page."""
CACHE_LINE = 64


class _Block:
    """Zeroed memory that begins with a huge page; it lives as long as a tensor in it."""

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        # Private: memory that processes can share, Python's default, has no such pages.
        memory = mmap.mmap(-1, size + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        begin = -whole.data_ptr() % HUGE
        self.bytes = whole[begin : begin + size]

    def take(self, size: int) -> Tensor | None:
        """`size` bytes from the next cache line on, or None where they do not fit."""
        begin = -(-self.used // CACHE_LINE) * CACHE_LINE
        if begin + size > self.size:
            return None
        self.used = begin + size
        return self.bytes[begin : self.used]


_lock = threading.Lock()
_shared: _Block | None = None


def huge_zeros(shape: tuple[int, ...] | int, dtype: torch.dtype, share: bool = False) -> Tensor:
    """Zeros on the CPU, from a cache line on. Pages are zeroed by the system when they are touched, so what nobody
    writes costs nothing.

    share: put a tensor of less than half a block into one with others. It is freed with the last of them, and copying
    one's storage copies the whole block. Without it what is smaller than a huge page is in plain memory.
    """
    global _shared
    shape = (shape,) if isinstance(shape, int) else shape
    size = math.prod(shape) * dtype.itemsize
    if share and 2 * size <= BLOCK:
        with _lock:
            memory = _shared.take(size) if _shared is not None else None
            if memory is None:
                _shared = _Block(BLOCK)
                memory = _shared.take(size)
    elif size < HUGE:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    else:
        memory = _Block(size).take(size)
    assert memory is not None
    return memory.view(dtype).view(shape)
