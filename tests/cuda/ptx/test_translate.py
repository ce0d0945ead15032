"""The translator of PTX: instructions against arithmetic written here, what it refuses, and that a wrong instruction in
a kernel's compiled code is seen."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch

from tests.cuda.ptx.compiled import compiled_module, compiled_triton, cuda_kernels, cuda_ptx, library
from tests.cuda.ptx.translate import Untranslated, translate

MASK = 2**32 - 1
WORDS = [
    0,
    1,
    2,
    5,
    31,
    32,
    33,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0xDEADBEEF,
    0x12345678,
    0x00FF00FF,
    0xFFFFFF80,
]
FLOATS = [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, -7.25, 0.1, 1e10, -1e10, 1e-3, 65504.0, math.inf, math.nan]


def signed(x: int) -> int:
    return x - 2**32 if x & 0x80000000 else x


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(x: int, at: int, count: int) -> int:
    return x >> at & (1 << count) - 1 if at < 32 else 0


def lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def permuted(a: int, b: int, selector: int) -> int:
    data = struct.pack("<II", a, b)
    out = 0
    for i in range(4):
        s = selector >> 4 * i & 15
        byte = data[s & 7]
        out |= ((0xFF if byte & 0x80 else 0) if s & 8 else byte) << 8 * i
    return out


# r = f(a, b, c) on 32-bit words.
INTEGERS: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 R, A, B;": lambda a, b, c: a + b,
    "sub.s32 R, A, B;": lambda a, b, c: a - b,
    "mul.lo.s32 R, A, B;": lambda a, b, c: a * b,
    "mul.hi.u32 R, A, B;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 R, A, B;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 R, A, B, C;": lambda a, b, c: a * b + c,
    "div.u32 R, A, B;": lambda a, b, c: a // b if b else MASK,
    "div.s32 R, A, B;": lambda a, b, c: truncated(signed(a), signed(b)) if b else MASK,
    "rem.s32 R, A, B;": lambda a, b, c: signed(a) - signed(b) * truncated(signed(a), signed(b)) if b else a,
    "min.s32 R, A, B;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 R, A, B;": lambda a, b, c: max(a, b),
    "abs.s32 R, A;": lambda a, b, c: abs(signed(a)),
    "shl.b32 R, A, B;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 R, A, B;": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 R, A, B;": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 R, A, B, C;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 R, A, B, C;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "lop3.b32 R, A, B, C, 0xca;": lambda a, b, c: lop3(a, b, c, 0xCA),
    "lop3.b32 R, A, B, C, 150;": lambda a, b, c: a ^ b ^ c,
    "prmt.b32 R, A, B, C;": permuted,
    "bfe.u32 R, A, 5, 9;": lambda a, b, c: field(a, 5, 9),
    "bfe.s32 R, A, 4, 8;": lambda a, b, c: field(a, 4, 8) - (256 if a >> 11 & 1 else 0),
    "bfi.b32 R, A, B, 8, 12;": lambda a, b, c: b & ~0xFFF00 | (a & 0xFFF) << 8,
    "popc.b32 R, A;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 R, A;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 R, A;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "cvt.s32.s8 R, A;": lambda a, b, c: (a & 0xFF) - (256 if a & 0x80 else 0),
    "{.reg .pred q; setp.lt.s32 q, A, B; selp.b32 R, C, 7, q;}": lambda a, b, c: c if signed(a) < signed(b) else 7,
    "{.reg .pred q; setp.hs.u32 q, A, B; @!q mov.u32 R, 3; @q mov.u32 R, C;}": lambda a, b, c: c if a >= b else 3,
}  # fmt: skip


def single(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def half(x: float, dtype: torch.dtype = torch.bfloat16) -> float:
    return float(torch.tensor(x, dtype=dtype))


def bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def of_halves(low: float, high: float, dtype: torch.dtype) -> int:
    return int(torch.tensor([low, high]).to(dtype).view(torch.int32)) & MASK


def whole(x: float, low: int, high: int, rounding: Callable[[float], float]) -> int:
    return 0 if math.isnan(x) else int(max(low, min(high, x if math.isinf(x) else rounding(x))))


def order(x: float) -> tuple[float, float]:
    """Zeros by their sign."""
    return x, math.copysign(1.0, x)


# The same with float32 in the words.
REALS: dict[str, Callable[[float, float, float], int]] = {
    "add.rn.f32 R, A, B;": lambda a, b, c: bits(single(a + b)),
    "fma.rn.f32 R, A, B, C;": lambda a, b, c: bits(float((torch.tensor(a).double() * b + c).float())),
    "mul.ftz.f32 R, A, B;": lambda a, b, c: bits(single(a * b)),
    "min.f32 R, A, B;": lambda a, b, c: bits(min((x for x in (a, b) if x == x), key=order, default=math.nan)),
    "max.NaN.f32 R, A, B;": lambda a, b, c: bits(max(a, b, key=order) if a == a and b == b else math.nan),
    "neg.f32 R, A;": lambda a, b, c: bits(a) ^ 0x80000000,
    "copysign.f32 R, A, B;": lambda a, b, c: bits(math.copysign(b, a)),
    "cvt.rni.s32.f32 R, A;": lambda a, b, c: whole(a, -(2**31), 2**31 - 1, round),
    "cvt.rzi.u32.f32 R, A;": lambda a, b, c: whole(a, 0, MASK, math.trunc),
    "cvt.rn.bf16x2.f32 R, A, B;": lambda a, b, c: of_halves(b, a, torch.bfloat16),
    "cvt.rn.f16x2.f32 R, A, B;": lambda a, b, c: of_halves(b, a, torch.float16),
    "cvt.rn.f32.s32 R, 16777217;": lambda a, b, c: bits(16777216.0),
    "cvt.sat.f32.f32 R, A;": lambda a, b, c: bits(0.0 if not a > 0.0 else min(a, 1.0)),
    "{.reg .b16 h; cvt.rn.bf16.f32 h, A; add.rn.f32.bf16 R, h, B;}": lambda a, b, c: bits(single(half(a) + b)),
    "{.reg .b16 h; cvt.rn.f16.f32 h, A; sub.rn.f32.f16 R, h, B;}": lambda a, b, c: bits(
        single(half(a, torch.float16) - b)
    ),
    "{.reg .b16 g, h; cvt.rn.bf16.f32 g, A; cvt.rn.bf16.f32 h, B; fma.rn.f32.bf16 R, g, h, C;}": lambda a, b, c: bits(
        single(half(a) * half(b) + c)
    ),
    "{.reg .pred q; setp.ne.f32 q, A, B; selp.b32 R, 1, 0, q;}": lambda a, b, c: int(a != b and a == a and b == b),
    "{.reg .pred q; setp.ltu.f32 q, A, B; selp.b32 R, 1, 0, q;}": lambda a, b, c: int(a < b or a != a or b != b),
}  # fmt: skip


def module_of(body: str, registers: str = "", head: str = "") -> str:
    return f"""
