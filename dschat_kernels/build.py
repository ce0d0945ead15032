"""Compile the native CPU kernels of csrc/ when they are first needed, once per machine.

`load()` returns the compiled module or raises one readable `BuildError`; `try_load()` returns None instead,
and `status()` says why. Nothing happens at import, and torch is neither imported nor linked: kernels see raw
pointers.

The cache is `$DSCHAT_CACHE_DIR` (else `$XDG_CACHE_HOME/dschat`, else `~/.cache/dschat`):

    kernels/<name>-<key>/        one published build: the module and meta.json
    kernels/objects/<key>.o      compiled sources, so that an edited file costs one compilation
    kernels/logs/<name>.log      every command of the last build, with its output and time
    kernels/<name>.lock          flock: it dies with its process, the file itself means nothing

A key covers sources, headers, flags, compiler, Python ABI, pybind11, torch and the instruction set. A build
happens in a temporary folder and is published by one rename, so a killed builder leaves nothing that could be
loaded; meta.json holds the module's SHA-256, so a damaged file is rebuilt, not loaded.

Environment: DSCHAT_CACHE_DIR, DSCHAT_CPU_ISA (one of isa_levels()), DSCHAT_DISABLE_JIT=1 (never run
a compiler), DSCHAT_CXXFLAGS (extra flags, such as -fsanitize=undefined), CXX (the compiler), MAX_JOBS
(compilations at a time).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from dschat_kernels import limits

try:
    import fcntl
except ImportError:  # Windows: load() says so
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of a published folder; part of every key

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


def isa_levels() -> tuple[str, ...]:
    """ISA levels of this machine's family of CPUs, weakest first."""
    return tuple(_levels())


# No -ffast-math and no contraction: a result must not depend on what a compiler chooses to reorder or fuse.
_COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-pthread",
    "-Wall",
)
_LINK_FLAGS = (
    ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared", "-pthread")
)


class BuildError(RuntimeError):
    """The native kernels cannot be compiled or loaded.

    `str()` is one sentence; where a command failed, the command, its first errors and the log's path follow.
    """

    def __init__(
        self, sentence: str, *, command: Sequence[str] = (), output: str = "", log: Path | None = None
    ) -> None:
        self.sentence = sentence
        self.command = tuple(command)
        self.output = output
        self.log = log
        lines = [sentence]
        if self.command:
            lines.append(f"  command: {shlex.join(self.command)}")
        lines += [f"  | {line}" for line in _first_errors(output)]
        if log is not None:
            lines.append(f"  full log: {log}")
        super().__init__("\n".join(lines))


def _first_errors(output: str, limit: int = 6) -> list[str]:
    """The lines that say what went wrong: from the first error on, else the output's first lines."""
    lines = [line for line in output.splitlines() if line.strip()]
    first = next(
        (i for i, line in enumerate(lines) if re.search(r"error|undefined|cannot find", line, re.I)), 0
    )
    return lines[first : first + limit]


# -------------------------------------------------------------------------------------------- the environment


def cache_dir() -> Path:
    """The folder that dschat caches in (not created here)."""
    if root := os.environ.get("DSCHAT_CACHE_DIR"):
        return Path(root).expanduser().absolute()
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root).expanduser().absolute() / "dschat"
    try:
        return Path.home() / ".cache" / "dschat"
    except RuntimeError:
        raise BuildError(
            "There is no home folder to cache kernels in; set DSCHAT_CACHE_DIR to a folder."
        ) from None


def jit_disabled() -> bool:
    """DSCHAT_DISABLE_JIT is set to something other than 0."""
    return os.environ.get("DSCHAT_DISABLE_JIT", "0").strip().lower() not in ("", "0", "false", "no")


