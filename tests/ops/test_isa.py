"""A selection of the op tests under every instruction set that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dschat_kernels import build
from dschat_kernels.ops._common import kernels

HERE = Path(__file__).parent
SELECTION = {
    "test_rms_norm.py": "(forward_and_gradients and 111) or any_shape or batch_position",
    "test_layer_norm.py": "(forward_and_gradients and 111) or any_shape or batch_position",
    "test_bias_act.py": "(forward_and_gradients and 111) or vector_functions or whole_range or nan",
    "test_gated_act.py": "(forward_and_gradients and 111) or any_shape or batch_position",
    "test_linear.py": "transposed_panels",
    "test_lora_linear.py": "low_rank_grads_against",
    "test_token_logprobs.py": "gradients or frozen or masked_vocabulary",
    "test_linear_int8.py": "(float64 and 300) or half_a_step or (same_bits and 96) or broken",
    "test_sample.py": "equals_reference or log_prob_against or bad_rows or draws_depend",
}


def test_this_process_runs_the_instruction_set_it_was_told() -> None:
    forced = os.environ.get("DSCHAT_CPU_ISA")
    assert kernels().isa == (forced or build.select_isa())


@pytest.mark.slow
@pytest.mark.parametrize("isa", build.isa_levels())
def test_ops_under(isa: str) -> None:
    if isa not in build.runnable_isas():
        pytest.skip(f"this machine does not run {isa}")
    if isa == kernels().isa:
        pytest.skip("the whole suite runs on it")
    names = " or ".join(f"({Path(name).stem} and ({chosen}))" for name, chosen in SELECTION.items())
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(str(HERE / name) for name in SELECTION)]
    command += [f"{HERE / 'test_isa.py'}::test_this_process_runs_the_instruction_set_it_was_told"]
    command += ["-k", f"{names} or this_process_runs"]
    result = subprocess.run(
        command,
        env={**os.environ, "DSCHAT_CPU_ISA": isa},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "deselected" in result.stdout
