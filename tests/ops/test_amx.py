"""The AMX path without AMX: its kernels, layouts and masks on a software model of the tile registers.

On a machine with AMX the whole suite runs on the real tiles, and this file still runs the model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SELECTION = {
    "test_linear.py": "(against_float64 and 300) or inverse or (same_bits and 96) or separate_ops or fuses_lora",
    "test_lora_linear.py": "do_not_depend",
    "test_token_logprobs.py": "bit",
}


@pytest.mark.slow
def test_tile_products_on_the_model() -> None:
    names = " or ".join(f"({Path(name).stem} and ({chosen}))" for name, chosen in SELECTION.items())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        *(str(HERE / name) for name in SELECTION),
        "-k",
        names,
    ]
    result = subprocess.run(
        command,
        env={**os.environ, "DSCHAT_CXXFLAGS": "-DDSCHAT_AMX_MODEL"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "deselected" in result.stdout
