"""What the compiled code does with memory is counted as in the checking build of the source: hand-written PTX against
sectors and bank conflicts computed here by hand."""

from __future__ import annotations

import struct

import pytest
import torch
from emulated import Recorder, emulated_module
from test_translate import module_of

from tests.cuda.ptx.compiled import library
from tests.cuda.ptx.translate import translate

SHARED = ".reg .pred p; .reg .b32 %x<4>; .shared .align 16 .b8 memory[16384];"


def counts(body: str, threads: int = 32, words: int = 4096) -> dict[str, int]:
    """What one block counts; %rd0 and %rd1 point at input and output, %rd3 and %rd4 at the thread's word of them."""
    given, out = torch.zeros(words, dtype=torch.int32), torch.zeros(words, dtype=torch.int32)
    module, recorder = emulated_module(checking=True), Recorder([given, out])
    module.reset()
    module.set_order(0, 0)
    recorder.tell(module)
    path = str(library(translate(module_of(body, SHARED), "k")))
    parameters = struct.pack("<QQ", given.data_ptr(), out.data_ptr())
    module.launch_library(path, [1, 1, 1], [threads, 1, 1], 0, parameters)
    found: dict[str, int] = module.traffic()
    return found


def at(stride: int) -> str:
    """%rd5: the input's byte at `stride` times the thread's number."""
    return f"mul.wide.u32 %rd5, %r0, {stride}; add.s64 %rd5, %rd0, %rd5;"


GLOBAL = {
    # body: (requests, sectors, bytes used, bytes moved); a warp of words is 128 bytes, and a sector has 32
    "ld.global.u32 %r1, [%rd3];": (1, 4, 128, 128),
    f"{at(8)} ld.global.u32 %r1, [%rd5];": (1, 8, 128, 128),
    f"{at(32)} ld.global.u32 %r1, [%rd5];": (1, 32, 128, 128),
    f"{at(16)} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd5];": (1, 16, 512, 512),
    f"{at(8)} ld.global.v2.u32 {{%r1, %r2}}, [%rd5];": (1, 8, 256, 256),
    f"{at(32)} ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd5];": (1, 32, 512, 512),
    "ld.global.u32 %r1, [%rd0];": (1, 1, 4, 4),  # all lanes the same word
    "ld.global.u32 %r1, [%rd3]; \n ld.global.u32 %r2, [%rd3];": (2, 8, 256, 128),  # a block's cache has it
    "setp.lt.u32 p, %r0, 8; @p ld.global.u32 %r1, [%rd3];": (1, 1, 32, 32),
    "setp.lt.u32 p, %r0, 0; @p ld.global.u32 %r1, [%rd3];": (0, 0, 0, 0),
    "st.global.u32 [%rd4], %r0;": (1, 4, 128, 128),
    "mov.u32 %r1, 0; \n $L: ld.global.u32 %r2, [%rd3]; add.s64 %rd3, %rd3, 128; add.u32 %r1, %r1, 1; \n"
    "setp.lt.u32 p, %r1, 3; @p bra $L;": (3, 12, 384, 384),
    "red.global.add.u32 [%rd4], %r0;": (1, 4, 128, 128),
}  # fmt: skip


@pytest.mark.parametrize("body", GLOBAL)
def test_sectors(body: str) -> None:
    found = counts(body)
    names = ("requests", "sectors", "used_bytes", "moved_bytes")
    assert tuple(found[name] for name in names) == GLOBAL[body]
    assert found["shared_requests"] == 0


def test_every_warp_is_a_request() -> None:
    found = counts("ld.global.u32 %r1, [%rd3];", threads=96)
    assert (found["requests"], found["sectors"]) == (3, 12)


def place(stride: int) -> str:
    """%x0: the offset in shared memory of `stride` times the thread's number."""
    return f"mov.u32 %x0, memory; mul.lo.u32 %x1, %r0, {stride}; add.u32 %x0, %x0, %x1;"


BANKS = {
    # body: passes of each request; words at distance 32 are in one bank
    f"{place(4)} st.shared.u32 [%x0], %r0;": 1,
    f"{place(8)} st.shared.u32 [%x0], %r0;": 2,
    f"{place(64)} st.shared.u32 [%x0], %r0;": 16,
    f"{place(128)} st.shared.u32 [%x0], %r0;": 32,
    f"{place(132)} st.shared.u32 [%x0], %r0;": 1,  # a row padded by a word
    f"{place(16)} st.shared.v4.u32 [%x0], {{%r0, %r0, %r0, %r0}};": 1,  # four quarters of 128 bytes
    f"{place(128)} st.shared.v4.u32 [%x0], {{%r0, %r0, %r0, %r0}};": 8,
    f"{place(16)} stmatrix.sync.aligned.m8n8.x4.shared.b16 [%x0], {{%r0, %r0, %r0, %r0}};": 1,
    f"{place(128)} stmatrix.sync.aligned.m8n8.x4.shared.b16 [%x0], {{%r0, %r0, %r0, %r0}};": 8,
    f"{place(0)} st.shared.u32 [%x0], 7;": 1,  # every lane the same word
}  # fmt: skip


@pytest.mark.parametrize("body", BANKS)
def test_bank_conflicts(body: str) -> None:
    found = counts(body)
    assert (found["shared_requests"], found["shared_passes"], found["worst_passes"]) == (
        1,
        BANKS[body],
        BANKS[body],
    )
    assert found["requests"] == 0


def test_loads_of_matrices_are_told_apart() -> None:
    """One of four matrices and one of two, whose rows half of the lanes give: two requests, with conflicts in one."""
    fill = "st.shared.v4.u32 [%x0], {%r0, %r0, %r0, %r0}; \n bar.sync 0; \n"
    loads = (
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1, %r2}, [%x0]; \n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%x0];"
    )
    found = counts(f"{place(128)} {fill} {loads}")
    assert (found["shared_requests"], found["shared_passes"]) == (3, 24)


def test_asynchronous_copies() -> None:
    """A load of global memory, and a store to shared memory at the wait."""
    copy = "cp.async.cg.shared.global [%x0], [%rd5], 16; cp.async.commit_group; \n cp.async.wait_group 0;"
    found = counts(f"{at(32)} {place(128)} {copy}")
    assert (found["requests"], found["sectors"], found["used_bytes"]) == (1, 32, 512)
    assert (found["shared_requests"], found["shared_passes"]) == (1, 8)


def test_another_instructions_store_is_a_race() -> None:
    """Lanes may store to one place in one instruction; beside it, or from another warp, nothing orders them."""
    one = f"{place(0)} st.shared.u32 [%x0], 7;"
    with pytest.raises(RuntimeError, match=r"race: write to shared memory.*line .* of the PTX"):
        counts(one, threads=64)
    with pytest.raises(RuntimeError, match=r"race: read of shared memory.*line .* of the PTX"):
        counts(f"{one} \n ld.shared.u32 %r1, [%x0];")
    with pytest.raises(RuntimeError, match="out of bounds: 4-byte read at tensor"):
        counts("ld.global.u32 %r1, [%rd3+16384];")
