"""All KV caches of the process that are open, for who shows what they hold.

Locking
    A dict of weak references, each change of which is one step, as is dict.copy() of it: other
    copies make objects on the way, which may start a collection, in which references die.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING
from weakref import ref

if TYPE_CHECKING:
    from pagealloc.kv.cache import KVCache

__all__ = ["note_cache", "open_caches"]

_caches: dict[ref[KVCache], int] = {}
_numbers = count()


def note_cache(cache: KVCache) -> None:
    """Have a cache listed for as long as it is open."""
    _caches[ref(cache, _caches.pop)] = next(_numbers)


def open_caches() -> list[tuple[int, KVCache]]:
    """Return all caches that are not closed, each behind its number.  Thread-safe.

    They are numbered in the order they were made, from 0 on.
    """
    numbered = [(number, cache_ref()) for cache_ref, number in _caches.copy().items()]
    return [(number, cache) for number, cache in numbered if cache is not None and not cache.closed]
