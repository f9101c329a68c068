"""SharedPrefix: the first tokens of a context, in a file whose pages contexts map.

Purpose
    Let contexts, also of several processes, begin with the same tokens on the same pages.
Structure
    The file is as long as the KV buffer, and holds, where they lie in the buffer, the whole pages
    of rows of the first tokens.  Contexts map these privately: the kernel copies a page for whoever
    writes to it.  Rows that share a page with others' stay each context's own.
Locking
    None: nothing may evaluate in a context that maps.
Units
    Bytes and tokens.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any, Self

import llama_cpp
import numpy as np

from pagealloc import LlamaStateError, page_size_bytes
from pagealloc.llama.contexts import SEQUENCE, SEQUENCE_HEADER
from pagealloc.llama.model_states import new_blob
from pagealloc.llama.state_blob import StateFormat, write_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagealloc.llama.kv_rows import KVRows
    from pagealloc.llama.state_blob import RecordFormat

__all__ = ["SharedPrefix"]


class SharedPrefix:
    """Rows of the first tokens of a context; made by `KVMemory.prefix`.

    It can be sent to other processes of this user by what `multiprocessing` sends with: the file
    goes along.
    """

    def __init__(self, fd: int, tokens: list[int], record: RecordFormat, n_cells: int) -> None:
        self._fd = fd
        self.tokens = tokens
        self._record = record
        self._n_cells = n_cells

    @property
    def n_tokens(self) -> int:
        """How many tokens."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Physical bytes of the file."""
        return os.fstat(self._fd).st_blocks * 512

    @classmethod
    def of(cls, rows: KVRows, tokens: list[int]) -> Self:
        """Return the first tokens of a context, which lie in its first cells.

        Raises
        ------
        ValueError
            V is transposed, or the context has several streams.
        LlamaStateError
            They lie elsewhere.
        OSError
            There is no memory for the file.
        """
        if rows.record.is_transposed or rows.n_streams > 1:
            raise ValueError(
                "to share a prefix, rows must lie token by token: make the Llama with "
                "flash_attn=True, and one stream"
            )
        if not rows.used[0, : len(tokens)].all():
            raise LlamaStateError("the first tokens do not lie in the first cells")
        fd = os.memfd_create("pagealloc-prefix", os.MFD_CLOEXEC)
        prefix = cls(fd, tokens, rows.record, rows.n_cells)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, -(-rows.buffer.nbytes // page_size_bytes()) * page_size_bytes())
        view = memoryview(rows.buffer)
        for tensor in rows.tensors:
            end = tensor.start + len(tokens) * tensor.kind.row_bytes
            _write(fd, view[tensor.start : end], tensor.start)
        return prefix

    def give(self, context: int) -> None:
        """Put the tokens in the place of a context's.

        Raises
        ------
        LlamaStateError
            llama.cpp refused them: the context is of another model or shape, and is empty now.
        """
        state_format = StateFormat(SEQUENCE_HEADER, (self._record,))
        blob = new_blob(SEQUENCE_HEADER, state_format.nbytes([self.n_tokens]))
        place = write_state(state_format, blob, [np.arange(self.n_tokens, dtype=np.int32)])[0]
        start = 0
        for kinds, places in zip(
            zip(self._record.k, self._record.v, strict=True),
            zip(place.k, place.v, strict=True),
            strict=True,
        ):
            for kind, at in zip(kinds, places, strict=True):
                n_bytes = self.n_tokens * kind.row_bytes
                _read(self._fd, blob[at : at + n_bytes], start)
                start += kind.row_bytes * self._n_cells
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        array = (ctypes.c_uint8 * len(blob)).from_buffer(blob)
        n_read = llama_cpp.llama_state_seq_set_data_ext(context, array, len(blob), SEQUENCE, 0)
        if n_read != len(blob):
            raise LlamaStateError("llama.cpp refused the prefix: it is of another model or shape")

    def map_into(self, rows: KVRows) -> int:
        """Let a context that has these rows have them on the file's pages; return their bytes.

        Raises
        ------
        LlamaStateError
            The context's rows lie otherwise, or are others.
        OSError
            The kernel refused; what was mapped by then holds the same rows.
        """
        if (rows.record.k, rows.record.v, rows.n_cells) != (
            self._record.k,
            self._record.v,
            self._n_cells,
        ):
            raise LlamaStateError("the contexts differ in n_ctx, or in their rows")
        view, n_mapped = memoryview(rows.buffer), 0
        spans = list(self._pages(rows))
        for start, end in spans:
            same = bytearray(end - start)
            _read(self._fd, memoryview(same), start)
            if view[start:end] != same:
                raise LlamaStateError("the context's rows are not those of the prefix")
        for start, end in spans:
            rows.buffer.map_private(self._fd, start, end - start)
            n_mapped += end - start
        return n_mapped

    def _pages(self, rows: KVRows) -> Iterator[tuple[int, int]]:
        """Yield the ranges of whole pages that hold nothing but rows of the prefix."""
        page = page_size_bytes()
        for tensor in rows.tensors:
            end = tensor.start + self.n_tokens * tensor.kind.row_bytes
            first, last = -(-tensor.start // page) * page, end // page * page
            if first < last:
                yield first, last

    def __del__(self) -> None:
        os.close(self._fd)

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self._fd), self.tokens, self._record, self._n_cells)


def _received(sent: Any, tokens: list[int], record: RecordFormat, n_cells: int) -> SharedPrefix:
    return SharedPrefix(sent.detach(), tokens, record, n_cells)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written


def _read(fd: int, target: memoryview, offset: int) -> None:
    while len(target):
        n_read = os.preadv(fd, [target], offset)
        if not n_read:
            raise LlamaStateError("the prefix's file is shorter than it should be")
        target, offset = target[n_read:], offset + n_read
