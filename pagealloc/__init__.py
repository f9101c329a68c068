"""Page-aligned memory for LLM inference on CPUs.

The words, as used everywhere in this package:

page
    An OS page (4, 16 or 64 KiB, asked of the machine).  Huge page: 2 MiB or 1 GiB.
reserve, commit, purge
    Take address space; have it backed; give the backing back and keep the address.
backing
    What stands behind an arena: ``hugetlb``, ``thp`` or ``base``.  *Achieved* backing is measured.
arena, chunk
    One large reserved range from the kernel; a 2 MiB-aligned piece of it.
size class, slab, slot
    Sizes up to half a page are served from slabs, runs of pages cut into equal slots.
page run
    Any other size: exactly the pages it needs, best fit, merged when freed.
magazine, central list
    A thread's own stack of free slots or runs of one size; the shared stack behind all of them.
victim
    A magazine that sat unused for one collection; it goes back at the next.
Buffer, Batch
    The handle that owns one slot or run, and the one that owns many.  Only ``alloc()`` and
    ``alloc_many()`` make them.
Pool
    Idle Buffers or objects kept for reuse, as in Go's ``sync.Pool``.
extent store, window
    One memfd with reference-counted pages; a contiguous address range mapped over it.
layout, row, KV block, sequence
    The shape and strides of a KV cache; the K or V bytes of one token in one layer; consecutive
    tokens as a unit; one conversation.  They live in `pagealloc.kv`.
held bytes
    Physical memory, measured; never address space.
"""

from pagealloc.core.allocator import PageAllocator, default_allocator
from pagealloc.core.batch import Batch
from pagealloc.core.buffer import Buffer
from pagealloc.core.c_api import get_include
from pagealloc.core.counters import AllocatorStats, ArenaStats, ClassStats, PoolStats
from pagealloc.core.exact import ExactClass
from pagealloc.core.extents import ExtentStats, ExtentStore
from pagealloc.core.latency_histogram import LatencyHistogram
from pagealloc.core.numpy_handler import NumpyHandler, numpy_handler
from pagealloc.core.os_memory import huge_page_size_bytes, page_size_bytes
from pagealloc.core.pool import Pool
from pagealloc.core.window import Run, Window
from pagealloc.core.window_view import WindowView
from pagealloc.errors import (
    BackingUnavailableError,
    CacheFileError,
    ClosedError,
    ForkedError,
    InvariantError,
    LlamaStateError,
    OutOfMemoryError,
    PageallocError,
    PageBoundaryError,
    WireError,
)

__version__ = "0.1.0"

__all__ = [
    "AllocatorStats",
    "ArenaStats",
    "BackingUnavailableError",
    "Batch",
    "Buffer",
    "CacheFileError",
    "ClassStats",
    "ClosedError",
    "ExactClass",
    "ExtentStats",
    "ExtentStore",
    "ForkedError",
    "InvariantError",
    "LatencyHistogram",
    "LlamaStateError",
    "NumpyHandler",
    "OutOfMemoryError",
    "PageAllocator",
    "PageBoundaryError",
    "PageallocError",
    "Pool",
    "PoolStats",
    "Run",
    "Window",
    "WindowView",
    "WireError",
    "default_allocator",
    "get_include",
    "huge_page_size_bytes",
    "numpy_handler",
    "page_size_bytes",
]
