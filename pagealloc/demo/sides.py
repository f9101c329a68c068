"""The two ways to keep the conversations' KV caches that the demo compares.

Each side creates what it needs at start-up, hands out one KV store a conversation with the shared
prompt in it, and says what its caches hold.
"""

from collections.abc import Callable
from typing import Protocol

from pagealloc.demo.job import SideJob
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

    def __init__(self, shape: LlamaShape, job: SideJob) -> None: ...

    def conversation(self, index: int, compute_prefix: ComputePrefix) -> KVStore:
        """Return the store of a conversation, holding the shared prompt."""

    def kv_bytes(self, page_table_growth_bytes: int) -> int:
        """Return the physical memory that the caches hold, their page tables included."""

    def huge_bytes(self) -> int | None:
        """Return how much of the caches huge pages map; None where the kernel does not say."""

    def close(self) -> None:
        """Give everything back."""


class BaselineSide:
    """As inference code does it today: a preallocated cache each, every prompt computed in full."""

    def __init__(self, shape: LlamaShape, job: SideJob) -> None:
        self._stores = [PreallocatedKV(shape, job.n_ctx) for _ in job.question_ids]

    def conversation(self, index: int, compute_prefix: ComputePrefix) -> KVStore:
        """Compute the shared prompt into this conversation's own cache."""
        compute_prefix(self._stores[index])
        return self._stores[index]

    def kv_bytes(self, page_table_growth_bytes: int) -> int:
        """Return the resident bytes of all caches and the growth of the page tables."""
        arrays = sum(resident_bytes(kv.address, kv.mapped_bytes) for kv in self._stores)
        return arrays + page_table_growth_bytes

    def huge_bytes(self) -> int | None:
        """Return None: whose huge pages the kernel counts, it does not say by array."""
        return None

    def close(self) -> None:
        """Drop the caches."""
        self._stores.clear()


class PageallocSide:
    """With pagealloc: the shared prompt is computed once, and forked for each conversation.

    Or not, if the job says so: then each conversation has a sequence of its own.
    """

    def __init__(self, shape: LlamaShape, job: SideJob) -> None:
        layout = paged_layout(shape, job.n_ctx)
        self._cache = KVCache(layout, backing=job.backing, **KV_KINDS[job.kv])
        self._prompt = PagedKV(self._cache.sequence()) if job.shares_prompt else None
        self._conversations: list[PagedKV] = []

    def conversation(self, index: int, compute_prefix: ComputePrefix) -> KVStore:  # noqa: ARG002
        """Fork the sequence that holds the shared prompt; the first call computes it."""
        if self._prompt is None:
            kv = PagedKV(self._cache.sequence())
            compute_prefix(kv)
        else:
            if not len(self._prompt):
                compute_prefix(self._prompt)
            kv = self._prompt.fork()
        self._conversations.append(kv)
        return kv

    def kv_bytes(self, page_table_growth_bytes: int) -> int:
        """Return the pages of the cache's file and the growth of the page tables."""
        return int(self._cache.stats().file_bytes) + page_table_growth_bytes

    def huge_bytes(self) -> int | None:
        """Return how much of the sequences huge pages map; None before Linux 6.7."""
        try:
            return self._cache.huge_bytes()
        except OSError:
            return None

    def close(self) -> None:
        """Close the conversations, then the cache."""
        for kv in self._conversations:
            kv.close()
        if self._prompt is not None:
            self._prompt.close()
        self._cache.close()


SIDES: dict[str, type[Side]] = {"baseline": BaselineSide, "pagealloc": PageallocSide}
