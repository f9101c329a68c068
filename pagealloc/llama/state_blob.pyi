from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

class LayerType(NamedTuple):
    ggml_type: int
    row_bytes: int
    value_bytes: int = 0

class RecordFormat(NamedTuple):
    n_streams: int
    stream: int
    is_transposed: bool
    k: tuple[LayerType, ...]
    v: tuple[LayerType, ...]

class StateFormat(NamedTuple):
    header: bytes
    records: tuple[RecordFormat, ...]
    def nbytes(self, counts: Sequence[int]) -> int: ...

class RecordPlace(NamedTuple):
    positions: npt.NDArray[np.int32]
    k: list[int]
    v: list[int]

def parse_state(
    blob: Buffer, *, any_sequences: bool = False
) -> tuple[StateFormat, list[RecordPlace]]: ...
def write_state(
    state_format: StateFormat, blob: Buffer, positions: Sequence[npt.NDArray[np.int32]]
) -> list[RecordPlace]: ...
def record_bytes(record: RecordFormat, n_cells: int) -> int: ...
def transpose(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None: ...
