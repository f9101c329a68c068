from typing import Any, NoReturn, Self, final

import numpy.typing as npt

from pagealloc.kv.row_table import RowTable
from pagealloc.kv.sequence_rows import SequenceRows

@final
class BatchRows:
    n_rows: int
    def __new__(cls, table: RowTable, sequences: list[SequenceRows], layer: int) -> Self: ...
    def write(self, kv: npt.NDArray[Any], start: int, end: int) -> None: ...
    def finish_write(self, firsts: list[int]) -> None: ...
    def gather(
        self, layer: int, kv: int, out: npt.NDArray[Any], start: int, end: int
    ) -> None: ...
    def __reduce__(self) -> NoReturn: ...