.version 8.0
.target sm_80
.address_size 64
{head}
.visible .entry k(.param .u64 k_in, .param .u64 k_out)
{{
.reg .b32 %r<8>; .reg .b64 %rd<6>; {registers}
ld.param.u64 %rd0, [k_in]; ld.param.u64 %rd1, [k_out];
mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
{body}
ret;
}}
"""


def run(ptx: str, given: torch.Tensor, out: torch.Tensor, threads: int = 32) -> None:
    parameters = struct.pack("<QQ", given.data_ptr(), out.data_ptr())
    path = str(library(translate(ptx, "k")))
    compiled_module().launch_library(path, [1, 1, 1], [threads, 1, 1], 0, parameters)


@pytest.mark.parametrize("table", [INTEGERS, REALS], ids=["integers", "reals"])
def test_instructions(table: dict[str, Callable[..., int]]) -> None:
    """Every instruction on every pair of the values, with a third one that varies."""
    values = WORDS if table is INTEGERS else [bits(x) for x in FLOATS]
    n = len(values)
    words = [(values[i // n], values[i % n], values[(3 * i + i // n) % n]) for i in range(n * n)]
    given = torch.tensor(words, dtype=torch.int64).t().to(torch.int32).contiguous()
    count = n * n
    body = f"ld.global.u32 %r1, [%rd3]; ld.global.u32 %r2, [%rd3+{4 * count}]; ld.global.u32 %r3, [%rd3+{8 * count}];\n"
    for i, text in enumerate(table):
        for name, register in (("R", "%r4"), ("A", "%r1"), ("B", "%r2"), ("C", "%r3")):
            text = text.replace(f" {name},", f" {register},").replace(f" {name};", f" {register};")
        body += f"{text} st.global.u32 [%rd4+{4 * count * i}], %r4;\n"
    out = torch.zeros(len(table), count, dtype=torch.int32)
    run(module_of(body), given, out, threads=count)
    for (text, expected), row in zip(table.items(), out.tolist(), strict=True):
        for given_words, found in zip(words, row, strict=True):
            arguments = (
                given_words
                if table is INTEGERS
                else [struct.unpack("<f", struct.pack("<I", x))[0] for x in given_words]
            )
            wanted = expected(*arguments) & MASK
            both_nan = (
                table is REALS and (wanted & 0x7FFFFFFF) > 0x7F800000 and (found & 0x7FFFFFFF) > 0x7F800000
            )
            narrow_nan = "x2" in text and any(
                math.isnan(x) for x in arguments[:2]
            )  # its sign is not specified
            assert found & MASK == wanted or both_nan or narrow_nan, (
                f"{text} of {arguments}: {found & MASK:x}, not {wanted:x}"
            )


def test_parameters_of_every_spelling() -> None:
    """Names, places and sizes: what a pointer points at says nothing about its own place."""
    head = """.entry k(.param .u64 .ptr .align 1 a, .param .u64 .ptr .global .align 16 b, .param .u8 c,
    .param .align 8 .b8 d[12], .param .u64 .ptr e, .param .f32 f) { ret; }"""
    expected = [("a", 0, 8), ("b", 8, 8), ("c", 16, 1), ("d", 24, 12), ("e", 40, 8), ("f", 48, 4)]
    assert translate(head, "k").parameters == expected


def test_lanes_and_shared_memory() -> None:
    """Shuffles at the edges of segments, votes, reductions, a barrier, and shared memory by offset and by pointer."""
    body = """
