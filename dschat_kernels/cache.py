"""Paged KV cache: pages of 64 tokens, reference counted, copied before a shared one is written.

Layout of one layer (csrc/cpu/kv_cache.h says the same):

* ``k[layer]``: ``[pages, Hkv, PAGE / 16, D, 16]``, 16 keys side by side, so that scores vectorise over keys;
* ``v[layer]``: ``[pages, Hkv, PAGE, Dp]``, ``Dp`` = ``D`` rounded up to 16.

Of a cache of dtype int8 a page of a head is ``PAGE`` float32 scales, one a token, and behind them integers in pairs:

* ``k[layer]``: int8 ``[pages, Hkv, PAGE * (4 + De)]``, integers ``[PAGE / 16, De / 2, 16, 2]``, ``De`` = ``D`` or,
  where that is odd, ``D + 1``;
* ``v[layer]``: int8 ``[pages, Hkv, PAGE * (4 + Dp)]``, integers ``[PAGE / 2, Dp, 2]``.

A token's key (and its value) in a head is scale * integers, as quantise.py makes them of its ``D`` numbers.

A slot is one sequence. ``block_table[slot, i]`` is the page that holds its tokens ``64 i .. 64 i + 63`` (-1:
none), and ``lengths[slot]`` the number of tokens written. A step is ``prepare_append`` (pages,
copy-on-write), the kernels, ``advance``.

Keys and values lie on the device of the model, the books on the CPU: kernels there read ``block_table``, a copy at
a fixed address that ``sync`` brings up to date; on the CPU it is the book itself.

Invariants: a page is free or its reference count is the number of block table entries that name it; a page
that holds no token yet (reserved beyond ``lengths``) belongs to one slot only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .huge_pages import huge_zeros
from .limits import available_memory
from .quantise import quantise

__all__ = [
    "CHUNK",
    "KV_CACHES",
    "LANES",
    "PAGE",
    "OutOfPages",
    "PagedKVCache",
    "cache_shapes",
    "padded_head_dim",
    "page_bytes",
    "pages_for",
    "read_pages",
    "write_pages",
]

PAGE = 64
"""Tokens of a page."""
CHUNK = 256
"""Keys that attention reduces in one go; part of the definition of its bits."""
LANES = 16
SCALE_BYTES = 4
"""Of a token's float32 scale in a page of int8."""

KV_CACHES = ("auto", "int8")
"""How a decoder keeps keys and values: in its own dtype, or quantised."""

