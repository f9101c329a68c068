"""Sequence: the rows of one conversation in one window.

Purpose
    Append, read, truncate and fork, so that memory is committed before it is touched and no
    sequence ever sees another one's rows.
Structure
    ::

        append --> rows fit? --> pages ready? --> copy           a few microseconds
                                     | no
                                     v
                      RowPages.make_ready: commit, make private  once a page or KV block
Invariants
    those of row_pages;  no live array reaches past the rows of its layer
Locking
    None: one writer a sequence, many readers.  fork(), truncate() and close() are writers.
"""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any, NoReturn, Self

from pagealloc.errors import ClosedError, ForkedError, PageBoundaryError
from pagealloc.kv import boundary, views
from pagealloc.kv.lineage import Branch
from pagealloc.kv.row_pages import RowPages
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from pagealloc.kv.cache import KVCache

__all__ = ["Sequence"]

# ruff: noqa: SLF001  a fork reaches into its twin; cache and sequences are one unit


class Sequence:
    """The K and V rows of one conversation.

    Made by `KVCache.sequence` or `fork`.  One thread at a time may change it (append, truncate,
    fork, close); any number may read.  After ``os.fork()`` the child process can read and close it
    but not change it, and read only what the parent keeps: rows that it truncates or closes
    meanwhile read as zeros, or as what came in their place.

    Parameters
    ----------
    cache : KVCache
        The cache it belongs to.

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
        "_branch",
        "_cache",
        "_layout",
        "_lengths",
        "_pages",
        "_pid",
        "_ready",
        "_window",
        "_writer",
    )

    def __init__(self, cache: KVCache) -> None:
        layout = cache.layout
        self._cache = cache
        self._layout = layout
        self._writer = cache._writer
        self._window = cache._new_window()
        self._lengths = [0] * layout.n_layers
        self._pages = RowPages(self._window, layout)
        self._ready = self._pages.ready
        self._branch = Branch()
        self._pid = os.getpid()
        cache._register(self)

    # --- what it is ---------------------------------------------------------------------------

    def __len__(self) -> int:
        """Tokens that every layer holds."""
        return min(self._lengths)

    @property
    def layer_lengths(self) -> tuple[int, ...]:
        """Tokens that each layer holds."""
        return tuple(self._lengths)

    @property
    def cache(self) -> KVCache:
        """The cache it belongs to."""
        return self._cache

    @property
    def committed_bytes(self) -> int:
        """Bytes of the pages behind its rows, shared ones included."""
        return 0 if self.closed else self._window.committed_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._window.closed

    def __repr__(self) -> str:
        if self.closed:
            return "<Sequence closed>"
        shortest, longest = min(self._lengths), max(self._lengths)
        tokens = str(shortest) if shortest == longest else f"{shortest} to {longest}"
        return (
            f"<Sequence of {tokens} tokens, at most {self._layout.max_tokens}; "
            f"{format_bytes(self.committed_bytes)} committed>"
        )

    # --- appending ----------------------------------------------------------------------------

    def append(self, layer: int, k: npt.NDArray[Any], v: npt.NDArray[Any]) -> None:
        """Add rows to one layer.

        Parameters
        ----------
        layer : int
            Which layer; each has its own length until all have had the same rows.
        k, v : ndarray, shape (T, H, D)
            Rows of the layout's dtype (``uint16`` for bfloat16), with any strides.  Nothing is
            converted silently.

        Raises
        ------
        TypeError, ValueError
            The arrays do not fit the layout.
        PageBoundaryError
            There is no such layer, or the window has no room for the rows.
        OutOfMemoryError
            The budget or the kernel refused the pages; the sequence is as it was.
        ForkedError
            This process inherited the sequence through ``os.fork()``.
        """
        self._check_writable()
        n_tokens = self._writer.count(k, v)
        boundary.check_layer(self._layout, layer)
        start = self._lengths[layer]
        end = start + n_tokens
        if end > self._ready[layer]:
            self._pages.make_ready((layer,), self._lengths, end)
        self._writer.write(self._window, layer, start, n_tokens, k, v)
        self._lengths[layer] = end

    def append_token(self, kv: npt.NDArray[Any]) -> None:
        """Add one token to all layers, or to none.

        Parameters
        ----------
        kv : ndarray, shape (L, 2, H, D)
            K and V of the token by layer.

        Raises
        ------
        ValueError
            The layers differ in length, besides the errors of `append`.
        """
        self._check_writable()
        self._writer.check_token(kv)
        start = self._equal_length("append a token")
        end = start + 1
        short = [layer for layer, ready in enumerate(self._ready) if ready < end]
        if short:
            self._pages.make_ready(short, self._lengths, end)
        self._writer.write_token(self._window, start, kv)
        self._lengths = [end] * self._layout.n_layers

    # --- reading ------------------------------------------------------------------------------

    def k(self, layer: int, start: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        """Return the K rows of a layer, without a copy, read-only.

        Layer-major orders only; in block order a layer has two token axes, see `k_blocks`.

        Parameters
        ----------
        layer : int
            Which layer.
        start, end : int
            Tokens ``[start, end)``; to the layer's last row by default.

        Returns
        -------
        ndarray, shape (T, H, D)
            As long as it lives, the sequence cannot be closed, nor truncated below its rows.

        Raises
        ------
        PageBoundaryError
            The layer or the tokens lie outside the committed rows.
        ValueError
            The layout is in block order.
        """
        return self._rows(layer, 0, start, end)

    def v(self, layer: int, start: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        """Return the V rows of a layer, without a copy, read-only; as `k`."""
        return self._rows(layer, 1, start, end)

    def k_blocks(self, layer: int) -> npt.NDArray[Any]:
        """Return the K rows of a layer by KV block, without a copy, read-only; block order only.

        Returns
        -------
        ndarray, shape (B, block_tokens, H, D)
            Of the last block, only the rows up to the layer's length are valid: what lies behind
            them is committed memory of undefined content, and changes as tokens arrive.

        Raises
        ------
        PageBoundaryError
            There is no such layer.
        ValueError
            The layout is in a layer-major order.
        """
        return self._blocks(layer, 0)

    def v_blocks(self, layer: int) -> npt.NDArray[Any]:
        """Return the V rows of a layer by KV block, without a copy, read-only; as `k_blocks`."""
        return self._blocks(layer, 1)

    def _rows(self, layer: int, kv: int, start: int, end: int | None) -> npt.NDArray[Any]:
        return self._read(
            lambda lengths: views.row_array(
                self._window, self._layout, lengths, (layer, kv), (start, end)
            )
        )

    def _blocks(self, layer: int, kv: int) -> npt.NDArray[Any]:
        return self._read(
            lambda lengths: views.block_array(self._window, self._layout, lengths, (layer, kv))
        )

    def _read(self, make_array: Callable[[list[int]], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Make an array over rows that the writer does not cut at the same time.

        Appending changes `_lengths` in place, cutting puts another list in its place.  Once the
        array is made, its view keeps the writer from cutting what it covers.
        """
        while True:
            self._check_open()
            lengths = self._lengths
            try:
                array = make_array(lengths)
            except PageBoundaryError:
                if self._lengths is lengths:
                    raise
                continue  # the pages went while we looked
            if self._lengths is lengths:
                return array
            del array

    # --- changing its length ------------------------------------------------------------------

    def truncate(self, n_tokens: int) -> None:
        """Drop all rows from token `n_tokens` on, and release the pages that held no others.

        A page the kernel refuses to let go stays committed, shows as waste in the cache's stats,
        and every later change of the sequence tries again.

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
        self._cut(min(self._lengths))

    def _cut(self, n_tokens: int) -> None:
        # Shorten first, look at the views then: a reader makes its view first and looks at the
        # lengths then, so that one of the two notices the other.
        lengths = self._lengths
        self._lengths = [n_tokens] * self._layout.n_layers
        reach = self._window.highest_mark()
        if reach > n_tokens:
            self._lengths = lengths
            raise BufferError(
                f"cannot drop rows from token {n_tokens} on: a live array reaches to token "
                f"{reach}; delete what k() and v() returned first"
            )
        if n_tokens < self._branch.start:
            self._branch = self._branch.split(n_tokens)
        self._pages.cut(n_tokens)

    def fork(self) -> Sequence:
        """Return a second sequence with the same rows, which shares all pages with this one.

        Nothing is copied.  Whichever of the two writes to a page first gets its own copy of it.

        Raises
        ------
        ValueError
            The layers differ in length.
        OutOfMemoryError
            The kernel refused the mapping; this sequence is as it was.
        """
        self._check_writable()
        n_tokens = self._equal_length("fork")
        child = Sequence(self._cache)
        try:
            child._pages.share(self._pages, self._lengths)
        except BaseException:
            child.close()
            raise
        child._lengths = self._lengths.copy()
        child._branch = self._branch.split(n_tokens)
        self._branch = self._branch.split(n_tokens)
        return child

    def close(self) -> None:
        """Give back the pages that no other sequence shares.  A second call does nothing.

        Raises
        ------
        BufferError
            An array that `k` or `v` returned is still alive.
        """
        self._window.close()
        self._cache._forget(self)

    # --- guards -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError if what the modules say must hold does not."""
        if self.closed:
            return
        self._pages.check(self._lengths)

    def _check_open(self) -> None:
        if self._window.closed:
            raise ClosedError("the sequence is closed")

    def _check_writable(self) -> None:
        self._check_open()
        if os.getpid() != self._pid:
            raise ForkedError(
                "this process inherited the sequence through os.fork() and may only read it: its "
                "memory is shared with the process that made it; build a new KVCache here"
            )

    def _equal_length(self, what: str) -> int:
        """Return the length that all layers have."""
        lengths = self._lengths
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
