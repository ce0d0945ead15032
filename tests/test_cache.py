"""The paged cache against a plain model (a list of numbers a slot), its reference counts, and its errors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dschat_kernels.cache import PAGE, OutOfPages, PagedKVCache, padded_head_dim, pages_for

SLOTS, PAGES, WIDTH = 5, 12, 4
LAYERS, HEADS, DIM = 2, 2, 3

slot_numbers = st.integers(0, SLOTS - 1)
token_counts = st.one_of(st.integers(0, 5), st.integers(0, 150))


class CacheMachine(RuleBasedStateMachine):
    """Every token has its own number; keys and values follow from it, layer, head and dimension."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(LAYERS, HEADS, DIM, PAGES, SLOTS, WIDTH, self.dtype)
        self.model: list[list[int]] = [[] for _ in range(SLOTS)]
        self.tokens = 0

    def data(self, tokens: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = torch.tensor(tokens, dtype=torch.float32)[None, :, None] * 100
        k = n + (layer * HEADS + torch.arange(HEADS))[:, None, None] * DIM + torch.arange(DIM)
        return k, -k

    def state(self) -> tuple[object, ...]:
        c = self.cache
        return c.block_table.clone().tolist(), c.lengths.tolist(), c._refs.tolist(), sorted(c._free)

    @rule(
        slots=st.lists(slot_numbers, unique=True, max_size=SLOTS),
        counts=st.lists(token_counts, min_size=SLOTS, max_size=SLOTS),
    )
    def append(self, slots: list[int], counts: list[int]) -> None:
        counts = counts[: len(slots)]
        before = self.state()
        try:
            need = self.cache.pages_needed(slots, counts)
            free = self.cache.free_pages
            self.cache.prepare_append(slots, counts)
        except ValueError:
            assert any(len(self.model[s]) + n > WIDTH * PAGE for s, n in zip(slots, counts, strict=True))
            assert self.state() == before
            return
        except OutOfPages as error:
            assert need > free and f"{need} cache pages" in str(error) and f"{free} of" in str(error)
            assert self.state() == before
            return
        assert self.cache.free_pages == free - need
        for slot, n in zip(slots, counts, strict=True):
            new = list(range(self.tokens, self.tokens + n))
            self.tokens += n
            for layer in range(LAYERS):
                self.cache.write(slot, layer, len(self.model[slot]), *self.data(new, layer))
            self.model[slot] += new
        self.cache.advance(slots, torch.tensor(counts, dtype=torch.int64))

    @rule(slot=slot_numbers, n=token_counts)
    def alloc(self, slot: int, n: int) -> None:
        before = self.state()
        try:
            self.cache.alloc(slot, n)
            assert self.cache.capacity(slot) >= len(self.model[slot]) + n
        except (OutOfPages, ValueError):
            assert self.state() == before

    @rule(slot=slot_numbers)
    def free(self, slot: int) -> None:
        self.cache.free(slot)
        self.model[slot] = []

    @rule(src=slot_numbers, dst=st.lists(slot_numbers, unique=True, max_size=SLOTS - 1))
    def fork(self, src: int, dst: list[int]) -> None:
        dst = [d for d in dst if d != src]
        self.cache.fork(src, *dst)
        for d in dst:
            self.model[d] = list(self.model[src])

    @rule(slots=st.lists(slot_numbers, unique=True), data=st.data())
    def reorder(self, slots: list[int], data: st.DataObject) -> None:
        sources = data.draw(st.lists(slot_numbers, min_size=len(slots), max_size=len(slots)))
        self.cache.reorder(torch.tensor(slots, dtype=torch.int64), sources)
        old = [list(tokens) for tokens in self.model]
        for slot, source in zip(slots, sources, strict=True):
            self.model[slot] = list(old[source])

    @rule(slot=slot_numbers, share=st.floats(0, 1))
    def crop(self, slot: int, share: float) -> None:
        length = int(share * len(self.model[slot]))
        self.cache.crop(slot, length)
        self.model[slot] = self.model[slot][:length]

    @invariant()
    def contents(self) -> None:
        for slot, tokens in enumerate(self.model):
            assert self.cache.length(slot) == len(tokens)
            for layer in range(LAYERS):
                k, v = self.cache.gather(slot, layer)
                expected_k, expected_v = self.data(tokens, layer)
                assert torch.equal(k, expected_k) and torch.equal(v, expected_v)

    @invariant()
    def ownership(self) -> None:
        owned = [self.cache.pages(slot) for slot in range(SLOTS)]
        references = Counter(page for pages in owned for page in pages)
        free = self.cache._free
        assert len(set(free)) == len(free) and not set(free) & set(references)
        assert len(free) + len(references) == PAGES, "a page leaked"
        assert [references.get(page, 0) for page in range(PAGES)] == self.cache._refs.tolist()
        for slot, pages in enumerate(owned):
            assert len(set(pages)) == len(pages)
            row = self.cache.block_table[slot].tolist()
            assert row == pages + [-1] * (WIDTH - len(pages))
            # What is reserved beyond the tokens belongs to nobody else; so does a place about to be written.
            assert all(references[page] == 1 for page in pages[pages_for(self.cache.length(slot)) :])


class Int8CacheMachine(CacheMachine):
    """Numbers that int8 holds exactly, a scale of its own for every token, layer and head."""

    dtype = torch.int8

    def data(self, tokens: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.tensor(tokens, dtype=torch.float32)[None, :, None] + 1
        head = (layer * HEADS + torch.arange(HEADS))[:, None, None]
        k = scale * torch.cat([torch.full_like(head, 127), head, -head - 1], dim=2)
        return k, -2 * k


TestCacheMachine = CacheMachine.TestCase
TestInt8CacheMachine = Int8CacheMachine.TestCase
for case in (TestCacheMachine, TestInt8CacheMachine):
    case.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


def small(**change: Any) -> PagedKVCache:
    sizes = {
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 5,
        "num_pages": 6,
        "num_slots": 3,
        "max_pages_per_slot": 4,
    }
    return PagedKVCache(**{**sizes, **change})


def append(cache: PagedKVCache, slot: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, cache.num_kv_heads, n, cache.head_dim).unbind(0)
    cache.prepare_append([slot], n)
    cache.write(slot, 0, cache.length(slot), k, v)
    cache.advance([slot], n)
    return k, v


def test_layout() -> None:
    """The layout that csrc/cpu/kv_cache.h documents."""
    cache = small()
    k, v = append(cache, 0, 70)
    assert cache.k.shape == (1, 6, 2, 4, 5, 16) and cache.v.shape == (1, 6, 2, 64, 16)
    assert padded_head_dim(5) == 16 and padded_head_dim(16) == 16 and padded_head_dim(65) == 80
    for token in (0, 17, 63, 64, 69):
        page = cache.block_table[0, token // 64]
        inside = token % 64
        assert torch.equal(cache.k[0, page, :, inside // 16, :, inside % 16], k[:, token])
        assert torch.equal(cache.v[0, page, :, inside, :5], v[:, token])
    assert not cache.v[..., 5:].any()
    assert cache.bytes_per_page == 4 * (2 * 64 * 5 + 2 * 64 * 16)


def test_layout_of_int8() -> None:
    """A page of a head is 64 scales and the same numbers as integers."""
    cache = small(dtype=torch.int8)
    k, v = append(cache, 0, 70)
    assert cache.k.shape == (1, 6, 2, 64 * 10) and cache.v.shape == (1, 6, 2, 64 * 20)
    for token in (0, 17, 63, 64, 69):
        page, inside = cache.block_table[0, token // 64], token % 64
        for head in range(2):
            for held, x, shape in ((cache.k, k, (4, 3, 16, 2)), (cache.v, v, (32, 16, 2))):
                raw = held[0, page, head]
                scale = raw[:256].view(torch.float32)[inside]
                assert scale == x[head, token].abs().max() / 127
                whole = raw[256:].view(shape)
                if held is cache.k:
                    found = whole[inside // 16, :, inside % 16].flatten()
                else:
                    found = whole[inside // 2, :, inside % 2]
                assert torch.equal(found[:5].float(), (x[head, token] / scale).round())
    assert cache.bytes_per_page == 2 * 64 * (4 + 6) + 2 * 64 * (4 + 16)


def test_shared_prompt_costs_its_pages_once() -> None:
    cache = small(num_slots=3)
    append(cache, 0, 100)
    cache.fork(0, 1, 2)
    assert cache.free_pages == 4
    assert cache.pages_needed([0, 1, 2], 1) == 2  # the last holder keeps the partial page
    cache.prepare_append([0, 1, 2], 1)
    assert cache.free_pages == 2
    assert len({cache.pages(slot)[1] for slot in range(3)}) == 3
    assert {cache.pages(slot)[0] for slot in range(3)} == {cache.pages(0)[0]}


def test_full_pages_are_never_copied() -> None:
    cache = small()
    append(cache, 0, 128)
    cache.fork(0, 1)
    assert cache.pages_needed([0, 1], [1, 1]) == 2 and cache.pages_needed([0], 0) == 0


def test_out_of_pages_changes_nothing() -> None:
    cache = small()
    append(cache, 0, 200)
    table = cache.block_table.clone()
    with pytest.raises(OutOfPages, match="3 cache pages are needed and 2 of 6 are free"):
        cache.prepare_append([0, 1], [1, 129])
    with pytest.raises(OutOfPages, match="4 cache pages are needed and 2 of 6 are free"):
        cache.alloc(1, 256)
    assert torch.equal(cache.block_table, table) and cache.free_pages == 2
    cache.prepare_append([1], 128)


def test_reserved_pages_are_used_first() -> None:
    cache = small()
    cache.alloc(0, 130)
    reserved = cache.pages(0)
    assert cache.pages_needed([0], 192) == 0
    append(cache, 0, 150)
    assert cache.pages(0) == reserved


def test_write_refuses_shared_and_foreign_places() -> None:
    cache = small()
    append(cache, 0, 10)
    cache.fork(0, 1)
    k = torch.zeros(2, 1, 5)
    with pytest.raises(ValueError, match="slot 1 shares the pages of places 10 to 10"):
        cache.write(1, 0, 10, k, k)
    with pytest.raises(ValueError, match="places 64 to 64 are outside slot 0"):
        cache.write(0, 0, 64, k, k)
    with pytest.raises(ValueError, match=r"k has shape \(2, 1, 4\)"):
        cache.write(0, 0, 0, k[..., :4], k)


def test_bad_requests_name_the_value() -> None:
    cache = small()
    append(cache, 0, 10)
    with pytest.raises(ValueError, match="slot 3 does not exist: the cache has slots 0 to 2"):
        cache.free(3)
    with pytest.raises(ValueError, match="slot -1"):
        cache.prepare_append([-1], 1)
    with pytest.raises(ValueError, match=r"slots \[1, 1\] repeat"):
        cache.prepare_append([1, 1], 1)
    with pytest.raises(ValueError, match="2 slots and 1 token counts"):
        cache.prepare_append([0, 1], [1])
    with pytest.raises(ValueError, match="n_tokens is -2"):
        cache.prepare_append([0], -2)
    with pytest.raises(ValueError, match="would hold 257 tokens and a slot is limited to 256"):
        cache.prepare_append([0], 247)
    with pytest.raises(ValueError, match="room for 54 more tokens, not 60"):
        cache.advance([0], 60)
    with pytest.raises(ValueError, match="has 10 tokens: it cannot be cropped to 11"):
        cache.crop(0, 11)
    with pytest.raises(ValueError, match="cannot be forked onto itself"):
        cache.fork(0, 1, 0)
    with pytest.raises(ValueError, match="repeat a slot"):
        cache.reorder([1, 1], [0, 0])
    with pytest.raises(ValueError, match="2 slots and 1 sources"):
        cache.reorder([1, 2], [0])
    with pytest.raises(ValueError, match="num_pages is 0"):
        small(num_pages=0)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        PagedKVCache(1, 1, 1, 1, 1, 1, torch.int32)


def test_repr_says_how_full_it_is() -> None:
    cache = small()
    append(cache, 0, 70)
    assert "pages=2/6 in use" in repr(cache)
