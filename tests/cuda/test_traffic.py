"""What the CUDA kernels move, against tests/cuda/traffic.json and against bounds: see traffic.py."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from resources import TABLE as RESOURCES
from traffic import DTYPES, TABLE, least, measure, problems, row

TRAFFIC: dict[str, dict[str, dict[str, Any]]] = json.loads(TABLE.read_text())
MOST_MOVED, LEAST_EFFICIENCY = 1.05, 90

_VECTOR = (
    "beside 8 elements of 16 bits a thread wants 32 bytes of a float32 vector: two loads, each of every other half of "
    "its sectors, which the first-level cache has for the second"
)
_WORD = "all lanes of a warp read a row's one word, which takes a sector"
_SUMS = "lanes store the elements that they have of sums, two neighbours of 16 bits one after the other"
_LANE_ROWS = "every lane walks along a row of its own"
BELOW = {
    "rms_norm: forward": _VECTOR,
    "rms_norm: backward": _VECTOR,
    "rms_norm: partial_sums": _WORD,
    "layer_norm: forward": _VECTOR,
    "layer_norm: backward": _VECTOR,
    "layer_norm: partial_sums": _WORD,
    "bias_act: forward": _VECTOR,
    "bias_act: backward": _VECTOR,
    "gated_act: forward": _VECTOR,
    "gated_act: backward": _VECTOR,
    "rope_append: append_all": "the cache has 16 keys side by side: a token's key goes to a sector an element",
    "attention: attention_tiles": _SUMS,
    "attention_backward: query_gradients": _LANE_ROWS,
    "attention_backward: key_gradients": _LANE_ROWS,
}
"""The kernels with rows below LEAST_EFFICIENCY, and why."""


@functools.cache
def expected(dtype: torch.dtype) -> dict[str, dict[str, dict[str, Any]]]:
    """The table's rows of a dtype, by the kernel's name or by the bytes of an element, s, of the case. What has
    neither is measured with each dtype."""
    other, size = ("<float", "s=4") if dtype != torch.float32 else ("<__nv_bfloat16", "s=2")
    return {
        kernel: {case: found for case, found in rows.items() if size not in case.split()}
        for kernel, rows in TRAFFIC.items()
        if other not in kernel
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_kernel_moves_more_than_the_table_says(dtype: torch.dtype) -> None:
    measured = measure(dtype)
    wrong = []
    for kernel in measured.keys() | expected(dtype).keys():
        listed = expected(dtype).get(kernel, {})
        if "<" not in kernel and dtype == torch.float32:  # a case that other dtypes have
            listed = {case: found for case, found in listed.items() if case in measured[kernel]}
        wrong += problems(kernel, measured.get(kernel, {}), listed)
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
                below.add(kernel.partition("<")[0])
                assert kernel.partition("<")[0] in BELOW, where
    assert below == BELOW.keys()


def test_the_table_has_every_kernel() -> None:
    """Those that nvcc compiles, but for float16's."""
    compiled = json.loads(RESOURCES.read_text())["kernels"]["sm_80"]
    assert {kernel for kernel in compiled if "__half" not in kernel} == TRAFFIC.keys()


def test_a_worse_kernel_is_noticed() -> None:
    counts = {"moved_bytes": 100, "once_bytes": 50, "used_bytes": 200, "sectors": 10, "shared_requests": 4,
              "shared_passes": 4, "worst_passes": 1}  # fmt: skip
    good = row("4 * n", {"n": 25, "k": 3}, counts)
    assert good == {"sizes": {"n": 25}, "formula": "4 * n", "least": 100, "moved": 1, "once": 2, "asked": 2,
                    "efficiency": 62.5, "ways": 1, "worst": 1}  # fmt: skip
    assert problems("op: kernel", {"case": good}, {"case": good}) == []
    for name, value in (
        ("moved_bytes", 102),
        ("used_bytes", 210),
        ("sectors", 11),
        ("shared_passes", 5),
        ("worst_passes", 2),
        ("once_bytes", 49),
    ):
        worse = row("4 * n", {"n": 25}, {**counts, name: value})
        assert len(problems("op: kernel", {"case": worse}, {"case": good})) == 1, name
    assert problems("op: kernel", {}, {"case": good}) and problems("op: kernel", {"case": good}, {})
