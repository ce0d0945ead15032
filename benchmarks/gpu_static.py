"""What can be said of the GPU kernels without a GPU: compiled code, its resources, and a bound on time.

    python -m benchmarks.gpu_static                  the tables and the roofline
    python -m benchmarks.gpu_static --check [--arch sm_80] [--only rms_norm]     compile, compare with the table
    python -m benchmarks.gpu_static --write [--only sample]     compile, and write these rows anew; rows of kernels that
                                                     no op launches any more go

Every kernel is compiled ahead of time exactly as its default launch would compile it: the ops are called on tensors of
realistic widths, and what they would have launched is recorded. The table (results/gpu_static.json) holds per kernel
and architecture: registers, spills, shared memory, accesses of 128 bits, tensor-core instructions; what they leave of
a multiprocessor's threads (occupancy) follows. The roofline divides
an op's bytes and operations by data-sheet rates: no kernel can be faster. It is a bound, not a measurement.

Printed beside it are the tables of the CUDA kernels, which tests/cuda/resources.py and tests/cuda/traffic.py write and
tests hold: what nvcc makes of them, and what they move when their source runs on the CPU.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).parent / "results" / "gpu_static.json"
CUDA_TABLES = Path(__file__).parents[1] / "tests" / "cuda"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
OTHER_DTYPES = ("sm_80", "gfx942")
"""Where float32 and float16 are compiled too; bfloat16 is compiled for all."""
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
"""Bytes of shared memory that one program can have."""


# ------------------------------------------------------------------------------------------------- specimens


@dataclass(frozen=True)
class Specimen:
    """One call of an op: `call` runs it on freshly made tensors; bytes and operations are the least it needs."""

    name: str
    call: Callable[[], Any]
    bytes: int
    operations: int
    dtype: str


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def specimens() -> list[Specimen]:
    """The ops at the widths of a Llama of 8 B parameters: 16 rows of decoding, or 512 tokens of prefill."""
    made = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        made += _specimens(dtype)
    return made


def _specimens(dtype: torch.dtype) -> list[Specimen]:
    from dschat_kernels.cache import CHUNK, LANES, PAGE
    from dschat_kernels.triton import (
        _digest,
        attention,
        attention_decode,
        bias_act,
        gated_act,
        layer_norm,
        linear,
        lora_linear,
        rms_norm,
        rope_append,
        sample,
        token_logprobs,
    )

    size, kind = dtype.itemsize, str(dtype).removeprefix("torch.")
    rows, hidden, mid, heads, kv_heads, dim, vocab, keys, rank = 16, 4096, 14336, 32, 8, 128, 32000, 1024, 16
    tokens, pages = 512, 1024 // PAGE

    def t(*shape: int) -> Tensor:
        return _empty(*shape, dtype=dtype)

    def f(*shape: int) -> Tensor:
        return _empty(*shape, dtype=torch.float32)

    def q(*shape: int) -> Tensor:
        return _empty(*shape, dtype=torch.int8)

    def i(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    qkv = (tokens, heads + 2 * kv_heads, dim)
    cache = (t(pages, kv_heads, PAGE // LANES, dim, LANES), t(pages, kv_heads, PAGE, dim))
    table = torch.arange(pages, dtype=torch.int32)[None].repeat(rows, 1)
    kv = 2 * keys * kv_heads * dim * size
    prefill = torch.tensor([0, tokens], dtype=torch.int32)
    one_each = torch.arange(rows + 1, dtype=torch.int32)
    split = qkv[1] * dim
    found = [
        ("rms_norm", lambda: rms_norm.rms_norm(t(rows, hidden), t(hidden), t(rows, hidden), 1e-6, 0.0, "llama"),
         4 * rows * hidden * size, 6 * rows * hidden),
        ("rms_norm_backward",
         lambda: rms_norm.rms_norm_backward(t(tokens, hidden), None, t(tokens, hidden), t(hidden), f(tokens), 0.0,
                                            "llama", True), 3 * tokens * hidden * size, 12 * tokens * hidden),
        ("layer_norm", lambda: layer_norm.layer_norm(t(rows, hidden), t(hidden), t(hidden), t(rows, hidden), 1e-5),
         4 * rows * hidden * size, 8 * rows * hidden),
        ("layer_norm_backward",
         lambda: layer_norm.layer_norm_backward(t(tokens, hidden), None, t(tokens, hidden), t(hidden), f(tokens),
                                                f(tokens), True, True),
         3 * tokens * hidden * size, 14 * tokens * hidden),
        ("bias_act", lambda: bias_act.bias_act(t(rows, mid), t(mid), "gelu_tanh"), 2 * rows * mid * size,
         20 * rows * mid),
        ("bias_act_backward",
         lambda: bias_act.bias_act_backward(t(tokens, mid), t(tokens, mid), t(mid), "gelu_tanh", True),
         3 * tokens * mid * size, 40 * tokens * mid),
        ("gated_act", lambda: gated_act.gated_act(t(rows, 2 * mid), None, None, None, "silu"),
         3 * rows * mid * size, 8 * rows * mid),
        ("gated_act_backward",
         lambda: gated_act.gated_act_backward(t(tokens, mid), t(tokens, mid), t(tokens, mid), None, None, "silu",
                                              False, False), 5 * tokens * mid * size, 16 * tokens * mid),
        ("rope", lambda: rope_append.rope(t(tokens, heads, dim), f(keys, dim // 2), f(keys, dim // 2), i(tokens), dim,
                                          "half", False), 2 * tokens * heads * dim * size, 6 * tokens * heads * dim),
        ("rope_append",
         lambda: rope_append.rope_append(*t(*qkv).split([heads, kv_heads, kv_heads], 1), f(keys, dim // 2),
                                         f(keys, dim // 2), i(tokens), i(tokens), *cache, table, dim, "half"),
         2 * tokens * split * size, 6 * tokens * split),
        ("attention", lambda: attention.attention(t(tokens, heads, dim), *cache, table[:1], prefill, prefill[1:], None,
                                                  0.1, None, None, None),
         (2 * tokens * heads * dim + 2 * tokens * kv_heads * dim) * size, 2 * tokens * tokens * heads * dim),
        ("attention_backward",
         lambda: attention.packed_attention_backward(t(tokens, heads, dim), t(tokens, heads, dim),
                                                     t(tokens, kv_heads, dim), t(tokens, kv_heads, dim), prefill,
                                                     0.1, None, None, None),
         (3 * tokens * heads * dim + 4 * tokens * kv_heads * dim) * size, 5 * tokens * tokens * heads * dim),
        ("attention_decode",
         lambda: attention_decode.attention_decode(t(rows, heads, dim), *cache, table, one_each,
                                                   torch.full((rows,), keys, dtype=torch.int32), None, 0.1, None, None,
                                                   None, 0),
         rows * (kv + 2 * heads * dim * size), 4 * rows * keys * heads * dim),
        ("linear", lambda: linear.linear(t(rows, hidden), t(hidden, hidden), None, hidden, hidden, False, "none",
                                         t(rows, hidden), False),
         (hidden * hidden + 3 * rows * hidden) * size, 2 * rows * hidden * hidden),
        ("linear_gated", lambda: linear.linear(t(rows, hidden), t(2 * mid, hidden), None, mid, hidden, True, "silu",
                                               None, False),
         (2 * mid * hidden + rows * (hidden + mid)) * size, 4 * rows * hidden * mid),
        ("lora_linear", lambda: lora_linear.lora_linear(t(tokens, hidden), t(hidden, hidden), None, f(rank, hidden),
                                                        f(hidden, rank), 1.0),
         (hidden * hidden + 2 * tokens * hidden) * size, 2 * tokens * hidden * (hidden + 2 * rank)),
        ("linear_prefill", lambda: linear.linear(t(4096, hidden), t(hidden, hidden), None, hidden, hidden, False,
                                                 "none", None, False),
         (hidden * hidden + 2 * 4096 * hidden) * size, 2 * 4096 * hidden * hidden),
        ("linear_int8", lambda: linear.linear_int8(t(rows, hidden), q(hidden, hidden), 1, f(hidden), None, hidden,
                                                   hidden, False, "none", t(rows, hidden), False),
         hidden * hidden + 3 * rows * hidden * size, 2 * rows * hidden * hidden),
        ("linear_int8_gated", lambda: linear.linear_int8(t(rows, hidden), q(2 * mid, hidden), 1, f(2 * mid), None, mid,
                                                         hidden, True, "silu", None, False),
         2 * mid * hidden + rows * (hidden + mid) * size, 4 * rows * hidden * mid),
        ("linear_int8_prefill", lambda: linear.linear_int8(t(4096, hidden), q(hidden, hidden), 1, f(hidden), None,
                                                           hidden, hidden, False, "none", None, False),
         hidden * hidden + 2 * 4096 * hidden * size, 2 * 4096 * hidden * hidden),
        ("digest", lambda: _digest.digest(torch.zeros(2**20, dtype=torch.int32)), 2**22, 2**22),
        ("fuse_lora", lambda: lora_linear.fuse_lora(t(hidden, hidden), f(rank, hidden), f(hidden, rank), 1.0),
         2 * hidden * hidden * size, 2 * hidden * hidden * rank),
        ("low_rank_grads",
         lambda: lora_linear.low_rank_grads(t(tokens, hidden), t(tokens, hidden), f(rank, hidden), f(hidden, rank),
                                            1.0),
         4 * tokens * hidden * size, 8 * tokens * hidden * rank),
        ("sample", lambda: sample.sample(t(rows, vocab), 1.0, 50, 0.9, 0.01, 2**40, torch.zeros(rows).long(),
                                         torch.zeros(rows).long()), rows * vocab * size, 4 * rows * vocab),
        ("sample_all", lambda: sample.sample(t(rows, vocab), 1.0, 0, 1.0, 0.0, 2**40, torch.zeros(rows).long(),
                                             torch.zeros(rows).long()), rows * vocab * size, 4 * rows * vocab),
        ("token_logprobs",
         lambda: token_logprobs.token_logprobs(t(tokens, hidden), t(vocab, hidden), torch.zeros(tokens).long(), None,
                                               1.0, None, True),
         (vocab * hidden + tokens * hidden) * size, 2 * tokens * hidden * vocab),
        ("token_logprobs_backward",
         lambda: token_logprobs.token_logprobs_backward(f(tokens), None, t(tokens, hidden), t(4096, hidden),
                                                        torch.zeros(tokens).long(), None, f(tokens), f(tokens), 1.0,
                                                        None, [True, True, False]),
         2 * (4096 * hidden + tokens * hidden) * size, 6 * tokens * hidden * 4096),
    ]  # fmt: skip
    assert CHUNK % PAGE == 0
    return [Specimen(f"{name}.{kind}", call, moved, work, kind) for name, call, moved, work in found]


def launches(specimen: Specimen) -> dict[str, Any]:
    """What a call launches, by the name of the kernel (another variant of a kernel: NAME.2); each once."""
    from dschat_kernels.triton import _launch, sample

    found: dict[str, Any] = {}

    def record(this: Any) -> None:
        name = this.kernel.fn.__name__
        same = [variant(other) for key, other in found.items() if key.partition(".")[0] == name]
        if variant(this) not in same:
            found[f"{name}.{len(same) + 1}" if same else name] = this

    before, _launch.run = _launch.run, record
    raises, sample.raise_for_bad_rows = sample.raise_for_bad_rows, lambda tokens, temperature: None
    try:
        specimen.call()
    finally:
        _launch.run, sample.raise_for_bad_rows = before, raises
    return found


def variant(launch: Any) -> tuple[Any, ...]:
    """What makes another program of a kernel: constants, which arguments are there, and their dtypes."""
    values = {**launch.arguments, **launch.config.blocks}
    kinds = []
    for parameter in launch.kernel.params:
        value = values[parameter.name]
        if isinstance(value, Tensor):
            kinds.append(value.dtype)
        else:
            kinds.append(value if parameter.is_constexpr or value is None else type(value))
    return (*kinds, launch.config.num_warps, launch.config.num_stages, launch.config.fp_fusion)


# --------------------------------------------------------------------------------------------------- compile

_POINTEE = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int32: "i32",
    torch.int64: "i64", torch.int8: "i8",
}  # fmt: skip


def source(launch: Any) -> Any:
    """What triton.compile takes: types, constants, and what a launch would specialise on."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    values = {**launch.arguments, **launch.config.blocks}
    for parameter in launch.kernel.params:
        value, place = values[parameter.name], (parameter.num,)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _POINTEE[value.dtype]
            attributes[place] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
        elif type(value) is int:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Any, arch: str) -> dict[str, Any]:
    """Resources of a launch's kernel compiled for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {
        "num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages,
        "enable_fp_fusion": launch.config.fp_fusion,
    }  # fmt: skip
    kernel = triton.compile(source(launch), target=target, options=options)
    found = {"warps": launch.config.num_warps, "shared": kernel.metadata.shared}
    return {**found, **(_of_amdgcn(kernel.asm["amdgcn"]) if amd else _of_cubin(kernel.asm["cubin"]))}


# Of a multiprocessor: threads, blocks, registers, and bytes of shared memory of which each block reserves 1 KiB.
MULTIPROCESSOR = {
    "sm_80": (2048, 32, 65536, 167936),
    "sm_90": (2048, 32, 65536, 233472),
    "sm_100": (2048, 32, 65536, 233472),
    "sm_120": (1536, 24, 65536, 102400),
}


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """The share of an NVIDIA multiprocessor's threads that blocks of a kernel can fill."""
    most_threads, most_blocks, all_registers, all_shared = MULTIPROCESSOR[arch.removesuffix("a")]
    warps = -(-threads // 32)
    of_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are given out in units of 256 ...
    by_registers = all_registers // of_warp // 4 * 4 // warps  # ... in four partitions
    by_shared = all_shared // (-(-(shared + 1024) // 128) * 128)
    blocks = min(most_blocks, by_registers, by_shared, most_threads // (warps * 32))
    return blocks * warps * 32 / most_threads


def nvidia_tool(name: str) -> Path | None:
    """A tool of Triton's wheel."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "backends" / "nvidia" / "bin" / name


def sass_counts(text: str) -> dict[str, int]:
    """What a disassembled kernel has of local memory, 128-bit global accesses, and matrix instructions."""
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.M)
    count = collections.Counter(code)

    def number(*starts: str, having: str = "") -> int:
        return sum(n for name, n in count.items() if name.startswith(starts) and having in name)

    return {
        "local": number("STL", "LDL"),
        "wide": number("LDG.", "STG.", "LDGSTS.", having=".128"),
        "tensor": number("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "QMMA"),
    }


def _of_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers and stack from the resource section; instructions from the disassembly."""
    tool = nvidia_tool("cuobjdump")
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = {
            flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        }
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text["-res-usage"])
    assert usage is not None
    counts = sass_counts(text["-sass"])
    return {
        "registers": int(usage[1]),
        "spills": counts["local"] + int(usage[2]),
        "wide": counts["wide"],
        "tensor": counts["tensor"],
    }


def _of_amdgcn(text: str) -> dict[str, Any]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "wide": len(re.findall(r"\b(?:global|buffer)_(?:load|store)_dwordx4\b", text)),
        "tensor": len(re.findall(r"\bv_mfma_", text)),
    }


