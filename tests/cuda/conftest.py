"""Op tests run the CUDA kernels on the CPU, threads in random order."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from emulated import Order, emulated_cuda

from dschat_kernels.ops._common import offered


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    """`backend="cuda"` runs within the test, and torch.ops.dschat_cuda is there."""
    offered("cuda")
    with emulated_cuda(Order.RANDOM, seed=1) as module:
        yield module
