"""PrefixStats and PrefixEvent: what the prefix index has, did, and tells as it happens."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["PrefixEvent", "PrefixStats"]


class PrefixStats(NamedTuple):
    """One reading of a prefix index."""

    n_blocks: int
    """Published KV blocks whose rows are in memory."""
    n_tokens: int
    """Their tokens."""
    nbytes: int
    """Bytes of their rows."""
    n_disk_blocks: int
    """Published blocks whose rows are in a file only."""
    n_pinned_blocks: int
    """Of them, those that a pin keeps: pinned ones, and all before them."""
    n_lookups: int
    """Prompts that were looked up."""
    n_hits: int
    """Of them, those of which at least one block was found."""
    n_asked_tokens: int
    """Tokens of all prompts looked up."""
    n_hit_tokens: int
    """Of them, those that were found."""
    n_stored_blocks: int
    """Blocks published so far."""
    n_evicted_blocks: int
    """Blocks evicted so far."""
    n_collisions: int
    """Hashes that named other tokens, which was noticed."""
    n_damaged_blocks: int
    """Blocks of files that were skipped, see ``KVCache.load(on_error="skip")``."""

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
