"""kv_memory: llama.cpp's KV buffer in our memory, where only tokens that exist take any.

Purpose
    Have `Llama(...)` made with its KV buffer in an allocator's memory, show its rows, give back
    what nothing lies in, and share prefixes between contexts.
Structure
    ::

        kv_memory() ..... replaces ggml's alloc_buffer while the context is made (BufferHook)
        KVMemory ........ the buffers that came of it
           `-- KVLayoutInBuffer   where rows lie in them, as found in a state
Locking
    _hook_lock: one context is made at a time.  A KVMemory is its context's thread's.
Units
    Bytes and cells; a cell is where a token's rows lie.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import warnings
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_cpp import Llama
from llama_cpp import llama_cpp as bindings

from pagealloc import PageAllocator
from pagealloc.llama.kv_buffer import BufferHook
from pagealloc.llama.kv_rows import KVRows, find_rows
from pagealloc.llama.shared_prefix import SharedPrefix
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    import numpy.typing as npt

    from pagealloc.llama.kv_buffer import KVBuffer

__all__ = ["KVMemory", "KVMemoryStats", "kv_memory"]

_hook_lock = threading.RLock()
_inside: list[KVMemory] = []
"""The one whose block is being executed, of the thread that has the lock."""

_alive: set[KVMemory] = set()
"""Those whose contexts are not freed: their allocators must not be collected before."""


class KVMemoryStats(NamedTuple):
    """What a context's KV buffers take."""

    reserved_bytes: int
    resident_bytes: int
    n_buffers: int


@contextmanager
def kv_memory(
    allocator: PageAllocator | None = None, *, backing: str = "base", lazy: bool = True
) -> Iterator[KVMemory]:
    """Make the first context inside the ``with`` block with its KV buffer in our memory.

    llama.cpp writes zeros to its whole KV buffer when it makes a context, so that a context for
    8,192 tokens takes as much memory as one that has 8,192.  In ours nothing is written, and pages
    come as tokens do.

    Parameters
    ----------
    allocator : PageAllocator, optional
        Whose memory to take, and in whose budget and statistics it counts; the whole of it, since
        llama.cpp may write anywhere.  By default one of its own.
    backing : {"base", "thp", "hugetlb"}
        Of the allocator of its own; what that is comes to bear with ``lazy=False``.  Huge pages
        made decoding no faster where it was measured.
    lazy : bool
        Base pages as tokens come, whatever the allocator's pages are: a huge one would bring 2 MiB
        where a row is written.  The kernel is asked so for the memory it gets there, and goes by it
        when the allocator hands that out again.  False: have all pages at once.

    Yields
    ------
    KVMemory

    Raises
    ------
    RuntimeError
        It is called inside such a block.

    Warns
    -----
    RuntimeWarning
        The memory is llama.cpp's own as usual, and why: ggml is not as it was, or the allocator
        refused.

    Examples
    --------
    >>> with kv_memory() as kv:  # doctest: +SKIP
    ...     llm = Llama("model.gguf", n_ctx=8192, flash_attn=True)
    >>> kv.stats().resident_bytes  # doctest: +SKIP
    0
    """
    source = allocator if allocator is not None else PageAllocator(backing=backing)
    memory = KVMemory(source)
    with _hook_lock:
        _forget_freed()
        before = bindings.llama_init_from_model
        if _inside:
            raise RuntimeError("kv_memory() inside kv_memory(): a block is about one context")
        thread = threading.get_ident()

        def init(model: Any, params: Any) -> Any:
            if memory.is_ours or threading.get_ident() != thread:
                return before(model, params)
            return memory._make(before, model, params, is_lazy=lazy)

        bindings.llama_init_from_model = init
        _inside.append(memory)
        try:
            yield memory
        finally:
            _inside.clear()
            bindings.llama_init_from_model = before


