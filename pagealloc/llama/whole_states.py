"""WholeStates: states that cannot be taken apart, kept as they are.

Purpose
    What a recurrent or sliding-window model's states need: one is of use only to a prompt that
    begins with all of its tokens.
Invariants
    held bytes are the sum of the blobs'; the least recently used one goes first
Locking
    The cache's lock, which its callers hold.
Units
    Bytes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from pagealloc import Buffer, default_allocator

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["WholeStates"]


class Whole(NamedTuple):
    """A state, and of how many tokens."""

    n_tokens: int
    blob: Buffer


class WholeStates:
    """Blobs by model and tokens.

    Parameters
    ----------
    salt : bytes
        Part of every key.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = salt
        self._states: OrderedDict[bytes, Whole] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def keep(self, identity: bytes, tokens: npt.NDArray[np.int32], blob: memoryview) -> Buffer:
        """Keep a copy of a state, and return it.

        Raises
        ------
        OutOfMemoryError
            There is no memory for it.
        """
        key = self._keys(identity, tokens, [len(tokens)])[len(tokens)]
        kept = default_allocator().alloc(len(blob))
        memoryview(kept)[:] = blob
        self._forget(key)
        self._states[key] = Whole(len(tokens), kept)
        self._lengths[len(tokens)] += 1
        self.nbytes += len(blob)
        return kept

    def find(self, identity: bytes, tokens: npt.NDArray[np.int32]) -> Whole | None:
        """Return the longest state with whose tokens a prompt begins."""
        lengths = sorted(n for n in self._lengths if n <= len(tokens))
        keys = self._keys(identity, tokens, lengths)
        for n_tokens in reversed(lengths):
            if keys[n_tokens] in self._states:
                self._states.move_to_end(keys[n_tokens])
                return self._states[keys[n_tokens]]
        return None

    def evict(self) -> bool:
        """Let go of the state used longest ago; False if there is none."""
        if not self._states:
            return False
        self._forget(next(iter(self._states)))
        return True

    def _forget(self, key: bytes) -> None:
        state = self._states.pop(key, None)
        if state is None:
            return
        self.nbytes -= len(memoryview(state.blob))
        self._lengths[state.n_tokens] -= 1
        if not self._lengths[state.n_tokens]:
            del self._lengths[state.n_tokens]

    def _keys(
        self, identity: bytes, tokens: npt.NDArray[np.int32], lengths: list[int]
    ) -> dict[int, bytes]:
        """Return the keys of a prompt's first tokens, for ascending lengths."""
        digest = blake2b(identity, key=self._salt[:64], digest_size=16)
        keys, start = {}, 0
        for n_tokens in lengths:
            digest.update(tokens[start:n_tokens].astype("<i4").tobytes())
            keys[n_tokens], start = digest.digest(), n_tokens
        return keys
