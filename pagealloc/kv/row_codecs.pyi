from typing import NoReturn, Self

from pagealloc.kv.layout import KVLayout

class RowCodecs:
    def __new__(cls, given: KVLayout, stored: KVLayout, rotate: str) -> Self: ...
    def __reduce__(self) -> NoReturn: ...
