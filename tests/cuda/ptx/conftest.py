"""These tests need nvcc, as they run what it compiles."""

from __future__ import annotations

from resources import nvcc_or_reason

collect_ignore_glob = [] if nvcc_or_reason()[0] is not None else ["test_*.py"]
