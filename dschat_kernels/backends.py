"""Which backends run on this machine, and why the others do not.

>>> import dschat_kernels as dk
>>> print(dk.backends())
backend    runs  isa     threads  why
reference  yes   -       2        PyTorch 2.13.0
cpu        yes   avx512  2        compiled just in time by /usr/bin/c++ (...)
triton     no    -       -        no GPU: torch.cuda.is_available() is False; use cpu or reference.
cuda       no    -       -        It cannot run, because PyTorch finds no CUDA GPU: ...
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dschat_kernels import build

NAMES = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Backend:
    """One row of the table: `why` says what it runs with, or why it does not run."""

    name: str
    runs: bool
    why: str
    isa: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Backends:
    """The table: iterate it, index it by name, print it."""

    rows: tuple[Backend, ...]

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Backend:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not a backend: give one of {', '.join(NAMES)}.")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by backend name, for JSON."""
        return {row.name: asdict(row) for row in self.rows}

    def __str__(self) -> str:
        head = ("backend", "runs", "isa", "threads", "why")
        cells = [head] + [
            (row.name, "yes" if row.runs else "no", row.isa or "-", str(row.threads or "-"), row.why)
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(4)]
        return "\n".join(
            "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[4]])
            for line in cells
        )

    __repr__ = __str__


def backends(*, compile: bool = True) -> Backends:
    """The table. The CPU kernels are compiled if they are not there yet, unless `compile` is False."""
    return Backends((_reference(), _cpu(compile), _triton(), _cuda(compile)))


def _reference() -> Backend:
    import torch

    return Backend("reference", True, f"PyTorch {torch.__version__}", threads=torch.get_num_threads())


def _cpu(compile: bool = True) -> Backend:
    module = build.try_load() if compile else None
    status = build.status()
    if status["loaded"]:
        module = module or build.load()
        how = f"compiled {status['source']}"
        if status["source"] == "just in time":
            how += f" by {status['compiler']}"
        return Backend("cpu", True, how, isa=module.isa, threads=module.num_threads())
    if status["reason"]:
        return Backend("cpu", False, status["reason"])
    return Backend("cpu", False, "Not loaded yet in this process; the first use compiles or loads it.")


def _triton() -> Backend:
    import torch

    from dschat_kernels import triton

    if not torch.cuda.is_available():
        return Backend("triton", False, "no GPU: torch.cuda.is_available() is False; use cpu or reference.")
    if reason := triton.too_old():
        return Backend("triton", False, f"{reason}.")
    if not triton.installed():
        return Backend("triton", False, "Triton is not installed: pip install 'dschat[triton]'.")
    return Backend("triton", True, f"compiled when first used, for {torch.cuda.get_device_name()}")


def _cuda(compile: bool = True) -> Backend:
    import torch

    from dschat_kernels import cuda

    if not compile and torch.cuda.is_available():
        return Backend("cuda", False, "Not loaded yet in this process; the first use compiles or loads it.")
    if reason := cuda.unavailable():
        return Backend("cuda", False, f"It cannot run, because {reason}.")
    major, minor = torch.cuda.get_device_capability()
    return Backend(
        "cuda", True, f"{torch.cuda.get_device_name()}, compiled by nvcc", isa=f"sm_{major}{minor}"
    )


_bandwidth: float | None = None


def read_bandwidth(repeats: int = 5, device: Any = None) -> float:
    """Bytes a second that summing 256 MiB of float32 reads, all threads; the best of some runs.

    device: a GPU's: bytes a second that copying 512 MiB, more than its caches hold, reads and writes.
    """
    import torch

    global _bandwidth
    if device is not None and device.type == "cuda":
        source = torch.ones(2**29, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * source.numel() / min(_gpu_seconds(lambda: target.copy_(source), repeats))
    data = torch.ones(64 * 2**20, device="cpu")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    _bandwidth = data.numel() * 4 / min(times)
    return _bandwidth


def _gpu_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls on the GPU, after one to warm up."""
    import torch

    work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def known_bandwidth() -> float | None:
    """What `read_bandwidth` gave last in this process, or None."""
    return _bandwidth


def matmul_peak(dtype: Any = None, repeats: int = 3, device: Any = None) -> float:
    """Floating-point operations a second of PyTorch's square matrix products, all threads; the best of some sizes and
    runs. dtype: default float32. device: a GPU's, as PyTorch is set up there (float32 without TF32, by default).
    """
    import torch

    best = 0.0
    if device is not None and device.type == "cuda":
        for size in (4096, 8192):
            a, b = (torch.rand(size, size, device=device).to(dtype or torch.float32) for _ in range(2))
            best = max(best, 2 * size**3 / min(_gpu_seconds(partial(torch.mm, a, b), repeats)))
        return best
    for size in (1024, 2048):
        a, b = (torch.rand(size, size, device="cpu").to(dtype or torch.float32) for _ in range(2))
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
