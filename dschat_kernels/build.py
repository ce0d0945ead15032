"""Compile the native CPU kernels of csrc/ when they are first needed, once per machine.

`load()` returns the compiled module or raises one readable `BuildError`; `try_load()` returns None instead, and
`status()` says why. Nothing happens at import, and torch is neither imported nor linked: kernels see raw pointers.

The cache is `$DSCHAT_CACHE_DIR` (else `$XDG_CACHE_HOME/dschat`, else `~/.cache/dschat`):

    kernels/<name>-<key>/        one published build: the module and meta.json
    kernels/objects/<key>.o      compiled sources, so that an edited file costs one compilation
    kernels/logs/                every command of the last build with its output
    kernels/<name>.lock          flock: it dies with its process, the file itself means nothing

A key covers sources, headers, flags, compiler, Python ABI, pybind11, torch and the instruction set. A build happens
in a temporary folder and is published by one rename, so a killed builder leaves nothing that could be loaded, and
meta.json holds the module's SHA-256, so a damaged file is rebuilt, not loaded.

Environment: DSCHAT_CACHE_DIR, DSCHAT_CPU_ISA (portable, avx2, avx512 or amx), DSCHAT_DISABLE_JIT=1 (never run a
compiler), DSCHAT_CXXFLAGS (extra flags, such as -fsanitize=address), CXX (the compiler), MAX_JOBS (compilations
at a time).
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
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: load() says so
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of a published folder; part of every key
ISA_LEVELS = ("portable", "avx2", "avx512", "amx")

# Instruction sets of a level: (what /proc/cpuinfo must list, compiler flags). Each level contains the one before.
_ISA_NEEDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "portable": ((), ()),
    "avx2": (("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    "avx512": (
        ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ),
    "amx": (("avx512_bf16", "amx_tile", "amx_bf16"), ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
}

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

    `str()` is one sentence, then (where a command failed) the command, its first error lines and the log's path.
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


# ---------------------------------------------------------------------------------------------- the environment


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _available_memory() >> 30))


def _available_memory() -> int:
    """Bytes that this process may still use, or a large number where nobody says."""
    available = 1 << 50
    with contextlib.suppress(OSError, ValueError, AttributeError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        if match:
            available = int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's limit (cgroup v2); "max" is not a number
        group = Path("/sys/fs/cgroup")
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        available = min(available, max(limit - used, 0))
    return available


# ------------------------------------------------------------------------------------------------ instruction set


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set names as the Linux kernel lists them (so the system also saves their registers)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:(.*)$", text, re.M)
    return frozenset(match[1].split()) if match else frozenset()


@functools.cache
def amx_permitted() -> bool:
    """Ask the Linux kernel to let this process use AMX tiles; threads started later inherit the permission."""
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
    needed = [name for step in ISA_LEVELS[: ISA_LEVELS.index(level) + 1] for name in _ISA_NEEDS[step][0]]
    missing = [name for name in needed if name not in cpu_flags()]
    if level == "amx" and not missing and not amx_permitted():
        missing = ["the kernel's permission to use AMX"]
    return missing


def runnable_isas() -> list[str]:
    """ISA levels that this machine can run, weakest first."""
    return [level for level in ISA_LEVELS if not missing_for(level)]


def isa_flags(level: str) -> tuple[str, ...]:
    """Compiler flags of an ISA level."""
    steps = ISA_LEVELS[: ISA_LEVELS.index(level) + 1]
    return tuple(flag for step in steps for flag in _ISA_NEEDS[step][1])


def select_isa() -> str:
    """DSCHAT_CPU_ISA, or the best level that CPU, system and compiler have."""
    forced = os.environ.get("DSCHAT_CPU_ISA", "").strip().lower()
    runnable = runnable_isas()
    if forced and forced not in ISA_LEVELS:
        raise BuildError(f"DSCHAT_CPU_ISA is {forced!r}: give one of {', '.join(ISA_LEVELS)}, or unset it.")
    if forced and forced not in runnable:
        raise BuildError(
            f"DSCHAT_CPU_ISA is {forced!r}, but this machine lacks {', '.join(missing_for(forced))}: "
            f"give one of {', '.join(runnable)}, or unset it."
        )
    if forced:
        return forced
    best = runnable[-1]
    if best == "amx":
        with contextlib.suppress(BuildError):
            if not find_compiler().accepts(isa_flags("amx")):
                best = "avx512"
    return best


# ------------------------------------------------------------------------------------------------------- compiler


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


# -------------------------------------------------------------------------------------------------------- a build


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed or missing
        sys.stderr.write(text)
        sys.stderr.flush()


class _Failed(Exception):
    """A command of the build failed."""

    def __init__(self, command: Sequence[str], output: str) -> None:
        self.command, self.output = command, output


@dataclass
class KernelBuild:
    """One native module: its sources, how they are compiled, and where the result is kept.

    name      the module's name; sources see it as the macro DSCHAT_MODULE
    root      folder that paths in the key are relative to, and an include directory
    sources   compiled, one object each
    headers   part of the key
    label     what the progress line calls it
    """

    name: str
    root: Path
    sources: Sequence[Path]
    headers: Sequence[Path] = ()
    isa: str = "portable"
    include_dirs: Sequence[Path] = ()
    cache: Path = field(default_factory=lambda: cache_dir() / "kernels")
    label: str = "native module"

    # ---- identity

    def snapshot(self) -> dict[str, str]:
        """SHA-256 of every source and header as they are now."""
        try:
            return {
                os.path.relpath(path, self.root): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted({*self.sources, *self.headers})
            }
        except OSError as error:
            raise BuildError(
                f"The kernel source {error.filename} cannot be read ({error.strerror})."
            ) from None

    @property
    def compile_flags(self) -> tuple[str, ...]:
        extra = shlex.split(os.environ.get("DSCHAT_CXXFLAGS", ""))
        return (*_COMPILE_FLAGS, *isa_flags(self.isa), *extra, f"-DDSCHAT_MODULE={self.name}")

    @property
    def link_flags(self) -> tuple[str, ...]:
        return (*_LINK_FLAGS, *shlex.split(os.environ.get("DSCHAT_CXXFLAGS", "")))

    def fingerprint(self, files: Mapping[str, str] | None = None) -> str:
        """What the module's behaviour depends on, apart from who compiled it: this must match to load a binary
        that was built ahead of time, perhaps elsewhere."""
        return _digest(
            {
                "format": FORMAT,
                "name": self.name,
                "isa": self.isa,
                "files": dict(self.snapshot() if files is None else files),
                "flags": [*self.compile_flags, *self.link_flags],
                "python": sysconfig.get_config_var("EXT_SUFFIX"),
            }
        )

    def toolchain(self) -> dict[str, Any]:
        """What else could change the bytes: a change of any of these means a new build."""
        compiler = find_compiler()
        return {
            "compiler": [*compiler.argv],
            "compiler_version": compiler.version,
            "pybind11": _version("pybind11"),
            "torch": _version("torch"),
            "libc": platform.libc_ver(),
            "python": sys.version,
        }

    def key(self, files: Mapping[str, str] | None = None) -> str:
        """The cache key: everything that the result depends on."""
        return _digest([self.fingerprint(files), self.toolchain()])[:20]

    @property
    def filename(self) -> str:
        return self.name + str(sysconfig.get_config_var("EXT_SUFFIX"))

    def folder(self, key: str) -> Path:
        return self.cache / f"{self.name}-{key}"

    # ---- load

    def load(self) -> ModuleType:
        """The module from the cache, compiled first where it must be."""
        key = self.key()
        if self._intact(self.folder(key)):
            # An import error of an intact file means that the machine changed under it: build anew.
            with contextlib.suppress(ImportError):
                return self.import_from(self.folder(key))
        folder = self.build(force_key=key)
        try:
            return self.import_from(folder)
        except ImportError as error:
            raise BuildError(
                f"The compiled module {folder / self.filename} does not load ({error})."
            ) from error

    def import_from(self, folder: Path) -> ModuleType:
        """Import the module that lies in a published folder."""
        path = str(folder / self.filename)
        loader = importlib.machinery.ExtensionFileLoader(self.name, path)
        spec = importlib.util.spec_from_file_location(self.name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    def _intact(self, folder: Path) -> bool:
        """Whether a published folder holds the very bytes that were published."""
        try:
            meta = json.loads((folder / "meta.json").read_text())
            return bool(meta["sha256"] == hashlib.sha256((folder / self.filename).read_bytes()).hexdigest())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    # ---- build

    def build(self, *, verbose: bool = False, force_key: str | None = None) -> Path:
        """Compile where the cache has nothing intact, and return the published folder.

        Processes that need the same module take turns: one compiles, the others wait and find it done.
        `force_key` names a build that could not be imported and is to be replaced.
        """
        if jit_disabled():
            raise BuildError(
                "DSCHAT_DISABLE_JIT is set and no compiled kernels lie ready: unset it, or install with "
                "DSCHAT_AOT=1 pip install ."
            )
        if fcntl is None:
            raise BuildError("Native kernels are not compiled on Windows: use WSL, or the reference backend.")
        unusable = force_key if force_key and self._intact(self.folder(force_key)) else None
        stamp = self._stamp(unusable)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            (self.cache / "objects").mkdir(exist_ok=True)
            (self.cache / "logs").mkdir(exist_ok=True)
            with self._lock():
                files = self.snapshot()
                folder = self.folder(self.key(files))
                if self._intact(folder) and not (
                    folder.name == f"{self.name}-{unusable}" and stamp == self._stamp(unusable)
                ):
                    return folder
                return self._compile_and_publish(files, verbose)
        except OSError as error:
            raise BuildError(
                f"The kernel cache {self.cache} cannot be written ({error.strerror}): "
                "set DSCHAT_CACHE_DIR to a folder that can."
            ) from error

    def _stamp(self, key: str | None) -> int:
        try:
            return (self.folder(key) / "meta.json").stat().st_mtime_ns if key else 0
        except OSError:
            return 0

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the build lock of this module name. The system drops it when the process ends, however it ends;
        the file stays and means nothing by itself."""
        with _THREADS, open(self.cache / f"{self.name}.lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                began = time.monotonic()
                _say(f"dschat: waiting for process {owner or '?'}, which compiles the {self.label} ... ")
                fcntl.flock(file, fcntl.LOCK_EX)
                _say(f"{time.monotonic() - began:.0f} s\n")
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def _compile_and_publish(self, files: dict[str, str], verbose: bool) -> Path:
        """With the lock held: compile, and publish under the key of the sources that were really compiled."""
        for leftover in self.cache.glob(f".{self.name}-*.tmp"):  # of builders that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        for _ in range(5):
            work = Path(tempfile.mkdtemp(prefix=f".{self.name}-", suffix=".tmp", dir=self.cache))
            try:
                log = self.cache / "logs" / f"{self.name}.log"
                self._compile(work, files, log, verbose)
                now = self.snapshot()
                if now != files:  # edited meanwhile: what was compiled has no name
                    files = now
                    continue
                return self._publish(work, files)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        raise BuildError(
            f"The kernel sources in {self.root} kept changing while they were compiled: try again."
        )

    def compile_into(self, folder: Path, *, verbose: bool = False) -> None:
        """Compile ahead of time into a folder, without the cache (used by setup.py)."""
        folder.mkdir(parents=True, exist_ok=True)
        files = self.snapshot()
        with tempfile.TemporaryDirectory() as work:
            self._compile(Path(work), files, Path(work) / "log", verbose, reuse=False)
            self._write_meta(Path(work), files)
            for name in (self.filename, "meta.json"):
                shutil.copyfile(Path(work) / name, folder / name)

    def _publish(self, work: Path, files: dict[str, str]) -> Path:
        self._write_meta(work, files)
        ready = work.with_name(work.name + ".ready.tmp")
        ready.mkdir()
        try:
            for name in (self.filename, "meta.json"):
                os.replace(work / name, ready / name)
            folder = self.folder(self.key(files))
            if folder.exists():  # damaged or not importable; whoever has it loaded keeps the old inode
                shutil.rmtree(folder)
            os.rename(ready, folder)
        finally:
            shutil.rmtree(ready, ignore_errors=True)
        self._prune(folder)
        return folder

    def _write_meta(self, work: Path, files: dict[str, str]) -> None:
        meta = {
            "name": self.name,
            "isa": self.isa,
            "fingerprint": self.fingerprint(files),
            "sha256": hashlib.sha256((work / self.filename).read_bytes()).hexdigest(),
            "flags": [*self.compile_flags],
            "toolchain": self.toolchain(),
            "files": files,
        }
        (work / "meta.json").write_text(json.dumps(meta, indent=1))

    def _prune(self, keep: Path) -> None:
        """Forget all but the newest builds and objects."""
        for pattern, limit in ((f"{self.name}-*/meta.json", 8), ("objects/*.o", 256)):
            found = sorted(self.cache.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True)
            for path in found[limit:]:
                if path.suffix == ".o":
                    path.unlink(missing_ok=True)
                elif path.parent != keep:
                    shutil.rmtree(path.parent, ignore_errors=True)

    # ---- compile

    def _includes(self) -> list[str]:
        dirs = [self.root, *self.include_dirs, Path(sysconfig.get_path("include"))]
        if spec := importlib.util.find_spec("pybind11"):
            dirs += [Path(place) / "include" for place in spec.submodule_search_locations or ()]
        return [f"-I{path}" for path in dict.fromkeys(dirs)]

    def _object_key(self, source: Path, files: Mapping[str, str]) -> str:
        """Key of one object: the source and the project headers that it includes, directly or not."""
        names = {path.resolve(): os.path.relpath(path, self.root) for path in {*self.sources, *self.headers}}
        seen: set[Path] = set()
        queue = [source.resolve()]
        while queue:
            path = queue.pop()
            seen.add(path)
            for include in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(errors="replace"), re.M):
                for base in (path.parent, self.root, *self.include_dirs):
                    found = (base / include).resolve()
                    if found in names and found not in seen:
                        queue.append(found)
        parts = {names[path]: files.get(names[path], "") for path in seen}
        return _digest([os.path.relpath(source, self.root), parts, self.compile_flags, self.toolchain()])

    def _compile(
        self, work: Path, files: dict[str, str], log: Path, verbose: bool, *, reuse: bool = True
    ) -> None:
        """Compile and link into `work`; fresh objects go to the object cache if no source changed meanwhile."""
        compiler = find_compiler()
        jobs = max_jobs()
        began = time.monotonic()
        # The binding includes pybind11 and takes longest, then big files: start with what takes long.
        order = sorted(self.sources, key=lambda p: ("bindings" not in p.parts, -p.stat().st_size))
        cached = {source: self.cache / "objects" / f"{self._object_key(source, files)}.o" for source in order}
        todo = [source for source in order if not (reuse and cached[source].is_file())]
        objects = {source: work / f"{i}-{source.stem}.o" for i, source in enumerate(order)}
        count = f"{len(todo)} file{'' if len(todo) == 1 else 's'}"
        _say(f"dschat: compiling {self.label} for {self.isa} ({count}, cached afterwards) ... ")
        if verbose:
            _say("\n")
        running: set[subprocess.Popen[str]] = set()
        with open(log, "w") as log_file:

            def run(command: list[str]) -> None:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
                running.add(process)
                output = process.communicate()[0]
                running.discard(process)
                record = f"$ {shlex.join(command)}\n{output}"
                log_file.write(record)
                if verbose:
                    _say(record)
                if process.returncode:
                    raise _Failed(command, output)

            def compile_one(source: Path) -> None:
                run(
                    [
                        *compiler.argv,
                        *self.compile_flags,
                        *self._includes(),
                        "-c",
                        str(source),
                        "-o",
                        str(objects[source]),
                    ]
                )

            pool = ThreadPoolExecutor(jobs)
            futures: dict[Future[None], Path] = {}
            try:
                futures = {pool.submit(compile_one, source): source for source in todo}
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                linked = [str(objects[s] if s in todo else cached[s]) for s in order]
                run([*compiler.argv, *linked, *self.link_flags, "-o", str(work / self.filename)])
            except _Failed as failed:
                _say("failed\n")
                sentence = self._failure(failed, compiler)
                raise BuildError(
                    sentence, command=_repeatable(failed.command), output=failed.output, log=log
                ) from None
            except BaseException:
                _say("stopped\n")
                raise
            finally:
                for future in futures:
                    future.cancel()
                for process in list(running):
                    with contextlib.suppress(OSError):
                        process.kill()
                pool.shutdown()
                if reuse and self.snapshot() == files:
                    for future, source in futures.items():
                        if future.done() and not future.cancelled() and future.exception() is None:
                            with contextlib.suppress(OSError):
                                shutil.copyfile(objects[source], work / "publish.o")
                                os.replace(work / "publish.o", cached[source])
        _say(f"{time.monotonic() - began:.0f} s\n")

    def _failure(self, failed: _Failed, compiler: Compiler) -> str:
        if "-c" not in failed.command:
            return f"Linking the {self.label} for {self.isa} failed with {compiler.argv[0]} ({compiler.version})."
        source = failed.command[failed.command.index("-c") + 1]
        return f"Compiling {source} for {self.isa} failed with {compiler.argv[0]} ({compiler.version})."


