"""csrc/cuda_emulation itself: what is right comes out right in every order, and what is wrong is reported."""

from __future__ import annotations

import functools
import re
from types import ModuleType

import pytest
import torch
from emulated import CSRC, HEADERS, RUNTIME, EmulatedBuild, Order, isa
from torch import Tensor

CASES = ("tests/cuda/emulation_cases.cu", "tests/cuda/emulation_cases.cpp")
ORDERS = pytest.mark.parametrize("order", Order)


@functools.cache
def cases(*defines: str, checking: bool = False) -> ModuleType:
    """tests/cuda/emulation_cases.cu."""
    return EmulatedBuild(
        name="_dschat_emulation_cases" + "_ucontext" * bool(defines) + "_checking" * checking,
        root=CSRC.parent,
        sources=[*CASES, *(f"csrc/{name}" for name in RUNTIME)],
        headers=[f"csrc/{name}" for name in HEADERS],
        include_dirs=["csrc"],
        isa=isa(),
        label="emulation's test kernels",
        defines=defines,
        checking=checking,
    ).load()


@pytest.fixture
def module(order: Order) -> ModuleType:
    found = cases()
    found.set_order(order.value, 3)
    return found


def test_float16_conversions_are_torchs() -> None:
    """All 65536 values back and forth, and float32 values of every exponent around every rounding."""
    m = cases()
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype, value, rounded in (
        (torch.bfloat16, m.bfloat16_value, m.bfloat16_bits),
        (torch.float16, m.float16_value, m.float16_bits),
    ):
        expected = bits.view(dtype).float()
        actual = torch.tensor([value(b) for b in range(65536)])
        assert torch.equal(actual.view(torch.int32), expected.view(torch.int32)) or torch.equal(
            actual.nan_to_num(7e9), expected.nan_to_num(7e9)
        )
        finite = expected[expected.isfinite()]
        middle = (finite.double() + torch.nextafter(finite, torch.tensor(1e38)).double()) / 2
        between = (finite[:-1].double() + finite[1:].double()) / 2
        around = [torch.nextafter(between.float(), side) for side in (finite[0], -finite[0])]
        edges = torch.tensor([65519.9, 65520.0, 1e30, 3.4e38])
        tests = torch.cat([finite, middle.float(), between.float(), *around, edges])
        tests = tests[tests.isfinite()]
        ours = torch.tensor([rounded(x) for x in tests.tolist()], dtype=torch.int32).to(torch.int16)
        assert torch.equal(ours, tests.to(dtype).view(torch.int16))
        assert rounded(float("nan")) == 0x7FFF


@ORDERS
def test_built_in_variables(module: ModuleType) -> None:
    out = torch.zeros(2 * 3 * 2, 4 * 2 * 5, dtype=torch.int32)
    assert module.who_am_i([2, 3, 2], [4, 2, 5], out.data_ptr()) == ""
    assert torch.equal(out, (torch.arange(12)[:, None] * 10000 + torch.arange(40)).int())


@ORDERS
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_sum(module: ModuleType, threads: int) -> None:
    x, out = torch.randint(-9, 9, (threads,)).float(), torch.zeros(threads)
    assert module.block_total(threads, x.data_ptr(), out.data_ptr()) == ""
    assert torch.equal(out, x.sum().expand(threads))


@ORDERS
def test_shuffles_and_votes(module: ModuleType) -> None:
    out, lane = torch.zeros(5, 32, dtype=torch.int32), torch.arange(32)
    assert module.shuffles(out.data_ptr()) == ""
    ballot = int(sum(1 << int(l) for l in lane if l % 3 == 0))
    up = torch.where(lane < 3, lane, lane - 3)
    expected = [torch.full((32,), 50), lane ^ 9, up, torch.full((32,), ballot), lane ^ 1]
    assert torch.equal(out, torch.stack(expected).to(torch.int64).to(torch.int32))


