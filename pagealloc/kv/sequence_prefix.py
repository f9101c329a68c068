"""SequencePrefix: what a sequence has from the prefix index, and gives to it.

Purpose
    Start with the rows of a prompt's published prefix, and publish rows for others.
Structure
    ::

        token   0 ............ n_cached ............ len(_tokens) ........ length
        rows    of the index | computed here       | of tokens nobody told |
                `---- _lease keeps what the index has of it ----'
Invariants
    _tokens are the tokens of the first rows, as long as none of these was dropped or rewritten
    the lease covers every page of the index that the sequence maps
Locking
    None: the sequence's one writer.  The index has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagealloc.errors import CacheFileError, WireError
from pagealloc.kv import boundary
from pagealloc.kv.block_segments import segments
from pagealloc.kv.boundary import Span
from pagealloc.kv.lineage import Cells, Lineage
from pagealloc.kv.prefix_hash import TOKEN_BYTES, token_bytes
from pagealloc.kv.pressure import with_room
from pagealloc.kv.row_pages import share_parts
from pagealloc.kv.sequence_views import SequenceViews

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pagealloc import Window
    from pagealloc.kv.layout import KVLayout
    from pagealloc.kv.prefix_client import RemoteFound, RemoteLease
    from pagealloc.kv.prefix_nodes import Lease, Node
    from pagealloc.kv.quantised_pages import QuantisedPages
    from pagealloc.kv.row_pages import RowPages

__all__ = ["SequencePrefix"]

# ruff: noqa: SLF001  cache and sequences are one unit


class SequencePrefix(SequenceViews):
    """The part of `Sequence` that the prefix index is about."""

    __slots__ = ("_lease", "_lineage", "_n_cached", "_pages", "_remote_lease", "_tokens")

    _lease: Lease | None
    _lineage: Lineage
    _n_cached: int
    _pages: RowPages | QuantisedPages
    _remote_lease: RemoteLease | None
    _tokens: bytes | None  # None: nobody told any

    @property
    def n_cached(self) -> int:
        """How many tokens of its prompt it found published when it was made, in whole KV blocks."""
        return self._n_cached

    def publish(self, token_ids: Iterable[int] | None = None, *, pin: bool = False) -> int:
        """Keep its rows for prompts that begin alike, also when it is closed.

        Its whole KV blocks are published as far as they are not; pages are shared, not copied.  Of
        a quantised sequence only packed rows are, see `n_cold`.  Published blocks stay until memory
        is short: then those that no open sequence has go, see ``KVCache(prefix_eviction=...)``.

        Parameters
        ----------
        token_ids : iterable of int, optional
            Which tokens its rows are of, from the first on; those it was made with by default, or
            published last.  Tokens behind its last row are ignored.
        pin : bool
            Keep them until ``cache.prefixes.unpin(token_ids)``, as for a system prompt.

        Returns
        -------
        int
            How many of its first tokens are published now, a multiple of ``block_tokens``.  Rows
            count only as far as positions are 0, 1, 2, ...

        Raises
        ------
        TypeError, ValueError
            `token_ids` are none, or others than those its rows are known to be of; or it was made
            without any.
        BufferError
            An array that may be written covers the rows.
        OutOfMemoryError
            There is no memory for the books; nothing was published.
        """
        self._check_writable()
        if token_ids is not None:
            self._tokens = self._checked(token_bytes(token_ids))
        elif self._tokens is None:
            raise ValueError(
                "publish() of which tokens?  Give token_ids=, or make the sequence with "
                "cache.sequence(token_ids)"
            )
        n_tokens = min(len(self._tokens) // TOKEN_BYTES, self._pages.n_stored(self))  # type: ignore[arg-type]
        positions = self.positions[:n_tokens]
        n_tokens = _count_true(positions == np.arange(n_tokens))
        return self._publish_first(n_tokens, self._tokens, pin=pin)

    def _publish_first(self, n_tokens: int, tokens: bytes, *, pin: bool = False) -> int:
        """Publish its first rows, which are of these tokens; return how many it were."""
        self._lineage.settle(len(self))
        self._pages.lend(self)  # type: ignore[arg-type]
        lease = self._cache._prefixes.publish(
            self._pages.stored.window,
            tokens[: n_tokens * TOKEN_BYTES],
            self._lineage.part(0, n_tokens),
            is_pinned=pin,
            keeps=self._remote_lease,
        )
        if lease is None:
            return 0
        self._lease = lease
        return self._cache._prefixes.n_tokens(lease)

    def _checked(self, tokens: bytes) -> bytes:
        """Return the tokens, if they are those that the rows are known to be of."""
        rows = (self._tokens or b"")[: len(self) * TOKEN_BYTES]
        n_known = min(len(rows), len(tokens))
        if tokens[:n_known] != rows[:n_known]:
            known, given = (np.frombuffer(each[:n_known], "<i4") for each in (rows, tokens))
            token = int((known != given).argmax())
            raise ValueError(
                f"token_ids[{token}]={given[token]}, but this row was made for token "
                f"{known[token]}: publish() wants the tokens from the sequence's first row on"
            )
        return max(rows, tokens, key=len)

    def _take_prefix(self, lease: Lease) -> None:
        """Give an empty sequence the rows that a lease keeps.

        Raises
        ------
        OutOfMemoryError
            The kernel refused the mapping.
        """
        index = self._cache._prefixes
        parts, cells = index.parts(lease)
        self._lease = lease
        self._take(index.n_tokens(lease), cells, lambda window: share_parts(window, parts))

    def _take_remote(self, found: RemoteFound) -> None:
        """Give an empty sequence the rows of another process, as long as it has the lease."""
        layout = self._cache.cold_layout
        lengths = [found.n_tokens] * layout.n_layers
        runs = [(run.offset, run.file_offset, run.nbytes) for run in found.runs]
        pages = [Span(offset, offset + nbytes) for offset, _, nbytes in runs]
        if (
            found.n_tokens % layout.block_tokens
            or found.n_tokens > len(self._tokens or b"") // TOKEN_BYTES
            or boundary.page_spans(layout, pages) != boundary.pages_of(layout, lengths)
        ):
            raise WireError(f"the owner's pages are not those of {found.n_tokens} tokens")
        self._remote_lease = found.lease
        cells = Cells(-1 - found.lease.number, 0, found.n_tokens)
        self._take(found.n_tokens, [cells], lambda window: window.share_foreign(found.file, runs))

    def _take(self, n_tokens: int, cells: list[Cells], share: Callable[[Window], None]) -> None:
        lengths = [n_tokens] * self._cache.layout.n_layers
        self._pages.take(self, lengths, share)  # type: ignore[arg-type]
        self._lineage = Lineage(cells)
        self._set_positions(np.arange(n_tokens, dtype=np.int32))
        self._set_lengths(lengths)
        self._n_cached = n_tokens

    def _read_prefix(self, nodes: list[Node], tokens: bytes) -> None:
        """Read the rows behind those it has from files, publish them, and count them as cached.

        Raises
        ------
        CacheFileError
            A block is damaged, unless the cache skips such blocks: then those before it are there.
        OutOfMemoryError
            There is no memory for them.
        """
        cache, pages = self._cache, self._pages
        layout, index = cache.cold_layout, cache._prefixes
        n_tokens = len(self)
        end = n_tokens + len(nodes) * layout.block_tokens
        pages.make_stored_ready(self, end, lambda request: with_room(cache, [self], request))  # type: ignore[arg-type, list-item]
        for node in nodes:
            try:
                _read_block(node, pages.stored.window, layout)
            except CacheFileError as error:
                index.skip(node, error)
                break
            n_tokens += layout.block_tokens
        pages.set_stored(self, n_tokens)  # type: ignore[arg-type]
        self._set_positions(np.arange(n_tokens, dtype=np.int32))
        self._set_lengths([n_tokens] * layout.n_layers)
        self._n_cached = n_tokens
        self._publish_first(n_tokens, tokens)

    def _forget_tokens(self, n_kept: int) -> None:
        """Rows from token `n_kept` on were dropped or rewritten, or are not of the tokens told."""
        if self._tokens is not None:
            self._tokens = self._tokens[: n_kept * TOKEN_BYTES]
        if self._lease is not None:
            self._lease = self._cache._prefixes.lease_at(self._lease, n_kept)


def _read_block(node: Node, window: Window, layout: KVLayout) -> None:
    """Read a block's rows from its file to where they lie in a window."""
    if node.on_disk is None:  # another thread found it damaged
        raise CacheFileError(f"KV block {node.block} of the prompt was damaged, and skipped")
    spans = segments(layout, node.block)
    buffers = [memoryview(window.view(span.start, span.nbytes, writable=True)) for span in spans]
    try:
        node.on_disk.read(buffers)
    finally:
        for buffer in buffers:
            buffer.release()


def _count_true(mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int:
    """Return how many elements come before the first that is False."""
    return len(mask) if mask.all() else int(mask.argmin())
