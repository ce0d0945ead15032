"""Which backend tensors on a GPU get, and that the kernels on the CPU end with the test that asked for them."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated_cuda
from torch._subclasses import FakeTensorMode

from dschat_kernels import triton
from dschat_kernels.backends import _triton
from dschat_kernels.ops import _common
from dschat_kernels.ops.bias_act import bias_act
from tests.helpers import cuda_refusal


@pytest.mark.parametrize("able", [("triton", "cuda"), ("triton",), ("cuda",), ()], ids=str)
def test_on_a_gpu_triton_goes_before_cuda_and_cuda_before_the_reference(
    able: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "_said", set())
    monkeypatch.setattr(_common, "_why_not", lambda name, *_: None if name in able else f"no {name}.")
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    if able:
        assert _common.resolve_backend("bias_act", None, x) == able[0]
        return
    with pytest.warns(UserWarning, match="no triton; no cuda; the PyTorch reference runs instead"):
        assert _common.resolve_backend("bias_act", None, x) == "reference"


def test_every_op_is_there() -> None:
    assert set(_common.offered("cuda")) == set(_common._OPS)


def test_within_the_emulation_other_backends_are_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8)
    with emulated_cuda() as module:
        monkeypatch.setattr(module, "bias_act", None)
        assert torch.equal(bias_act(x, None, "none", backend="cpu"), x)
        assert torch.equal(bias_act(x, None, "none"), x)
        with pytest.raises(TypeError):
            bias_act(x, None, "none", backend="cuda")


def test_after_the_emulation_there_is_no_cuda() -> None:
    x = torch.randn(3, 8)
    with emulated_cuda():
        bias_act(x, backend="cuda")
    error, message = cuda_refusal()
    with pytest.raises(error, match=message):
        bias_act(x, backend="cuda")


def test_the_refusal_on_either_kind_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the missing GPU, with one the place of the tensors; as errors of their kinds."""
    x = torch.randn(3, 8)
    for reason, expected in (("this machine has no CUDA GPU", RuntimeError), (None, ValueError)):
        monkeypatch.setattr("dschat_kernels.cuda.unavailable", lambda reason=reason: reason)
        error, message = cuda_refusal()
        assert error is expected
        with pytest.raises(error, match=f"bias_act: {message}; use backend=None or 'reference'"):
            bias_act(x, backend="cuda")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", "finds no NVIDIA driver"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "driver .* is too old for PyTorch"),
        ("No CUDA GPUs are available", "this machine has no CUDA GPU"),
        (None, "this machine has no CUDA GPU"),
    ],
)  # fmt: skip
def test_a_missing_driver_is_not_a_missing_gpu(
    error: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(
        RuntimeError, match=f"the cuda backend cannot run, because .*{reason}.*; use backend=None"
    ):
        bias_act(torch.randn(3, 8), backend="cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(RuntimeError, match=r"PyTorch finds no CUDA GPU: version .* is built without CUDA"):
        bias_act(torch.randn(3, 8), backend="cuda")


@pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((12, 0), True)], ids=str)
def test_triton_needs_a_gpu_of_today(
    capability: tuple[int, int], able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    triton._capability.cache_clear()
    monkeypatch.setattr(triton, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    found = _triton()
    try:
        assert found.runs == able
        if able:
            assert _common.resolve_backend("bias_act", "triton", x) == "triton"
            return
        sentence = "Triton's kernels need a GPU of compute capability 8.0, and this one has 7.5"
        assert found.why == f"{sentence}."
        with pytest.raises(ValueError, match=f"bias_act: {sentence}; use backend=None"):
            _common.resolve_backend("bias_act", "triton", x)
    finally:
        triton._capability.cache_clear()
