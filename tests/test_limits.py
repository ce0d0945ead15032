"""Memory and CPUs within control groups: made-up /proc and /sys trees, and what is refused with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dschat.engine.hybrid_engine as engine_module
import dschat_kernels.cache as cache_module
from dschat import HybridEngine, SamplingConfig
from dschat_kernels import limits
from dschat_kernels.cache import PagedKVCache
from tests.tiny_models import build

MB = 1 << 20


def machine(root: Path, cgroup: str = "", free: int | None = 1000 * MB, **named: str) -> Path:
    """A root with /proc/meminfo, /proc/self/cgroup and files of /sys/fs/cgroup (their "/" written "__")."""
    (root / "proc/self").mkdir(parents=True)
    if free is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in named.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def files(**named: str) -> dict[str, str]:
    """memory_max -> memory.max"""
    return {
        "/".join(part.replace("_", ".", 1) for part in name.split("__")): text for name, text in named.items()
    }


def test_without_control_groups(tmp_path: Path) -> None:
    root = machine(tmp_path / "a")
    assert limits.available_memory(root) == 1000 * MB
    assert limits.cpu_quota(root) is None and limits.cpus(root) == len(os.sched_getaffinity(0))
    assert limits.available_memory(tmp_path / "nowhere") is None
    assert limits.available_memory(machine(tmp_path / "b", free=None)) is None


def test_version_2(tmp_path: Path) -> None:
    v2 = files(
        memory_max="max",
        box__memory_max=str(300 * MB),
        box__memory_current=str(120 * MB),
        box__memory_stat=f"anon {100 * MB}\ninactive_file {15 * MB}\nactive_file {5 * MB}",
        box__job__memory_max="max",
        box__job__memory_current="1",
        cpu_max="max 100000",
        box__cpu_max="150000 100000",
        box__job__cpu_max="max 100000",
    )
    root = machine(tmp_path / "a", "0::/box/job\n", **v2)
    assert limits.available_memory(root) == (300 - 120 + 15) * MB
    assert limits.cpu_quota(root) == 1.5 and limits.cpus(root) == min(2, len(os.sched_getaffinity(0)))
    full = v2 | files(
        box__memory_current=str(400 * MB), box__memory_stat="", box__job__cpu_max="20000 100000"
    )
    root = machine(tmp_path / "b", "0::/box/job\n", **full)
    assert limits.available_memory(root) == 0
    assert limits.cpu_quota(root) == 0.2 and limits.cpus(root) == 1
    # A container's mount is its own group, whatever path it has outside.
    inside = files(memory_max=str(50 * MB), memory_current=str(20 * MB), cpu_max="100000 100000")
    root = machine(tmp_path / "c", "0::/docker/1234\n", **inside)
    assert limits.available_memory(root) == 30 * MB and limits.cpus(root) == 1


def test_version_1(tmp_path: Path) -> None:
    v1 = {
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "memory/box/memory.limit_in_bytes": str(200 * MB),
        "memory/box/memory.usage_in_bytes": str(90 * MB),
        "memory/box/memory.stat": f"cache 1\ntotal_inactive_file {40 * MB}",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/box/cpu.cfs_quota_us": "100000",
        "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
    }
    root = machine(tmp_path, "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n", **v1)
    assert limits.available_memory(root) == 150 * MB
    assert limits.cpu_quota(root) == 1.0 and limits.cpus(root) == 1


def test_this_machine() -> None:
    free = limits.available_memory()
    assert free is None or free > 0
    assert 1 <= limits.cpus() <= (os.cpu_count() or 1)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(limits, "cpus", lambda: 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert limits.use_threads() == 2  # said by the user
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert limits.use_threads(2) == 2  # said by the user
        assert limits.use_threads() == 1 == torch.get_num_threads()
        monkeypatch.setattr(limits, "cpus", lambda: 4)
        assert limits.use_threads() == 1  # PyTorch chose fewer
    finally:
        torch.set_num_threads(before)


def test_a_cache_beyond_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedKVCache(2, 1, 16, 4, 2, 2)
    assert cache.bytes_per_page * 4 == cache.k.nbytes + cache.v.nbytes
    monkeypatch.setattr(cache_module, "available_memory", lambda: 4 * cache.bytes_per_page)
    PagedKVCache(2, 1, 16, 4, 2, 2)
    made: list[Any] = []
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(a))
    with pytest.raises(
        MemoryError,
        match=r"a cache of 5 pages of 64 tokens needs 0\.1 MiB and 0\.1 MiB are free: run fewer sequences at once",
    ):
        PagedKVCache(2, 1, 16, 5, 2, 2)
    assert not made


def test_packs_beyond_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HybridEngine(build("llama"))
    monkeypatch.setattr(engine_module, "available_memory", lambda: 1000)
    with pytest.raises(
        MemoryError, match=r"the packed weights need 0\.\d MiB beside the model's own and 0\.0 MiB"
    ):
        engine.generate(torch.ones(1, 2, dtype=torch.long), None, SamplingConfig(max_new_tokens=1))
    assert engine.decoder.packed_bytes == 0
    monkeypatch.undo()
    engine.flip()
    need = engine.decoder.packed_bytes
    assert need > 1000
    monkeypatch.setattr(engine_module, "available_memory", lambda: 0)
    engine.flip()  # what is there already needs nothing
