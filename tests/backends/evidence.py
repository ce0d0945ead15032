"""docs/gpu.md: what is known of every op on every backend, and by what evidence, from the suite's own tables.

    python -m tests.backends.evidence        writes the page, and the README's table and paragraph on the GPU

A cell is what tests/backends runs (its parameters), and what the tables of compiled resources hold (whose tests compile
again and compare). What ran on a GPU is gpu_run.json, which has the fingerprints of the sources that ran
(benchmarks/gpu_sources.py): an op whose source is another now has not run. test_evidence.py fails where the page or the
README says anything else.
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_sources
from tests.backends.backends import BACKENDS, COMPILED, RAN, SOURCE, Backend
from tests.backends.cases import CASES

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "gpu.md"
README = REPO / "README.md"
RUN = Path(__file__).with_name("gpu_run.json")
TIMES = REPO / "benchmarks" / "results" / "gpu-h200.json"
CUDA_TABLE = REPO / "tests" / "cuda" / "resources.json"
TRITON_TABLE = REPO / "benchmarks" / "results" / "gpu_static.json"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Sources of an op that are not called like it.
CUDA_SOURCES = {"rope": "rope_append", "fuse_lora": "lora_linear", "packed_attention": "attention_backward"}
SPECIMENS = {"packed_attention": "attention_backward"}

HEAD = """# GPU kernels: what was executed, and where

This page is written by `python -m tests.backends.evidence` from the tables that the tests run by and the record of the
one run on a GPU (`tests/backends/gpu_run.json`), and a test fails where it is not current.

One suite, `tests/backends`, runs every op on every backend by one criterion: the error against float64 is at most twice
PyTorch's own in the same dtype, plus one rounding; gradients too; sizes odd, one, none, and around blocks, pages and
chunks; a row's bits the same in every batch and layout; what is copied, rotated or drawn equal bit for bit. On a
machine with a GPU the same cases run on it (`cuda-gpu`, `triton-gpu`).

From the strongest to the weakest:

- **Ran on a GPU**: {gpu}, {date}
  ({software}).
  A dtype without brackets passed every case of the suite; in brackets: only the shapes of `benchmarks/gpu_check.py`
  were compared with float64, by the same criterion, because a defect of the tests' own inputs, mended since, stopped
  the cases. It counts as run while the code of the op's file, and of those that it includes or imports, is what it was
  then (comments aside; `benchmarks/gpu_sources.py`); otherwise it is an **earlier version** that ran. With the kernels
  of that day CUDA graphs were recorded and replayed, greedy tokens were the CPU's, and one step each of SFT, reward
  model, PPO, GRPO, RLOO and DPO gave the CPU's numbers ({others} tests). What changed after that run, and has not run
  on a GPU since:
{changed}
- **Compiled code executed on the CPU**: the PTX that nvcc makes of `csrc/cuda`, or Triton of its kernels, is translated
  instruction by instruction (`tests/cuda/ptx`) and runs on fibers, one a thread, with warps, barriers, shared memory,
  cp.async, ldmatrix and mma.sync. What is not known to the translator is an error that names it. Not modelled: flushed
  subnormals, the last bits of approximate instructions, memory order between blocks, and time.
- **Source executed on the CPU**: `csrc/cuda` compiled by the host's compiler onto the same fibers, threads in random
  order; Triton's kernels in its interpreter. "Checked" is the build that sees every access: races, bounds,
  uninitialised and misaligned memory. It counts, of every CUDA kernel in bfloat16 and float32, the bytes moved (at most
  1.05 times the least of its tiling), the share of sectors used (90 % but for the kernels that
  `tests/cuda/test_traffic.py` names with the reason) and the passes of bank conflicts; `tests/cuda/traffic.json` has
  them, and a test fails where one is worse. The same build counts what Triton's compiled code for sm_80 does, so far
  of the kernels in `tests/triton_kernels/traffic.json`, by the same bounds; `test_triton_traffic.py` there names those
  that are missing.
