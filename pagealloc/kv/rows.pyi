from typing import Any, NoReturn, Self, final

import numpy.typing as npt

from pagealloc import Window
from pagealloc.kv.layout import KVLayout

@final
class RowWriter:
    def __new__(cls, layout: KVLayout) -> Self: ...
    def count(self, k: npt.NDArray[Any], v: npt.NDArray[Any]) -> int: ...
    def write(
        self,
        window: Window,
        layer: int,
        start: int,
        n_tokens: int,
        k: npt.NDArray[Any],
        v: npt.NDArray[Any],
    ) -> None: ...
    def check_token(self, kv: npt.NDArray[Any]) -> None: ...
    def write_token(self, window: Window, token: int, kv: npt.NDArray[Any]) -> None: ...
    def __reduce__(self) -> NoReturn: ...
