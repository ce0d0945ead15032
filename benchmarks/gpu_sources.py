"""Fingerprints of what the GPU kernels are compiled from: did the code that a record tells of run, or an earlier one?

    python -m benchmarks.gpu_sources        prints the fingerprints of the present sources

A fingerprint is of an op's file and all it includes or imports beside it, as code: comments, docstrings and layout do
not count. Constants that Triton's modules take from elsewhere in the package count by their definitions. `gpu_check`
puts them into its report.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS: dict[str, dict[str, str]] = {
    "cuda": {"rope": "rope_append", "fuse_lora": "lora_linear", "packed_attention": "attention_backward"},
    "triton": {
        "rope": "rope_append", "fuse_lora": "lora_linear", "low_rank_grads": "lora_linear",
        "packed_attention": "attention", "linear_int8": "linear",
    },
}  # fmt: skip
"""Files of ops that are not called like them."""
ALSO = {"packed_attention": "attention", "token_logprobs": "token_logprobs_backward"}
"""The other file of an op whose forward and backward have one each."""
NAMES = (
    "rms_norm", "layer_norm", "bias_act", "gated_act", "rope", "rope_append", "linear", "linear_int8", "lora_linear",
    "fuse_lora", "low_rank_grads", "attention", "attention_decode", "packed_attention", "sample", "token_logprobs",
)  # fmt: skip


def fingerprints(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """By backend and op."""
    return {backend: {op: fingerprint(root, backend, op) for op in NAMES} for backend in ("cuda", "triton")}


def fingerprint(root: Path, backend: str, op: str) -> str:
    stem = OPS[backend].get(op, op)
    parts = cuda_code(root, stem) if backend == "cuda" else triton_code(root, stem)
    if backend == "cuda" and op in ALSO:
        parts |= cuda_code(root, ALSO[op])
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ CUDA


def cuda_code(root: Path, stem: str) -> dict[str, str]:
    """The code of a kernel's file and the headers of csrc/cuda that it reaches, by path."""
    found: dict[str, str] = {}
    wanted = [f"cuda/{stem}.cu"]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = plain_cpp((root / "csrc" / name).read_text())
            wanted += re.findall(r'^#include "(cuda/[^"]+)"', found[name], re.M)
    return found


_COMMENT_OR_TEXT = re.compile(r"//[^\n]*|/\*.*?\*/|(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')", re.S)


def plain_cpp(text: str) -> str:
    """Without comments and layout; a line each for what the preprocessor reads."""
    text = _COMMENT_OR_TEXT.sub(lambda m: m[1] or " ", text).replace("\\\n", " ")
    lines: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"\s+", " ", line).strip()
        line = line if line.startswith("#") else re.sub(r" ?([^\w\s\"']) ?", r"\1", line)
        if lines and line and not line.startswith("#") and not lines[-1].startswith("#"):
            joint = " " if re.match(r"\w", line) and re.search(r"\w$", lines[-1]) else ""
            lines[-1] += joint + line
        elif line:
            lines.append(line)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- Triton


def triton_code(root: Path, stem: str) -> dict[str, str]:
    """The code of a module of dschat_kernels/triton and of those that it imports there, by name; constants that they
    import from elsewhere in the package too."""
    found: dict[str, str] = {}
    wanted = [f"dschat_kernels.triton.{stem}"]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        module = _parsed(root, name)
        found[name] = plain_python(module)
        for node in ast.walk(module):
            source = node.module if isinstance(node, ast.ImportFrom) else None
            if source is None or not source.startswith("dschat_kernels."):
                continue
            if source.startswith("dschat_kernels.triton."):
                wanted.append(source)
            else:
                names = [alias.name for alias in node.names if alias.name.isupper()]
                found |= {f"{source}.{constant}": _constant(root, source, constant) for constant in names}
    return found


def _parsed(root: Path, module: str) -> ast.Module:
    return ast.parse((root / f"{module.replace('.', '/')}.py").read_text())


def _constant(root: Path, module: str, name: str) -> str:
    """The code that defines it and the constants that it is made of, where it may have been imported in its turn."""
    for node in _parsed(root, module).body:
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and name in [a.asname or a.name for a in node.names]
        ):
            return _constant(root, node.module, name)
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        named = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        if any(part.id == name and isinstance(part.ctx, ast.Store) for part in named):
            of = sorted({part.id for part in named if isinstance(part.ctx, ast.Load) and part.id.isupper()})
            return " ".join([plain_python(node), *(_constant(root, module, part) for part in of)])
    raise LookupError(f"{module} does not define {name}")


def plain_python(node: ast.AST) -> str:
    """The tree as text without docstrings, the same from every version of Python: what is empty is left out."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return f"[{','.join(text(item) for item in value if not _is_text(item))}]"
        if not isinstance(value, ast.AST):
            return repr(value)
        fields = (
            (name, part) for name, part in ast.iter_fields(value) if part not in (None, []) or name == "value"
        )
        return f"{type(value).__name__}({','.join(f'{name}={text(part)}' for name, part in fields)})"

    return text(node)


def _is_text(node: object) -> bool:
    """A docstring, of whatever."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


if __name__ == "__main__":
    print(json.dumps(fingerprints(), indent=1))
