"""Saving: all published blocks of a cache in one file, which is the old one until it is complete.

Structure
    ::

        .NAME.XXXXXXXX.tmp   O_EXCL, 0600, locked by whoever writes it
          1. blocks, parents before children
          2. index, header
          3. fsync; rename to NAME; fsync of the folder

    Killed at any moment, NAME is the old file or the new one.  What is left of the other is removed
    by whoever saves to NAME next, for nobody locks it any more.
Locking
    Blocks may be published and evicted meanwhile: what is evicted before its turn is not in the
    file, nor can its children be, which went before it.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagealloc import page_size_bytes
from pagealloc.kv.block_segments import block_piece_bytes, segments
from pagealloc.kv.cache_file import HEADER, IOV_MAX, NO_PARENT, Header, checksum, record_dtype
from pagealloc.kv.layer_rows import round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagealloc import Window
    from pagealloc.kv.boundary import Span
    from pagealloc.kv.prefix_disk import DiskPrefixIndex
    from pagealloc.kv.prefix_nodes import Node

    Progress = Callable[[int, int], Any]

__all__ = ["save"]

INDEX_ALIGNMENT = 64


def save(
    index: DiskPrefixIndex,
    window: Window,
    path: str | os.PathLike[str],
    description: bytes,
    progress: Progress | None,
) -> int:
    """Write all published blocks; return how many.

    Parameters
    ----------
    index : DiskPrefixIndex
        What is published.
    window : Window
        With addresses and without pages, to map blocks in.
    path : path
        Where to.
    description : bytes
        What the rows are.
    progress : callable, optional
        Called with how many blocks were written, and of how many.
    """
    target = Path(path)
    _remove_leftovers(target)
    fd, temporary = _new_file(target)
    try:
        n_blocks = _Writer(index, window, fd, description).write(progress)
        os.fsync(fd)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return n_blocks


def _new_file(target: Path) -> tuple[int, Path]:
    """Return a new file beside the target, which is locked."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        fd = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), temporary.stat()):
                return fd, temporary
        os.close(fd)  # another saver took it for a leftover, just before it was locked


def _remove_leftovers(target: Path) -> None:
    """Remove what savers left that were killed: files that nobody locks."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        with suppress(OSError):
            fd = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
            finally:
                os.close(fd)


class _Writer:
    """One file as it is written."""

    def __init__(self, index: DiskPrefixIndex, window: Window, fd: int, description: bytes) -> None:
        self.index = index
        self.window = window
        self.fd = fd
        self.description = description
        self.block_bytes = block_piece_bytes(index.layout)
        self.block_stride = round_up(self.block_bytes, page_size_bytes())
        self.numbers: dict[Node, int] = {}
        self.records: list[bytes] = []  # of record_dtype
        self.index_offset = round_up(HEADER.size + len(description), INDEX_ALIGNMENT)
        self.blocks_offset = 0

    def write(self, progress: Progress | None) -> int:
        """Write everything; return how many blocks that is."""
        runs = self.index.snapshot()
        n_most = sum(len(run) for run in runs)
        dtype = record_dtype(self.index.layout.block_tokens)
        index_end = self.index_offset + n_most * dtype.itemsize
        self.blocks_offset = round_up(index_end, page_size_bytes())

        def tell() -> None:
            if progress is not None:
                progress(len(self.records), n_most)

        for run in runs:
            self._write_run(run, tell)
        data = b"".join(self.records)
        header = Header(
            block_tokens=self.index.layout.block_tokens,
            n_blocks=len(self.records),
            block_bytes=self.block_bytes,
            block_stride=self.block_stride,
            index_offset=self.index_offset,
            blocks_offset=self.blocks_offset,
            index_checksum=checksum([data]),
            root=self.index.root_key,
            description=self.description,
        )
        os.ftruncate(self.fd, header.file_bytes)
        _write_all(self.fd, [memoryview(data)], self.index_offset)
        _write_all(self.fd, [memoryview(header.pack())], 0)
        return len(self.records)

    def _write_run(self, run: list[Node], tell: Callable[[], None]) -> None:
        """Write consecutive blocks: those in memory, then those in a file."""
        n_held = self.index.map_run(run, self.window)
        try:
            for node in run[:n_held]:
                spans = segments(self.index.layout, node.block)
                pieces = [memoryview(self.window.view(*_place(span))) for span in spans]
                try:
                    self._write_block(node, pieces)
                finally:  # also for what holds this frame: the pages are released below
                    for piece in pieces:
                        piece.release()
                tell()
        finally:
            for mapped in self.window.runs():
                self.window.release(mapped.offset, mapped.nbytes)
        for node in run[n_held:]:
            if node.on_disk is not None:
                piece = memoryview(bytearray(self.block_bytes))
                node.on_disk.read([piece])
                self._write_block(node, [piece])
                tell()

    def _write_block(self, node: Node, pieces: list[memoryview]) -> None:
        parent = NO_PARENT
        if node.parent is not None and node.parent.parent is not None:
            if node.parent not in self.numbers:
                return  # it was evicted before its turn, and so were its children
            parent = self.numbers[node.parent]
        number = self.numbers[node] = len(self.records)
        head = parent.to_bytes(4, "little") + node.tokens
        self.records.append(head + checksum([head, *pieces]))
        _write_all(self.fd, pieces, self.blocks_offset + number * self.block_stride)


def _place(span: Span) -> tuple[int, int]:
    return span.start, span.nbytes


def _write_all(fd: int, buffers: list[memoryview], offset: int) -> None:
    """Write buffers from an offset on, one behind the other."""
    for first in range(0, len(buffers), IOV_MAX):
        some = buffers[first : first + IOV_MAX]
        n_written = os.pwritev(fd, some, offset)
        for buffer in some:  # the kernel writes less where it has to: go on one by one
            left = buffer[max(0, min(n_written, len(buffer))) :]
            n_written -= len(buffer)
            offset += len(buffer) - len(left)
            while len(left):
                n_more = os.pwrite(fd, left, offset)
                left = left[n_more:]
                offset += n_more
