"""What Triton's kernels move, against tests/triton_kernels/traffic.json and against bounds: see traffic.py there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dschat_kernels
from tests.cuda.traffic import DTYPES, least, problems
from tests.triton_kernels.traffic import NAMES, TABLE, measure

TRAFFIC: dict[str, dict[str, dict[str, Any]]] = json.loads(TABLE.read_text())
MOST_MOVED, LEAST_EFFICIENCY = 1.05, 90

_VECTOR = (
    "beside 8 elements of 16 bits a thread has 32 bytes of a float32 vector: two loads, each of every other half of "
    "its sectors, which the first-level cache has for the second"
)
BELOW = {
    "rms_norm: _forward": _VECTOR,
    "layer_norm: _forward": _VECTOR,
    "layer_norm: _backward": _VECTOR + "; the vector is read again for every row",
    "bias_act: _forward": _VECTOR,
    "gated_act: _forward": _VECTOR,
    "rope_append: _append": "the cache has 16 keys side by side: a token's key goes to a sector an element",
}
"""The kernels with rows below LEAST_EFFICIENCY, and why."""

NOT_MEASURED = {
    "_digest: _digest",
    "_gemm: _matmul",
    "_logsumexp: _chunk_sums",
    "_logsumexp: _row_sums",
    "attention: _backward_kv",
    "attention: _backward_q",
    "attention: _prefill",
    "attention_decode: _join",
    "attention_decode: _split",
    "linear: _linear",
    "lora_linear: _fuse_lora",
    "lora_linear: _lora_linear",
    "sample: _chunk_masses",
    "sample: _draw",
    "sample: _narrow",
    "sample: _threshold",
    "token_logprobs: _logit_grad",
    "token_logprobs: _logprobs",
}
"""The kernels that have no formula yet."""


def launched() -> set[str]:
    """The kernels that the ops' files launch."""
    folder = Path(dschat_kernels.__file__).parent / "triton"
    return {
        f"{path.stem}: {name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"\blaunch\(\s*(_\w+)\s*,", path.read_text())
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_kernel_moves_more_than_the_table_says(dtype: torch.dtype) -> None:
    measured = measure(dtype)
    listed = {kernel: rows for kernel, rows in TRAFFIC.items() if kernel.endswith(f", {NAMES[dtype]}")}
    wrong = []
    for kernel in measured.keys() | listed.keys():
        wrong += problems(kernel, measured.get(kernel, {}), listed.get(kernel, {}))
    assert not wrong, "\n".join(wrong)


def test_the_table_keeps_the_bounds() -> None:
    """Every kernel moves what its formula says, and uses what it moves but for the reasons above."""
    below = set()
    for kernel, rows in TRAFFIC.items():
        for case, found in rows.items():
            where = f"{kernel} in {case}: {found}"
            assert found["least"] == least(found["formula"], found["sizes"]), where
            assert 1 <= found["moved"] <= MOST_MOVED, where
            if found["efficiency"] < LEAST_EFFICIENCY:
                below.add(kernel.partition(",")[0])
                assert kernel.partition(",")[0] in BELOW, where
    assert below == BELOW.keys()


def test_the_table_and_the_list_of_what_it_lacks_are_all_kernels() -> None:
    measured = {kernel.partition(",")[0] for kernel in TRAFFIC}
    assert measured.isdisjoint(NOT_MEASURED)
    assert measured | NOT_MEASURED == launched()
    assert TRAFFIC.keys() == {f"{kernel}, {name}" for kernel in measured for name in NAMES.values()}
