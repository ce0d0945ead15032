"""Memory for what a step reads once: where it begins, what it holds, who shares it, and what the system is told."""

from __future__ import annotations

import gc
import mmap
import re
import weakref
from pathlib import Path

import pytest
import torch

from dschat_kernels import huge_pages
from dschat_kernels.huge_pages import BLOCK, CACHE_LINE, HUGE, huge_zeros
from dschat_kernels.packing import PackedLinear


def flags_of(address: int) -> list[str] | None:
    """VmFlags of the mapping that holds an address; None where the system does not tell."""
    path = Path("/proc/self/smaps")
    if not path.exists():
        return None
    inside = False
    for line in path.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 7), (1 << 20,), (9, 1 << 21)])
def test_zeros_of_their_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [huge_zeros(shape, dtype) for _ in range(3)]
    for i, tensor in enumerate(tensors):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor.any()
        assert tensor.data_ptr() % CACHE_LINE == 0
        tensor.fill_(i + 1)
    for i, tensor in enumerate(tensors):
        assert (tensor == i + 1).all()


def test_small_tensors_share_a_block_and_large_ones_do_not() -> None:
    small = [huge_zeros(1000, torch.float32) for _ in range(2)]
    assert small[1].data_ptr() - small[0].data_ptr() == -(-4000 // CACHE_LINE) * CACHE_LINE
    large = [huge_zeros(BLOCK, torch.int8) for _ in range(2)]
    assert all(t.data_ptr() % HUGE == 0 for t in large)
    assert abs(large[1].data_ptr() - large[0].data_ptr()) >= BLOCK


def test_the_system_is_asked_for_huge_pages() -> None:
    packed = PackedLinear.from_weight(torch.ones(64, 64))
    assert packed.panels is not None
    flags = flags_of(packed.panels.data_ptr())
    if flags is None:
        pytest.skip("the system does not list the flags of mappings")
    assert "hg" in flags


def test_memory_goes_back_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[mmap.mmap]] = []

    class Watched(mmap.mmap):
        def __init__(self, *given: int) -> None:
            made.append(weakref.ref(self))

    monkeypatch.setattr(huge_pages.mmap, "mmap", Watched)
    monkeypatch.setattr(huge_pages, "_shared", None)
    first, second = huge_zeros(1000, torch.float32), huge_zeros(1000, torch.float32)
    huge_pages._shared = None  # as when the next block is begun
    (memory,) = made
    del first
    gc.collect()
    assert memory() is not None and not second.any()
    del second
    gc.collect()
    assert memory() is None
