"""The build of native kernels, on a source tree of two tiny files: keys, locks, kills, damage, errors."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dschat_kernels import build, instruction_sets
from dschat_kernels.build import BuildError, KernelBuild

REPO = Path(__file__).resolve().parent.parent
NAME = "_dschat_fake"

MODULE = """
#include <Python.h>
#include "value.h"

int helper();

static PyObject* value(PyObject*, PyObject*) { return PyLong_FromLong(VALUE + helper()); }
static PyObject* isa(PyObject*, PyObject*) {
#if defined(__AVX512F__)
  return PyUnicode_FromString("avx512");
#elif defined(__AVX2__)
  return PyUnicode_FromString("avx2");
#elif defined(DSCHAT_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return PyUnicode_FromString("neon_bf16");
#elif defined(DSCHAT_NEON) && defined(__ARM_FEATURE_DOTPROD)
  return PyUnicode_FromString("neon");
#else
  return PyUnicode_FromString("portable");
#endif
}
static PyMethodDef methods[] = {
    {"value", value, METH_NOARGS, nullptr}, {"isa", isa, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fake", nullptr, -1, methods};
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)
PyMODINIT_FUNC INIT(DSCHAT_MODULE)() { return PyModule_Create(&definition); }
"""

# Stands in for the compiler: notes every call, and waits at the stage that the file HOLD names.
WRAPPER = """#!/bin/sh
case "$*" in
  *--version*) echo "fake compiler 1.0"; exit 0;;
  *" -c "*) stage=compile;;
  *) stage=link;;
esac
echo "$stage $*" >> {calls}
while [ -e {hold} ] && [ "$(cat {hold})" = $stage ]; do
  echo $stage > {held}
  sleep 0.02
done
exec c++ "$@"
"""

PROGRAM = """
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
from dschat_kernels.build import KernelBuild
module = KernelBuild({name!r}, Path({root!r}), ["main.cpp", "lib/helper.cpp"], ["value.h"],
                     cache=Path({cache!r}), label="fake kernels").load()
print(module.value())
"""


@dataclass
class Project:
    """A source tree, its cache, and a compiler that can be watched and held."""

    root: Path
    cache: Path
    calls_file: Path
    hold_file: Path
    held_file: Path
    compiler: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def build(self, **changes: object) -> KernelBuild:
        settings = {
            "name": NAME,
            "root": self.root,
            "sources": ["main.cpp", "lib/helper.cpp"],
            "headers": ["value.h"],
            "cache": self.cache,
            "label": "fake kernels",
        }
        return KernelBuild(**{**settings, **changes})  # type: ignore[arg-type]

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def calls(self) -> list[str]:
        """What the compiler was asked for, e.g. ["main.cpp", "helper.cpp", "link"]."""
        if not self.calls_file.exists():
            return []
        found = []
        for line in self.calls_file.read_text().splitlines():
            match = re.search(r" -c \S*/(\w+\.cpp)", line)
            found.append(match[1] if match else "link")
        return found

    def published(self) -> list[Path]:
        return sorted(self.cache.glob(f"{NAME}-*"))

    def leftovers(self) -> list[Path]:
        return [path for path in self.cache.rglob("*") if path.name.endswith(".tmp")]

    def start(self, before: str = "") -> subprocess.Popen[str]:
        """Another process that loads the module and prints its value; `before` is code that it runs first."""
        program = before + PROGRAM.format(name=NAME, root=str(self.root), cache=str(self.cache))
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        self.processes.append(process)
        return process

    def hold(self, stage: str) -> None:
        self.held_file.unlink(missing_ok=True)
        self.hold_file.write_text(stage)

    def release(self) -> None:
        self.hold_file.unlink(missing_ok=True)

    def wait_held(self) -> None:
        wait_until(self.held_file.exists)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process writes to stderr, up to and with `text`."""
    assert process.stderr is not None
    seen = ""
    while not seen.endswith(text):
        assert select.select([process.stderr], [], [], 60)[0], f"the process said only {seen!r}"
        byte = os.read(process.stderr.fileno(), 1)
        assert byte, f"the process ended after {seen!r}"
        seen += byte.decode()
    return seen


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    for name in ("DSCHAT_CPU_ISA", "DSCHAT_DISABLE_JIT", "DSCHAT_CXXFLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    made = Project(
        root=tmp_path / "src",
        cache=tmp_path / "cache",
        calls_file=tmp_path / "calls",
        hold_file=tmp_path / "hold",
        held_file=tmp_path / "held",
        compiler=tmp_path / "cxx",
    )
    made.write("main.cpp", MODULE)
    made.write("value.h", "#define VALUE 40\n")
    made.write("lib/helper.cpp", "int helper() { return 2; }\n")
    made.compiler.write_text(WRAPPER.format(calls=made.calls_file, hold=made.hold_file, held=made.held_file))
    made.compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(made.compiler))
    yield made
    made.release()
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------- build and reuse


