from collections.abc import Callable
from types import GenericAlias, TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, final, overload

from pagealloc.core.allocator import PageAllocator
from pagealloc.core.buffer import Buffer
from pagealloc.core.counters import PoolStats
from pagealloc.core.idle_items import IdleItems

T = TypeVar("T")

@final
class Pool(IdleItems, Generic[T]):
    @overload
    def __init__(
        self: Pool[Buffer],
        new: None = None,
        *,
        nbytes: int | str,
        reset: Callable[[Buffer], object] | None = None,
        max_idle_bytes: int | str | None = None,
        allocator: PageAllocator | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        new: Callable[[], T],
        *,
        nbytes: int | str | None = None,
        reset: Callable[[T], object] | None = None,
        max_idle_bytes: int | str | None = None,
        allocator: None = None,
    ) -> None: ...
    @property
    def closed(self) -> bool: ...
    def get(self) -> T: ...
    def put(self, item: T) -> None: ...
    def borrow(self) -> Borrow[T]: ...
    def collect(self) -> int: ...
    def close(self) -> None: ...
    def stats(self) -> PoolStats: ...
    def check(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def __class_getitem__(cls, item: Any) -> GenericAlias: ...
    def __reduce_ex__(self, protocol: object) -> NoReturn: ...

@final
class Borrow(Generic[T]):
    def __enter__(self) -> T: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def __class_getitem__(cls, item: Any) -> GenericAlias: ...
    def __reduce_ex__(self, protocol: object) -> NoReturn: ...

def collect_pools() -> int: ...
