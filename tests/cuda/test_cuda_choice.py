"""Which backend tensors on a GPU get, and that the kernels on the CPU end with the test that asked for them."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated_cuda
from torch._subclasses import FakeTensorMode

from dschat_kernels.ops import _common
from dschat_kernels.ops.bias_act import bias_act


@pytest.mark.parametrize("able", [("cuda", "triton"), ("cuda",), ("triton",), ()], ids=str)
def test_on_a_gpu_cuda_goes_before_triton_and_triton_before_the_reference(
    able: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "_said", set())
    monkeypatch.setattr(_common, "_why_not", lambda name, *_: None if name in able else f"no {name}.")
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    if able:
        assert _common.resolve_backend("bias_act", None, x) == able[0]
        return
    with pytest.warns(UserWarning, match="no cuda; no triton; the PyTorch reference runs instead"):
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
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x = torch.randn(3, 8)
    with emulated_cuda():
        bias_act(x, backend="cuda")
    with pytest.raises(
        RuntimeError, match="the cuda backend cannot run, because this machine has no CUDA GPU"
    ):
        bias_act(x, backend="cuda")
