from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers import (
    DTYPES,
    ODD_SIZES,
    assert_close_to_fp64,
    check_gradients,
    native_threads,
    non_contiguous,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from dschat_kernels.ops.gated_act import gated_act, gated_act_reference

GATES = ("silu", "gelu", "gelu_tanh", "relu")


def gated_act_cpu(gate: Tensor, up: Tensor | None, **options: object) -> Tensor:
    return gated_act(gate, up, backend="cpu", **options)


def make(
    shape: list[int], columns: int, dtype: torch.dtype, packed: bool, biases: tuple[bool, bool]
) -> dict[str, Tensor | None]:
    return {
        "gate": (2 * torch.randn(*shape, columns * (2 if packed else 1))).to(dtype),
        "up": None if packed else torch.randn(*shape, columns).to(dtype),
        "gate_bias": torch.randn(columns).to(dtype) if biases[0] else None,
        "up_bias": torch.randn(columns).to(dtype) if biases[1] else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation, columns", [*product(GATES, ODD_SIZES[:-1]), ("silu", ODD_SIZES[-1])])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_gradients(dtype: torch.dtype, activation: str, columns: int, packed: bool) -> None:
    for rows, biases in ((1, (False, False)), (40, (True, True)), (33, (False, True)), (0, (True, False))):
        inputs = make([rows], columns, dtype, packed, biases)
        check_gradients(gated_act_cpu, gated_act_reference, inputs, activation=activation)


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    columns=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(GATES),
    packed=st.booleans(),
    biases=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape(
    shape: list[int],
    columns: int,
    dtype: torch.dtype,
    activation: str,
    packed: bool,
    biases: tuple[bool, bool],
) -> None:
    inputs = make(shape, columns, dtype, packed, biases)
    check_gradients(gated_act_cpu, gated_act_reference, inputs, activation=activation)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_reference_gradcheck(activation: str, packed: bool) -> None:
    inputs = make([3], 4, torch.float64, packed, (True, True))
    names = [name for name, t in inputs.items() if t is not None]

    def f(*tensors: Tensor) -> Tensor:
        return gated_act_reference(**dict(zip(names, tensors, strict=True)), activation=activation)

    torch.autograd.gradcheck(f, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("name, activation", [("silu", "silu"), ("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_hf_mlp_gate(name: str, activation: str, dtype: torch.dtype) -> None:
    gate, up = torch.randn(64, 111).to(dtype), torch.randn(64, 111).to(dtype)
    expected, exact = ACT2FN[name](gate) * up, ACT2FN[name](gate.double()) * up.double()
    assert_close_to_fp64(gated_act(gate, up, activation, backend="cpu"), exact, expected)
    packed = torch.cat([gate, up], -1)
    assert_close_to_fp64(gated_act(packed, None, activation, backend="cpu"), exact, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_separate(dtype: torch.dtype) -> None:
    gate, up = torch.randn(5, 37).to(dtype), torch.randn(5, 37).to(dtype)
    separate = [t.clone().requires_grad_() for t in (gate, up)]
    together = torch.cat([gate, up], -1).requires_grad_()
    a, b = gated_act(*separate, backend="cpu"), gated_act(together, backend="cpu")
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(together.grad, torch.cat([t.grad for t in separate], -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_batch_position_or_threads(dtype: torch.dtype) -> None:
    inputs = make([150], 577, dtype, False, (True, True))
    gate, up, *biases = inputs.values()
    dy = torch.randn(150, 577).to(dtype)

    def run(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (gate, up, *biases)]
        y = gated_act(*leaves[:2], gate_bias=leaves[2], up_bias=leaves[3], backend="cpu")
        y.backward(dy)
        return y.detach(), *(t.grad for t in leaves)

    with native_threads(1):
        expected = run(gate, up, dy)
    for threads in (2, 3, 7):
        with native_threads(threads):
            assert all(torch.equal(g, e) for g, e in zip(run(gate, up, dy), expected, strict=True))
    order = torch.randperm(150)
    got = run(gate[order], up[order], dy[order])[:3]
    assert all(torch.equal(g, e[order]) for g, e in zip(got, expected, strict=False))
    assert all(torch.equal(g, e[7]) for g, e in zip(run(gate[7], up[7], dy[7])[:3], expected, strict=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype) -> None:
    gate, up = torch.randn(6, 38).to(dtype), torch.randn(6, 38).to(dtype)
    expected, expected_packed = gated_act(gate, up, backend="cpu"), gated_act(gate, backend="cpu")
    for gate_view in non_contiguous(gate):
        assert torch.equal(gated_act(gate_view, backend="cpu"), expected_packed)
        for up_view in non_contiguous(up):
            assert torch.equal(gated_act(gate_view, up_view, backend="cpu"), expected)
    both = torch.cat([gate, up], -1).requires_grad_()  # views of one projection's output
    gated_act(both[:, :38], both[:, 38:], backend="cpu").sum().backward()
    packed = both.detach().clone().requires_grad_()
    gated_act(packed, backend="cpu").sum().backward()
    assert torch.equal(both.grad, packed.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(dtype: torch.dtype, packed: bool) -> None:
    inputs = make([3], 21, dtype, packed, (packed, not packed))
    leaves = [None if t is None else t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.dschat.gated_act.default, (*leaves, "silu"))
    detached = [None if t is None else t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.dschat.gated_act_backward.default,
        (torch.randn(3, 21).to(dtype), *detached, "silu", packed, not packed),
    )


def test_compiles_without_graph_break() -> None:
    def f(x: Tensor, bias: Tensor) -> Tensor:
        return gated_act(torch.tanh(x), gate_bias=bias).square().sum()

    leaves = [torch.randn(4, 34, requires_grad=True), torch.randn(17, requires_grad=True)]
    f(*leaves).backward()
    expected = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves).backward()
    for t, e in zip(leaves, expected, strict=True):
        torch.testing.assert_close(t.grad, e)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"gate": "x"}, TypeError, "gated_act: gate is a str; give a torch.Tensor."),
        ({"gate": torch.ones(2, 8).int()}, TypeError, "gate has dtype int32; give a floating point tensor"),
        ({"gate": torch.tensor(1.0)}, ValueError, "gate is a number without dimensions"),
        ({"gate": torch.ones(2, 7), "up": None}, ValueError, "its last dimension 7 is odd"),
        (
            {"up": torch.ones(2, 9)},
            ValueError,
            r"up has shape \[2, 9\] and gate \[2, 8\]; give the same shape",
        ),
        ({"up": torch.ones(2, 8).bfloat16()}, TypeError, "up is torch.bfloat16 and gate is torch.float32"),
        ({"up": torch.ones(2, 8, device="meta")}, ValueError, "up is on meta and the input on cpu"),
        ({"gate_bias": torch.ones(4)}, ValueError, r"gate_bias has shape \[4\]; give \[8\]"),
        ({"up_bias": torch.ones(8, device="meta")}, ValueError, "up_bias is on meta and the input on cpu"),
        ({"up": None, "up_bias": torch.ones(8)}, ValueError, r"up_bias has shape \[8\]; give \[4\]"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'; choose one of none, gelu"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'; choose one of"),
        ({"gate": torch.ones(2, 8).half(), "up": None, "backend": "cpu"}, ValueError, "not float16"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"gate": torch.ones(2, 8), "up": torch.ones(2, 8), **change}
    with pytest.raises(error, match=message) as caught:
        gated_act(**arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
