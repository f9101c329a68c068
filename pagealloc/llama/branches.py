"""Branches: how cached prompts go on behind their whole blocks, token by token.

Purpose
    A prompt shares whole blocks with others by the prefix index; here it is found how many more
    tokens it shares with the next block of one, or with the last tokens of one, which fill none.
Structure
    ::

        key of the first blocks' tokens --> the next tokens of each prompt that goes on from there
                                            16 of them: a block, whose rows the prefix index has
                                            fewer: a tail, whose rows are kept here
Invariants
    nbytes is the sum of the tails'
    a branch whose block was evicted may still be here: who follows it finds that out
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

import numpy as np

from pagealloc import default_allocator

if TYPE_CHECKING:
    import numpy.typing as npt

    from pagealloc import Buffer

__all__ = ["Branch", "Branches"]

MAX_BLOCKS = 1 << 16
"""Of blocks that are noted: those used longest ago are forgotten, and found whole only."""


class Branch(NamedTuple):
    """How a prompt goes on: what of it another one shares."""

    tokens: npt.NDArray[np.int32]
    n_shared: int
    rows: memoryview | None


class Branches:
    """Branches of one model's prompts.

    Parameters
    ----------
    block_tokens : int
        Tokens of a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._children: dict[bytes, dict[bytes, None]] = {}
        self._blocks: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self._tails: OrderedDict[tuple[bytes, bytes], Buffer] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    @property
    def n_tails(self) -> int:
        """How many tails there are."""
        return len(self._tails)

    def note_blocks(self, tokens: npt.NDArray[np.int32], first_token: int) -> None:
        """Remember the whole blocks of a prompt from a token on."""
        size = self._block_tokens
        digest = blake2b(_bytes(tokens[:first_token]), digest_size=16)
        with self._lock:
            for start in range(first_token, len(tokens) - size + 1, size):
                block = _bytes(tokens[start : start + size])
                self._blocks[digest.digest(), block] = None
                self._children.setdefault(digest.digest(), {})[block] = None
                digest.update(block)
            while len(self._blocks) > MAX_BLOCKS:
                self._drop(*self._blocks.popitem(last=False)[0])

    def new_tail(self, tokens: npt.NDArray[np.int32], nbytes: int) -> memoryview | None:
        """Return memory for the rows of a prompt's tail; None if it has none, or they are there.

        Raises
        ------
        OutOfMemoryError
            There is no memory for it.
        """
        n_whole = len(tokens) // self._block_tokens * self._block_tokens
        parent, tail = _key(tokens[:n_whole]), _bytes(tokens[n_whole:])
        with self._lock:
            if any(child.startswith(tail) for child in self._children.get(parent, ())) or not tail:
                return None
        rows = default_allocator().alloc(nbytes)
        with self._lock:
            self._tails[parent, tail] = rows
            self._children.setdefault(parent, {})[tail] = None
            self.nbytes += nbytes
        return memoryview(rows)

    def find(self, tokens: npt.NDArray[np.int32], n_known: int) -> Branch | None:
        """Return the branch that shares most tokens with a prompt behind its known blocks."""
        parent = _key(tokens[:n_known])
        wanted = _bytes(tokens[n_known : n_known + self._block_tokens])
        with self._lock:
            shared = ((_n_shared(child, wanted), child) for child in self._children.get(parent, ()))
            n_shared, child = max(shared, default=(0, b""))
            if not n_shared:
                return None
            entry = (parent, child)
            rows = self._tails.get(entry)
            (self._blocks if rows is None else self._tails).move_to_end(entry)
        kept = None if rows is None else memoryview(rows)
        return Branch(np.frombuffer(child, "<i4").astype(np.int32), n_shared, kept)

    def forget_block(self, tokens: npt.NDArray[np.int32], n_known: int, branch: Branch) -> None:
        """Forget a branch whose block turned out to be gone."""
        entry = _key(tokens[:n_known]), _bytes(branch.tokens)
        with self._lock:
            if entry in self._blocks:
                del self._blocks[entry]
                self._drop(*entry)

    def evict(self) -> bool:
        """Let go of the tail used longest ago; False if there is none."""
        with self._lock:
            if not self._tails:
                return False
            entry, rows = self._tails.popitem(last=False)
            self._drop(*entry)
            self.nbytes -= len(memoryview(rows))
            return True

    def _drop(self, parent: bytes, child: bytes) -> None:
        children = self._children[parent]
        del children[child]
        if not children:
            del self._children[parent]


def _bytes(tokens: npt.NDArray[np.int32]) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()


def _key(tokens: npt.NDArray[np.int32]) -> bytes:
    return blake2b(_bytes(tokens), digest_size=16).digest()


def _n_shared(one: bytes, other: bytes) -> int:
    """Return how many tokens two runs of bytes begin with alike."""
    n_tokens = 0
    for at in range(0, min(len(one), len(other)), 4):
        if one[at : at + 4] != other[at : at + 4]:
            break
        n_tokens += 1
    return n_tokens