mov.u32 %r1, %laneid;
shfl.sync.up.b32 %r2|p, %r1, 3, 0, -1; st.global.u32 [%rd4], %r2;
shfl.sync.down.b32 %r2|p, %r1, 3, 0x181f, -1; st.global.u32 [%rd4+128], %r2;
setp.lt.u32 p, %r1, 5; vote.sync.ballot.b32 %r2, p, -1; st.global.u32 [%rd4+256], %r2;
redux.sync.max.u32 %r2, %r1, -1; st.global.u32 [%rd4+384], %r2;
mov.u32 %r3, memory; shl.b32 %r4, %r1, 2; add.s32 %r3, %r3, %r4; st.shared.u32 [%r3], %r1;
bar.sync 0;
mov.u64 %rd5, memory; cvta.shared.u64 %rd5, %rd5; ld.u32 %r2, [%rd5+28]; st.global.u32 [%rd4+512], %r2;
"""
    out = torch.zeros(5, 32, dtype=torch.int32)
    run(module_of(body, ".reg .pred p; .shared .align 16 .b8 memory[128];"), out, out)
    lane = torch.arange(32)
    down = torch.where(lane % 8 < 5, lane + 3, lane)
    expected = [torch.where(lane < 3, lane, lane - 3), down, torch.full((32,), 31), torch.full((32,), 31),
                torch.full((32,), 7)]  # fmt: skip
    assert torch.equal(out, torch.stack(expected).int())


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, 1",
        "mbarrier.init.shared.b64 [%r1], 1",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd1, {%r2, %r3}], [%r4]",
        "bar.sync 1",
        "barrier.sync 0, 64",
        "fma.rz.f32 %r1, %r2, %r3, %r4",
        "add.rz.f32.bf16 %r1, %r2, %r3",
        "mul.rn.f32.bf16 %r1, %r2, %r3",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4}",
        "add.rn.f32 %r1, %r2, %clock",
    ],
)
def test_what_is_not_translated_is_named(instruction: str) -> None:
    with pytest.raises(Untranslated) as error:
        translate(module_of(instruction + ";"), "k")
    assert instruction.split()[0] in str(error.value) or "%clock" in str(error.value)


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.u32 %r1, [%rd3+2];", "misaligned: 4-byte load in line"),
        (
            "mov.u32 %r1, memory; st.shared.u32 [%r1+256], %r1;",
            "out of bounds: 4 bytes of shared memory at offset 256 of 128",
        ),
        ("setp.eq.u32 p, %r0, 0; @p bra $END; bar.sync 0; $END:", ""),
        ("trap;", "trap in line"),
    ],
    ids=["misaligned", "shared", "left early", "trap"],
)
def test_faults_are_errors(body: str, message: str) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    ptx = module_of(body, ".reg .pred p; .shared .align 16 .b8 memory[128];")
    if not message:  # threads that have ended are not waited for
        return run(ptx, out, out)
    with pytest.raises(RuntimeError, match=message):
        run(ptx, out, out)


def test_a_wrong_instruction_in_compiled_code_is_seen() -> None:
    """The additions of a real kernel turned into subtractions."""
    ptx = cuda_ptx("rms_norm", "sm_80")
    name = next(n for plain, n in cuda_kernels("rms_norm", "sm_80").items() if "forwardIff" in plain)
    x, scale, y, rstd = torch.randn(2, 64), torch.ones(64), torch.zeros(2, 64), torch.zeros(2)
    pointers = (x.data_ptr(), 0, scale.data_ptr(), y.data_ptr(), 0, rstd.data_ptr())
    parameters = struct.pack("<6Q2qf?3xi?", *pointers, 64, 64, 1e-6, False, 16, True)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    begin = ptx.index(f".entry {name}")
    for wrong in (False, True):
        text = ptx[:begin] + ptx[begin:].replace("add.rn.f32", "sub.rn.f32" if wrong else "add.rn.f32")
        path = str(library(translate(text, name)))
        compiled_module().launch_library(path, [2, 1, 1], [32, 1, 1], 256, parameters)
        assert torch.allclose(y, expected, rtol=1e-5) != wrong


def test_hoppers_own_instructions_stay_out() -> None:
    """Triton multiplies with wgmma on sm_90: compiled there (benchmarks/gpu_static.py), executed for sm_80 only."""
    triton = pytest.importorskip("triton")
    from dschat_kernels.ops._common import offered
    from dschat_kernels.ops.linear import linear
    from dschat_kernels.packing import PackedLinear

    assert triton is not None
    offered("triton")
    packed = PackedLinear.from_weight(torch.randn(64, 64).bfloat16(), dense=True)
    with compiled_triton("sm_90"), pytest.raises(Untranslated, match="wgmma"):
        linear(torch.randn(64, 64).bfloat16(), packed, backend="triton")
