"""rope and rope_append against float64, HF's rotations, each other, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_close_to_fp64
from hypothesis import given
from hypothesis import strategies as st
from paged import same_bits, threads
from torch import Tensor

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops.rope_append import rope, rope_append, rope_append_reference, rope_reference
from tests.helpers import cuda_refusal


def tables(max_pos: int, rotary_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    inv_freq = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_pos)[:, None] * inv_freq
    return angles.cos().float(), angles.sin().float()


@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 5),
    half=st.integers(1, 40),
    rest=st.integers(0, 20),
    style=st.sampled_from(["half", "interleaved"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_rope_matches_float64(
    tokens: int, heads: int, half: int, rest: int, style: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    cos, sin = tables(50, 2 * half)
    x = torch.randn(tokens, heads, 2 * half + rest).to(dtype)
    positions = torch.randint(0, 50, (tokens,))
    y = rope(x, cos, sin, positions, style=style, backend="cpu")
    exact = rope_reference(x.double(), cos, sin, positions, style=style)
    assert_close_to_fp64(y, exact, rope_reference(x, cos, sin, positions, style=style))
    assert same_bits(y, rope_reference(x, cos, sin, positions, style=style))
    assert same_bits(y[..., 2 * half :], x[..., 2 * half :])


def test_rope_has_the_bits_of_hf_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = tables(40, 64)
    q, k = torch.randn(40, 9, 64), torch.randn(40, 3, 64)
    full = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    hf_q, hf_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *full)
    for x, hf in ((q, hf_q), (k, hf_k)):
        assert torch.equal(rope(x, cos, sin, torch.arange(40), backend="cpu"), hf[0].transpose(0, 1))


def test_rope_has_the_bits_of_hf_gptj() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    cos, sin = tables(30, 16)
    x = torch.randn(30, 4, 32)
    hf = torch.cat((apply_rotary_pos_emb(x[None, ..., :16], sin[None], cos[None])[0], x[..., 16:]), -1)
    y = rope(x, cos, sin, torch.arange(30), style="interleaved", rotary_dim=16, backend="cpu")
    assert torch.equal(y, hf)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_gradient(style: str, dtype: torch.dtype) -> None:
    cos, sin = tables(20, 12)
    positions = torch.randint(0, 20, (7,))
    x = torch.randn(7, 3, 17).to(dtype)
    grad = torch.randn(7, 3, 17).to(dtype)
    got, torch_own, exact = (
        x.clone().requires_grad_(),
        x.clone().requires_grad_(),
        x.double().requires_grad_(),
    )
    rope(got, cos, sin, positions, style=style, backend="cpu").backward(grad)
    rope_reference(torch_own, cos, sin, positions, style=style).backward(grad)
    rope_reference(exact, cos, sin, positions, style=style).backward(grad.double())
    assert_close_to_fp64(got.grad, exact.grad, torch_own.grad)


def test_reference_gradcheck() -> None:
    cos, sin = tables(9, 4)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    for style in ("half", "interleaved"):
        assert torch.autograd.gradcheck(
            lambda t, s=style: rope(t, cos, sin, torch.tensor([0, 8, 3]), style=s), x
        )


class Case:
    """Tokens of several slots in random order, as slices of one packed qkv."""

    def __init__(
        self, dtype: torch.dtype, q_heads: int = 6, kv_heads: int = 2, dim: int = 24,
        cache: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.cache = PagedKVCache(2, kv_heads, dim, 20, 4, 5, cache or dtype)
        lens = [70, 1, 0, 130]
        self.cache.prepare_append([0, 1, 3], [70, 1, 130])
        self.slots = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lens)])
        self.positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lens])
        order = torch.randperm(len(self.slots))
        self.slots, self.positions = self.slots[order], self.positions[order]
        qkv = torch.randn(len(order), q_heads + 2 * kv_heads, dim).to(dtype)
        self.q, self.k, self.v = qkv.split((q_heads, kv_heads, kv_heads), 1)
        self.cos, self.sin = tables(200, dim - 8)
        self.dim = dim

    def run(
        self, op: object = rope_append, rows: slice = slice(None), rotate: bool = True, **options: object
    ) -> Tensor:
        table = (self.cos, self.sin) if rotate else (None, None)
        heads = (self.q[rows], self.k[rows], self.v[rows])
        where = (
            self.positions[rows],
            self.slots[rows],
            self.cache.k[1],
            self.cache.v[1],
            self.cache.block_table,
        )
        return op(*heads, *table, *where, **options)  # type: ignore[operator]

    def expect_written(self, rotate: bool, style: str) -> None:
        for slot, n in ((0, 70), (1, 1), (3, 130)):
            self.cache.lengths[slot] = n
            k, v = self.cache.gather(slot, 1)
            mine = torch.nonzero(self.slots == slot)[:, 0]
            mine = mine[self.positions[mine].long().argsort()]
            expected = self.k[mine]
            if rotate:
                expected = rope(expected, self.cos, self.sin, self.positions[mine], style=style)
            assert same_bits(k, expected.transpose(0, 1)) and same_bits(v, self.v[mine].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_append_writes_what_rope_gives(dtype: torch.dtype, style: str, rotate: bool, backend: str) -> None:
    case = Case(dtype)
    q = case.run(rotate=rotate, style=style, backend=backend)
    expected = rope(case.q, case.cos, case.sin, case.positions, style=style) if rotate else case.q
    assert same_bits(q, expected)
    case.expect_written(rotate, style)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 33])
def test_append_quantises_what_it_would_write(dtype: torch.dtype, dim: int) -> None:
    """scale * integer, within half a scale of what a cache of the model's dtype holds; zeros, what is too small for a
    scale, and what is not finite too."""
    plain, case = Case(dtype, dim=dim), Case(dtype, dim=dim, cache=torch.int8)
    case.q, case.k, case.v, case.slots, case.positions = (
        plain.q,
        plain.k,
        plain.v,
        plain.slots,
        plain.positions,
    )
    first = [int(torch.nonzero((plain.slots == 0) & (plain.positions == i))) for i in range(4)]
    for token, value in zip(first, (0.0, 1e-39, float("inf"), float("nan")), strict=True):
        case.k[token], case.v[token] = value, value
    for c in (plain, case):
        c.run(backend="cpu")
        for slot, n in ((0, 70), (1, 1), (3, 130)):
            c.cache.lengths[slot] = n
    for slot in (0, 1, 3):
        for x, z in zip(plain.cache.gather(slot, 1), case.cache.gather(slot, 1), strict=True):
            if slot == 0:
                assert not z[:, :2].any() and z[:, 2:4].isnan().all()
                x, z = x[:, 4:], z[:, 4:]
            scale = x.float().abs().amax(-1, keepdim=True) / 127
            assert ((x.float() - z).abs() <= 0.5001 * scale).all()
            assert torch.equal(z.abs().amax(-1, keepdim=True), 127 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", [None, torch.int8])
def test_append_touches_only_its_places(dtype: torch.dtype, cache: torch.dtype | None) -> None:
    case, reference = Case(dtype, cache=cache), Case(dtype, cache=cache)
    for c in (case, reference):
        c.cache.k.fill_(3)
        c.cache.v.fill_(3)
    reference.slots, reference.positions, reference.q = case.slots, case.positions, case.q
    reference.k, reference.v = case.k, case.v
    case.run(backend="cpu")
    reference.run(rope_append_reference)
    assert same_bits(case.cache.k, reference.cache.k) and same_bits(case.cache.v, reference.cache.v)


@pytest.mark.parametrize("cache", [None, torch.int8])
def test_append_bits_do_not_depend_on_batch_or_threads(cache: torch.dtype | None) -> None:
    case = Case(torch.bfloat16, cache=cache)
    q = case.run(backend="cpu")
    k, v = case.cache.k.clone(), case.cache.v.clone()
    case.cache.k.zero_()
    case.cache.v.zero_()
    with threads(1):
        alone = torch.cat([case.run(rows=slice(i, i + 1), backend="cpu") for i in range(len(case.q))])
    assert same_bits(q, alone) and same_bits(case.cache.k, k) and same_bits(case.cache.v, v)


def test_rope_takes_any_strides() -> None:
    cos, sin = tables(10, 8)
    x = torch.randn(3, 16, 5).permute(2, 0, 1)
    positions = torch.tensor([0, 9, 2, 2, 7])
    expected = rope_reference(x.contiguous(), cos, sin, positions)
    assert torch.equal(rope(x, cos, sin, positions, backend="cpu"), expected)
    assert torch.equal(
        rope(x, cos, sin, positions.int()[:, None].expand(5, 2)[:, 0], backend="cpu"), expected
    )


def test_opcheck() -> None:
    cos, sin = tables(10, 4)
    x = torch.randn(3, 2, 6, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dschat.rope.default, (x, cos, sin, torch.tensor([0, 4, 9]), 4, "half", False)
    )
    cache = PagedKVCache(1, 1, 6, 2, 2, 1)
    cache.prepare_append([0, 1], [2, 1])
    index = (torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    heads = (torch.randn(3, 2, 6), torch.randn(3, 1, 6), torch.randn(3, 1, 6))
    eight = PagedKVCache(1, 1, 6, 2, 2, 1, torch.int8)
    for table in ((cos, sin), (None, None)):
        for held in (cache, eight):
            where = (held.k[0], held.v[0], cache.block_table)
            torch.library.opcheck(
                torch.ops.dschat.rope_append.default,
                (*heads, *table, *index, *where, 4 if table[0] is not None else 0, "half"),
            )


def test_fp64_falls_back_and_forced_backends_explain() -> None:
    cos, sin = tables(4, 4)
    x = torch.randn(2, 1, 4, dtype=torch.float64)
    assert rope(x, cos, sin, torch.tensor([0, 1])).dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        rope(x, cos, sin, torch.tensor([0, 1]), backend="cpu")
    error, message = cuda_refusal()
    with pytest.raises(error, match=message):
        rope(x, cos, sin, torch.tensor([0, 1]), backend="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 4)}, "tokens, heads, head_dim"),
        ({"x": torch.ones(3, 1, 4, dtype=torch.int64)}, "floating"),
        ({"positions": torch.tensor([0, 1])}, r"positions has shape \[2\]"),
        ({"positions": torch.tensor([0.0, 1, 2])}, "int32 or int64"),
        ({"positions": torch.tensor([0, 1, 8])}, "positions run from 0 to 8"),
        ({"positions": torch.tensor([0, -1, 2])}, "positions run from -1"),
        ({"sin": torch.zeros(8, 1)}, "sin has shape"),
        ({"rotary_dim": 6}, "rotary_dim is 6"),
        ({"style": "neox"}, "style is 'neox'"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_rope_bad_input(change: dict[str, object], message: str) -> None:
    cos, sin = tables(8, 4)
    arguments: dict[str, object] = {
        "x": torch.randn(3, 1, 4),
        "cos": cos,
        "sin": sin,
        "positions": torch.arange(3),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        rope(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 4]}, "slots run from 0 to 4"),
        ({"positions": [0, 190]}, "page -1"),
        ({"positions": [0, 199], "table": 3}, "position 199 is beyond the 192 tokens"),
        ({"k": (2, 3, 24)}, "k has 3 heads and the cache 2"),
        ({"k": (2, 2, 16)}, "head_dim 24"),
        ({"v": (1, 2, 24)}, "v has shape"),
        ({"dtype": torch.bfloat16}, "make the cache in the model's dtype"),
    ],
)
def test_append_bad_input(change: dict[str, Any], message: str) -> None:
    case = Case(torch.float32)
    dtype = change.get("dtype", torch.float32)
    q, k, v = (torch.randn(*change.get(n, (2, 6 if n == "q" else 2, 24))).to(dtype) for n in "qkv")
    positions, slots = (torch.tensor(change.get(n, [0, 1])) for n in ("positions", "slots"))
    before = case.cache.k.clone()
    table = case.cache.block_table[:, : change.get("table", 5)]
    with pytest.raises((ValueError, TypeError), match=message):
        rope_append(q, k, v, case.cos, case.sin, positions, slots, case.cache.k[1], case.cache.v[1], table)
    assert torch.equal(case.cache.k, before)
