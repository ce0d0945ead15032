"""The cache of one rollout, kept for the next one.

Fresh memory is not free: its pages are zeroed when they are touched, and a virtual machine may have to ask its host for
each of them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cache import PagedKVCache

if TYPE_CHECKING:
    from .plan import Decoder


class KeptCache:
    """Makes caches for a decoder, one at a time, and gives the last one again where it is large enough.

    padding: of the caches, see PagedKVCache.
    """

    def __init__(self, decoder: Decoder, padding: bool = False) -> None:
        self.decoder, self.padding = decoder, padding
        self.cache: PagedKVCache | None = None

    def new_cache(self, num_slots: int, max_tokens: int) -> PagedKVCache:
        """An empty cache for that many sequences and tokens; the one before must not be used any more."""
        held = self.cache
        if held is not None and self.holds(num_slots, max_tokens):
            held.clear()
            return held
        self.release()
        self.cache = self.decoder.new_cache(num_slots, max_tokens, padding=self.padding)
        return self.cache

    def holds(self, num_slots: int, max_tokens: int) -> bool:
        """Whether `new_cache` would give the last cache again."""
        held = self.cache
        return held is not None and held.num_slots >= num_slots and held.max_length >= max_tokens

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        return 0 if self.cache is None else self.cache.num_pages * self.cache.bytes_per_page

    def release(self) -> None:
        """Gives up the cache, for instance to train in its memory."""
        self.cache = None

    def trim(self, most: int) -> None:
        """Gives up a cache of more than `most` bytes."""
        if self.bytes > most:
            self.release()
