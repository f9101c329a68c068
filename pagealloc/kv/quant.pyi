from typing import Any

import numpy as np
import numpy.typing as npt

SIMD_LEVEL: str

def simd_levels() -> tuple[str, ...]: ...
def quantize(
    rows: npt.NDArray[Any], kind: str, *, rotate: bool = False
) -> npt.NDArray[np.uint8]: ...
def dequantize(
    packed: npt.NDArray[np.uint8],
    kind: str,
    shape: tuple[int, int],
    *,
    rotate: bool = False,
    dtype: npt.DTypeLike = ...,
) -> npt.NDArray[Any]: ...
