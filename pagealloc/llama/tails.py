"""Tails: the rows of prompts' last tokens, which fill no block.

Purpose
    A prompt that comes again is found to its last token, and one shorter than a block at all.
Structure
    A tail has the rows of the tokens behind a prompt's last whole block, and is found by the key of
    the prompt up to any of them.
Invariants
    every key in _whose is of a tail that is there; nbytes is the sum of the tails'
    the least recently used one goes first
Locking
    Its own lock.
Units
    Bytes and tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from pagealloc import default_allocator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pagealloc import Buffer

__all__ = ["Tails"]


class Tail(NamedTuple):
    """Rows of one prompt's last tokens; and the keys of it up to each of them."""

    rows: Buffer
    keys: list[bytes]


class Tails:
    """Tails of one model's prompts.

    Parameters
    ----------
    block_tokens : int
        Tokens of a block; a tail has fewer.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._tails: OrderedDict[bytes, Tail] = OrderedDict()
        self._whose: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._tails)

    def new(self, tokens: npt.NDArray[np.int32], nbytes: int) -> memoryview | None:
        """Return memory for the tail of a prompt, entered already; None if its rows are there.

        Raises
        ------
        OutOfMemoryError
            There is no memory for it.
        """
        keys = self._keys(tokens, len(tokens) // self._block_tokens * self._block_tokens)
        with self._lock:
            whose = self._whose.get(keys[-1])
            if whose is not None:
                self._tails.move_to_end(whose)
                return None
        rows = default_allocator().alloc(nbytes)
        with self._lock:
            self._tails[keys[-1]] = Tail(rows, keys)
            self._whose.update(dict.fromkeys(keys, keys[-1]))
            self.nbytes += nbytes
        return memoryview(rows)

    def find(self, tokens: npt.NDArray[np.int32], n_known: int) -> tuple[int, memoryview] | None:
        """Return how many tokens behind a prompt's known blocks a tail has, and all its rows."""
        keys = self._keys(tokens[: n_known + self._block_tokens - 1], n_known)
        with self._lock:
            for n_tokens in range(len(keys), 0, -1):
                whose = self._whose.get(keys[n_tokens - 1])
                if whose is not None:
                    self._tails.move_to_end(whose)
                    return n_tokens, memoryview(self._tails[whose].rows)
        return None

    def evict(self) -> bool:
        """Let go of the tail used longest ago; False if there is none."""
        with self._lock:
            if not self._tails:
                return False
            evicted, tail = self._tails.popitem(last=False)
            for key in tail.keys:
                if self._whose.get(key) == evicted:
                    del self._whose[key]
            self.nbytes -= len(memoryview(tail.rows))
            return True

    def _keys(self, tokens: npt.NDArray[np.int32], n_known: int) -> list[bytes]:
        """Return the keys of a prompt's first ``n_known + 1, n_known + 2, ...`` tokens."""
        digest = blake2b(tokens[:n_known].astype("<i4").tobytes(), digest_size=16)
        keys = []
        for token in tokens[n_known:]:
            digest.update(int(token).to_bytes(4, "little", signed=True))
            keys.append(digest.digest())
        return keys
