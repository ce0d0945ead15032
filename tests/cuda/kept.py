"""What tests compile, in the build cache by its content: made once, whichever process of the tests is the first."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from dschat_kernels import build
from tests.together import alone


def kept(suffix: str, *key: str, make: Callable[[Path], None]) -> Path:
    """The file of a key, made by `make(path)` if nobody has yet; the key is all that its content depends on."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
    path = build.cache_dir() / "tests" / f"{digest}{suffix}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                make(made)
                os.replace(made, path)
    return path