class KVMemory:
    """The KV buffers of one context.  Made by `kv_memory`.

    Not thread-safe: nothing may evaluate meanwhile.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self._buffers: list[KVBuffer] = []
        self._scratch: list[KVBuffer] = []  # kept: without its KVBuffer memory does not go back
        self._context = 0
        self._llm: weakref.ref[Llama] | None = None
        self._prefix: SharedPrefix | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the context's KV buffer is in our memory."""
        return bool(self._buffers)

    @property
    def is_live(self) -> bool:
        """Whether the context was not freed."""
        return any(buffer.is_live for buffer in self._buffers)

    def stats(self) -> KVMemoryStats:
        """Return what the buffers take; zeros once the context is freed."""
        live = [buffer for buffer in self._buffers if buffer.is_live]
        return KVMemoryStats(
            reserved_bytes=sum(buffer.nbytes for buffer in live),
            resident_bytes=sum(buffer.resident_bytes() for buffer in live),
            n_buffers=len(live),
        )

    # --- rows ---------------------------------------------------------------------------------

    def k(self, layer: int) -> npt.NDArray[Any]:
        """Return the K rows of a layer as they lie there, live and read-only.

        Parameters
        ----------
        layer : int
            Of those that keep K and V.

        Returns
        -------
        ndarray, shape (C, H, D), or (C, bytes) of packed rows
            Of all C cells of the context, of all its streams; bfloat16 as uint16.  A cell where no
            token lies reads as zeros, or as what lay there.  The array keeps the memory, also when
            the context is gone.

        Raises
        ------
        ValueError
            There are no tokens yet, or it is no layer.
        LlamaStateError
            Rows do not lie as expected.
        ClosedError
            The context was freed.
        """
        return self._rows().array(layer, "k")

    def v(self, layer: int) -> npt.NDArray[Any]:
        """Return the V rows of a layer; as `k`.  Without flash attention values are strided."""
        return self._rows().array(layer, "v")

    def trim(self) -> int:
        """Give back the pages in which no token lies; return how many bytes that were.

        After ``seq_rm``, ``Llama.reset`` and the like, which only mark cells as free.
        ``llama_memory_clear`` with data gives all pages back by itself.

        Raises
        ------
        LlamaStateError
            Rows do not lie as expected: nothing was given back.
        OutOfMemoryError
            There is no memory for a copy of the state.
        ClosedError
            The context was freed.
        """
        before = self.stats().resident_bytes
        rows = find_rows(self._context, self._kv_buffer())
        if rows is None:
            self._kv_buffer().purge_all()
        else:
            rows.purge_unused()
        return before - self.stats().resident_bytes

    # --- prefixes -----------------------------------------------------------------------------

    def prefix(self, n_tokens: int | None = None) -> SharedPrefix:
        """Return the first tokens of sequence 0 for other contexts, also in other processes.

        Raises
        ------
        ValueError
            There are not so many tokens, or V is transposed (``flash_attn=False``).
        LlamaStateError
            Rows do not lie as expected, or not in the order of positions.
        """
        llm = self._llama()
        tokens = llm.input_ids[: llm.n_tokens if n_tokens is None else n_tokens].tolist()
        if not 0 < len(tokens) <= llm.n_tokens:
            raise ValueError(f"n_tokens={n_tokens}: the context has {llm.n_tokens}")
        if self._prefix is None or self._prefix.tokens != tokens:
            self._prefix = SharedPrefix.of(self._rows(), tokens)
        return self._prefix

    def share_prefix(self, other: KVMemory, n_tokens: int | None = None) -> int:
        """Let another context begin with this one's first tokens, on the same pages.

        What `other` held is replaced.  Whoever writes to a page that both have gets a copy of it,
        from the kernel.  Both need ``flash_attn=True`` and the same model and ``n_ctx``.

        Parameters
        ----------
        other : KVMemory
            Of the other context.
        n_tokens : int, optional
            How many; all by default.

        Returns
        -------
        int
            How many bytes of pages they share now.

        Raises
        ------
        ValueError, LlamaStateError
            As `prefix`; or the contexts differ.
        OSError
            The kernel refused a mapping: those that were made stay, and hold the same rows.
        """
        prefix = self.prefix(n_tokens)
        shared_bytes = other.adopt(prefix)
        prefix.map_into(self._rows())
        return shared_bytes

    def adopt(self, prefix: SharedPrefix) -> int:
        """Begin with the tokens of a prefix, on its pages; see `share_prefix`."""
        llm = self._llama()
        prefix.give(llm._ctx.ctx)
        llm.input_ids[: prefix.n_tokens] = prefix.tokens
        llm.n_tokens = prefix.n_tokens
        llm._requires_eval = True
        return prefix.map_into(self._rows())

    # --- making it ----------------------------------------------------------------------------

    def _make(self, init: Any, model: Any, params: Any, *, is_lazy: bool) -> Any:
        try:
            hook = _hook()
        except (LookupError, AttributeError, OSError) as error:
            _warn(str(error))
            return init(model, params)
        hook.install(self.allocator, is_lazy=is_lazy)
        try:
            context = init(model, params)
        finally:
            buffers, n_refused = hook.remove()
        if context is None:
            return None
        if n_refused:
            _warn(f"the allocator refused {n_refused} buffers: {self.allocator!r}")
        self._buffers = [buffer for buffer in buffers if buffer.is_live and buffer.n_clears]
        self._scratch = [buffer for buffer in buffers if buffer.is_live and not buffer.n_clears]
        self._context = context
        self._llm = _llama_being_made()
        _alive.add(self)
        if not n_refused and not self._buffers:
            _warn("llama.cpp made no KV buffer in the memory of the CPU")
        return context

    def _kv_buffer(self) -> KVBuffer:
        if not self._buffers:
            raise ValueError("the KV buffer is llama.cpp's own: see the warning when it was made")
        return max(self._buffers, key=lambda buffer: buffer.nbytes)

    def _rows(self) -> KVRows:
        rows = find_rows(self._context, self._kv_buffer())
        if rows is None:
            raise ValueError("the context has no tokens yet")
        return rows

    def _llama(self) -> Llama:
        llm = self._llm() if self._llm is not None else None
        if llm is None:
            raise ValueError("the Llama is gone, or the context was made without one")
        return llm

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<KVMemory of {stats.n_buffers} buffers, {format_bytes(stats.resident_bytes)} of "
            f"{format_bytes(stats.reserved_bytes)} resident>"
        )


