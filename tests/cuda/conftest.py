"""Op tests run the CUDA kernels on the CPU, threads in random order."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from emulated import Order, emulated_cuda


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    """`backend="cuda"` runs within the test."""
    with emulated_cuda(Order.RANDOM, seed=1) as module:
        yield module
