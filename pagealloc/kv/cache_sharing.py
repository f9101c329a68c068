"""CacheSharing: what a cache has in files and in other processes.

Purpose
    Save and load published prefixes, lend them to other processes, and use theirs: what `KVCache`
    inherits.
Structure
    ::

        save    published blocks --> cache_writer --> file
        load    file --> CacheFile --> DiskPrefixIndex      rows are read when they are asked for
        serve   PrefixServer <-- socket --> RemotePrefixes  attach
Locking
    None of its own: the index, the server and the client have theirs.
"""

from __future__ import annotations

import fcntl
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self, cast

from pagealloc import Window
from pagealloc.errors import CacheFileError, WireError
from pagealloc.kv.cache_description import describe_cache, options_of
from pagealloc.kv.cache_file import CacheFile
from pagealloc.kv.cache_writer import save
from pagealloc.kv.prefix_client import F_GET_SEALS, F_SEAL_SHRINK, RemotePrefixes
from pagealloc.kv.prefix_hash import TOKEN_BYTES, owner_key
from pagealloc.kv.prefix_server import PrefixServer
from pagealloc.kv.sequences_by_id import SequencesById
from pagealloc.slow_events import slow_event

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from pagealloc import ExtentStore
    from pagealloc.kv.layout import KVLayout
    from pagealloc.kv.prefix_client import RemoteFound
    from pagealloc.kv.prefix_disk import DiskPrefixIndex, OnError
    from pagealloc.kv.quantisation import Quantisation
    from pagealloc.kv.sequence import Sequence

__all__ = ["CacheSharing"]

F_ADD_SEALS, F_SEAL_SEAL = 1033, 1  # as in prefix_client


# ruff: noqa: SLF001  class methods set up the cache they made