@functools.cache
def _hook() -> BufferHook:
    """Return the hook on the ggml that llama.cpp uses; made, and tested, once."""
    return BufferHook(
        _address("ggml_backend_cpu_buffer_type"),
        _address("ggml_backend_buft_alloc_buffer"),
        _address("ggml_backend_cpu_buffer_from_ptr"),
        _address("ggml_backend_buffer_clear"),
        _address("ggml_backend_buffer_free"),
        _is_writable,
    )


def _address(name: str) -> int:
    """Return where a function lies, by libllama's handle: there may be unused copies of ggml."""
    return ctypes.cast(getattr(bindings._lib, name), ctypes.c_void_p).value or 0


def _is_writable(address: int) -> bool:
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            extent, permissions = line.split(maxsplit=2)[:2]
            start, end = (int(each, 16) for each in extent.split("-"))
            if start <= address < end:
                return "w" in permissions
    return False


def _llama_being_made() -> weakref.ref[Llama] | None:
    """Return the `Llama` whose constructor makes the context; None if there is none."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        maker = frame.f_locals.get("self")
        if isinstance(maker, Llama):
            return weakref.ref(maker)
        frame = frame.f_back
    return None


def _forget_freed() -> None:
    _alive.difference_update([memory for memory in _alive if not memory.is_live])


def _warn(why: str) -> None:
    warnings.warn(
        f"llama.cpp's KV buffer lies in its own memory, as usual: {why}",
        RuntimeWarning,
        stacklevel=6,
    )
