"""docs/gpu.md: what is known of every op on every backend, and by what evidence, from the suite's own tables.

    python -m tests.backends.evidence        writes the page

A cell is what tests/backends runs (its parameters), and what the tables of compiled resources hold (whose tests compile
again and compare). test_evidence.py fails where the page says anything else.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.backends.backends import BACKENDS, Backend
from tests.backends.cases import CASES

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "gpu.md"
CUDA_TABLE = REPO / "tests" / "cuda" / "resources.json"
TRITON_TABLE = REPO / "benchmarks" / "results" / "gpu_static.json"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Sources of an op that are not called like it.
CUDA_SOURCES = {"rope": "rope_append", "fuse_lora": "lora_linear", "packed_attention": "attention_backward"}
SPECIMENS = {"packed_attention": "attention_backward"}

HEAD = """# GPU kernels without a GPU: what was executed

This page is written by `python -m tests.backends.evidence` from the tables that the tests run by, and a test fails
where it is not current. **Nothing here has run on a GPU**, and no time is given for one.

One suite, `tests/backends`, runs every op on every backend by one criterion: the error against float64 is at most twice
PyTorch's own in the same dtype, plus one rounding; gradients too; sizes odd, one, none, and around blocks, pages and
chunks; a row's bits the same in every batch and layout; what is copied, rotated or drawn equal bit for bit. On a
machine with a GPU the same cases run on it (`cuda-gpu`, `triton-gpu`).

From the strongest to the weakest:

- **Compiled code executed on the CPU**: the PTX that nvcc makes of `csrc/cuda`, or Triton of its kernels, is translated
  instruction by instruction (`tests/cuda/ptx`) and runs on fibers, one a thread, with warps, barriers, shared memory,
  cp.async, ldmatrix and mma.sync. What is not known to the translator is an error that names it. Not modelled: flushed
  subnormals, the last bits of approximate instructions, memory order between blocks, and time.
- **Source executed on the CPU**: `csrc/cuda` compiled by the host's compiler onto the same fibers, threads in random
  order; Triton's kernels in its interpreter. "Checked" is the build that sees every access: races, bounds,
  uninitialised and misaligned memory, and the traffic that the streaming kernels are held to.
- **Compiled**: no spills, and registers, shared memory, occupancy, 128-bit accesses and matrix instructions no worse
  than the checked-in tables. wgmma and tcgen05, which Triton uses on sm_90 and sm_100, are compiled only.

`make test` runs what stands in front; what follows "nightly" is a test of `make test-full`, with every size, and is no
claim that it has passed: the report of that run says so. The cells of sm_120 take few sizes there, and have all passed.
"""


def _dtypes(backend: Backend) -> str:
    def names(dtypes: tuple[torch.dtype, ...]) -> str:
        return ", ".join(SHORT[d] for d in SHORT if d in dtypes)

    more = tuple(d for d in backend.nightly if d not in backend.dtypes)
    return "; ".join(
        part for part in (names(backend.dtypes), f"nightly {names(more)}" if more else "") if part
    )


def _compiled(op: str) -> tuple[str, str]:
    """The architectures that nvcc and Triton have compiled the op for, and how many kernels."""
    kernels = json.loads(CUDA_TABLE.read_text())["kernels"]
    source = CUDA_SOURCES.get(op, op)
    of_cuda = {arch: sum(key.startswith(f"{source}: ") for key in rows) for arch, rows in kernels.items()}
    specimen = SPECIMENS.get(op, op)
    keys = [key.split("/") for key in json.loads(TRITON_TABLE.read_text()) if key.split(".")[0] == specimen]
    archs = sorted({arch for *_, arch in keys}, key=lambda arch: (not arch.startswith("sm"), len(arch), arch))
    assert all(of_cuda.values()) and archs, op
    number = max(of_cuda.values())
    return f"{', '.join(of_cuda)} ({number} kernels)", f"{', '.join(archs)} ({len(keys)} compilations)"


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, kind, of in (("CUDA C++", "cuda", 0), ("Triton", "triton", 1)):
        shown = [b for b in BACKENDS if b.backend == kind and b.device == "cpu"]
        columns = [
            f"{b.evidence.removesuffix(' executed on the CPU')}, {b.name.removeprefix(kind + '-')}"
            for b in shown
        ]
        columns = [c.replace("source, source", "source executed").replace("source, checked", "source executed, checked")
                   .replace("compiled code, ", "compiled code executed, ") for c in columns]  # fmt: skip
        lines += [
            f"\n## {title}\n",
            f"| op | {' | '.join(columns)} | compiled |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for name in CASES:
            op = name.strip("_")
            lines.append(f"| `{op}` | {' | '.join(map(_dtypes, shown))} | {_compiled(op)[of]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
