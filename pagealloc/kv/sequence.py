"""Sequence: the rows of one conversation in one window.

Purpose
    Append, read, truncate, fork, and change by position, so that memory is committed before it is
    touched and no sequence ever sees another one's rows.
Structure
    Sequence            whole conversations: here
      SequencePrefix    what it has from the prefix index, and gives to it
      SequenceViews     arrays of whole KV blocks and packed rows
      SequenceRows      what every token passes: appending, arrays (Cython)
      RowPages          the pages behind the rows
      Lineage           which tokens are whose
      seq_ops           rm, cp, add, div: by position
Invariants
    those of sequence_rows, row_pages and lineage
Locking
    None: one writer a sequence, many readers.  fork(), truncate() and close() are writers.
"""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING, NoReturn, Self

from pagealloc.errors import PageBoundaryError
from pagealloc.kv import seq_ops
from pagealloc.kv.lineage import Lineage
from pagealloc.kv.pressure import with_room
from pagealloc.kv.quantised_pages import QuantisedPages
from pagealloc.kv.row_pages import RowPages
from pagealloc.kv.sequence_prefix import SequencePrefix
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pagealloc.kv.cache import KVCache

__all__ = ["Sequence"]

# ruff: noqa: SLF001  a fork reaches into its twin; cache and sequences are one unit

_uses = itertools.count()


