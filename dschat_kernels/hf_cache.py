"""The cache that `model.generate()` of a patched model carries: transformers' Cache interface over our paged
cache.

transformers counts columns of a padded batch, ours counts tokens of ragged rows; this class holds the mask
that maps one to the other. Beams, `num_return_sequences`, cropping and selecting share or drop pages instead
of copying tensors.

When a forward needs HF's own code in the middle of a sequence (attentions asked for, a hook somewhere),
`to_dense` turns the cache, in place and for good, into the plain `DynamicCache` that it would have been
without us."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .cache import PagedKVCache

NewCache = Callable[[int, int], PagedKVCache]


# As in patch.py: what is pickled may name another class.
_RECONSTRUCT: Any = vars(copyreg)["_reconstructor"]


@functools.cache
def _watched(kind: Any) -> Any:
    """A kind of layer that tells its cache before its tensors are looked at."""

    def look(self: Any) -> None:
        whole = vars(self)["_whole"]()
        if whole is not None:
            whole.layer_is_read()

    def tensor(name: str) -> property:
        def read(self: Any) -> Any:
            look(self)
            return vars(self).get(name)

        return property(read, lambda self, value: vars(self).__setitem__(name, value))

    def get_seq_length(self: Any) -> Any:
        look(self)
        return kind.get_seq_length(self)

    names = ("keys", "values", "is_initialized")
    members: dict[str, Any] = {name: tensor(name) for name in names}
    members |= {"get_seq_length": get_seq_length, "__module__": kind.__module__}
    members["_layer_type"] = None  # transformers' table of layers holds every subclass that has one
    return type(kind.__name__, (kind,), members)


class PagedDynamicCache(DynamicCache):
    """A `DynamicCache` whose keys and values are pages, until `to_dense`.

    Args:
        config: of the model; gives the layer kinds of the dense form.
        new_cache: (slots, tokens a slot) -> an empty paged cache.
        max_length: columns that are known to come (0: not known; the cache grows when it must).
        owner: the decoder that writes the pages.
        note: told when somebody reads the tensors of a layer, which makes the cache dense.

    A copy shares no page that either writes to; what is pickled is a plain `DynamicCache`.
    """

    def __init__(
        self, config: Any, new_cache: NewCache, *, max_length: int = 0, owner: Any = None,
        note: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self._watch_layers()
        self._note = note
        self._new_cache = new_cache
        self._max_length = max_length
        self.owner = owner
        self.fresh_packs = False  # the packs were refreshed for this cache and no token was written since
        self.paged: PagedKVCache | None = None
        self.slots: list[int] = []
        # [rows, columns], on the CPU whatever torch's default device is: which columns hold a token
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device="cpu")
        self._is_dense = False

    # ------------------------------------------------------------------------------------- ragged rows

    @property
    def is_dense(self) -> bool:
        """Whether the cache became a plain `DynamicCache`."""
        return self._is_dense

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    def adopt(self, new_cache: NewCache, owner: Any) -> None:
        """An empty cache changes its decoder."""
        self._new_cache, self.owner = new_cache, owner
        self.paged, self.slots = None, []
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device="cpu")

    def open(self, rows: int, columns: int) -> PagedKVCache:
        """Room for `columns` columns in all of each of `rows` rows; an empty cache takes its number of rows
        from here."""
        if self.paged is None:
            self.paged = self._reserve(rows, columns, max(columns, self._max_length))
            self.slots = list(range(rows))
            self.mask = torch.zeros(rows, 0, dtype=torch.bool, device="cpu")
        elif columns > self.paged.max_length:
            self._rebuild(list(range(rows)), columns, max(columns, 2 * self.paged.max_length))
        assert self.paged is not None
        return self.paged

    def _reserve(self, rows: int, least: int, wanted: int) -> PagedKVCache:
        """Room for `wanted` tokens a row; where memory has not that much, for twice the `least`, or the `least`:
        `generate` names the most that may come, and rows seldom reach it. Raises MemoryError when `least` do not
        fit."""
        for tokens in (wanted, min(wanted, 2 * least)):
            with contextlib.suppress(MemoryError):
                return self._new_cache(rows, tokens)
        return self._new_cache(rows, least)

    def wrote(self, columns: Tensor) -> None:
        """Count new columns: bool [rows, n], which of them became tokens."""
        self.mask = columns if self.mask.shape[1] == 0 else torch.cat([self.mask, columns], dim=1)
        self.fresh_packs = False

    def _rebuild(self, sources: list[int], least: int, wanted: int) -> None:
        """Make row i of a new paged cache what row `sources[i]` was; rows with one source share its pages.
        least, wanted: tokens of a row, see `_reserve`."""
        old, old_slots = self.paged, self.slots
        assert old is not None
        new = self._reserve(max(1, len(sources)), least, wanted)
        first: dict[int, int] = {}
        for row, source in enumerate(sources):
            if source in first:
                new.fork(first[source], row)
                continue
            first[source] = row
            length = old.length(old_slots[source])
            if length == 0:
                continue
            new.prepare_append([row], length)
            for layer in range(new.num_layers):
                new.write(row, layer, 0, *old.gather(old_slots[source], layer))
            new.advance([row], length)
        self.paged, self.slots = new, list(range(len(sources)))

    def to_dense(self) -> None:
        """Become the plain `DynamicCache` with the same contents: [rows, heads, columns, head_dim], zeros at
        padding."""
        if self._is_dense:
            return
        self._is_dense = True
        for layer in self.layers:
            layer.__class__ = type(layer).__mro__[1]
            del vars(layer)["_whole"]
        if self.paged is None or self.mask.shape[1] == 0:
            return
        cache, mask = self.paged, self.mask
        repeats = self.owner.spec.cache_repeats if self.owner is not None else 1
        shape = (self.rows, cache.num_kv_heads * repeats, mask.shape[1], cache.head_dim)
        for layer in range(cache.num_layers):
            keys, values = (torch.zeros(shape, dtype=cache.dtype, device=cache.device) for _ in range(2))
            for row, slot in enumerate(self.slots):
                k, v = cache.gather(slot, layer)
                keys[row, :, mask[row]] = k.repeat_interleave(repeats, 0)
                values[row, :, mask[row]] = v.repeat_interleave(repeats, 0)
            super().update(keys, values, layer)
        self.paged, self.slots = None, []

    def _watch_layers(self) -> None:
        """Whoever looks into a layer finds it as it would be without us."""
        for layer in self.layers:
            kind: Any = type(layer)
            layer.__class__ = _watched(kind)
            vars(layer)["_whole"] = weakref.ref(self)

    def layer_is_read(self) -> None:
        """Somebody wants tensors of a layer, perhaps to change them."""
        if self._is_dense or self.mask.shape[1] == 0:
            return
        if self._note is not None:
            self._note("a cache went to transformers, because tensors of its layers were read")
        self.to_dense()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedDynamicCache:
        new: Any = object.__new__(type(self))
        memo[id(self)] = new
        shared = ("_new_cache", "owner", "_note", "paged")
        for name, value in vars(self).items():
            vars(new)[name] = value if name in shared else copy.deepcopy(value, memo)
        if not self._is_dense:
            for layer in new.layers:
                vars(layer)["_whole"] = weakref.ref(new)
            if new.paged is not None:
                new._rebuild(list(range(new.rows)), max(1, new.mask.shape[1]), new.paged.max_length)
        copied: PagedDynamicCache = new
        return copied

    def __copy__(self) -> PagedDynamicCache:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> Any:
        dense = copy.deepcopy(self)
        dense.to_dense()
        ours = {
            "_new_cache",
            "_max_length",
            "owner",
            "_note",
            "fresh_packs",
            "paged",
            "slots",
            "mask",
            "_is_dense",
        }
        state = {name: value for name, value in vars(dense).items() if name not in ours}
        return _RECONSTRUCT, (DynamicCache, object, None), state

    # ------------------------------------------------------------------------- transformers' interface

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.to_dense()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __iter__(self) -> Any:
        self.to_dense()
        return super().__iter__()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._is_dense else self.mask.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.to_dense()  # only transformers' own forward asks for the shape of a dense mask
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def batch_size(self) -> int:
        return super().batch_size if self._is_dense else (self.rows or -1)

    @property
    def is_initialized(self) -> bool:
        return super().is_initialized if self._is_dense else self.paged is not None

    @property
    def is_croppable(self) -> bool:
        return super().is_croppable if self._is_dense else True

    def reset(self) -> None:
        if self._is_dense:
            return super().reset()
        for slot in self.slots:
            assert self.paged is not None
            self.paged.free(slot)
        self.mask = self.mask[:, :0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self._is_dense:
            return super().reorder_cache(beam_idx)
        sources = [int(i) for i in beam_idx.tolist()]
        if self.paged is not None and sources != list(range(self.rows)):
            self.paged.reorder(self.slots, [self.slots[i] for i in sources])
            self.mask = self.mask[sources]

    def crop(self, tokens_to_remove: int) -> None:
        if self._is_dense:
            return super().crop(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported; pass minus the number of tokens to remove."
            )
        if tokens_to_remove == 0 or self.paged is None:
            return
        kept = max(0, self.mask.shape[1] + tokens_to_remove)
        for slot, length in zip(self.slots, self.mask[:, :kept].sum(1).tolist(), strict=True):
            self.paged.crop(slot, length)
        self.mask = self.mask[:, :kept]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._is_dense:
            return super().batch_repeat_interleave(repeats)
        self._select([row for row in range(self.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._is_dense:
            return super().batch_select_indices(indices)
        self._select(torch.arange(self.rows, device="cpu")[indices].tolist())

    def _select(self, sources: list[int]) -> None:
        if self.paged is None:
            return
        self._rebuild(sources, max(1, self.mask.shape[1]), self.paged.max_length)
        self.mask = self.mask[sources]

    def __repr__(self) -> str:
        return super().__repr__() if self._is_dense else f"{type(self).__name__}({self.paged})"