class CacheSharing(SequencesById):
    """The part of `KVCache` that is about files and other processes."""

    __slots__ = (
        "_layout",
        "_owner_key",
        "_prefixes",
        "_quantisation",
        "_remote",
        "_server",
        "_store",
    )

    _layout: KVLayout
    _owner_key: bytes
    _prefixes: DiskPrefixIndex
    _quantisation: Quantisation | None
    _store: ExtentStore

    def __init__(self) -> None:
        super().__init__()
        self._remote: RemotePrefixes | None = None
        self._server: PrefixServer | None = None

    @abstractmethod
    def close(self) -> None:
        """Give all memory back."""

    # --- in other processes -------------------------------------------------------------------

    def serve(self, path: str | os.PathLike[str]) -> PrefixServer:
        """Lend published prefixes to other processes of this user, who `attach`.

        A thread answers them.  Clients map pages read-only; while one has a prefix, its blocks are
        not evicted, and neither the server nor the cache can be closed.  See docs/prefixes.md for
        what a client is trusted with.

        Parameters
        ----------
        path : path
            Of a Unix socket, in a folder that only this user may open; made if it is missing.

        Returns
        -------
        PrefixServer
            To be closed before the cache, or with it.

        Raises
        ------
        PermissionError, FileExistsError
            Others may open the folder; another process serves there, or it is no socket.
        ValueError
            The cache serves already.
        OSError
            There can be no socket, or the kernel cannot seal the memory file.
        """
        self._check_process()
        if self._server is not None and not self._server.closed:
            raise ValueError(f"this cache serves at {self._server.path} already")
        if not fcntl.fcntl(self._store.fd, F_GET_SEALS) & F_SEAL_SHRINK:
            fcntl.fcntl(self._store.fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK)
        description = describe_cache(self._layout, self._quantisation)
        self._server = PrefixServer(path, self._prefixes, self._store, self._owner_key, description)
        return self._server

    @classmethod
    def attach(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return a new cache that also finds what another process has published.

        Its sequences start with the longest prefix that either has.  The owner's rows are mapped,
        not copied, and can only be read; what comes behind them is this cache's own, in its budget.

        Parameters
        ----------
        path : path
            Of the socket at which the owner serves.
        **options
            As of `KVCache`; `model` and `salt` must be the owner's.  The layout, and how it
            quantises, is taken from the owner.

        Raises
        ------
        OSError
            Nobody serves there, or not as this user.
        WireError
            The owner's rows are of another model or salt; or it is no owner.
        """
        remote = RemotePrefixes(path, owner_key(options.get("model"), options.get("salt")))
        try:
            try:
                layout, quantisation = options_of(
                    remote.owner.description, remote.path, remote.owner.page_bytes
                )
            except CacheFileError as error:
                raise WireError(str(error)) from error
            cache = cast("Callable[..., Self]", cls)(layout, **(quantisation | options))
            try:
                remote.join(
                    cache._prefixes.root_key, cache._prefixes.layout.window_bytes, cache._store
                )
                cache._remote = cache._prefixes.remote = remote
            except BaseException:
                cache.close()
                raise
        except BaseException:
            remote.close()
            raise
        return cache

    def _find_remote(self, tokens: bytes, n_found: int) -> RemoteFound | None:
        remote, block_bytes = self._remote, TOKEN_BYTES * self._layout.block_tokens
        if remote is None or n_found >= len(tokens) // block_bytes * self._layout.block_tokens:
            return None
        found = remote.find(tokens[: TOKEN_BYTES * self._layout.max_tokens])
        return found if found is not None and found.n_tokens > n_found else None

    def _forget(self, sequence: Sequence) -> None:
        super()._forget(sequence)
        if self._remote is not None:
            self._remote.settle()

    # --- in files -----------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Callable[[int, int], Any] | None = None,
    ) -> int:
        """Write all published blocks to a file, which is the old one until this one is complete.

        Other threads may use the cache meanwhile.  Needs the package xxhash (``pagealloc[disk]``).

        Parameters
        ----------
        path : path
            A file that nobody but this user will be able to read.
        progress : callable, optional
            Called with how many blocks are written, and of how many.

        Returns
        -------
        int
            How many blocks were written.

        Raises
        ------
        OSError
            The file cannot be written; what was there is there.
        CacheFileError
            A block that is in another file only is damaged there.
        OutOfMemoryError
            There is no address space to map blocks.
        """
        self._check_process()
        description = describe_cache(self._layout, self._quantisation)
        with Window(self._store, self._prefixes.layout.window_bytes) as window:
            return save(self._prefixes, window, path, description, progress)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layout: KVLayout | None = None,
        *,
        on_error: OnError = "raise",
        **options: Any,
    ) -> Self:
        """Return a new cache that finds the blocks of a file.

        Reads the file's index only: rows are read, and verified, when a prompt first asks for them.
        The file stays open; replacing or removing it is harmless.

        Parameters
        ----------
        path : path
            A file that `save` wrote: this user's, that nobody else may open, no symbolic link.
        layout : KVLayout, optional
            As saved by default.  `max_tokens`, `order` and `page_bytes` may differ.
        on_error : {"raise", "skip"}
            What a damaged or lost block does: raise when it is asked for, or be forgotten with the
            blocks behind it, with a warning.
        **options
            As of `KVCache`.  `model` and `salt` must be those it was saved with; how it quantises
            is taken from the file.

        Raises
        ------
        CacheFileError
            The file is not safe to open, damaged, truncated, newer, or of another model, salt or
            kind of rows.
        OSError
            It cannot be read.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: 'raise' and 'skip' are possible")
        with slow_event("cache_load") as attributes:
            file = CacheFile(path)
            attributes["n_blocks"] = file.header.n_blocks
            saved, quantisation = options_of(file.header.description, file.path)
            if not options.keys() & {"quantize", "k_type", "v_type"}:
                options = quantisation | options
            cache = cast("Callable[..., Self]", cls)(layout or saved, **options)
            try:
                cache._prefixes.on_error = on_error
                cache._prefixes.adopt(file)
            except BaseException:
                cache.close()
                raise
            return cache
