"""SequencesById: the open sequences of a cache, by number; llama.cpp's operations on them.

Purpose
    Make sequences, find them, and let go of them: what `KVCache` inherits.
Structure
    ::

        _sequences   seq_id -> weak reference: a sequence nobody refers to gives its pages back
        _named       seq_id -> sequence, of those asked for by number: the cache keeps them
Locking
    None: single operations of a dict, which are atomic.
Source
    llama.cpp, ``llama_memory_seq_rm`` and its siblings.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

from pagealloc.kv.prefix_client import RemoteFound
from pagealloc.kv.prefix_hash import token_bytes
from pagealloc.kv.prefix_index import Found
from pagealloc.kv.sequence import Sequence
from pagealloc.slow_events import slow_event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagealloc.kv.cache import KVCache
    from pagealloc.kv.prefix_disk import DiskPrefixIndex

__all__ = ["SequencesById"]

# ruff: noqa: SLF001  cache and sequences are one unit


NOTHING = Found(None, [])


class SequencesById(ABC):
    """The sequences of a cache."""

    __slots__ = ("_named", "_next_seq_ids", "_sequences")

    _prefixes: DiskPrefixIndex

    @abstractmethod
    def _find_remote(self, tokens: bytes, n_found: int) -> RemoteFound | None:
        """Return what the owner has of a prompt, if it is more than what was found here."""

    @abstractmethod
    def _check_process(self) -> None:
        """Raise ForkedError in a process that may only read the cache."""

    def __init__(self) -> None:
        self._sequences: dict[int, weakref.ref[Sequence]] = {}
        self._named: dict[int, Sequence] = {}
        self._next_seq_ids = itertools.count()

    def sequence(
        self,
        token_ids: Iterable[int] | None = None,
        *,
        seq_id: int | None = None,
        evictable: bool = False,
    ) -> Sequence:
        """Return a new sequence.  It takes a warm window, or reserves address space.

        Parameters
        ----------
        token_ids : iterable of int, optional
            Its prompt.  The sequence starts with the rows of the longest published prefix of it,
            whole KV blocks, see `Sequence.publish`; ``n_cached`` of its tokens need not be computed
            then.  A model that wants to compute at least the last one is given
            ``token_ids[:-1]``.  Without a prompt it starts empty.
        seq_id : int, optional
            Its number.  A sequence that was given one lives until it or the cache is closed; one
            that was not, and gets the next free one, as long as somebody refers to it.
        evictable : bool
            Whether the cache may close it to make room for others, as for a stored prompt.

        Raises
        ------
        TypeError, ValueError
            `seq_id` is negative, or an open sequence's; or `token_ids` are none.
        OutOfMemoryError
            The kernel refused the address range.
        CacheFileError
            A block of it in a file is damaged, see ``KVCache.load(on_error=...)``.
        ClosedError, ForkedError
            The cache is closed, or inherited through ``os.fork()``.
        """
        if seq_id is not None:
            seq_id = _seq_id(seq_id)
            if self._find(seq_id) is not None:
                raise ValueError(f"seq_id={seq_id}: this sequence exists; use seq({seq_id})")
        if isinstance(token_ids, int):
            raise TypeError(f"sequence({token_ids}): a number is given as seq_id={token_ids}")
        tokens = None if token_ids is None else token_bytes(token_ids)
        self._check_process()
        found = self._prefixes.find(tokens) if tokens else NOTHING
        remote = self._find_remote(tokens or b"", self._prefixes.n_found(found))
        if remote is not None:
            sequence = self._starting_with(remote, tokens, seq_id, evictable=evictable)
        elif not found.on_disk:
            sequence = self._starting_with(found, tokens, seq_id, evictable=evictable)
        else:
            with self._prefixes.restoring:
                found = self._prefixes.find(tokens or b"", is_again=True)
                sequence = self._starting_with(found, tokens, seq_id, evictable=evictable)
        if seq_id is not None:
            self._named[seq_id] = sequence
        return sequence

    def _starting_with(
        self,
        found: Found | RemoteFound,
        tokens: bytes | None,
        seq_id: int | None,
        *,
        evictable: bool,
    ) -> Sequence:
        """Return a new sequence with the rows that were found."""
        is_found = found.lease is not None
        sequence = self._new_sequence(seq_id, evictable=evictable, for_fork=is_found)
        sequence._tokens = tokens
        try:
            if found != NOTHING:
                with slow_event("prefix_restore") as attributes:
                    self._restore(sequence, found, tokens or b"")
                    attributes["n_tokens"] = sequence.n_cached
                    attributes["source"] = _source_of(found)
        except BaseException:
            sequence.close()
            raise
        return sequence

    @staticmethod
    def _restore(sequence: Sequence, found: Found | RemoteFound, tokens: bytes) -> None:
        if isinstance(found, RemoteFound):
            sequence._take_remote(found)
            return
        if found.lease is not None:
            sequence._take_prefix(found.lease)
        if found.on_disk:
            sequence._read_prefix(found.on_disk, tokens)

    def seq(self, seq_id: int) -> Sequence:
        """Return the open sequence of this number.

        Raises
        ------
        KeyError
            There is none.
        """
        found = self._find(_seq_id(seq_id))
        if found is None:
            raise KeyError(f"no open sequence has seq_id={seq_id}")
        return found

    @property
    def sequences(self) -> list[Sequence]:
        """The open sequences, oldest first."""
        references = list(self._sequences.values())
        found = [sequence for reference in references if (sequence := reference()) is not None]
        return [sequence for sequence in found if not sequence.closed]

    # --- by seq_id, with llama.cpp's meaning --------------------------------------------------

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> bool:
        """Remove the tokens at positions [p0, p1) of a sequence, of all if `seq_id` is -1.

        A sequence that does not exist has no tokens.  See `Sequence.rm`, also for what is raised.
        """
        if operator.index(seq_id) == -1:
            for sequence in self.sequences:
                sequence.rm(p0, p1)
            return True
        found = self._find(_seq_id(seq_id))
        return True if found is None else found.rm(p0, p1)

    def seq_cp(self, source_id: int, target_id: int, p0: int = -1, p1: int = -1) -> None:
        """Give a sequence the tokens at positions [p0, p1) of another; see `Sequence.cp`.

        A target that does not exist is made, if there is anything to give.
        """
        source, target = self._find(_seq_id(source_id)), self._find(_seq_id(target_id))
        if source is None or source is target:
            return
        if target is not None:
            source.cp(target, p0, p1)
            return
        target = self.sequence(seq_id=target_id)
        try:
            source.cp(target, p0, p1)
        except BaseException:
            target.close()
            raise
        if not len(target):
            target.close()

    def seq_keep(self, seq_id: int) -> None:
        """Remove all tokens of all other sequences; see `Sequence.keep`."""
        seq_id = _seq_id(seq_id)
        for sequence in self.sequences:
            if sequence.seq_id != seq_id:
                sequence.rollback()
                sequence.rm()

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int, *, lossy: bool = False) -> None:
        """Move tokens of a sequence by `delta` positions; see `Sequence.add`."""
        found = self._find(_seq_id(seq_id))
        if found is not None:
            found.add(p0, p1, delta, lossy=lossy)

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int, *, lossy: bool = False) -> None:
        """Divide positions of a sequence by `d`; see `Sequence.div`."""
        found = self._find(_seq_id(seq_id))
        if found is not None:
            found.div(p0, p1, d, lossy=lossy)

    def seq_pos_min(self, seq_id: int) -> int:
        """Return the smallest position in a sequence, -1 if it has no tokens."""
        found = self._find(_seq_id(seq_id))
        return -1 if found is None else found.pos_min()

    def seq_pos_max(self, seq_id: int) -> int:
        """Return the largest position in a sequence, -1 if it has no tokens."""
        found = self._find(_seq_id(seq_id))
        return -1 if found is None else found.pos_max()

    def _new_sequence(self, seq_id: int | None = None, **options: bool) -> Sequence:
        """Return a new sequence, by default with the next free number."""
        if seq_id is None:
            seq_id = next(number for number in self._next_seq_ids if self._find(number) is None)
        return Sequence(cast("KVCache", self), seq_id, **options)

    def _find(self, seq_id: int) -> Sequence | None:
        reference = self._sequences.get(seq_id)
        found = None if reference is None else reference()
        return None if found is None or found.closed else found

    def _register(self, sequence: Sequence) -> None:
        key, registry = sequence.seq_id, self._sequences

        def drop(reference: weakref.ref[Sequence]) -> None:
            if registry.get(key) is reference:
                del registry[key]

        registry[key] = weakref.ref(sequence, drop)

    def _forget(self, sequence: Sequence) -> None:
        if self._named.get(sequence.seq_id) is sequence:
            del self._named[sequence.seq_id]
        reference = self._sequences.get(sequence.seq_id)
        if reference is not None and reference() is sequence:
            del self._sequences[sequence.seq_id]


def _source_of(found: Found | RemoteFound) -> str:
    """Return where the rows come from that take longest."""
    if isinstance(found, RemoteFound):
        return "process"
    return "file" if found.on_disk else "memory"


def _seq_id(seq_id: int) -> int:
    """Return a sequence's number as an int."""
    number = operator.index(seq_id)
    if number < 0:
        raise ValueError(f"seq_id={number}: must not be negative")
    return number
