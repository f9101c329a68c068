"""PrefixStats and PrefixEvent: what the prefix index has, did, and tells as it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["PrefixEvent", "PrefixStats"]


@dataclass(frozen=True, kw_only=True)
class PrefixStats:
    """One reading of a prefix index.  Frozen; take another with ``cache.prefixes.stats()``.

    The first sentence on each parameter and property is what metrics say of it
    (``pagealloc.observe``).

    Parameters
    ----------
    n_blocks : int
        Published KV blocks whose rows are in memory.
    n_tokens : int
        Tokens of the published KV blocks whose rows are in memory.
    nbytes : int
        Bytes of the rows of the published KV blocks in memory.
    n_disk_blocks : int
        Published KV blocks whose rows are in a file only.
    n_pinned_blocks : int
        Published KV blocks that a pin keeps: pinned ones, and all before them.
    n_lookups : int
        Prompts that were looked up.
    n_hits : int
        Prompts looked up of which at least one block was found.
    n_asked_tokens : int
        Tokens of all prompts that were looked up.
    n_hit_tokens : int
        Tokens of the prompts looked up that were found.
    n_stored_blocks : int
        KV blocks published since the cache was made.
    n_evicted_blocks : int
        Published KV blocks evicted since the cache was made.
    n_collisions : int
        Hashes of blocks that named other tokens, which was noticed.
    n_damaged_blocks : int
        Blocks of files that were skipped, see ``KVCache.load(on_error="skip")``.
    """

    n_blocks: int
    n_tokens: int
    nbytes: int
    n_disk_blocks: int
    n_pinned_blocks: int
    n_lookups: int
    n_hits: int
    n_asked_tokens: int
    n_hit_tokens: int
    n_stored_blocks: int
    n_evicted_blocks: int
    n_collisions: int
    n_damaged_blocks: int

    @property
    def hit_rate(self) -> float:
        """Share of the tokens looked up that were found; 0 if none were."""
        return self.n_hit_tokens / self.n_asked_tokens if self.n_asked_tokens else 0.0


class PrefixEvent(NamedTuple):
    """Something that happened to published blocks, for ``KVCache(on_prefix_event=...)``."""

    kind: Literal["stored", "hit", "evicted"]
    first_token: int
    """Where in its prompt the first of the blocks starts."""
    n_tokens: int
    """Tokens of the blocks."""
    key: bytes
    """Chained hash of the last of them, 16 bytes."""