@ORDERS
@pytest.mark.parametrize("valid", [16, 8, 0])
def test_asynchronous_copies(module: ModuleType, valid: int) -> None:
    x, out = torch.randn(64, 4), torch.zeros(64, 4)
    assert module.copies(x.data_ptr(), out.data_ptr(), valid) == ""
    expected = x.flip(0)
    expected[:, valid // 4 :] = 0
    assert torch.equal(out, expected)


@ORDERS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_instructions(module: ModuleType, dtype: torch.dtype, transposed: bool) -> None:
    """The layouts of mma.m16n8k16 and ldmatrix: a wrong place of any element changes the product."""
    a, b, d = (
        torch.randint(-8, 8, (16, 16)).to(dtype),
        torch.randint(-8, 8, (16, 8)).to(dtype),
        torch.zeros(16, 8),
    )
    given = b if transposed else b.t().contiguous()
    call = (dtype == torch.float16, a.data_ptr(), given.data_ptr(), d.data_ptr(), transposed)
    assert module.product(*call) == ""
    assert torch.equal(d, a.float() @ b.float())


# -------------------------------------------------------------------------------------------------- planted bugs


def plant(m: ModuleType, bug: int, *, blocks: int = 1, threads: int = 64) -> tuple[str, Tensor, Tensor]:
    x, out = torch.randn(256), torch.zeros(256)
    message = m.planted(bug, blocks, threads, 4 * threads, x.data_ptr(), out.data_ptr(), 256)
    return message, x, out


@ORDERS
@pytest.mark.parametrize(
    "bug, message",
    [
        (0, "deadlock in block 0,0,0: 32 threads at __syncthreads, 31 in a warp collective, 1 at their end; "
            "__shfl_sync at line .* of warp 1 waits for lane 0, which is at its end"),
        (1, "diverged block: __syncthreads at line .* meets __syncthreads at line"),
        (2, "deadlock.*waits for lane 7, which is at __syncthreads"),
        (3, "the calling lane .* is not in the mask 0000000f"),
        (4, "diverged warp: .* meets "),
        (5, "shuffle: lane .* reads lane 20, which is not in the mask 0000ffff"),
        (6, "a thread ends with cp.async copies that it never waited for"),
        (7, "cp.async of 16 bytes: an address is not a multiple of 16"),
    ],
)  # fmt: skip
def test_what_would_hang_or_be_undefined_is_reported(module: ModuleType, bug: int, message: str) -> None:
    assert re.search(message, plant(module, bug)[0], re.S), plant(module, bug)[0]
    assert plant(module, 21)[0] == "", "an error does not outlive its launch"


@ORDERS
def test_a_weak_wait_shows_poison(module: ModuleType) -> None:
    message, _, out = plant(module, 8)
    assert message == "" and out[:64].isnan().all()


@ORDERS
def test_a_missing_barrier_shows_poison(module: ModuleType) -> None:
    message, _, out = plant(module, 9)
    assert message == "" and out[:64].isnan().any()


def test_orders_differ() -> None:
    """A race whose outcome depends on who comes first has three outcomes."""
    m, seen = cases(), set()
    for order in Order:
        m.set_order(order.value, 5)
        _, x, out = plant(m, 10)
        seen.add(tuple((out[:64] == x[:64].flip(0)).tolist()))
    assert len(seen) == 3


@ORDERS
@pytest.mark.parametrize(
    "grid, block, shared, message",
    [
        (1, 1025, 0, "a block of 1025 x 1 x 1 threads"),
        (0, 32, 0, "a grid of 0 x 1 x 1 blocks"),
        (1, 32, 100 * 1024, "102400 bytes of dynamic shared memory"),
        (1, 32, 99 * 1024, "1024 bytes of shared memory do not fit beside what is in use"),
    ],
)
def test_limits_of_a_launch(module: ModuleType, grid: int, block: int, shared: int, message: str) -> None:
    x = torch.randn(256)
    assert message in module.planted(21, grid, block, shared, x.data_ptr(), x.data_ptr(), 256)


def test_ucontext_gives_the_same() -> None:
    """The switch of machines that are not x86-64."""
    m = cases("-DDSCHAT_EMULATION_UCONTEXT")
    x, out = torch.randint(-9, 9, (96,)).float(), torch.zeros(96)
    assert m.block_total(96, x.data_ptr(), out.data_ptr()) == ""
    assert torch.equal(out, x.sum().expand(96))
    assert "deadlock" in plant(m, 0)[0] and plant(m, 21)[0] == ""


# ------------------------------------------------------------------------------------------- the checking build


def plant_checked(bug: int, order: Order = Order.ASCENDING, blocks: int = 1) -> str:
    m = cases(checking=True)
    m.set_order(order.value, 1)
    m.reset()
    x, out = torch.randn(256), torch.empty(64 * blocks)
    m.add_buffer(x.data_ptr(), 1024, "x", True, True)
    m.add_buffer(out.data_ptr(), 256 * blocks, "out", False, False)
    return m.planted(bug, blocks, 64, 256, x.data_ptr(), out.data_ptr(), 256)


@ORDERS
@pytest.mark.parametrize(
    "bug, message",
    [
        (8, "uninitialised: read of shared memory"),
        (9, "(uninitialised|race): read of shared memory"),
        (10, "race: (write to|read of) shared memory.* and a (read|write) by thread .* of block 0"),
        (11, r"out of bounds: 4-byte read at x\+1024, a buffer of 1024 bytes"),
        (12, r"out of bounds: 4-byte write at out\+256, a buffer of 256 bytes"),
        (13, "out of bounds: 4-byte write of shared memory at offset"),
        (14, "out of bounds: 4-byte write of shared memory at offset 256, where no variable lies"),
        (15, "uninitialised: read of shared memory"),
        (16, "misaligned: an address that is no multiple of 16"),
        (18, "(uninitialised|race): (write to|read of) shared memory"),
        (19, r"read-only: write to x\+"),
        (20, r"uninitialised: read of out\+0"),
    ],
)  # fmt: skip
def test_checking_build_finds(order: Order, bug: int, message: str) -> None:
    """Among them races whose results are right in this order."""
    assert re.search(message, plant_checked(bug, order)), plant_checked(bug, order)


@ORDERS
def test_checking_build_finds_races_of_blocks(order: Order) -> None:
    assert re.search(
        r"race: write to out\+0 and a write by thread 0 of block 0", plant_checked(17, order, blocks=2)
    )


@ORDERS
def test_checking_build_is_silent_where_nothing_is_wrong(order: Order) -> None:
    assert plant_checked(21, order, blocks=2) == ""


def test_traffic_of_known_patterns() -> None:
    m = cases(checking=True)
    plant_checked(21)
    traffic = m.traffic()
    # Per thread x is read twice, by 32 lanes thrice; out is written once and, by 32 lanes, read and written again.
    assert traffic["bytes_read"] == 4 * (64 * 2 + 32 + 32) and traffic["bytes_written"] == 4 * (64 + 32)
    assert traffic["used_bytes"] == 32 * traffic["sectors"], "neighbours read neighbours"
    assert traffic["shared_passes"] == traffic["shared_requests"], "no bank conflicts"


@pytest.mark.parametrize(
    "bug, expected",
    [
        # Two warps load 32 floats each from 32 sectors, and store them in 4.
        (22, {"requests": 4, "sectors": 2 * (32 + 4), "used_bytes": 4 * 128, "shared_requests": 0}),
        (23, {"requests": 2, "sectors": 5 + 4, "used_bytes": 2 * 128, "shared_requests": 0}),
        # One warp stores into shared memory and loads from there, in two passes each, eight, two, and one.
        (24, {"sectors": 8, "shared_requests": 2, "shared_passes": 4}),
        (25, {"sectors": 8, "shared_requests": 2, "shared_passes": 16}),
        (26, {"shared_requests": 2, "shared_passes": 2 + 8}),
        (27, {"sectors": 8, "shared_requests": 2, "shared_passes": 2}),
    ],
)  # fmt: skip
def test_wasted_traffic_is_counted(bug: int, expected: dict[str, int]) -> None:
    assert plant_checked(bug) == ""
    traffic = cases(checking=True).traffic()
    assert {name: traffic[name] for name in expected} == expected
    assert traffic["worst_passes"] == {24: 2, 25: 8, 26: 8, 27: 1}.get(bug, 0)


def test_traffic_is_told_by_launch() -> None:
    """With the kernel's name; what lanes, warps and blocks read again counts again, or once a block, or once."""
    m = cases(checking=True)
    assert plant_checked(23, blocks=1) == ""
    x, out = torch.randn(256), torch.empty(128)
    m.add_buffer(x.data_ptr(), 1024, "x", True, True)
    m.add_buffer(out.data_ptr(), 512, "out", False, False)
    assert m.planted(21, 2, 64, 256, x.data_ptr(), out.data_ptr(), 256) == ""
    (first, small), (second, traffic) = m.traffic_by_launch()
    assert first == second and "kernel = {anonymous}::planted]" in first
    assert small["once_bytes"] == small["moved_bytes"] == small["used_bytes"] == 2 * 128
    # Two blocks read the same 64 floats, of which a warp reads the half three times in all, and write 64 each, which
    # they read and write again in part.
    assert traffic["once_bytes"] == 4 * (64 + 2 * 32 + 2 * 64)
    assert traffic["moved_bytes"] == 2 * 4 * (64 + 32 + 64)
    assert traffic["used_bytes"] == 2 * 4 * (2 * 64 + 32 + 32 + 64 + 32)
    assert m.traffic()["used_bytes"] == traffic["used_bytes"] + small["used_bytes"]
