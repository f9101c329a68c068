from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from pagealloc.core.buffer import Buffer
from pagealloc.core.heap_owner import Heap

class PageAllocator(Heap):
    def alloc(self, nbytes: int | str, *, align: int | str | None = None) -> Buffer: ...
    def empty(
        self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = "float64"
    ) -> np.ndarray[Any, np.dtype[Any]]: ...
    def zeros(
        self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = "float64"
    ) -> np.ndarray[Any, np.dtype[Any]]: ...

def default_allocator() -> PageAllocator: ...
