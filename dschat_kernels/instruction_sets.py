"""The instruction sets that the CPU kernels are compiled for, and which of them this machine runs.

A level is a name and what it needs; each contains the one before. Families of CPUs have levels of their own, and
`portable` in common. The standard library is enough: a wheel is built without torch.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# Families of CPUs, by platform.machine(), and their levels: (what `cpu_flags` must list, compiler flags). Each level
# contains the one before.
_Levels = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
_PORTABLE: _Levels = {"portable": ((), ())}
_X86: _Levels = {
    **_PORTABLE,
    "avx2": (("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    "avx512": (
        ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ),
    "avx512_bf16": (("avx512_bf16",), ("-mavx512bf16",)),
    "amx": (("amx_tile", "amx_bf16"), ("-mamx-tile", "-mamx-bf16")),
}
# Compilers for 64-bit ARM use NEON at every level; the define chooses what is written with it. Of two -march the last
# counts.
_ARM: _Levels = {
    **_PORTABLE,
    "neon": (("asimd", "asimddp"), ("-DDSCHAT_NEON", "-march=armv8.2-a+dotprod")),
    "neon_bf16": (("bf16",), ("-march=armv8.2-a+dotprod+bf16",)),
}
_FAMILIES = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}


def _levels() -> _Levels:
    """The levels of this machine's family of CPUs."""
    return _FAMILIES.get(platform.machine(), _PORTABLE)


def levels() -> tuple[str, ...]:
    """ISA levels of this machine's family of CPUs, weakest first."""
    return tuple(_levels())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set names as the Linux kernel lists them (so the system also saves their registers)."""
    if _levels() is _ARM:
        return _arm_flags()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:(.*)$", text, re.M)
    return frozenset(match[1].split()) if match else frozenset()


# Name in Linux -> its bit in the words AT_HWCAP (16) and AT_HWCAP2 (26), and what macOS calls it.
_ARM_FLAGS = {
    "asimd": (16, 1, "hw.optional.AdvSIMD"),
    "asimddp": (16, 20, "hw.optional.arm.FEAT_DotProd"),
    "bf16": (26, 14, "hw.optional.arm.FEAT_BF16"),
}


def _arm_flags() -> frozenset[str]:
    """What an ARM CPU has of `_ARM_FLAGS`, as the system tells a process: /proc/cpuinfo may tell of another
    CPU, where this one is made up by software."""
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return frozenset(name for name, (_, _, known) in _ARM_FLAGS.items() if _sysctl(libc, known))
        libc.getauxval.restype = ctypes.c_ulong
        libc.getauxval.argtypes = [ctypes.c_ulong]
        return frozenset(
            name for name, (word, bit, _) in _ARM_FLAGS.items() if libc.getauxval(word) >> bit & 1
        )
    except (OSError, AttributeError):  # a system that tells it otherwise
        return frozenset()


def _sysctl(libc: ctypes.CDLL, name: str) -> int:
    """A number that macOS knows by name; 0 where it does not."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return value.value


@functools.cache
def amx_permitted() -> bool:
    """Ask the Linux kernel to let this process use AMX tiles; all its threads get the permission."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    sys_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata = 158, 0x1023, 18
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return libc.syscall(sys_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0
    except (OSError, AttributeError):
        return False


def missing_for(level: str) -> list[str]:
    """What this machine lacks for an ISA level; empty where it can run it."""
    needed = [name for needs, _ in _steps(level) for name in needs]
    missing = [name for name in needed if name not in cpu_flags()]
    if level == "amx" and not missing and not amx_permitted():
        missing = ["the kernel's permission to use AMX"]
    return missing


def runnable() -> list[str]:
    """ISA levels that this machine can run, weakest first."""
    return [level for level in levels() if not missing_for(level)]


def flags(level: str) -> tuple[str, ...]:
    """Compiler flags of an ISA level, of this machine's CPUs or of another family."""
    return tuple(flag for _, given in _steps(level) for flag in given)


def _steps(level: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """A level's entry after those that it contains."""
    family = next(family for family in (_levels(), _X86, _ARM) if level in family)
    names = list(family)
    return [family[name] for name in names[: names.index(level) + 1]]
