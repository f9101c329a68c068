from collections.abc import Callable, Sequence
from threading import Event
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from pagealloc.core.batch import Batch
from pagealloc.core.buffer import Buffer
from pagealloc.core.exact import ExactClass
from pagealloc.core.heap_owner import Heap
from pagealloc.core.latency_histogram import LatencyHistogram

class PageAllocator(Heap):
    def alloc(
        self, nbytes: int | str, *, align: int | str | None = None, prefault: bool = False
    ) -> Buffer: ...
    def prefault(
        self,
        nbytes: int | str,
        *,
        n_threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
        cancel: Event | None = None,
    ) -> int: ...
    def alloc_many(
        self, nbytes: int | str, n_blocks: SupportsIndex, *, align: int | str | None = None
    ) -> Batch: ...
    def exact(self, nbytes: int | str) -> ExactClass: ...
    def latencies(self) -> tuple[LatencyHistogram, ...]: ...
    def empty(
        self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = "float64"
    ) -> np.ndarray[Any, np.dtype[Any]]: ...
    def zeros(
        self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = "float64"
    ) -> np.ndarray[Any, np.dtype[Any]]: ...

def default_allocator() -> PageAllocator: ...
