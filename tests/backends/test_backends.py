"""Every op on every backend by one criterion: the cases of cases.py on the backends of backends.py.

By default backends that compile every kernel first take the short form; DSCHAT_TEST_ALL_KERNELS=1 (make test-full)
takes every size and dtype, and few sizes on the backends that run only then.
"""

from __future__ import annotations

import pytest
import torch

from dschat_kernels.ops._common import offered
from tests.backends.backends import BACKENDS, Backend
from tests.backends.cases import CASES


def _parameters() -> list[object]:
    return [
        backend.parameter(dtype, op, id=f"{op.strip('_')}-{backend.name}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
        for dtype in backend.runs()
        for op in CASES
    ]


@pytest.mark.parametrize("backend, dtype, op", _parameters())
def test_op(backend: Backend, dtype: torch.dtype, op: str) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    offered(backend.backend) if backend.backend != "reference" else None
    with backend.within(), torch.device(backend.device):
        CASES[op](backend.backend, dtype, backend.thorough)
