from typing import Any, Literal

import numpy.typing as npt

from pagealloc.kv.cold_rows import ColdRows
from pagealloc.kv.window_rows import WindowRows

class SequenceArrays(WindowRows):
    _cold: ColdRows | None
    _is_closed: bool
    _was_evicted: bool
    def k(
        self,
        layer: int,
        start: int = 0,
        end: int | None = None,
        *,
        on_cross: Literal["view", "copy", "raise"] = "view",
        dtype: npt.DTypeLike | None = None,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]: ...
    def v(
        self,
        layer: int,
        start: int = 0,
        end: int | None = None,
        *,
        on_cross: Literal["view", "copy", "raise"] = "view",
        dtype: npt.DTypeLike | None = None,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]: ...
    def read_word(self, offset: int) -> int: ...
    def write_word(self, offset: int, value: int) -> None: ...
    @property
    def _n_cuts(self) -> int: ...
    def _check_open(self) -> None: ...
    def _check_writable(self) -> None: ...