_THREADS = threading.RLock()  # one build at a time within a process


def _repeatable(command: Sequence[str]) -> list[str]:
    """A compilation as a user can repeat it: the temporary object's folder is gone."""
    command = list(command)
    if "-c" in command:
        command[command.index("-o") + 1] = os.devnull
    return command


# --------------------------------------------------------------------------------------------- the project's module


def csrc_dir() -> Path:
    """The native sources: inside an installed package, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise BuildError(
        f"The kernel sources are missing: neither {here / 'csrc'} nor {here.parent / 'csrc'} has them."
    )


def cpu_build(isa: str) -> KernelBuild:
    """The build of csrc/cpu with its binding, for one ISA level."""
    root = csrc_dir()
    return KernelBuild(
        name=f"_dschat_cpu_{isa}",
        root=root,
        sources=[*sorted((root / "cpu").glob("*.cpp")), root / "bindings" / "cpu.cpp"],
        headers=[*sorted((root / "cpu").glob("*.h")), *sorted((root / "bindings").glob("*.h"))],
        isa=isa,
        include_dirs=[root / "cpu"],
        label="CPU kernels",
    )


def ahead_of_time_dir() -> Path:
    """Where setup.py puts modules that were compiled ahead of time: one folder an ISA level."""
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
        return kernels.import_from(folder) if kernels._intact(folder) else None
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

    Keys: tried, loaded, isa, source, path, reason (one sentence, or None), detail (the whole error), compiler, cache.
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
