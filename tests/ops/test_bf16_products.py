"""bfloat16 products by AMX tiles and by AVX512-BF16 dots, on machines without them: their kernels, layouts and masks
run on software models of the instructions.

On a machine with AMX, or with the dots, the whole suite runs on the real ones, and this file still runs the models.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dschat_kernels import build, linear
from dschat_kernels.ops._common import kernels
from dschat_kernels.packing import PackedLinear

HERE = Path(__file__).parent
SELECTION = {
    "test_linear.py": "(against_float64 and 300) or inverse or (same_bits and 96) or separate_ops or fuses_lora",
    "test_linear_int8.py": "(float64 and 300) or half_a_step or (same_bits and 96)",
    "test_lora_linear.py": "do_not_depend",
    "test_token_logprobs.py": "bit",
}
MODELS = {"amx model": "-DDSCHAT_AMX_MODEL", "dot model": "-DDSCHAT_BF16_DOT_MODEL"}


def run(model: str, *command: str) -> str:
    """What a Python process prints whose kernels were compiled with the model."""
    isa = [level for level in build.runnable_isas() if level != "amx"][-1]
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "DSCHAT_CXXFLAGS": MODELS[model], "DSCHAT_CPU_ISA": isa},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


def products() -> str:
    """Digest of bfloat16 products of odd sizes, with factors and sums that are subnormal, zero, huge, or not finite."""
    digest = hashlib.sha256(kernels().bf16_products.encode()[:3])
    g = torch.Generator().manual_seed(0)
    for rows, n, k in ((1, 33, 7), (3, 64, 129), (25, 96, 576)):
        scales = 10.0 ** torch.randint(-42, 20, (rows, k), generator=g).double()
        for x in (torch.randn(rows, k, generator=g), torch.randn(rows, k, generator=g).double() * scales):
            w = torch.randn(n, k, generator=g).to(torch.bfloat16)
            w[0, 0], w[1, 1] = 0.0, torch.inf
            y = linear(x.to(torch.bfloat16), PackedLinear.from_weight(w), backend="cpu")
            digest.update(y.nan_to_num().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_products_on_the_model(model: str) -> None:
    names = " or ".join(f"({Path(name).stem} and ({chosen}))" for name, chosen in SELECTION.items())
    out = run(model, "-m", "pytest", "-q", "-x", *(str(HERE / name) for name in SELECTION), "-k", names)
    assert " passed" in out and "deselected" in out


@pytest.mark.slow
@pytest.mark.parametrize("instruction", ["dot", "amx"])
def test_the_model_has_the_bits_of_the_instruction(instruction: str) -> None:
    if kernels().bf16_products != instruction:
        pytest.skip(f"this machine's bfloat16 products are by {kernels().bf16_products}")
    code = "from tests.ops.test_bf16_products import products; print(products())"
    assert run(f"{instruction} model", "-c", code).split()[-1] == products()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is x86's")
def test_the_amx_instructions_compile(tmp_path: Path) -> None:
    """The real ones, which the model replaces, on any machine whose compiler knows them."""
    compiler, amx = build.find_compiler(), build.cpu_build("amx")
    source, made = tmp_path / "empty.cpp", tmp_path / "gemm_amx.o"
    source.write_text("")
    # Its own flags only: one that is wrong among the others must not look like an old compiler.
    known = [*compiler.argv, *build._X86["amx"][1], "-c", str(source), "-o", str(made)]
    if subprocess.run(known, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler.argv[0]} has no AMX")
    includes = [f"-I{amx.root}", f"-I{amx.root / 'cpu'}"]
    command = [
        *compiler.argv,
        *amx.compile_flags,
        *includes,
        "-c",
        str(amx.root / "cpu/gemm_amx.cpp"),
        "-o",
        str(made),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
