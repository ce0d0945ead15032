"""docs/gpu.md says what the suite runs, and the suite has every op."""

from __future__ import annotations

from dschat_kernels.ops import _common
from tests.backends.backends import BACKENDS
from tests.backends.cases import CASES
from tests.backends.evidence import PAGE, page
from tests.helpers import CPU_ONLY


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.backends.evidence"


def test_every_op_has_a_case() -> None:
    """Gradients are part of an op's case. What has kernels for the CPU only is tested in tests/ops."""
    _common.offered("cuda")
    assert not CPU_ONLY & _common.offered("triton").keys()
    ops = {op for op in _common._OPS if not op.endswith("_backward")}
    assert ops - CPU_ONLY == {name.strip("_") for name in CASES}


def test_every_backend_runs_by_night() -> None:
    assert all(set(b.dtypes) <= set(b.nightly) and b.nightly for b in BACKENDS)
