"""The two ways to keep the conversations' KV caches that the demo compares.

Each side creates what it needs at start-up, hands out one KV store a conversation with the shared
prompt in it, and says what its caches hold.
"""

from collections.abc import Callable
from typing import Protocol

from pagealloc.demo.kv_stores import KVStore, PagedKV, PreallocatedKV, paged_layout
from pagealloc.demo.measure import resident_bytes
from pagealloc.demo.weights import LlamaShape
from pagealloc.kv import KVCache
from pagealloc.kv.quantisation import KV_KINDS

__all__ = ["SIDES", "BaselineSide", "PageallocSide", "Side"]

ComputePrefix = Callable[[KVStore], None]
"""Computes the shared prompt into an empty KV store."""


class Side(Protocol):
    """One way to keep the caches."""

    def __init__(self, shape: LlamaShape, n_ctx: int, n_conversations: int, kv: str) -> None: ...

    def conversation(self, index: int, compute_prefix: ComputePrefix) -> KVStore:
        """Return the store of a conversation, holding the shared prompt."""

    def kv_bytes(self, page_table_growth_bytes: int) -> int:
        """Return the physical memory that the caches hold, their page tables included."""

    def close(self) -> None:
        """Give everything back."""


class BaselineSide:
    """As inference code does it today: a preallocated cache each, every prompt computed in full."""

    def __init__(
        self,
        shape: LlamaShape,
        n_ctx: int,
        n_conversations: int,
        kv: str,  # noqa: ARG002  float16, whatever the other side has
    ) -> None:
        self._stores = [PreallocatedKV(shape, n_ctx) for _ in range(n_conversations)]

    def conversation(self, index: int, compute_prefix: ComputePrefix) -> KVStore:
        """Compute the shared prompt into this conversation's own cache."""
        compute_prefix(self._stores[index])
        return self._stores[index]

    def kv_bytes(self, page_table_growth_bytes: int) -> int:
        """Return the resident bytes of all caches and the growth of the page tables."""
        arrays = sum(resident_bytes(kv.address, kv.mapped_bytes) for kv in self._stores)
        return arrays + page_table_growth_bytes

    def close(self) -> None:
        """Drop the caches."""
        self._stores.clear()


class PageallocSide:
    """With pagealloc: the shared prompt is computed once, and forked for each conversation."""

    def __init__(
        self,
        shape: LlamaShape,
        n_ctx: int,
        n_conversations: int,  # noqa: ARG002  nothing is set aside per conversation
        kv: str,
    ) -> None:
        self._cache = KVCache(paged_layout(shape, n_ctx), **KV_KINDS[kv])
        self._shared = PagedKV(self._cache.sequence())
        self._forks: list[PagedKV] = []

    def conversation(self, index: int, compute_prefix: ComputePrefix) -> KVStore:  # noqa: ARG002
        """Fork the sequence that holds the shared prompt; the first call computes it."""
        if not len(self._shared):
            compute_prefix(self._shared)
        fork = self._shared.fork()
        self._forks.append(fork)
        return fork

    def kv_bytes(self, page_table_growth_bytes: int) -> int:
        """Return the pages of the cache's file and the growth of the page tables."""
        return int(self._cache.stats().file_bytes) + page_table_growth_bytes

    def close(self) -> None:
        """Close the conversations, then the cache."""
        for kv in (*self._forks, self._shared):
            kv.close()
        self._cache.close()


SIDES: dict[str, type[Side]] = {"baseline": BaselineSide, "pagealloc": PageallocSide}
