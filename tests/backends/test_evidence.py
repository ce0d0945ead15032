"""docs/gpu.md says what the suite runs, and the suite has every op."""

from __future__ import annotations

from dschat_kernels.ops import _common
from tests.backends.backends import BACKENDS
from tests.backends.cases import CASES
from tests.backends.evidence import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.backends.evidence"


def test_every_op_has_a_case() -> None:
    _common.offered("cuda")
    ops = {op for op in _common._OPS if not op.endswith("_backward")}  # gradients are part of an op's case
    assert ops == {name.strip("_") for name in CASES}


def test_every_backend_runs_by_night() -> None:
    assert all(set(b.dtypes) <= set(b.nightly) and b.nightly for b in BACKENDS)