def max_jobs() -> int:
    """Compilations at a time: MAX_JOBS, else as many as there are cores and GiB of free memory."""
    if text := os.environ.get("MAX_JOBS", "").strip():
        if not text.isdecimal() or int(text) < 1:
            raise BuildError(f"MAX_JOBS is {text!r}: give a whole number from 1, or unset it.")
        return int(text)
    return max(1, min(limits.cpus(), _available_memory() >> 30))


def _available_memory() -> int:
    """Bytes that this process may still use, or a large number where nobody says."""
    free = limits.available_memory()
    return 1 << 50 if free is None else free


# -------------------------------------------------------------------------------------------- instruction set


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
    """What an ARM CPU has of `_ARM_FLAGS`, as the system tells a process: /proc/cpuinfo may be an emulator's host's."""
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


def runnable_isas() -> list[str]:
    """ISA levels that this machine can run, weakest first."""
    return [level for level in isa_levels() if not missing_for(level)]


def isa_flags(level: str) -> tuple[str, ...]:
    """Compiler flags of an ISA level, of this machine's CPUs or of another family."""
    return tuple(flag for _, flags in _steps(level) for flag in flags)


def _steps(level: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """A level's entry after those that it contains."""
    family = next(levels for levels in (_levels(), _X86, _ARM) if level in levels)
    names = list(family)
    return [family[name] for name in names[: names.index(level) + 1]]


def select_isa() -> str:
    """DSCHAT_CPU_ISA, or the best level that CPU, system and compiler have."""
    forced = os.environ.get("DSCHAT_CPU_ISA", "").strip().lower()
    runnable = runnable_isas()
    if forced and forced not in isa_levels():
        raise BuildError(f"DSCHAT_CPU_ISA is {forced!r}: give one of {', '.join(isa_levels())}, or unset it.")
    if forced and forced not in runnable:
        raise BuildError(
            f"DSCHAT_CPU_ISA is {forced!r}, but this machine lacks {', '.join(missing_for(forced))}: "
            f"give one of {', '.join(runnable)}, or unset it."
        )
    if forced:
        return forced
    with contextlib.suppress(BuildError):  # without a compiler, kernels compiled ahead of time may be there
        compiler = find_compiler()
        return next(level for level in reversed(runnable) if compiler.accepts(isa_flags(level)))
    return runnable[-1]


# --------------------------------------------------------------------------------------------------- compiler


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command's words and its version line."""

    argv: tuple[str, ...]
    version: str

    def accepts(self, flags: Sequence[str]) -> bool:
        """Whether it knows the flags (an old compiler may not know a new instruction set)."""
        command = [*self.argv, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def find_compiler() -> Compiler:
    """$CXX, else the first of c++, g++ and clang++ on PATH."""
    words = shlex.split(os.environ.get("CXX", ""))
    candidates = [words] if words else [["c++"], ["g++"], ["clang++"]]
    for argv in candidates:
        if path := shutil.which(argv[0]):
            return _identify((path, *argv[1:]), os.stat(path).st_mtime_ns)
    if words:
        raise BuildError(f"CXX is {words[0]!r}, which is not a command here: install it, or unset CXX.")
    raise BuildError(
        "No C++ compiler was found: install g++ or clang++ (Debian and Ubuntu: apt install g++), or set CXX."
    )


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("DSCHAT_CXXFLAGS", ""))


@functools.cache
def _identify(argv: tuple[str, ...], _mtime: int) -> Compiler:
    command = [*argv, "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"The compiler {argv[0]} does not run ({error}); set CXX to another.") from None
    if done.returncode:
        raise BuildError(
            f"The compiler {argv[0]} does not run; set CXX to another.",
            command=command,
            output=done.stderr or done.stdout,
        )
    return Compiler(argv, (done.stdout.splitlines() or [""])[0])


# ---------------------------------------------------------------------------------------------------- a build

Tree = Mapping[str, bytes]  # path relative to the sources' root, with "/" -> content

_THREADS = threading.RLock()  # one build at a time within a process


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed or missing
        sys.stderr.write(text)
        sys.stderr.flush()


class _CommandFailed(Exception):
    def __init__(self, command: Sequence[str], output: str) -> None:
        self.command, self.output = command, output


@dataclass
class KernelBuild:
    """One native module: its sources, how they are compiled, and where the result is kept.

    name          the module's name, which sources see as the macro DSCHAT_MODULE
    root          the folder of the sources, and an include directory
    sources       compiled, one object each; relative to root
    headers       everything else that the sources include; relative to root
    isa           the level whose flags are used
    include_dirs  further include directories; relative to root
    label         what the progress line calls the module

    What is compiled is a copy of the very bytes that went into the key, so an edit during a build cannot put
    the new code under the old key.
    """

    name: str
    root: Path
    sources: Sequence[str]
    headers: Sequence[str] = ()
    isa: str = "portable"
    include_dirs: Sequence[str] = ()
    cache: Path = field(default_factory=lambda: cache_dir() / "kernels")
    label: str = "native module"

    # ---- identity

    def read(self) -> dict[str, bytes]:
        """Every source and header as it is now."""
        try:
            return {name: (self.root / name).read_bytes() for name in sorted({*self.sources, *self.headers})}
        except OSError as error:
            raise BuildError(f"The source {error.filename} cannot be read ({error.strerror}).") from None

    @property
    def compile_flags(self) -> tuple[str, ...]:
        return (*_COMPILE_FLAGS, *isa_flags(self.isa), *_extra_flags(), f"-DDSCHAT_MODULE={self.name}")

    @property
    def link_flags(self) -> tuple[str, ...]:
        return (*_LINK_FLAGS, *_extra_flags())

    @property
    def filename(self) -> str:
        return self.name + str(sysconfig.get_config_var("EXT_SUFFIX"))

    def fingerprint(self, tree: Tree | None = None) -> str:
        """What the module does: its sources, flags and Python ABI, but not who compiled it.

        A module that was compiled ahead of time, perhaps on another machine, is used when this matches.
        """
        tree = self.read() if tree is None else tree
        return _digest(
            {
                "format": FORMAT,
                "name": self.name,
                "isa": self.isa,
                "files": {name: _sha256(content) for name, content in tree.items()},
                "compile": self.compile_flags,
                "link": self.link_flags,
                "abi": sysconfig.get_config_var("EXT_SUFFIX"),
            }
        )

    def library_flags(self) -> tuple[str, ...]:
        """Where this machine keeps the libraries that `link_flags` name."""
        return ()

    def toolchain(self) -> dict[str, Any]:
        """Whatever else could change the bytes, or whether they load."""
        compiler = find_compiler()
        return {
            "compiler": compiler.argv,
            "compiler_version": compiler.version,
            "libc": platform.libc_ver(),
            "pybind11": _version("pybind11"),
            "python": sys.version,
            "torch": _version("torch"),
        }

    def key(self, tree: Tree | None = None) -> str:
        """The cache key: fingerprint and toolchain."""
        return _digest([self.fingerprint(tree), self.toolchain()])[:20]

    def folder(self, key: str) -> Path:
        """Where the build of a key is published."""
        return self.cache / f"{self.name}-{key}"

    def intact(self, folder: Path) -> bool:
        """Whether a folder holds the very bytes that were published in it."""
        try:
            meta = json.loads((folder / "meta.json").read_text())
            return bool(meta["sha256"] == _sha256((folder / self.filename).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    # ---- load

    def load(self) -> ModuleType:
        """The module from the cache, compiled first where it must be."""
        folder, fresh = self._obtain(verbose=False)
        try:
            return self.import_from(folder)
        except ImportError as error:
            failure = error
        if not fresh:  # the bytes are those that once loaded, so the machine changed under them
            folder, _ = self._obtain(verbose=False, instead_of=folder)
            try:
                return self.import_from(folder)
            except ImportError as error:
                failure = error
        raise BuildError(f"The compiled {self.label} do not load ({failure}): is a definition missing?")

    def import_from(self, folder: Path) -> ModuleType:
        """Import the module that lies in a published folder."""
        loader = importlib.machinery.ExtensionFileLoader(self.name, str(folder / self.filename))
        spec = importlib.util.spec_from_loader(self.name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    # ---- build

    def build(self, *, verbose: bool = False) -> Path:
        """Compile unless the cache has the module, and return its folder."""
        return self._obtain(verbose=verbose)[0]

    def compile_into(self, folder: Path, *, verbose: bool = False) -> None:
        """Compile ahead of time into a folder, past the cache (setup.py does)."""
        tree = self.read()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            self._compile(Path(work), tree, Path(work) / "log", verbose=verbose, objects=None)
            self._write_meta(Path(work), tree)
            for name in (self.filename, "meta.json"):
                shutil.copyfile(Path(work) / name, folder / name)

    def _obtain(self, *, verbose: bool, instead_of: Path | None = None) -> tuple[Path, bool]:
        """The folder of the module, and whether it was compiled just now.

        Processes that want the same module take turns: the first compiles, the others find it done.
        `instead_of` is a folder that cannot be imported and is compiled anew.
        """
        if jit_disabled():
            with contextlib.suppress(BuildError):  # what lies ready may be used, compiler or not
                folder = self.folder(self.key())
                if folder != instead_of and self.intact(folder):
                    return folder, False
            raise BuildError(
                "DSCHAT_DISABLE_JIT is set and no compiled kernels lie ready: unset it, or install with "
                "DSCHAT_AOT=1 pip install ."
            )
        folder = self.folder(self.key())
        if folder != instead_of and self.intact(folder):
            return folder, False
        if fcntl is None:
            raise BuildError("Kernels are not compiled on Windows: use WSL, or the reference backend.")
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            for name in ("objects", "logs"):
                (self.cache / name).mkdir(exist_ok=True)
            with self._lock():
                tree = self.read()
                folder = self.folder(self.key(tree))
                if folder != instead_of and self.intact(folder):  # built while this process waited
                    return folder, False
                self._build_locked(folder, tree, verbose, reuse=instead_of is None)
                return folder, True
        except OSError as error:
            raise BuildError(
                f"The kernel cache {self.cache} cannot be used ({error.strerror or error}): "
                "set DSCHAT_CACHE_DIR to a folder that can be written."
            ) from error

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the build lock of this module name.

        The system drops a flock when its process ends, however it ends. The file stays; that it exists, and
        the process number in it, mean nothing.
        """
        with _THREADS, open(self.cache / f"{self.name}.lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                began = time.monotonic()
                owner = file.read(20).strip() or "?"
                _say(f"dschat: waiting for process {owner}, which compiles the {self.label} ... ")
                fcntl.flock(file, fcntl.LOCK_EX)
                _say(f"{time.monotonic() - began:.0f} s\n")
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def _build_locked(self, folder: Path, tree: Tree, verbose: bool, reuse: bool) -> None:
        for leftover in self.cache.glob(f".{self.name}-*.tmp"):  # of builders that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{self.name}-", suffix=".tmp", dir=self.cache))
        try:
            log = self.cache / "logs" / f"{self.name}.log"
            objects = self.cache / "objects"
            if not reuse:
                shutil.rmtree(objects, ignore_errors=True)
                objects.mkdir()
            self._compile(work, tree, log, verbose=verbose, objects=objects)
            self._write_meta(work, tree)
            ready = work / "ready"
            ready.mkdir()
            for name in (self.filename, "meta.json"):
                os.rename(work / name, ready / name)
            if folder.exists():  # damaged; whoever has it loaded keeps the old file
                os.rename(folder, work / "old")
            os.rename(ready, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._prune(keep=folder)

    def _write_meta(self, work: Path, tree: Tree) -> None:
        meta = {
            "name": self.name,
            "isa": self.isa,
            "sha256": _sha256((work / self.filename).read_bytes()),
            "fingerprint": self.fingerprint(tree),
            "flags": self.compile_flags,
            "toolchain": self.toolchain(),
            "files": {name: _sha256(content) for name, content in tree.items()},
        }
        (work / "meta.json").write_text(json.dumps(meta, indent=1))

    def _prune(self, keep: Path, builds: int = 8, objects: int = 300) -> None:
        """Forget all but the newest builds of this name, and all but the newest objects."""
        by_age = [
            sorted(self.cache.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
            for pattern in (f"{self.name}-*", "objects/*.o")
        ]
        for path in by_age[0][builds:]:
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)
        for path in by_age[1][objects:]:
            path.unlink(missing_ok=True)
        for path in self.cache.glob("objects/*.tmp"):  # of copies that were killed
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)

    # ---- compile

    def _closure(self, source: str, tree: Tree) -> dict[str, str]:
        """Digests of a source and of the project's headers that it includes, directly or not."""
        closure: dict[str, str] = {}
        queue = [source]
        while queue:
            name = queue.pop()
            if name in closure:
                continue
            closure[name] = _sha256(tree[name])
            for include in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', tree[name], re.M):
                for base in (posixpath.dirname(name), "", *self.include_dirs):
                    found = posixpath.normpath(posixpath.join(base, include.decode(errors="replace")))
                    if found in tree:
                        queue.append(found)
        return closure

    def _idle_defines(self, source: str, tree: Tree) -> set[str]:
        """Extra flags -DDSCHAT_X whose name neither the source nor a header of it has: its object is the same without
        them, and is shared with builds that do not give them."""
        text = b" ".join(tree[name] for name in self._closure(source, tree))
        named = ((flag, re.match(r"-D(DSCHAT_\w+)", flag)) for flag in _extra_flags())
        return {flag for flag, name in named if name and not re.search(rb"\b%s\b" % name[1].encode(), text)}

    def _include_flags(self, root: Path) -> list[str]:
        dirs = [root, *(root / name for name in self.include_dirs), Path(sysconfig.get_path("include"))]
        spec = importlib.util.find_spec("pybind11")  # finds it without importing it
        if spec is not None and spec.submodule_search_locations:
            dirs += [Path(place) / "include" for place in spec.submodule_search_locations]
        return [f"-I{path}" for path in dirs]

    def _compile_command(self, compiler: Compiler, name: str, copy: Path) -> list[str]:
        """What compiles a source, but for include directories and file names."""
        return [*compiler.argv, *self.compile_flags, f"-ffile-prefix-map={copy}=csrc"]

    def _compile(self, work: Path, tree: Tree, log: Path, *, verbose: bool, objects: Path | None) -> None:
        """Compile `tree` and link the module into `work`, taking from and adding to the object cache."""
        compiler = find_compiler()
        jobs = max_jobs()
        copy = work / "src"
        for name, content in tree.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(content)

        # What takes long starts first: the binding, which parses pybind11, then by size.
        order = sorted(self.sources, key=lambda name: (not name.startswith("bindings"), -len(tree[name])))
        target = {name: work / f"{i}.o" for i, name in enumerate(order)}
        idle = {name: self._idle_defines(name, tree) for name in order}
        stored: dict[str, Path] = {}
        if objects is not None:
            for name in order:
                flags = [flag for flag in self.compile_flags if flag not in idle[name]]
                key = _digest([name, self._closure(name, tree), flags, self.toolchain()])
                stored[name] = objects / f"{key}.o"
        taken = [name for name in order if name in stored and _copy(stored[name], target[name])]
        todo = [name for name in order if name not in taken]

        files = f"{len(todo)} file{'' if len(todo) == 1 else 's'}"
        _say(f"dschat: compiling {self.label} for {self.isa} ({files}, cached afterwards) ... ")
        began = time.monotonic()
        try:
            with (
                open(log, "w") as log_file,
                _Commands(log_file, verbose, {str(copy): str(self.root)}) as commands,
            ):

                def compile_one(name: str) -> None:
                    command = self._compile_command(compiler, name, copy)
                    command = [*(c for c in command if c not in idle[name]), *self._include_flags(copy)]
                    commands.run([*command, "-c", str(copy / name), "-o", str(target[name])])
                    if name in stored:
                        _copy(target[name], stored[name])

                def link() -> None:
                    inputs = [str(target[name]) for name in order]
                    flags = [*self.library_flags(), *self.link_flags]
                    commands.run([*compiler.argv, *inputs, *flags, "-o", str(work / self.filename)])

                commands.run_all(compile_one, todo, jobs)
                try:
                    link()
                except _CommandFailed:
                    if not taken:
                        raise
                    commands.run_all(compile_one, taken, jobs)  # an object from the cache may be damaged
                    link()
        except _CommandFailed as failed:
            _say("failed\n")
            what, again = f"Linking the {self.label}", list(failed.command)
            if "-c" in again:
                what = f"Compiling {again[again.index('-c') + 1]}"
                again[again.index("-o") + 1] = os.devnull  # the object's own folder is temporary
            raise BuildError(
                f"{what} for {self.isa} failed with {compiler.argv[0]} ({compiler.version}).",
                command=again,
                output=failed.output,
                log=log,
            ) from None
        except BaseException:
            _say("stopped\n")
            raise
        _say(f"{time.monotonic() - began:.0f} s\n")


class _Commands:
    """Runs compiler commands, several at a time, writes a log, and ends what still runs when it is left.

    `rename` maps a temporary folder to the one that a reader knows, in commands and messages.
    """

    def __init__(self, log: TextIO, verbose: bool, rename: Mapping[str, str]) -> None:
        self._log, self._verbose, self._rename = log, verbose, rename
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._starting = threading.Lock()  # a command is started and listed, or not started any more

    def __enter__(self) -> _Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        with self._starting:
            self._stopped = True
        for process in list(self._running):
            with contextlib.suppress(OSError):
                process.kill()

    def _shown(self, text: str) -> str:
        for temporary, known in self._rename.items():
            text = text.replace(temporary, known)
        return text

    def run(self, command: Sequence[str]) -> None:
        began = time.monotonic()
        try:
            with self._starting:
                if self._stopped:
                    raise _CommandFailed(command, "another command failed first")
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env={**os.environ, "LC_ALL": "C"},
                )
                self._running.add(process)
            output = self._shown(process.communicate()[0])
            self._running.discard(process)
            code = process.returncode
        except OSError as error:
            output, code = str(error), 1
        shown = [self._shown(word) for word in command]
        record = f"$ {shlex.join(shown)}\n{output}# {time.monotonic() - began:.1f} s\n"
        self._log.write(record)
        if self._verbose:
            _say("\n" + record)
        if code:
            raise _CommandFailed(shown, output)

    def run_all(self, task: Callable[[str], None], names: Sequence[str], jobs: int) -> None:
        """`task` of every name, `jobs` at a time; the first failure ends the rest."""
        with ThreadPoolExecutor(jobs) as pool:
            futures: list[Future[None]] = []
            try:
                futures += [pool.submit(task, name) for name in names]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self._stop()
                raise


def _copy(source: Path, target: Path) -> bool:
    """Copy a file so that the target is complete or absent; False where the source is not there."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        os.utime(source)  # recently used
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


# --------------------------------------------------------------------------------------- the project's module


def csrc_dir() -> Path:
    """The native sources: inside an installed package, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise BuildError(f"The kernel sources are missing from {here / 'csrc'}: install dschat again.")


def _names(root: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))


def cpu_build(isa: str) -> KernelBuild:
    """The build of csrc/cpu with its binding, for one ISA level."""
    root = csrc_dir()
    return KernelBuild(
        name=f"_dschat_cpu_{isa}",
        root=root,
        # The slowest first: the others are compiled beside it.
        sources=["bindings/cpu.cpp", *_names(root, "cpu/*.cpp")],
        headers=[*_names(root, "cpu/*.h"), *_names(root, "bindings/*.h")],
        isa=isa,
        include_dirs=["cpu"],
        label="CPU kernels",
    )


# ----------------------------------------------------------------------------------------------- CUDA kernels

CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures that the CUDA kernels are written for (90 stands for H100 and H200, 100 for B200)."""

# The house's rule for floating point is that of _COMPILE_FLAGS: nothing is fused that is not written as fmaf.
_NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-pthread")


def find_nvcc() -> Compiler:
    """nvcc of $CUDA_HOME, of PATH, of /usr/local/cuda, or of the wheel nvidia-cuda-nvcc."""
    places = [Path(root) / "bin" / "nvcc" for root in (os.environ.get("CUDA_HOME"),) if root]
    places += [Path(found) for found in (shutil.which("nvcc"),) if found]
    places += [Path("/usr/local/cuda/bin/nvcc")]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        places += sorted(Path(root).glob("*/bin/nvcc"))
    for path in places:
        if path.is_file():
            found = _identify((str(path.resolve()),), os.stat(path).st_mtime_ns)
            command = [*found.argv, "--version"]
            text = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
            release = re.search(r"release .*", text)
            return Compiler(found.argv, f"nvcc {release[0]}" if release else found.version)
    raise BuildError(
        "No nvcc was found: install the CUDA toolkit (or pip install nvidia-cuda-nvcc nvidia-cuda-crt "
        "nvidia-cuda-runtime nvidia-nvvm), or set CUDA_HOME."
    )


@dataclass
class CudaBuild(KernelBuild):
    """The build of csrc/cuda by nvcc, with its binding; `isa` is an architecture such as "sm_90"."""

    @property
    def compile_flags(self) -> tuple[str, ...]:
        """nvcc's, for every source: the binding has nothing for the GPU."""
        number = self.isa.removeprefix("sm_")
        code = f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"
        return (*_NVCC_FLAGS, code, f"-DDSCHAT_MODULE={self.name}")

    @property
    def link_flags(self) -> tuple[str, ...]:
        return ("-shared", "-pthread", "-lcudart_static", "-ldl", "-lrt")

    def library_flags(self) -> tuple[str, ...]:
        """Where the toolkit's runtime library is: nvcc itself says where its root is, since the command may be a
        wrapper elsewhere."""
        argv = find_nvcc().argv
        plan = [*argv, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
        said = subprocess.run(plan, capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr
        top = re.search(r"^#\$ TOP=(.+?)\s*$", said, re.M)
        root = Path(top[1]) if top else Path(argv[0]).parent.parent
        folders = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
        folder = next((f for f in folders if (f / "libcudart_static.a").is_file()), root / "lib64")
        return (f"-L{folder}",)

    def toolchain(self) -> dict[str, Any]:
        nvcc = find_nvcc()
        return {**super().toolchain(), "nvcc": nvcc.argv, "nvcc_version": nvcc.version}

    def _compile_command(self, compiler: Compiler, name: str, copy: Path) -> list[str]:
        host = [f"-ccbin={compiler.argv[0]}"] if len(compiler.argv) == 1 else []
        return [*find_nvcc().argv, *host, *self.compile_flags]


def cuda_build(arch: str) -> CudaBuild:
    """The build of csrc/cuda with its binding, for one architecture."""
    root = csrc_dir()
    return CudaBuild(
        name=f"_dschat_cuda_{arch}",
        root=root,
        sources=["bindings/cuda.cpp", *_names(root, "cuda/*.cu")],
        headers=[*_names(root, "cuda/*.cuh"), *_names(root, "cuda/*.h")],
        isa=arch,
        label="CUDA kernels",
    )


_cuda_modules: dict[str, ModuleType | BuildError] = {}


def load_cuda(capability: tuple[int, int]) -> ModuleType:
    """The CUDA kernels for GPUs of a compute capability: those that setup.py compiled, or built first where they must
    be.

    Raises BuildError, the same one on every call.
    """
    arch = f"sm_{capability[0]}{capability[1]}"
    with _THREADS:
        if arch not in _cuda_modules:
            try:
                if capability < (8, 0):
                    raise BuildError(
                        f"The CUDA kernels need a GPU from sm_80 (A100) on, and this one is {arch}."
                    )
                kernels = cuda_build(arch)
                _cuda_modules[arch] = _ahead_of_time(kernels) or kernels.load()
            except BuildError as error:
                _cuda_modules[arch] = error
        found = _cuda_modules[arch]
    if isinstance(found, BuildError):
        raise found
    return found


def ahead_of_time_dir() -> Path:
    """Where setup.py puts modules that were compiled ahead of time: one folder an ISA level or GPU architecture."""
    return Path(__file__).resolve().parent / "_native"


@dataclass
class _State:
    module: ModuleType | None = None
    error: BuildError | None = None
    isa: str | None = None
    source: str | None = None  # "ahead of time" or "just in time"
    path: str | None = None


_state = _State()


def _ahead_of_time(kernels: KernelBuild) -> ModuleType | None:
    """The module that setup.py compiled, if it is of these very sources and of this Python."""
    folder = ahead_of_time_dir() / kernels.isa
    try:
        if json.loads((folder / "meta.json").read_text())["fingerprint"] != kernels.fingerprint():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(ImportError):
        return kernels.import_from(folder) if kernels.intact(folder) else None
    return None


def load() -> ModuleType:
    """The compiled CPU kernels, built first where they must be; kept for the life of the process.

    Raises BuildError, the same one on every call: a failed build is not tried twice in a process.
    """
    with _THREADS:
        if _state.module is not None:
            return _state.module
        if _state.error is not None:
            raise _state.error
        try:
            _state.isa = select_isa()
            kernels = cpu_build(_state.isa)
            module = _ahead_of_time(kernels)
            _state.source = "just in time" if module is None else "ahead of time"
            if module is None:
                module = kernels.load()
            _state.path = module.__file__
        except BuildError as error:
            _state.error = error
            raise
        _state.module = module
        return module


def try_load() -> ModuleType | None:
    """The compiled CPU kernels, or None where they cannot be had; `status()` has the reason."""
    try:
        return load()
    except BuildError:
        return None


def build(verbose: bool = False) -> Path:
    """Compile the CPU kernels into the cache unless they are there, and return their folder."""
    return cpu_build(select_isa()).build(verbose=verbose)


def status() -> dict[str, Any]:
    """What became of the CPU kernels in this process; compiles nothing.

    Keys: tried, loaded, isa, source, path, reason (one sentence, or None), detail (the error in full),
    compiler, cache.
    """
    error = _state.error
    try:
        compiler = find_compiler()
        compiler_line = f"{compiler.argv[0]} ({compiler.version})"
    except BuildError as missing:
        compiler_line = f"none: {missing.sentence}"
    try:
        cache = str(cache_dir())
    except BuildError as missing:
        cache = f"none: {missing.sentence}"
    return {
        "tried": _state.module is not None or error is not None,
        "loaded": _state.module is not None,
        "isa": _state.isa,
        "source": _state.source if _state.module is not None else None,
        "path": _state.path,
        "reason": error.sentence if error else None,
        "detail": str(error) if error else None,
        "compiler": compiler_line,
        "cache": cache,
    }


if __name__ == "__main__":
    try:
        print(build(verbose="-v" in sys.argv[1:]))
    except BuildError as problem:
        sys.exit(str(problem))
