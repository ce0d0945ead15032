"""Tests of this folder need Triton; all but those of the interpreter itself run inside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture
def interpreted() -> Iterator[None]:
    from tests.triton_kernels.interpreter import interpreter

    with interpreter():
        yield