- **Compiled**: no spills (Triton's compiler is that of `constraints.txt`), and registers, shared memory, occupancy,
  128-bit accesses and matrix instructions no worse than the checked-in tables. wgmma, which Triton uses on sm_90, ran
  on the GPU only, in earlier versions; tcgen05 (sm_100) is compiled only.

`make test` runs what stands in front; what follows "nightly" is a test of `make test-full`, with every size, and is no
claim that it has passed: the report of that run says so. The cells of sm_120 and of the checking build take few sizes
there.

`linear_int8` is `linear` over weights of 8 bits, `low_rank_grads` the gradients of LoRA's factors, of `lora_linear` and
of fused weights; both came after that run. No kernels for GPUs: products whose activations are quantised too
(`int8_dynamic`), whose only backends are `cpu` and `reference`. On every backend the product dy W in the gradient of
`lora_linear` by x is PyTorch's. The backward of CUDA's `token_logprobs` holds the gradients of 2048 logits a row at a
time in the dtype of the hidden states (twice where the head is trained too), Triton's 512 rows by 4096 logits in
float32.
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
    sources = tuple(f"{name}: " for name in (source, gpu_sources.ALSO.get(op)) if name)
    of_cuda = {arch: sum(key.startswith(sources) for key in rows) for arch, rows in kernels.items()}
    specimen = SPECIMENS.get(op, op)
    keys = [key.split("/") for key in json.loads(TRITON_TABLE.read_text()) if key.split(".")[0] == specimen]
    archs = sorted({arch for *_, arch in keys}, key=lambda arch: (not arch.startswith("sm"), len(arch), arch))
    assert all(of_cuda.values()) and archs, op
    number = max(of_cuda.values())
    return f"{', '.join(of_cuda)} ({number} kernels)", f"{', '.join(archs)} ({len(keys)} compilations)"


def _ran(run: dict[str, Any], kind: str, op: str) -> tuple[str, str]:
    """Dtypes of an op that ran on the GPU, as it is and in an earlier version."""
    passed = [SHORT[d] for d in SHORT if str(d).removeprefix("torch.") in run["passed"][kind].get(op, [])]
    if "bf16" not in passed and op in run["compared_bfloat16"][kind]:
        passed.append("(bf16)")
    dtypes = ", ".join(passed) or "-"
    return (dtypes, "") if op in unchanged(run, kind) else ("-", dtypes)


@functools.cache
def _fingerprints() -> dict[str, dict[str, str]]:
    return gpu_sources.fingerprints()


def unchanged(run: dict[str, Any], kind: str) -> list[str]:
    """Ops of a backend whose source is the one that ran."""
    now, then = _fingerprints()[kind], run["sources"][kind]
    return [op for op in now if now[op] == then.get(op)]


def since(run: dict[str, Any]) -> list[str]:
    """Ops that came after the run."""
    return [op for op in gpu_sources.NAMES if op not in run["sources"]["cuda"]]


def _times() -> list[str]:
    """Times of the kernels on that GPU."""
    report, run = json.loads(TIMES.read_text()), json.loads(RUN.read_text())
    peaks, (generation,) = report["peaks"], report["generation"]
    sides = ("cuda", "triton", "torch eager")
    same = {"torch eager": [row["op"] for row in report["kernels"]]}
    same |= {
        kind: [row["op"] for row in report["kernels"] if _op(row) in unchanged(run, kind)]
        for kind in sides[:2]
    }
    lines = [
        f"""
## Times on an {report["environment"]["gpu"]}

`make gpu-check`, bfloat16, the widths of a Llama of 8 B parameters: median microseconds, and the share of what the run
measured the GPU to reach ({peaks["bytes_per_s"] / 1e9:.0f} GB/s copying, {peaks["flops_per_s"] / 1e12:.0f} TFLOP/s in a
product). One run. An asterisk: an earlier version of the kernel, whose time now is not known. Triton's `linear` got
other tiles, timed apart on the same GPU (`benchmarks/NOTES.md`): 1.0 to 1.8 times as fast with few rows, 1.4 to 1.6
times with many.

| op | shape | {" | ".join(sides)} |
|---{"|---" * len(sides)}|---|"""
    ]
    for row in report["kernels"]:
        cells = [
            f"{row['sides'][side]['median_us']:.1f} ({100 * row['sides'][side]['share_of_peak']:.0f} %)"
            + " \\*" * (row["op"] not in same[side])
            for side in sides
        ]
        lines.append(f"| {row['op']} | {row['shape']} | {' | '.join(cells)} |")
    speeds = ", ".join(f"{name} {cell['tokens_per_s']:.0f}" for name, cell in generation["sides"].items())
    lines.append(
        f"\nGreedy tokens a second of a random Llama of 1.5 B parameters, batch {generation['batch']}, "
        f"{generation['prompt']} + {generation['new']} tokens, by the kernels of that day: {speeds}. Larger batches "
        "ran out of memory that digests of the weights held, which is mended; they are not measured yet."
    )
    return lines


def _op(row: dict[str, Any]) -> str:
    """The op of a row of times."""
    return re.split("[ ,]", row["op"])[0]


READMES = re.compile(r"(<!-- gpu evidence -->\n).*?(<!-- end of gpu evidence -->)", re.S)
STRONGEST = (RAN, COMPILED, SOURCE)
EVIDENCE = {RAN: "GPU", COMPILED: "compiled code", SOURCE: "source", "ran": "CPU"}


def _strongest(run: dict[str, Any], kind: str, op: str) -> str:
    """An op's dtypes on a backend by the strongest evidence of each: what ran on the GPU from this source, else what
    `make test` runs."""
    shown = [b for b in BACKENDS if b.backend == kind and b.device == "cpu"]
    if kind == "cpu":
        (cpu,) = shown
        return f"{EVIDENCE[cpu.evidence]}: {_dtypes(cpu)}"
    on_gpu = _ran(run, kind, op)[0].split(", ")
    found: dict[str, list[str]] = {evidence: [] for evidence in STRONGEST}
    for dtype in SHORT:
        name, known = SHORT[dtype], [b.evidence for b in shown if dtype in b.dtypes]
        ran = next((text for text in (name, f"({name})") if text in on_gpu), None)
        found[RAN if ran else min(known, key=STRONGEST.index)].append(ran or name)
    return "; ".join(
        f"{EVIDENCE[evidence]}: {', '.join(dtypes)}" for evidence, dtypes in found.items() if dtypes
    )


def table() -> list[str]:
    """The README's: ops that have the same evidence share a row."""
    run = json.loads(RUN.read_text())
    kinds = ("cpu", "cuda", "triton")
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in CASES:
        op = name.strip("_")
        rows.setdefault(tuple(_strongest(run, kind, op) for kind in kinds), []).append(f"`{op}`")
    lines = ["| op | C++ (cpu) | CUDA C++ (cuda) | Triton (triton) |", "| --- | --- | --- | --- |"]
    return lines + [f"| {', '.join(ops)} | {' | '.join(cells)} |" for cells, ops in rows.items()]


def readme() -> str:
    """The README with its table of evidence and its paragraph on the run on a GPU."""
    run, report = json.loads(RUN.read_text()), json.loads(TIMES.read_text())
    speeds = {name: cell["tokens_per_s"] for name, cell in report["generation"][0]["sides"].items()}
    text = (
        f"- **GPU**: passed every case of the suite (in brackets: a few shapes), once ({run['gpu']}, "
        f"{run['date']}), with the source that is here now; **the others ran in earlier versions and have not run on "
        f"a GPU again** ({', '.join(f'`{op}`' for op in since(run))} came later). "
        "With the kernels of that day CUDA graphs replayed, one step of SFT, reward model, PPO, GRPO, "
        "RLOO and DPO gave the CPU's numbers, and a random Llama of 1.5 B parameters generated "
        f"{speeds['triton, graphs']:.0f} tokens/s at batch 1 through Triton and CUDA graphs, Hugging Face's eager "
        f"generate {speeds['HF eager']:.0f}. Our products and attention were slower than cuBLAS and PyTorch's "
        "attention there."
    )
    paragraph = textwrap.fill(
        text, 124, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    old = README.read_text()
    assert READMES.search(old)
    return READMES.sub(lambda m: m[1] + "\n".join([*table(), "", paragraph, m[2]]), old)


def _bullet(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="  - ", subsequent_indent="    ")


def page() -> str:
    """The whole page."""
    run = json.loads(RUN.read_text())
    others, changed = len(run["other_tests"]), "\n".join(map(_bullet, run["changed_since"]))
    lines = [HEAD.format(**run, others=others, changed=changed)]
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
            f"| op | ran on an {run['gpu'].split()[-1]} | an earlier version ran | {' | '.join(columns)} | compiled |",
            "|---" * (len(columns) + 4) + "|",
        ]
        for name in CASES:
            op = name.strip("_")
            cells = [*_ran(run, kind, op), *map(_dtypes, shown), _compiled(op)[of]]
            lines.append(f"| `{op}` | {' | '.join(cells)} |")
    lines += _times()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme())