def archs_of(specimen: Specimen, archs: tuple[str, ...] = ARCHS) -> list[str]:
    """Those of `archs` that the specimen is compiled for."""
    return [arch for arch in archs if specimen.dtype == "bfloat16" or arch in OTHER_DTYPES]


def keys() -> list[str]:
    """specimen/kernel/architecture of every row that belongs into the table; nothing is compiled."""
    return [
        f"{specimen.name}/{kernel.strip('_')}/{arch}"
        for specimen in specimens()
        for kernel in launches(specimen)
        for arch in archs_of(specimen)
    ]


def strangers(table: dict[str, Any]) -> list[str]:
    """What the table has too much or too little of."""
    expected = set(keys())
    wrong = [f"{key} is launched by nothing: {_how(key)}" for key in sorted(table.keys() - expected)]
    return wrong + [_missing(key) for key in sorted(expected - table.keys())]


def _missing(key: str) -> str:
    return f"{key} is not in {TABLE.name}: {_how(key)}"


def _how(key: str) -> str:
    return f"run python -m benchmarks.gpu_static --write --only {key.split('/')[0]}"


def measure(archs: tuple[str, ...], only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(specimen/kernel/architecture, resources), of the specimens whose name starts with `only`."""
    for specimen in specimens():
        if not specimen.name.startswith(only):
            continue
        for name, launch in launches(specimen).items():
            for arch in archs_of(specimen, archs):
                yield f"{specimen.name}/{name.strip('_')}/{arch}", compile_for(launch, arch)


def problems(key: str, found: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What is worse than the table says, or never allowed."""
    expected = table.get(key)
    if expected is None:
        return [_missing(key)]
    wrong = []
    if found["spills"]:
        wrong.append(f"{key} has {found['spills']} spills")
    if found["shared"] > min(expected["shared"], SHARED_LIMIT[key.rpartition("/")[2]]):
        wrong.append(f"{key} takes {found['shared']} bytes of shared memory, {expected['shared']} before")
    if found["registers"] > expected["registers"] + 8:
        wrong.append(f"{key} takes {found['registers']} registers, {expected['registers']} before")
    before, now = row_occupancy(key, expected), row_occupancy(key, found)
    if before is not None and now is not None and now < before and not wrong:  # else that is why
        wrong.append(f"{key} fills {now:.0%} of a multiprocessor, {before:.0%} before")
    for name, what in (("wide", "128-bit accesses"), ("tensor", "tensor-core instructions")):
        if expected[name] and not found[name]:
            wrong.append(f"{key} has lost its {what}")
    return wrong


def row_occupancy(key: str, row: dict[str, Any]) -> float | None:
    """Of a row of the table; None on AMD, whose rules are others."""
    arch = key.rpartition("/")[2]
    if arch not in MULTIPROCESSOR:
        return None
    return occupancy(arch, row["registers"], 32 * row["warps"], row["shared"])


# -------------------------------------------------------------------------------------------------- roofline


@dataclass(frozen=True)
class Gpu:
    """Data-sheet rates, dense: memory in GB/s, matrix products in TFLOP/s by dtype."""

    name: str
    memory: float
    narrow: float
    wide: float


GPUS = (
    Gpu("A100 SXM 80GB", 2039, 312, 19.5),
    Gpu("H100 SXM", 3350, 989, 67),
    Gpu("H200 SXM", 4800, 989, 67),
    Gpu("B200", 8000, 2250, 75),
    Gpu("MI300X", 5300, 1307, 163),
)


def bound(specimen: Specimen, gpu: Gpu) -> float:
    """Microseconds below which the op cannot run: its bytes, or its operations, at the data sheet's rate."""
    rate = gpu.wide if specimen.dtype == "float32" else gpu.narrow
    return max(specimen.bytes / gpu.memory / 1e3, specimen.operations / rate / 1e6)


def print_table(table: dict[str, Any]) -> None:
    columns = ("registers", "spills", "shared", "wide", "tensor", "warps")
    print(f"{'kernel':56}" + "".join(f"{name:>10}" for name in (*columns, "occupancy")))
    for key, row in table.items():
        filled = row_occupancy(key, row)
        cells = [*(str(row[name]) for name in columns), "" if filled is None else f"{filled:.0%}"]
        print(f"{key:56}" + "".join(f"{cell:>10}" for cell in cells))
    print_cuda()
    print("\nLower bounds on time in microseconds, from data-sheet rates: not measured, on any GPU.")
    print(f"{'op':34}" + "".join(f"{gpu.name:>16}" for gpu in GPUS))
    for specimen in specimens():
        print(f"{specimen.name:34}" + "".join(f"{bound(specimen, gpu):>16.2f}" for gpu in GPUS))


def traffic_lines(table: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The rows of tests/cuda/traffic.py as text."""
    columns = ("least", "moved", "once", "asked", "efficiency", "ways", "worst")
    lines = [f"{'kernel':65} {'case':60}" + "".join(f"{name:>11}" for name in columns)]
    for kernel, rows in table.items():
        for case, row in rows.items():
            lines.append(f"{kernel:65} {case:60}" + "".join(f"{row[name]:>11}" for name in columns))
    return lines


def print_cuda() -> None:
    """The tables of the CUDA kernels."""
    resources = json.loads((CUDA_TABLES / "resources.json").read_text())
    columns = ("registers", "spills", "shared", "wide", "tensor", "threads", "occupancy")
    print(f"\n{'CUDA kernel, ' + resources['nvcc']:75}" + "".join(f"{name:>10}" for name in columns))
    for arch, rows in resources["kernels"].items():
        for kernel, row in rows.items():
            cells = "".join(f"{row[name]:>10}" for name in columns)
            print(f"{f'{kernel} {arch}':75}{cells}")
    print(
        "\nWhat the CUDA kernels move, counted on the CPU: bytes over the least, percentages of sectors, bank ways."
    )
    print(*traffic_lines(json.loads((CUDA_TABLES / "traffic.json").read_text())), sep="\n")


def write(table: dict[str, Any]) -> None:
    TABLE.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compile and compare with the table")
    parser.add_argument(
        "--write", action="store_true", help="compile and write these rows; those of former kernels go"
    )
    parser.add_argument(
        "--arch", choices=ARCHS, action="append", help="architecture to compile for; default all"
    )
    parser.add_argument("--only", default="", help="specimens whose name starts so")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if not (given.check or given.write):
        print_table(table)
        return 0
    if given.write:
        present = set(keys())
        table = {key: row for key, row in table.items() if key in present}
        write(table)
    wrong, done = [], 0
    for key, found in measure(tuple(given.arch or ARCHS), given.only):
        done += 1
        if given.write:
            table[key] = found
            write(table)
        wrong += problems(key, found, table)
    wrong += [line for line in strangers(table) if line not in wrong]
    print(f"{done} kernels compiled, {len(wrong)} problems", *wrong, sep="\n")
    return 1 if wrong or not (done or given.write) else 0


if __name__ == "__main__":
    sys.exit(main())