def test_first_load_compiles_and_the_next_process_does_not(
    project: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    assert project.build().load().value() == 42
    assert sorted(project.calls()) == ["helper.cpp", "link", "main.cpp"]
    line = capfd.readouterr().err
    assert re.fullmatch(
        r"dschat: compiling fake kernels for portable \(2 files, cached afterwards\) \.\.\. \d+ s\n", line
    )
    out, err = finish(project.start())
    assert (out, err) == ("42", "")
    assert len(project.calls()) == 3
    assert project.leftovers() == []


def test_two_processes_build_at_once(project: Project) -> None:
    project.hold("compile")
    first = project.start()
    project.wait_held()
    second = project.start()
    # The second one must be seen waiting before the first may go on, or this would test nothing.
    told = read_until(second, " ... ")
    project.release()
    assert finish(first)[0] == "42"
    out, rest = finish(second)
    assert out == "42"
    assert told == f"dschat: waiting for process {first.pid}, which compiles the fake kernels ... "
    assert re.fullmatch(r"\d+ s\n", rest)
    assert sorted(project.calls()) == ["helper.cpp", "link", "main.cpp"]
    assert len(project.published()) == 1


@pytest.mark.parametrize("stage", ["compile", "link"])
def test_killed_builder_leaves_nothing_that_loads(project: Project, stage: str) -> None:
    project.hold(stage)
    victim = project.start()
    project.wait_held()
    victim.send_signal(signal.SIGKILL)
    victim.wait(timeout=60)
    assert project.published() == []
    project.release()
    out, err = finish(project.start())
    assert out == "42"
    assert "waiting" not in err
    assert len(project.published()) == 1
    assert project.leftovers() == []


def test_builder_killed_while_publishing(project: Project) -> None:
    """Nothing is seen under the final name until the rename that brings all of it."""
    die_at_last = """
import os
rename = os.rename
def watched(source, target):
    if "/_dschat_fake-" in str(target):
        os.kill(os.getpid(), 9)
    rename(source, target)
os.rename = watched
"""
    victim = project.start(die_at_last)
    assert victim.wait(timeout=60) == -signal.SIGKILL
    assert sorted(project.calls()) == ["helper.cpp", "link", "main.cpp"]
    assert project.published() == []
    assert finish(project.start())[0] == "42"
    assert project.leftovers() == []


def test_a_waiting_process_takes_over_from_a_killed_builder(project: Project) -> None:
    project.hold("compile")
    victim = project.start()
    project.wait_held()
    heir = project.start()
    read_until(heir, "waiting")
    victim.send_signal(signal.SIGKILL)
    project.release()
    assert finish(heir)[0] == "42"


def test_interrupted_builder_stops_its_compiler(project: Project) -> None:
    project.hold("compile")
    process = project.start()
    project.wait_held()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped" in err
    assert project.published() == [] and project.leftovers() == []


@pytest.mark.parametrize(
    "content", ["", "999999999\n", f"{os.getpid()}\n"], ids=["empty", "nobody's", "this process'"]
)
def test_stale_lock_file_means_nothing(project: Project, content: str) -> None:
    project.cache.mkdir()
    (project.cache / f"{NAME}.lock").write_text(content)
    out, err = finish(project.start())
    assert out == "42"
    assert "waiting" not in err


# --------------------------------------------------------------------------------------------------- the key


def test_a_changed_header_is_a_new_build_of_what_includes_it(project: Project) -> None:
    old = project.build()
    old_key = old.key()
    assert old.load().value() == 42
    project.write("value.h", "#define VALUE 50\n")
    assert old.key() != old_key
    assert project.build().load().value() == 52
    # helper.cpp does not include value.h, so its object was reused.
    assert sorted(project.calls()[3:]) == ["link", "main.cpp"]
    project.write("value.h", "#define VALUE 40\n")
    assert project.build().key() == old_key
    assert project.build().load().value() == 42
    assert len(project.calls()) == 5


def test_a_define_that_a_source_does_not_name_is_no_new_object(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("main.cpp", MODULE.replace("VALUE +", "VALUE + DSCHAT_MORE +"))
    monkeypatch.setenv("DSCHAT_CXXFLAGS", "-DDSCHAT_MORE=0")
    first = project.build().load().value()
    monkeypatch.setenv("DSCHAT_CXXFLAGS", "-DDSCHAT_MORE=1 -DDSCHAT_NOWHERE")
    assert project.build().load().value() == first + 1
    assert sorted(project.calls()[3:]) == ["link", "main.cpp"]
    monkeypatch.setenv("DSCHAT_CXXFLAGS", "-DDSCHAT_MORE=1 -DNDEBUG")  # the system's headers may know it
    assert project.build().load().value() == first + 1
    assert sorted(project.calls()[5:]) == ["helper.cpp", "link", "main.cpp"]


def test_indirect_and_relative_includes_count(project: Project) -> None:
    project.write("main.cpp", MODULE.replace('"value.h"', '"lib/outer.h"'))
    project.write("lib/outer.h", '#include "inner.h"\n')
    project.write("lib/inner.h", "#define VALUE 1\n")
    headers = ["lib/outer.h", "lib/inner.h"]
    assert project.build(headers=headers).load().value() == 3
    project.write("lib/inner.h", "#define VALUE 2\n")
    assert project.build(headers=headers).load().value() == 4


def test_an_edit_during_the_build_cannot_get_the_old_key(project: Project) -> None:
    project.hold("compile")
    process = project.start()
    project.wait_held()
    project.write("value.h", "#define VALUE 50\n")
    project.release()
    assert finish(process)[0] == "42"
    assert finish(project.start())[0] == "52"


def test_key_covers_everything(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [project.build().key()]

    def changed(what: str, other: KernelBuild | None = None) -> None:
        keys.append((other or project.build()).key())
        assert len(set(keys)) == len(keys), f"{what} is not part of the key"

    project.write("lib/helper.cpp", "int helper() { return 3; }\n")
    changed("a source")
    changed("the ISA", project.build(isa="avx2"))
    changed("the name", project.build(name="_dschat_other"))
    monkeypatch.setenv("DSCHAT_CXXFLAGS", "-DNDEBUG")
    changed("DSCHAT_CXXFLAGS")
    real = build._version
    for package in ("torch", "pybind11"):
        with monkeypatch.context() as patch:
            patch.setattr(build, "_version", lambda name, p=package: "9.9" if name == p else real(name))
            changed(f"the version of {package}")
    project.compiler.write_text(project.compiler.read_text().replace("compiler 1.0", "compiler 2.0"))
    changed("the compiler's version")
    twin = project.compiler.with_name("cxx2")
    twin.write_text(project.compiler.read_text())
    twin.chmod(0o755)
    monkeypatch.setenv("CXX", str(twin))
    changed("the compiler's path")


# ------------------------------------------------------------------------------------------- damaged caches


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "empty meta", "no meta", "no module", "no json object"]
)
def test_damaged_build_is_rebuilt(project: Project, damage: str) -> None:
    folder = project.build().build()
    module, meta = folder / project.build().filename, folder / "meta.json"
    content = module.read_bytes()
    if damage == "truncate":
        module.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        module.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "empty meta":
        meta.write_text("")
    elif damage == "no meta":
        meta.unlink()
    elif damage == "no module":
        module.unlink()
    else:
        meta.write_text("[]")
    assert not project.build().intact(folder)
    assert finish(project.start())[0] == "42"
    assert project.build().intact(folder)
    assert project.leftovers() == []


def test_intact_build_that_does_not_import_is_rebuilt_once(project: Project) -> None:
    kernels = project.build()
    folder = kernels.build()
    (folder / kernels.filename).write_bytes(b"not a module")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"] = build._sha256(b"not a module")
    (folder / "meta.json").write_text(json.dumps(meta))
    assert kernels.intact(folder)
    assert finish(project.start())[0] == "42"


def test_damaged_object_is_compiled_again(project: Project) -> None:
    project.build().build()
    for path in (project.cache / "objects").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    project.write("value.h", "#define VALUE 50\n")
    assert project.build().load().value() == 52


def test_old_builds_are_forgotten(project: Project) -> None:
    kernels = project.build()
    keep = kernels.build()
    for i in range(12):
        old = project.cache / f"{NAME}-{i:02}"
        old.mkdir()
        os.utime(old, (i, i))
    kernels._prune(keep, builds=4, objects=1)
    assert {path.name for path in project.published()} == {
        keep.name,
        *(f"{NAME}-{i}" for i in ("09", "10", "11")),
    }
    assert len(list((project.cache / "objects").iterdir())) == 1


# --------------------------------------------------------------------------------------------------- errors


def sentence_of(error: BuildError) -> str:
    """The error's first line, which must be one sentence that says something."""
    first = str(error).splitlines()[0]
    assert first == error.sentence
    assert len(first) > 30 and first.endswith((".", "?"))
    return first


def test_compile_error_is_readable_and_repeatable(
    project: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    project.write("main.cpp", MODULE + "\nint broken( {\n")
    with pytest.raises(BuildError) as caught:
        project.build().load()
    error = caught.value
    assert f"Compiling {project.root}/main.cpp for portable failed" in sentence_of(error)
    assert "fake compiler 1.0" in error.sentence
    assert f"{project.root}/main.cpp:" in str(error) and "error:" in str(error)
    assert error.log is not None and "broken" in error.log.read_text()
    assert str(error.log) in str(error)
    again = subprocess.run(error.command, capture_output=True, text=True)
    assert again.returncode != 0 and "main.cpp" in again.stderr
    assert capfd.readouterr().err.endswith("... failed\n")
    assert project.published() == [] and project.leftovers() == []
    # The next attempt, after the fix, succeeds.
    project.write("main.cpp", MODULE)
    assert project.build().load().value() == 42


def test_link_error_and_missing_definition(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    with pytest.raises(BuildError) as caught:
        project.build(sources=["main.cpp"]).load()
    assert "helper" in sentence_of(caught.value) and "do not load" in str(caught.value)
    project.write("lib/helper.cpp", "int helper() { return 2; }\nint VALUE;\n#include <Python.h>\n")
    project.write("lib/twin.cpp", "int helper() { return 3; }\n")
    with pytest.raises(BuildError) as caught:
        project.build(sources=["main.cpp", "lib/helper.cpp", "lib/twin.cpp"]).load()
    assert sentence_of(caught.value).startswith("Linking the fake kernels for portable failed")
    assert "multiple definition" in str(caught.value)


@pytest.mark.parametrize(
    ("cxx", "path", "expect"),
    [
        ("/no/such/compiler", None, "CXX is '/no/such/compiler', which is not a command here"),
        ("", "/no/such/folder", "No C++ compiler was found: install g++ or clang++"),
        ("false", None, "does not run; set CXX to another."),
    ],
)
def test_missing_compiler(
    project: Project, monkeypatch: pytest.MonkeyPatch, cxx: str, path: str | None, expect: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    with pytest.raises(BuildError) as caught:
        project.build().load()
    assert expect in sentence_of(caught.value)


def test_cache_that_cannot_be_written(project: Project) -> None:
    project.cache.write_text("a file where the folder should be")
    with pytest.raises(BuildError) as caught:
        project.build().load()
    assert "set DSCHAT_CACHE_DIR" in sentence_of(caught.value)


def test_missing_source(project: Project) -> None:
    (project.root / "value.h").unlink()
    with pytest.raises(BuildError, match=r"value\.h cannot be read"):
        project.build().load()


def test_disable_jit(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSCHAT_DISABLE_JIT", "1")
    with pytest.raises(BuildError) as caught:
        project.build().load()
    assert sentence_of(caught.value).startswith("DSCHAT_DISABLE_JIT is set")
    assert project.calls() == []
    monkeypatch.setenv("DSCHAT_DISABLE_JIT", "0")
    project.build().build()
    monkeypatch.setenv("DSCHAT_DISABLE_JIT", "1")
    assert project.build().load().value() == 42
    assert len(project.calls()) == 3


def test_disable_jit_without_compiler_says_the_first(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSCHAT_DISABLE_JIT", "1")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(BuildError, match="DSCHAT_DISABLE_JIT is set"):
        project.build().load()


# ----------------------------------------------------------------------------------------------------- jobs


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(BuildError, match=re.escape(f"MAX_JOBS is {text!r}: give a whole number from 1")):
        build.max_jobs()


def test_max_jobs_default_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= build.max_jobs() <= (os.cpu_count() or 1)
    monkeypatch.setattr(build, "_available_memory", lambda: 100 << 20)
    assert build.max_jobs() == 1


@pytest.mark.parametrize("jobs", [1, 3])
def test_max_jobs_is_respected(project: Project, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    project.write("third.cpp", "int third() { return 3; }\n")
    project.hold("compile")
    program = PROGRAM.replace('"main.cpp"', '"third.cpp", "main.cpp"')
    program = program.format(name=NAME, root=str(project.root), cache=str(project.cache))
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO
    )
    project.processes.append(process)
    wait_until(lambda: len(project.calls()) >= jobs)
    time.sleep(0.3)
    assert len(project.calls()) == jobs
    project.release()
    assert finish(process)[0] == "42"


# ---------------------------------------------------------------------------------------- instruction sets

AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
NEON = {"asimd", "asimddp"}
LEVELS = {
    "x86_64": ("portable", "avx2", "avx512", "avx512_bf16", "amx"),
    "aarch64": ("portable", "neon", "neon_bf16"),
    "arm64": ("portable", "neon", "neon_bf16"),  # macOS
    "riscv64": ("portable",),
}


def on(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str] | None = None) -> None:
    """A machine of another family, with these flags."""
    monkeypatch.delenv("DSCHAT_CPU_ISA", raising=False)
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: machine)
    if flags is not None:
        monkeypatch.setattr(instruction_sets, "cpu_flags", lambda: frozenset(flags))


@pytest.mark.parametrize("machine", LEVELS)
def test_levels_contain_each_other(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    on(monkeypatch, machine)
    assert instruction_sets.levels() == LEVELS[machine]
    assert instruction_sets.flags("portable") == ()
    flags = [set(instruction_sets.flags(level)) for level in instruction_sets.levels()]
    assert all(smaller < larger for smaller, larger in pairwise(flags))


def test_flags_of_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other families' levels too: a cross compiler is told them on this machine."""
    flags = set(instruction_sets.flags("avx512"))
    assert {"-mavx512f", "-mfma", "-mf16c"} <= flags and "-mamx-bf16" not in flags
    assert instruction_sets.flags("neon") == ("-DDSCHAT_NEON", "-march=armv8.2-a+dotprod")
    # Of two -march the last counts.
    assert instruction_sets.flags("neon_bf16")[-1] == "-march=armv8.2-a+dotprod+bf16"


def test_no_flag_lets_the_compiler_choose_the_rounding() -> None:
    for level in {level for levels in LEVELS.values() for level in levels}:
        flags = build.cpu_build(level).compile_flags
        assert "-ffp-contract=off" in flags
        assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-march=native"} & set(flags)


@pytest.mark.parametrize(
    ("machine", "flags", "amx", "expect"),
    [
        ("x86_64", set(), False, "portable"),
        ("x86_64", {"avx2", "fma", "f16c"}, False, "avx2"),
        ("x86_64", {"avx2", "fma"}, False, "portable"),
        ("x86_64", AVX512, False, "avx512"),
        ("x86_64", AVX512 - {"avx512bw"}, False, "avx2"),
        ("x86_64", AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, True, "amx"),
        ("x86_64", AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}, False, "avx512_bf16"),
        ("x86_64", AVX512 | {"avx512_bf16"}, False, "avx512_bf16"),
        ("x86_64", {"avx512_bf16"}, False, "portable"),
        ("x86_64", AVX512 | {"amx_tile", "amx_bf16"}, True, "avx512"),
        ("aarch64", set(), False, "portable"),
        ("aarch64", {"asimd"}, False, "portable"),
        ("aarch64", NEON, False, "neon"),
        ("arm64", NEON | {"bf16"}, False, "neon_bf16"),
        ("aarch64", {"asimd", "bf16"}, False, "portable"),
        ("aarch64", AVX512, False, "portable"),
        ("riscv64", AVX512 | NEON, False, "portable"),
    ],
)
def test_automatic_level(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], amx: bool, expect: str
) -> None:
    on(monkeypatch, machine, flags)
    monkeypatch.setattr(instruction_sets, "amx_permitted", lambda: amx)
    monkeypatch.setattr(build.Compiler, "accepts", lambda self, flags: True)
    assert build.select_isa() == expect


class Symbol:
    """A function of libc, whose types may be set, as ctypes has it."""

    def __init__(self, function: Callable[..., int]) -> None:
        self.function = function

    def __call__(self, *args: object) -> int:
        return self.function(*args)


def test_arm_flags_are_those_that_linux_tells_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {16: 1 << 1 | 1 << 20 | 1 << 22, 26: 1 << 13}

    class Libc:
        getauxval = Symbol(lambda word: words[word])

    on(monkeypatch, "aarch64")
    monkeypatch.setattr(instruction_sets.sys, "platform", "linux")
    monkeypatch.setattr(instruction_sets.ctypes, "CDLL", lambda name: Libc)
    assert instruction_sets.cpu_flags.__wrapped__() == NEON
    words[26] |= 1 << 14
    assert instruction_sets.cpu_flags.__wrapped__() == NEON | {"bf16"}
    monkeypatch.setattr(instruction_sets.ctypes, "CDLL", lambda name: object())  # a libc without getauxval
    assert instruction_sets.cpu_flags.__wrapped__() == frozenset()


def test_arm_flags_are_those_that_macos_has_names_of(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {b"hw.optional.AdvSIMD": 1, b"hw.optional.arm.FEAT_DotProd": 1, b"hw.optional.arm.FEAT_BF16": 0}

    def sysctlbyname(name: bytes, value: Any, size: Any, new: object, length: object) -> int:
        if name not in known:
            return -1
        value._obj.value = known[name]
        return 0

    class Libc:
        pass

    Libc.sysctlbyname = Symbol(sysctlbyname)  # type: ignore[attr-defined]
    on(monkeypatch, "arm64")
    monkeypatch.setattr(instruction_sets.sys, "platform", "darwin")
    monkeypatch.setattr(instruction_sets.ctypes, "CDLL", lambda name: Libc)
    assert instruction_sets.cpu_flags.__wrapped__() == NEON
    known[b"hw.optional.arm.FEAT_BF16"] = 1
    assert instruction_sets.cpu_flags.__wrapped__() == NEON | {"bf16"}
    del known[b"hw.optional.arm.FEAT_DotProd"]  # a macOS that does not know the name yet
    assert instruction_sets.cpu_flags.__wrapped__() == {"asimd", "bf16"}


def test_compiler_that_does_not_know_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "x86_64")
    monkeypatch.setattr(instruction_sets, "runnable", lambda: list(instruction_sets.levels()))
    monkeypatch.setattr(build.Compiler, "accepts", lambda self, flags: "-mamx-tile" not in flags)
    assert build.select_isa() == "avx512_bf16"
    monkeypatch.setattr(build.Compiler, "accepts", lambda self, flags: "-mavx512bf16" not in flags)
    assert build.select_isa() == "avx512"
    on(monkeypatch, "aarch64")
    monkeypatch.setattr(build.Compiler, "accepts", lambda self, flags: not any("bf16" in f for f in flags))
    assert build.select_isa() == "neon"


def test_compiler_accepts(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    compiler = build.find_compiler()
    assert compiler.accepts(["-O3"])
    assert not compiler.accepts(["-mno-such-instruction-set"])


@pytest.mark.parametrize(
    ("machine", "flags", "runs", "lacks", "missing", "foreign"),
    [
        ("x86_64", AVX2 | {"avx512f"}, "avx2", "avx512", "avx512bw, avx512vl, avx512dq", "sse9"),
        ("aarch64", NEON, "neon", "neon_bf16", "bf16", "avx2"),
    ],
)
def test_forcing_a_level(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    flags: set[str],
    runs: str,
    lacks: str,
    missing: str,
    foreign: str,
) -> None:
    on(monkeypatch, machine, flags)
    for level in ("portable", runs):
        monkeypatch.setenv("DSCHAT_CPU_ISA", level)
        assert build.select_isa() == level
    monkeypatch.setenv("DSCHAT_CPU_ISA", lacks)
    with pytest.raises(BuildError) as caught:
        build.select_isa()
    assert sentence_of(caught.value) == (
        f"DSCHAT_CPU_ISA is {lacks!r}, but this machine lacks {missing}: give one of portable, {runs}, or unset it."
    )
    monkeypatch.setenv("DSCHAT_CPU_ISA", foreign)
    with pytest.raises(BuildError, match=f"give one of {', '.join(LEVELS[machine])}, or unset it"):
        build.select_isa()


def test_no_cpuinfo_is_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "x86_64")

    def no_file(self: Path, *args: object, **kwargs: object) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", no_file)
    assert instruction_sets.cpu_flags.__wrapped__() == frozenset()


@pytest.mark.parametrize("level", instruction_sets.runnable()[:3])
def test_module_is_compiled_for_its_level(project: Project, level: str) -> None:
    assert project.build(isa=level).load().isa() == level


# ------------------------------------------------------------------------------------- the project's module


@pytest.fixture
def fake_kernels(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Project:
    """build.load() with the tiny tree in place of csrc."""
    monkeypatch.setattr(build, "cpu_build", lambda isa: project.build(isa=isa))
    monkeypatch.setattr(build, "ahead_of_time_dir", lambda: tmp_path / "native")
    monkeypatch.setattr(build, "_state", build._State())
    return project


def test_load_is_kept_and_reported(fake_kernels: Project) -> None:
    assert build.status()["tried"] is False
    module = build.load()
    assert module.value() == 42 and build.load() is module and build.try_load() is module
    status = build.status()
    assert status["loaded"] and status["source"] == "just in time" and status["reason"] is None
    assert status["isa"] == build.select_isa() and Path(status["path"]).is_file()
    assert status["compiler"] == f"{fake_kernels.compiler} (fake compiler 1.0)"


def test_failure_is_kept_and_reported(fake_kernels: Project) -> None:
    fake_kernels.write("main.cpp", "nonsense")
    assert build.try_load() is None
    calls = len(fake_kernels.calls())
    assert build.try_load() is None
    with pytest.raises(BuildError):
        build.load()
    assert len(fake_kernels.calls()) == calls, "a failed build was tried twice"
    status = build.status()
    assert status["tried"] and not status["loaded"]
    assert "main.cpp" in status["reason"] and "\n" not in status["reason"]
    assert "error:" in status["detail"]


def test_ahead_of_time_module_is_preferred_while_it_matches(
    fake_kernels: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    isa = build.select_isa()
    folder = build.ahead_of_time_dir() / isa
    fake_kernels.build(isa=isa).compile_into(folder)
    assert not fake_kernels.cache.exists()
    # Neither a compiler nor the permission to use one is needed.
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/no/such/compiler")
        patch.setenv("DSCHAT_DISABLE_JIT", "1")
        assert build.load().value() == 42
    assert build.status()["source"] == "ahead of time"
    assert not fake_kernels.cache.exists()

    monkeypatch.setattr(build, "_state", build._State())
    fake_kernels.write("value.h", "#define VALUE 50\n")
    assert build.load().value() == 52
    assert build.status()["source"] == "just in time"

    monkeypatch.setattr(build, "_state", build._State())
    fake_kernels.write("value.h", "#define VALUE 40\n")
    module = folder / fake_kernels.build(isa=isa).filename
    half = module.read_bytes()[:1000]
    module.unlink()  # this process has the old file mapped: cutting it short would crash, a new file does not
    module.write_bytes(half)
    assert build.load().value() == 42
    assert build.status()["source"] == "just in time"


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSCHAT_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("DSCHAT_CACHE_DIR")
    assert build.cache_dir() == tmp_path / "xdg" / "dschat"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / ".cache" / "dschat"


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPO,
        env={**os.environ, **env},
    )


def test_without_compiler_the_reference_runs_and_says_so_once(tmp_path: Path) -> None:
    code = """
import warnings, torch, dschat_kernels as dk
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, w = torch.randn(3, 8), torch.ones(8)
    for _ in range(3):
        y = dk.rms_norm(x, w)
torch.testing.assert_close(y, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
said = [str(w.message) for w in caught if "compiler" in str(w.message)]
assert len(said) == 1, said
row = dk.backends()["cpu"]
assert not row.runs and "/no/such/compiler" in row.why, row
assert dk.backends()["reference"].runs
try:
    dk.rms_norm(x, w, backend="cpu")
except Exception as error:
    assert "/no/such/compiler" in str(error), error
else:
    raise SystemExit("a forced backend that cannot run must raise")
print("fine")
"""
    done = run_python(code, CXX="/no/such/compiler", DSCHAT_CACHE_DIR=str(tmp_path))
    assert done.stdout == "fine\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_import_compiles_nothing_and_is_quick(tmp_path: Path) -> None:
    code = """
import sys, time
t = time.perf_counter()
import dschat_kernels, dschat
assert "torch" not in sys.modules
import torch
t = time.perf_counter()
import dschat_kernels.ops, dschat_kernels.build, dschat_kernels.backends
print(time.perf_counter() - t)
"""
    done = run_python(code, DSCHAT_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2
    assert list(tmp_path.iterdir()) == []


def test_backends_table(tmp_path: Path) -> None:
    import dschat_kernels as dk

    table = dk.backends()
    assert [row.name for row in table] == ["reference", "cpu", "triton", "cuda"]
    cpu = table["cpu"]
    assert cpu.runs and cpu.isa == build.status()["isa"] and cpu.threads
    gpu = torch.cuda.is_available()
    assert gpu or (not table["triton"].runs and table["triton"].why.startswith("no GPU"))
    assert gpu or (not table["cuda"].runs and "no CUDA GPU" in table["cuda"].why)
    assert len(str(table).splitlines()) == 5
    assert json.loads(json.dumps(table.to_dict()))["reference"]["runs"] is True
    with pytest.raises(KeyError, match="give one of reference, cpu, triton, cuda"):
        table["metal"]


def test_public_names_stay_functions_after_their_submodules_are_imported() -> None:
    code = """
import dschat_kernels.backends, dschat_kernels.ops.rms_norm, dschat_kernels as dk
from dschat_kernels.backends import Backend
assert callable(dk.backends) and not hasattr(dk.backends, "__path__"), dk.backends
assert dk.backends(compile=False)["reference"].runs
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_installed_package_compiles_the_same_sources(tmp_path: Path) -> None:
    """The wheel has every source and header, and an install of it the very key of the checkout."""
    source = tmp_path / "checkout"  # pip leaves build/ and *.egg-info in the folder that it builds
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    assert tracked.returncode == 0, tracked.stderr
    for name in tracked.stdout.splitlines():
        if (REPO / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPO / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--target", str(tmp_path / "site"), str(source)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    code = """
from dschat_kernels import build
print(build.csrc_dir())
print(build.cpu_build("portable").key())
"""
    keys = {}
    for place in (tmp_path / "site", source):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(place)},
        )
        assert done.returncode == 0, done.stderr
        folder, keys[place.name] = done.stdout.split()
        assert Path(folder).is_relative_to(place)
    assert keys["site"] == keys["checkout"]
