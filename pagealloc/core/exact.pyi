from typing import final

from pagealloc.core.buffer import Buffer
from pagealloc.core.heap_owner import Heap

@final
class ExactClass:
    nbytes: int
    @property
    def allocator(self) -> Heap: ...
    def alloc(self) -> Buffer: ...

def exact_class(heap: Heap, nbytes: int) -> ExactClass: ...
