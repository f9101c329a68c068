from collections.abc import Callable, Iterable
from threading import Thread
from typing import final

from pagealloc.core.heap_owner import Heap

@final
class Population:
    def work(self, progress: Callable[[int, int], object] | None, all_bytes: int) -> None: ...

@final
class Runs:
    def __init__(self, owner: Heap, max_n: int) -> None: ...

def join_all(threads: Iterable[Thread]) -> None: ...
