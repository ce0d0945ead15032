"""benchmarks/gpu_check.py without a GPU: the whole dry run, and its kernels on what stands in for a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import emulated_cuda

from benchmarks import gpu_check, gpu_sources
from benchmarks.gpu_check import DRY, Machine
from tests.conftest import STORIES

OPS = (
    "rms_norm", "layer_norm", "bias_act", "gated_act", "linear", "linear_int8", "lora_linear", "fuse_lora",
    "low_rank_grads", "attention", "attention_decode", "rope_append", "sample", "token_logprobs",
)  # fmt: skip
PEAKS = {"bytes_per_s": 1e9, "flops_per_s": 1e9}


def test_the_dry_run_writes_the_whole_report(tmp_path: Path) -> None:
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dry_run"] and report["failures"] == []
    assert report["sources"] == gpu_sources.fingerprints()  # of what ran
    assert {row["op"].split(",")[0].split(" ")[0] for row in report["kernels"]} == set(OPS)
    for row in report["kernels"]:
        for side in (*report["backends"], "torch eager"):
            assert row["sides"][side]["median_us"] > 0
        assert row["sides"][report["backends"][0]]["good"] and row["bytes"] > 0
    (row,) = report["generation"]
    ours = report["backends"][0]
    assert row["dtype"] == "float32" and set(row["sides"]) == {"HF eager", ours, f"{ours}, HF patched"}
    for side in row["sides"].values():
        assert side["tokens_of_hf"] == 1.0 and side["tokens_per_s"] > 0
    shown = {row["op"] for row in report["kernels"] if row["op"].startswith("sample")}
    assert {f"sample, top-k {k}, top-p {p}" for k in ("off", 50) for p in ("off", 0.9)} < shown
    assert report["tests"]["status"] == 0 and "2/" in report["tests"]["summary"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# GPU check on the CPU: a DRY RUN, no figure here is a GPU's")
    assert all(f"| {op}" in text for op in OPS) and "- HF eager: " in text
    assert f"- {ours}, HF patched: " in text and ", 100.0% of the tokens are HF's" in text


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_its_kernels_call_the_gpu_backends_rightly(backend: str) -> None:
    """Every case within the criterion on the sources compiled for the CPU, and in Triton's interpreter, and the tokens
    of `generate`, patched and not."""
    with contextlib.ExitStack() as stack:
        if backend == "cuda":
            stack.enter_context(emulated_cuda())
        elif importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        else:
            from tests.triton_kernels.interpreter import interpreter

            stack.enter_context(interpreter())
        dtypes = (torch.bfloat16,) if backend == "triton" else (torch.bfloat16, torch.float16, torch.float32)
        machine = Machine(torch.device("cpu"), (backend,), dtypes, DRY, True)
        rows = list(gpu_check.kernels(machine, "", PEAKS))
        with torch.no_grad():
            (generated,) = gpu_check.generation(machine, str(STORIES))
    assert {
        name: side.get("tokens_of_hf", side) for name, side in generated["sides"].items()
    } == dict.fromkeys(("HF eager", backend, f"{backend}, HF patched"), 1.0)
    bad = [
        (row["op"], row["dtype"], row["sides"][backend])
        for row in rows
        if not row["sides"][backend].get("good")
    ]
    assert not bad


def test_a_wrong_kernel_and_one_that_fails_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("residual") is not None:
            raise RuntimeError("no residual today")
        return 1.01 * torch.nn.functional.rms_norm(x, x.shape[-1:], arguments[0], 1e-5)

    monkeypatch.setattr(gpu_check.dk, "rms_norm", broken)
    machine = Machine(torch.device("cpu"), ("cpu",), (torch.float32,), DRY, True)
    report: dict[str, Any] = {
        "backends": ["cpu"], "build": {}, "tests": {}, "peaks": PEAKS, "generation": [],
        "kernels": list(gpu_check.kernels(machine, "rms_norm", PEAKS)),
    }  # fmt: skip
    found = gpu_check.failures(report)
    assert any("rms_norm 3x64 float32, cpu: error" in line for line in found)
    assert "rms_norm + residual 3x64 float32, cpu: RuntimeError: no residual today" in found


def test_other_tokens_in_float32_and_forwards_left_to_transformers_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an engine that changed a token of each row, and a `generate` that somebody hooks into."""
    real = gpu_check.ours, gpu_check.patched

    def other(*arguments: Any) -> Any:
        return lambda: real[0](*arguments)() ^ torch.tensor([0, 0, 1, 0])

    def left(model: Any, *arguments: Any) -> Any:
        work = real[1](model, *arguments)
        return lambda: with_hook(work)

    def with_hook(work: Any) -> Any:
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
        try:
            return work()
        finally:
            hook.remove()

    monkeypatch.setattr(gpu_check, "ours", other)
    monkeypatch.setattr(gpu_check, "patched", left)
    machine = Machine(torch.device("cpu"), ("reference",), (torch.float32,), DRY, True)
    with torch.no_grad():
        rows = list(gpu_check.generation(machine, str(STORIES)))
    report: dict[str, Any] = {
        "backends": ["reference"], "build": {}, "tests": {}, "peaks": PEAKS, "kernels": [], "generation": rows,
    }  # fmt: skip
    tokens, forwards = gpu_check.failures(report)
    assert tokens == "generation of batch 2 in float32, reference: 75.0% of the tokens are Hugging Face's"
    assert "float32, reference, HF patched: RuntimeError: left to transformers: generate ran" in forwards
    assert "a global forward hook is registered" in forwards


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no NVIDIA GPU on this machine; --dry-run runs"):
        gpu_check.main(["--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_cut_short_has_reported_what_it_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "generation", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(
            ["--dry-run", "--parts", "kernels,generation", "--only", "rope_append", "--output", str(tmp_path)]
        )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["op"] for row in report["kernels"]] == ["rope_append"]
    assert "| rope_append |" in (tmp_path / "report.md").read_text()


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--parts", "kernels,speed"])
    assert "'speed' is none of build, tests, kernels, generation" in capsys.readouterr().err