Ints = Sequence[int] | np.ndarray | torch.Tensor
"""Slots, or numbers of tokens."""


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than a request needs; nothing was changed."""


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` tokens."""
    return -(-tokens // PAGE)


def padded_head_dim(head_dim: int) -> int:
    """``head_dim`` rounded up to whole vectors of 16 lanes."""
    return -(-head_dim // LANES) * LANES


def cache_shapes(pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """Shapes of keys and values of one layer."""
    padded = padded_head_dim(head_dim)
    if dtype == torch.int8:
        widths = head_dim + head_dim % 2, padded
        return tuple((pages, kv_heads, PAGE * (SCALE_BYTES + width)) for width in widths)
    return (pages, kv_heads, PAGE // LANES, head_dim, LANES), (pages, kv_heads, PAGE, padded)


def page_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a page over all layers, keys and values."""
    return layers * dtype.itemsize * sum(math.prod(s) for s in cache_shapes(1, kv_heads, head_dim, dtype))


def _quantised(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Views of int8 pages: scales, float32 [pages, Hkv, PAGE], and integers, [pages, Hkv, the rest]."""
    return pages[..., : PAGE * SCALE_BYTES].view(torch.float32), pages[..., PAGE * SCALE_BYTES :]


def _int8_views(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scales of keys, keys, scales of values, values) of int8 pages."""
    (k_scales, k), (v_scales, v) = _quantised(k_cache), _quantised(v_cache)
    return (
        k_scales,
        k.unflatten(-1, (PAGE // LANES, -1, LANES, 2)),
        v_scales,
        v.unflatten(-1, (PAGE // 2, -1, 2)),
    )


def write_pages(k_cache: Tensor, v_cache: Tensor, page: Tensor, inside: Tensor, k: Tensor, v: Tensor) -> None:
    """Token i's k[i] and v[i], [n, Hkv, D], to place inside[i] of page page[i] of one layer."""
    dim = k.shape[2]
    # Advanced indices separated by a slice put their dimension first: [n, Hkv, D].
    if k_cache.dtype != torch.int8:
        k_cache[page, :, inside // LANES, :, inside % LANES] = k.to(k_cache.dtype)
        v_cache[page, :, inside, :dim] = v.to(v_cache.dtype)
        return
    k_scales, k_cache, v_scales, v_cache = _int8_views(k_cache, v_cache)
    (k, k_scale), (v, v_scale) = (quantise(x.float().reshape(-1, dim)) for x in (k, v))
    shape = (len(page), k_cache.shape[1])
    k_scales[page, :, inside] = k_scale.view(shape)
    v_scales[page, :, inside] = v_scale.view(shape)
    for odd in range(min(2, dim)):
        half = k[:, odd::2].reshape(*shape, -1)
        k_cache[page, :, inside // LANES, : half.shape[2], inside % LANES, odd] = half
    v_cache[page, :, inside // 2, :dim, inside % 2] = v.view(*shape, dim)


def read_pages(
    k_cache: Tensor, v_cache: Tensor, pages: Tensor, head_dim: int, wide: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """k and v, [len(pages) * PAGE, Hkv, D], of pages of one layer; those of int8 multiplied out in `wide`."""
    k, v = k_cache[pages], v_cache[pages]
    if k_cache.dtype == torch.int8:
        k_scales, k, v_scales, v = _int8_views(k, v)
        k, v = k.transpose(-1, -2).flatten(3, 4)[..., :head_dim, :], v.transpose(-1, -2).flatten(2, 3)
        k = k.to(wide) * k_scales.to(wide).unflatten(-1, (PAGE // LANES, 1, LANES))
        v = v.to(wide) * v_scales.to(wide)[..., None]
    heads = k.shape[1]
    return (
        k.permute(0, 2, 4, 1, 3).reshape(-1, heads, head_dim),
        v.transpose(1, 2).reshape(-1, heads, v.shape[-1])[..., :head_dim],
    )


class PagedKVCache:
    """Keys and values of ``num_slots`` sequences in ``num_pages`` shared pages.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        num_pages: pages of the pool; ``bytes_per_page`` tells the cost of one.
        num_slots: sequences held at once.
        max_pages_per_slot: width of the block table, that is the longest sequence in pages.
        dtype: of keys and values: that of the model's activations, or int8 for quantised ones.
        device: of keys, values and block table.
        padding: one slot more, ``padding_slot``, whose places all lie in one page of its own, for rows that only fill
            up a batch (dschat_kernels/graphs.py); the methods do not know it.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        num_slots: int,
        max_pages_per_slot: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding: bool = False,
    ) -> None:
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("num_pages", num_pages),
            ("num_slots", num_slots),
            ("max_pages_per_slot", max_pages_per_slot),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: a cache needs at least 1.")
        if not dtype.is_floating_point and dtype != torch.int8:
            raise TypeError(f"dtype is {dtype}: keys and values need a floating-point dtype, or int8.")
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.max_pages_per_slot = max_pages_per_slot
        self.dtype = dtype
        self.device = torch.device(device)
        self.padding_slot = num_slots if padding else None
        pages, slots = num_pages + padding, num_slots + padding
        if self.device.type == "cpu":
            _check_memory(pages, self.bytes_per_page)
        # Zeroed: kernels read whole vectors, so padding must be finite.
        k, v = cache_shapes(pages, num_kv_heads, head_dim, dtype)
        self.k = _zeros((num_layers, *k), dtype, self.device)
        self.v = _zeros((num_layers, *v), dtype, self.device)
        self._table = np.empty((slots, max_pages_per_slot), dtype=np.int32)
        self._table[num_slots:] = num_pages  # the padding slot's page
        self._lengths = np.empty(num_slots, dtype=np.int32)
        self._owned = np.empty(num_slots, dtype=np.int64)  # block table entries in use
        self._refs = np.empty(num_pages, dtype=np.int32)
        self._mirrored = self.device.type != "cpu"
        self.clear()
        self.block_table = torch.from_numpy(self._table)  # shares memory with _table
        if self._mirrored:
            self.block_table = self.block_table.to(self.device)
        self._stale = False  # whether block_table, a mirror, is behind _table
        self.lengths = torch.from_numpy(self._lengths)

    # ------------------------------------------------------------------------------------------------- state

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def bytes_per_page(self) -> int:
        """Bytes that one page costs over all layers."""
        return page_bytes(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence a slot can hold."""
        return self.max_pages_per_slot * PAGE

    def length(self, slot: int) -> int:
        return int(self._lengths[self._slot(slot)])

    def pages(self, slot: int) -> list[int]:
        """Pages of a slot, in order, those reserved but not written yet included."""
        slot = self._slot(slot)
        return self._table[slot, : self._owned[slot]].tolist()

    def capacity(self, slot: int) -> int:
        """Tokens that the slot's pages can hold."""
        return int(self._owned[self._slot(slot)]) * PAGE

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(layers={self.num_layers}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"slots={self.num_slots}, pages={self.num_pages - self.free_pages}/{self.num_pages} in use, "
            f"{self.dtype})"
        )

    def sync(self) -> None:
        """Brings ``block_table`` up to date for kernels that are launched from now on."""
        if self._stale:
            self.block_table.copy_(torch.from_numpy(self._table), non_blocking=True)
            self._stale = False

    # -------------------------------------------------------------------------------------------- allocation

    def alloc(self, slot: int, n_tokens: int) -> None:
        """Makes room for ``n_tokens`` more tokens in ``slot``, so that later steps cannot run out of pages.

        Unlike :meth:`prepare_append` it does not copy a shared page.

        Raises:
            OutOfPages: fewer pages are free than needed. ValueError: the sequence would exceed
            ``max_length``.
        """
        slot = self._slot(slot)
        grow = self._growth(slot, n_tokens)
        self._demand(grow)
        self._grow(slot, grow)

    def free(self, slot: int) -> None:
        """Forgets the sequence in ``slot``, if any; pages nobody else holds return to the pool."""
        slot = self._slot(slot)
        self._drop(slot, 0)
        self._lengths[slot] = 0

    def clear(self) -> None:
        """Forgets every sequence, also what a call that was interrupted left half done."""
        self._table[: self.num_slots] = -1
        self._stale = self._mirrored
        self._lengths[:] = 0
        self._owned[:] = 0
        self._refs[:] = 0
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack: recently used pages are warm

    def fork(self, src: int, *dst: int) -> None:
        """Makes each slot of ``dst`` a copy of ``src`` by sharing its pages, and frees what it held.

        No data moves: a shared partial page is copied by the next :meth:`prepare_append` that writes into it.
        """
        src = self._slot(src)
        targets = [self._slot(slot) for slot in dst]
        if src in targets:
            raise ValueError(f"slot {src} cannot be forked onto itself: leave it out of the destinations.")
        if len(set(targets)) != len(targets):
            raise ValueError(f"fork destinations {targets} repeat a slot: name each once.")
        used = pages_for(int(self._lengths[src]))
        for slot in targets:
            self.free(slot)
            self._share(self._table[src, :used], slot, int(self._lengths[src]))

    def reorder(self, slots: Ints, sources: Ints) -> None:
        """After the call ``slots[i]`` holds what ``sources[i]`` held before, as beam search wants.

        Sources may repeat and may lie outside ``slots``. Pages are shared, never copied, so this needs no
        free page.
        """
        targets = [self._slot(slot) for slot in _ints(slots)]
        origins = [self._slot(slot) for slot in _ints(sources)]
        if len(targets) != len(origins):
            raise ValueError(
                f"reorder got {len(targets)} slots and {len(origins)} sources: give one source a slot."
            )
        if len(set(targets)) != len(targets):
            raise ValueError(f"reorder slots {targets} repeat a slot: name each once.")
        moves = [(t, o) for t, o in zip(targets, origins, strict=True) if t != o]
        held = []
        for _, origin in moves:  # take the new references before any old one is given up
            length = int(self._lengths[origin])
            row = self._table[origin, : pages_for(length)].copy()
            self._refs[row] += 1
            held.append((row, length))
        for target, _ in moves:
            self.free(target)
        for (target, _), (row, length) in zip(moves, held, strict=True):
            self._refs[row] -= 1  # _share counts them again
            self._share(row, target, length)

    def crop(self, slot: int, length: int) -> None:
        """Keeps the first ``length`` tokens of ``slot`` and gives up its other pages, reserved ones too."""
        slot = self._slot(slot)
        if not 0 <= length <= self._lengths[slot]:
            raise ValueError(
                f"slot {slot} has {self._lengths[slot]} tokens: it cannot be cropped to {length}."
            )
        self._drop(slot, pages_for(length))
        self._lengths[slot] = length

    def pages_needed(self, slots: Ints, n_tokens: int | Ints) -> int:
        """Free pages that ``prepare_append(slots, n_tokens)`` would take."""
        return self._append_plan(slots, n_tokens)[0]

    def prepare_append(self, slots: Ints, n_tokens: int | Ints) -> None:
        """Makes the next ``n_tokens`` places of each slot writable: new pages, a copy of a shared one.

        ``lengths`` stay; call :meth:`advance` when the tokens are written. All or nothing.

        Raises:
            OutOfPages: fewer pages are free than needed. ValueError: bad or repeated slots, or beyond
            ``max_length``.
        """
        need, plan = self._append_plan(slots, n_tokens)
        if need == 0:  # most decode steps
            return
        self._demand(need)
        sources, copies = [], []
        for slot, grow, copy in plan:
            if copy:
                place = self._lengths[slot] // PAGE
                old, new = int(self._table[slot, place]), self._take()
                self._refs[old] -= 1
                self._table[slot, place] = new
                self._stale = self._mirrored
                sources.append(old)
                copies.append(new)
            self._grow(slot, grow)
        if copies:
            # A page given up by its last other holder stays put, so every source is still intact here.
            # Lists would be sent to the device at each use, and waited for.
            old_pages, new_pages = torch.tensor([sources, copies], device="cpu").to(self.device)
            self.k[:, new_pages] = self.k[:, old_pages]
            self.v[:, new_pages] = self.v[:, old_pages]

    def advance(self, slots: Ints, n_tokens: int | Ints) -> None:
        """Counts ``n_tokens`` new tokens in each slot; they must fit into pages that the slot already has."""
        targets, counts = self._pairs(slots, n_tokens)
        room = self._owned[targets] * PAGE - self._lengths[targets]
        if (counts > room).any():
            bad = int((counts > room).argmax())
            raise ValueError(
                f"slot {targets[bad]} has room for {room[bad]} more tokens, not {counts[bad]}: "
                "call prepare_append first."
            )
        self._lengths[targets] += counts.astype(np.int32)

    # -------------------------------------------------------------------------------------------------- data

    def gather(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Contiguous copies ``(k, v)``, each ``[Hkv, length, D]``, of what a slot holds in one layer; of int8 in
        float32."""
        slot = self._slot(slot)
        length = int(self._lengths[slot])
        pages = torch.from_numpy(self._table[slot, : pages_for(length)].astype(np.int64)).to(self.device)
        k, v = read_pages(self.k[layer], self.v[layer], pages, self.head_dim)
        return k[:length].transpose(0, 1).contiguous(), v[:length].transpose(0, 1).contiguous()

    def write(self, slot: int, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes ``k`` and ``v``, ``[Hkv, n, D]``, at the places from ``start`` on of a slot in one layer.

        The places must be inside the slot's pages and these not shared; ``lengths`` stay.
        """
        slot = self._slot(slot)
        n = k.shape[1] if k.dim() == 3 else 0
        expected = (self.num_kv_heads, n, self.head_dim)
        if tuple(k.shape) != expected or tuple(v.shape) != expected:
            raise ValueError(
                f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: both must be "
                f"[{self.num_kv_heads}, n, {self.head_dim}]."
            )
        if start < 0 or start + n > self._owned[slot] * PAGE:
            raise ValueError(
                f"places {start} to {start + n - 1} are outside slot {slot}, whose pages hold "
                f"{self._owned[slot] * PAGE} "
                "tokens: call prepare_append first."
            )
        if n == 0:
            return
        touched = self._table[slot, start // PAGE : pages_for(start + n)]
        if (self._refs[touched] > 1).any():
            raise ValueError(
                f"slot {slot} shares the pages of places {start} to {start + n - 1}: call prepare_append "
                "first."
            )
        place = torch.arange(start, start + n, device="cpu")
        page = torch.from_numpy(self._table[slot].astype(np.int64))[place // PAGE].to(self.device)
        inside = (place % PAGE).to(self.device)
        write_pages(self.k[layer], self.v[layer], page, inside, k.transpose(0, 1), v.transpose(0, 1))

    # ---------------------------------------------------------------------------------------------- internal

    def _slot(self, slot: int) -> int:
        index = int(slot)
        if not 0 <= index < self.num_slots:
            raise ValueError(f"slot {index} does not exist: the cache has slots 0 to {self.num_slots - 1}.")
        return index

    def _pairs(self, slots: Ints, n_tokens: int | Ints) -> tuple[np.ndarray, np.ndarray]:
        """Slots and their token counts, int64; every slot exists and is named once."""
        targets, counts = _int_array(slots), _int_array(n_tokens)
        if counts.ndim == 0:
            counts = np.full(len(targets), counts)
        if len(counts) != len(targets):
            raise ValueError(
                f"got {len(targets)} slots and {len(counts)} token counts: give one count a slot."
            )
        if len(targets) == 0:
            return targets, counts
        if targets.min() < 0 or targets.max() >= self.num_slots:
            for slot in targets.tolist():
                self._slot(slot)
        if np.bincount(targets).max() > 1:
            raise ValueError(f"slots {targets.tolist()} repeat a slot: name each once.")
        if counts.min() < 0:
            raise ValueError(f"n_tokens is {counts.min()}: it must not be negative.")
        return targets, counts

    def _growth(self, slot: int, n_tokens: int) -> int:
        """Pages that ``slot`` lacks to hold ``n_tokens`` more."""
        if n_tokens < 0:
            raise ValueError(f"n_tokens is {n_tokens}: it must not be negative.")
        total = int(self._lengths[slot]) + n_tokens
        if total > self.max_length:
            raise ValueError(
                f"slot {slot} would hold {total} tokens and a slot is limited to {self.max_length}: "
                "make the cache with more pages per slot or shorten the sequence."
            )
        return max(0, pages_for(total) - int(self._owned[slot]))

    def _append_plan(self, slots: Ints, n_tokens: int | Ints) -> tuple[int, list[tuple[int, int, bool]]]:
        """(free pages needed, [(slot, pages to add, copy the partial page?)])."""
        targets, counts = self._pairs(slots, n_tokens)
        lengths = self._lengths[targets]
        if (lengths + counts <= self._owned[targets] * PAGE).all():  # most decode steps: nothing to do
            partial = targets[lengths % PAGE > 0]
            if not (self._refs[self._table[partial, self._lengths[partial] // PAGE]] > 1).any():
                return 0, []
        need, plan = 0, []
        left: dict[int, int] = {}  # references of a page after the copies planned so far
        for slot, count in zip(targets.tolist(), counts.tolist(), strict=True):
            grow, copy = self._growth(slot, count), False
            length = int(self._lengths[slot])
            if count > 0 and length % PAGE:
                page = int(self._table[slot, length // PAGE])
                refs = left.get(page, int(self._refs[page]))
                copy = refs > 1
                left[page] = refs - copy  # the last holder writes in place
            need += grow + copy
            plan.append((slot, grow, copy))
        return need, plan

    def _demand(self, need: int) -> None:
        if need > len(self._free):
            raise OutOfPages(
                f"{need} cache pages are needed and {len(self._free)} of {self.num_pages} are free: "
                "free a slot, run fewer sequences at once or make the cache larger."
            )

    def _take(self) -> int:
        page = self._free.pop()
        self._refs[page] = 1
        return page

    def _grow(self, slot: int, pages: int) -> None:
        self._stale |= self._mirrored and pages > 0
        for _ in range(pages):
            self._table[slot, self._owned[slot]] = self._take()
            self._owned[slot] += 1

    def _drop(self, slot: int, keep: int) -> None:
        for page in self._table[slot, keep : self._owned[slot]][::-1].tolist():
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free.append(page)
        self._table[slot, keep : self._owned[slot]] = -1
        self._stale = self._mirrored
        self._owned[slot] = min(keep, int(self._owned[slot]))

    def _share(self, row: np.ndarray, slot: int, length: int) -> None:
        """Gives the empty ``slot`` its own references to the pages of ``row``."""
        self._table[slot, : len(row)] = row
        self._stale = self._mirrored
        self._refs[row] += 1
        self._owned[slot] = len(row)
        self._lengths[slot] = length


def _check_memory(pages: int, bytes_per_page: int) -> None:
    """Raises MemoryError for a cache beyond what is free: its pages would be touched one by one, into the swap."""
    need, free = pages * bytes_per_page, available_memory()
    if free is not None and need > free:
        raise MemoryError(
            f"a cache of {pages} pages of {PAGE} tokens needs {need / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are "
            "free: run fewer sequences at once, or shorter ones."
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return (
        huge_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
    )


def _int_array(values: Any) -> np.ndarray:
    """int64 array of an int, a sequence or a tensor of them."""
    if isinstance(values, torch.Tensor):
        values = values.numpy()
    elif not isinstance(values, (int, np.ndarray)):
        values = [int(value) for value in values]
    return np.asarray(values, dtype=np.int64)


def _ints(values: Ints) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else [int(value) for value in values]
