"""What this process may use of the machine: memory and CPUs, with the limits of its control groups.

A container or a batch job sees the whole machine in /proc/meminfo and in its number of cores; what it may use is in
its control groups (cgroup v2 and v1), whose every ancestor may set a limit too. Importing this needs the standard
library only.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that can be allocated without swapping and within every memory limit; None where nobody says.

    The pages of files that a group read count as free: the kernel gives them up first. `root` is for tests.
    """
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    for group, version in _groups(root, "memory"):
        limit, used = (
            ("memory.max", "memory.current")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            most = int((group / limit).read_text())
            if most < _UNLIMITED:
                found.append(max(0, most - int((group / used).read_text()) + _file_pages(group, version)))
    return min(found, default=None)


def cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may keep busy: its affinity, and the quotas of its control groups rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time that the control groups allow, or None for no limit."""
    found = []
    for group, version in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            if version == 2:
                quota, period = (int(text) for text in (group / "cpu.max").read_text().split())
            else:
                quota = int((group / "cpu.cfs_quota_us").read_text())
                period = int((group / "cpu.cfs_period_us").read_text())
            if quota > 0 and period > 0:
                found.append(quota / period)
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version of cgroups) of every group that this process is in, up to the mount, for a controller."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            mount = root / "sys/fs/cgroup"
            if number != "0" and controller not in names.split(","):
                continue
            version = 2 if number == "0" else 1
            if version == 1:
                mount /= names if (mount / names).is_dir() else controller
            # Inside a container the path may be the host's, which is not mounted: then the mount is our group.
            folder = mount / path.lstrip("/")
            yield mount, version
            while folder != mount and mount in folder.parents:
                yield folder, version
                folder = folder.parent


def _file_pages(group: Path, version: int) -> int:
    name = "inactive_file" if version == 2 else "total_inactive_file"
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def use_threads(count: int = 0) -> int:
    """Sets PyTorch's threads, which the kernels follow, and returns their number.

    0: PyTorch's own choice (the cores that it may run on, or OMP_NUM_THREADS), but no more than the control groups
    allow: threads beyond a quota are stopped in the middle of a step, while the others wait for them.
    """
    import torch

    if count:
        torch.set_num_threads(count)
    elif not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > cpus():
        torch.set_num_threads(cpus())
    return torch.get_num_threads()
