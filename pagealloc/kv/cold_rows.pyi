from typing import Self

import numpy as np
import numpy.typing as npt

from pagealloc import Window
from pagealloc.kv.row_codecs import RowCodecs
from pagealloc.kv.row_table import RowTable
from pagealloc.kv.window_rows import WindowRows

class ColdRows(WindowRows):
    residual_tokens: int
    step_tokens: int
    def __new__(
        cls,
        table: RowTable,
        window: Window,
        codecs: RowCodecs,
        residual_tokens: int,
        step_tokens: int,
    ) -> Self: ...
    def _due(self, layer: int, n_tokens: int) -> int: ...
    def _errors(self) -> npt.NDArray[np.float64]: ...