class Sequence(SequencePrefix):
    """The K and V rows of one conversation.

    Made by `KVCache.sequence` or `fork`.  One thread at a time may change it (append, truncate,
    rm, fork, close, ...); any number may read.  After ``os.fork()`` the child process can read and
    close it but not change it, and read only what the parent keeps: rows that it truncates or
    closes meanwhile read as zeros, or as what came in their place; and so do the newest rows of a
    quantised sequence, which are not packed yet, once the parent appends.

    Parameters
    ----------
    cache : KVCache
        The cache it belongs to.
    seq_id : int
        Its number in the cache.
    evictable : bool
        Whether the cache may close it to make room for others.
    for_fork : bool
        Whether it is about to share another sequence's first pages.

    Examples
    --------
    >>> import numpy as np
    >>> from pagealloc.kv import KVCache, KVLayout
    >>> cache = KVCache(KVLayout(n_layers=2, n_kv_heads=3, head_dim=64, max_tokens=8192))
    >>> seq = cache.sequence()
    >>> rows = np.ones((10, 3, 64), np.float16)  # (T, H, D)
    >>> for layer in range(2):
    ...     seq.append(layer, rows, rows)
    >>> len(seq), seq.k(0).shape
    (10, (10, 3, 64))
    >>> cache.close()
    """

    __slots__ = (
        "__weakref__",
        "_is_growing",
        "_last_use",
        "_seq_id",
        "evictable",
    )

    evictable: bool
    """Whether the cache may close it to make room for others; settable."""

    def __init__(
        self,
        cache: KVCache,
        seq_id: int,
        *,
        evictable: bool = False,
        for_fork: bool = False,  # noqa: ARG002  for SequenceRows, which takes the window
    ) -> None:
        self._cache = cache
        self._seq_id = seq_id
        self.evictable = evictable
        self._is_growing = False
        self._touch()
        self._layout = cache.layout
        self._pages = (
            RowPages(self._window, cache.layout)
            if cache._quantisation is None
            else QuantisedPages(self, cache._quantisation)
        )
        self._lineage = Lineage()
        self._lease = None
        self._remote_lease = None
        self._tokens = None
        self._n_cached = 0
        cache._register(self)

    # --- what it is ---------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache:
        """The cache it belongs to."""
        return self._cache

    @property
    def seq_id(self) -> int:
        """Its number in the cache, for ``cache.seq_rm(seq_id, ...)`` and its siblings."""
        return self._seq_id

    @property
    def committed_bytes(self) -> int:
        """Bytes of the pages behind its rows, shared ones included."""
        if self.closed:
            return 0
        return sum(window.committed_bytes for window in self._pages.windows)

    @property
    def n_cold(self) -> int:
        """How many of its first tokens are quantised, in every layer; 0 if the cache does not."""
        return 0 if self._cold is None else len(self._cold)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the cache evicted it."""
        return self._is_closed

    def __repr__(self) -> str:
        if self.closed:
            return "<Sequence closed>"
        shortest, longest = min(self.layer_lengths), max(self.layer_lengths)
        tokens = str(shortest) if shortest == longest else f"{shortest} to {longest}"
        return (
            f"<Sequence {self._seq_id} of {tokens} tokens, at most {self._layout.max_tokens}; "
            f"{format_bytes(self.committed_bytes)} committed>"
        )

    # --- changing its length ------------------------------------------------------------------

    def _make_ready(
        self, layers: list[int], end: int, keep: Collection[Sequence] | None = None
    ) -> None:
        """Commit pages for rows up to `end`, whatever else is evicted for it but `keep`."""
        self._is_growing, n_cuts = True, self._n_cuts
        try:
            with_room(
                self._cache, keep or [self], lambda: self._pages.make_ready(self, layers, end)
            )
        finally:
            self._is_growing = False
        if self._n_cuts != n_cuts:
            self._check_open()
            raise ValueError("on_pressure() changed the sequence that was being appended to")
        self._touch()

    def _touch(self) -> None:
        """It was used, for the order of eviction: it grew, or was forked or copied from."""
        self._last_use = next(_uses)

    def truncate(self, n_tokens: int) -> None:
        """Drop all rows from token `n_tokens` on, and release the pages that held no others.

        Counts tokens as they are stored, whatever their positions; see `rm` for those.  A page the
        kernel refuses to let go stays committed, shows as waste in the cache's stats, and every
        later change of the sequence tries again.

        Raises
        ------
        ValueError
            The layers differ in length.
        PageBoundaryError
            `n_tokens` is negative or more than there are.
        BufferError
            A live array reaches past `n_tokens`.
        """
        self._check_writable()
        length = self._equal_length("truncate")
        n_tokens = operator.index(n_tokens)
        if not 0 <= n_tokens <= length:
            raise PageBoundaryError(
                f"cannot truncate to {n_tokens} tokens: the sequence holds {length}"
            )
        self._cut(n_tokens)

    def rollback(self) -> None:
        """Drop the rows that not all layers hold, so that the layers are of equal length again.

        For a forward pass that failed half-way, say with an `OutOfMemoryError`.

        Raises
        ------
        BufferError
            A live array reaches past the shortest layer.
        """
        self._check_writable()
        self._cut(len(self))

    def _cut(self, n_tokens: int) -> None:
        self._hide_rows(n_tokens)
        self._lineage.cut(n_tokens)
        self._forget_tokens(n_tokens)
        self._set_positions(self.positions[:n_tokens])
        self._pages.cut(self, [n_tokens] * self._layout.n_layers)

    def _hide_rows(self, n_tokens: int) -> None:
        """Shorten all layers to at most `n_tokens`, if no live array reaches further.

        Shorten first, look at the views then: a reader makes its view first and looks at the cuts
        then, so that one of the two notices the other.
        """
        lengths = self.layer_lengths
        self._set_lengths([n_tokens] * self._layout.n_layers)
        reach = max(window.highest_mark() for window in self._pages.windows)
        if reach > n_tokens:
            self._set_lengths(lengths)
            raise BufferError(
                f"cannot drop or change rows from token {n_tokens} on: a live array reaches to "
                f"token {reach}; delete what k() and v() returned first (while another thread "
                "copies rows, try again)"
            )

    def fork(self, n_tokens: int | None = None) -> Sequence:
        """Return a second sequence with the same rows, which shares all pages with this one.

        Nothing is copied.  Whichever of the two writes to a page first gets its own copy of it.

        Parameters
        ----------
        n_tokens : int, optional
            Only the first so many tokens; all by default.

        Raises
        ------
        ValueError
            The layers differ in length.
        PageBoundaryError
            `n_tokens` is negative or more than there are.
        OutOfMemoryError
            The kernel refused the mapping; this sequence is as it was.
        """
        self._check_writable()
        length = self._equal_length("fork")
        n_tokens = length if n_tokens is None else operator.index(n_tokens)
        if not 0 <= n_tokens <= length:
            raise PageBoundaryError(
                f"cannot fork the first {n_tokens} tokens: the sequence holds {length}"
            )
        child = self._cache._new_sequence(for_fork=True)
        try:
            self._share_into(child, n_tokens)
        except BaseException:
            child.close()
            raise
        return child

    def _share_into(self, child: Sequence, n_tokens: int) -> None:
        """Give the first tokens to a sequence that has none."""
        self._touch()
        lengths = [n_tokens] * self._layout.n_layers
        child._pages.share(child, self._pages, self, lengths)  # type: ignore[arg-type]
        self._lineage.settle(len(self))
        child._lease, child._tokens = self._lease, self._tokens
        child._remote_lease = self._remote_lease
        child._forget_tokens(n_tokens)
        child._lineage = Lineage(self._lineage.part(0, n_tokens))
        child._set_positions(self.positions[:n_tokens])
        child._set_lengths(lengths)

    def close(self) -> None:
        """Give back the pages that no other sequence shares.  A second call does nothing.

        Its window stays warm for the next sequence for a while, see `KVCache`.

        Raises
        ------
        BufferError
            An array that `k` or `v` returned is still alive.
        """
        if self.closed:
            return
        self._check_no_views()
        lengths = self.layer_lengths
        self._is_closed = True  # first: a thread that appends or reads meanwhile shall meet this
        try:
            self._set_lengths([0] * self._layout.n_layers)  # as `_hide_rows`
            self._check_no_views()
            for use, window in enumerate(self._pages.windows):
                self._cache._retire(window, use, is_idle=not self._is_growing)
        except BaseException:
            self._is_closed = False
            self._set_lengths(lengths)
            raise
        self._lease = self._remote_lease = None
        self._set_positions(self.positions[:0])
        self._cache._forget(self)

    def _check_no_views(self) -> None:
        if any(window.n_views for window in self._pages.windows):
            raise BufferError(
                "cannot close the sequence: arrays that k() and v() returned are still alive"
            )

    def _evict(self) -> None:
        self.close()
        self._was_evicted = True

    # --- by position, with llama.cpp's meaning ------------------------------------------------

    def rm(self, p0: int = -1, p1: int = -1) -> bool:
        """Remove the tokens at positions [p0, p1); the others keep theirs.

        Storage is compacted: by mapping pages elsewhere where what is removed is whole pages of
        every layer (`KVLayout.remap_tokens`), else by moving rows.

        Parameters
        ----------
        p0, p1 : int
            Positions; a negative `p0` is 0, a negative `p1` is no end.

        Returns
        -------
        bool
            True, as llama.cpp's ``seq_rm`` for caches that can remove any range.

        Raises
        ------
        ValueError
            The layers differ in length.
        BufferError
            A live array reaches past the first token to remove.
        OutOfMemoryError
            Rows had to be moved in pages that are shared, and there was no memory for copies of
            them; the sequence is as it was.
        """
        return seq_ops.remove(self, p0, p1)

    def cp(self, target: Sequence, p0: int = -1, p1: int = -1) -> None:
        """Give another sequence the tokens at positions [p0, p1), which keep their positions.

        An empty target shares their pages.  One that holds tokens gets copies behind them, except
        of tokens that it shares already.

        Raises
        ------
        TypeError, ValueError
            `target` is no sequence of this cache, or the layers of one of the two differ in length.
        PageBoundaryError, OutOfMemoryError
            The target has no room; or there is no memory.  The target is as it was.
        """
        seq_ops.copy(self, target, p0, p1)

    def keep(self) -> None:
        """Remove all tokens of all other sequences of the cache.

        Raises
        ------
        BufferError
            A live array covers one of them; those before it are empty, those behind it are not.
        """
        self._cache.seq_keep(self._seq_id)

    def add(self, p0: int, p1: int, delta: int, *, lossy: bool = False) -> None:
        """Move the tokens at positions [p0, p1) by `delta` positions, and rotate their K along.

        Tokens whose position becomes negative are removed.  Pages that are shared are copied.

        Parameters
        ----------
        p0, p1 : int
            Positions; a negative `p0` is 0, a negative `p1` is no end.
        delta : int
            How far they move.
        lossy : bool
            Whether quantised K rows may be rounded once more.

        Raises
        ------
        ValueError
            The layout says nothing of `rope`, or the layers differ in length; or a position would
            leave the range of 32 bits; or K rows are quantised and `lossy` is not set.
        BufferError
            A live array reaches past the first token to change.
        OutOfMemoryError
            There was no memory for copies of shared pages; the sequence is as it was.
        """
        seq_ops.add(self, p0, p1, delta, lossy=lossy)

    def div(self, p0: int, p1: int, d: int, *, lossy: bool = False) -> None:
        """Divide the positions in [p0, p1) by `d`, rounding down, and rotate K along; as `add`."""
        seq_ops.divide(self, p0, p1, d, lossy=lossy)

    def _has_packed_k(self, ranges: Collection[tuple[int, int]]) -> bool:
        """Whether K of any of these tokens is quantised."""
        cold = self._cold
        if cold is None or not self._cache.cold_layout.formats[0].is_packed:
            return False
        return any(start < max(cold.layer_lengths) for start, _ in ranges)

    def _give_way(self, request: Callable[[], None]) -> None:
        """Carry out a request for memory, whatever else is evicted for it."""
        with_room(self._cache, [self], request)

    def slide(self, window_tokens: int, sink_tokens: int = 0) -> int:
        """Drop the oldest tokens but the first few, so that about `window_tokens` follow them.

        Call it after appending.  Tokens are dropped in steps of `KVLayout.remap_tokens`, so that
        pages go back to the kernel and nothing but mappings moves; up to a step more than
        `window_tokens` stay meanwhile.  Positions stay as they are, see `add`.

        Parameters
        ----------
        window_tokens : int
            How many of the newest tokens to keep at least.
        sink_tokens : int
            How many of the first tokens to keep for ever ("attention sinks", Xiao et al., 2023).

        Returns
        -------
        int
            How many were dropped.

        Raises
        ------
        ValueError
            A number is negative, or the layers differ in length.
        BufferError, OutOfMemoryError
            As `rm`.
        """
        return seq_ops.slide(self, window_tokens, sink_tokens)

    def _uneven_bytes(self) -> int:
        """Bytes of rows beyond what `len` and `n_cold` say, while layers differ in either."""
        n_tokens, n_cold, lengths = len(self), self.n_cold, self.layer_lengths
        cold_lengths = lengths if self._cold is None else self._cold.layer_lengths
        if max(lengths) == n_tokens and (self._cold is None or max(cold_lengths) == n_cold):
            return 0
        n_bytes = 0
        for layer, rows in enumerate(self._layout.layers):
            cold_bytes = self._cache.cold_layout.layers[layer].token_bytes
            more_cold = 0 if self._cold is None else cold_lengths[layer] - n_cold
            n_bytes += more_cold * cold_bytes
            n_bytes += (lengths[layer] - n_tokens - more_cold) * rows.token_bytes
        return n_bytes

    # --- guards -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError if what the modules say must hold does not."""
        if self.closed:
            return
        self._check_rows()
        self._pages.check(self)

    def _equal_length(self, what: str) -> int:
        """Return the length that all layers have."""
        lengths = self.layer_lengths
        shortest = min(lengths)
        if max(lengths) != shortest:
            longer = [layer for layer, length in enumerate(lengths) if length != shortest]
            shown = ", ".join(f"layer {layer}: {lengths[layer]}" for layer in longer[:8])
            raise ValueError(
                f"cannot {what}: {len(longer)} of {len(lengths)} layers hold more than {shortest} "
                f"tokens ({shown}{', ...' if len(longer) > 8 else ''}); append to the others "
                f"first, or drop the surplus with rollback()"
            )
        return shortest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            self.close()
        except BufferError:
            if exc_type is None:  # else what the block raised matters more, and holds the arrays
                raise

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Sequence is memory of this process and cannot be pickled or copied; fork() makes a "
            "second sequence that shares its rows"
        )
