"""Threads of the kernels: torch's own where there are any, the same bits on every kind and number of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dschat_kernels import linear
from dschat_kernels.ops._common import kernels
from dschat_kernels.packing import PackedLinear


@contextmanager
def threads(count: int, openmp: bool) -> Iterator[None]:
    module = kernels()
    module.use_openmp(openmp)
    module.set_num_threads(count)
    try:
        yield
    finally:
        module.set_num_threads(0)
        module.use_openmp(True)


def product() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(37, 200, generator=g), torch.randn(301, 200, generator=g)
    return linear(x, PackedLinear.from_weight(w), backend="cpu")


def test_the_same_bits_on_every_kind_and_number_of_threads() -> None:
    expected = product()
    for openmp in (True, False):
        for count in (1, 2, 3, 5):
            with threads(count, openmp):
                assert kernels().num_threads() == count
                assert torch.equal(product(), expected)


def test_torch_threads_are_shared_and_their_number_followed() -> None:
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("this build of torch does not use OpenMP")
    assert kernels().uses_openmp()
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert kernels().num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    with threads(2, True):
        expected = product()
        child = os.fork()
        if child == 0:
            same = torch.equal(product(), expected) and not kernels().uses_openmp()
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_bad_numbers() -> None:
    for count in (-1, 257):
        with pytest.raises(ValueError, match=f"num_threads is {count}: give a number from 1 to 256"):
            kernels().set_num_threads(count)
