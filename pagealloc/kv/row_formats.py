"""RowFormat: how the values of a row are stored, and what that takes.

Structure
    Plain formats are NumPy's types, a value an item.  Packed ones are bytes in blocks of 32
    values, as ggml lays them out: a float16 scale, then 8 or 4 bits a value.
Units
    Bytes, unless the name says values.
Source
    ``block_q8_0`` and ``block_q4_0`` of ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = ["FORMATS", "BaseType", "KVType", "RowFormat"]

BaseType = Literal["float16", "float32", "bfloat16"]
KVType = Literal["float16", "float32", "bfloat16", "q8_0", "q4_0", "int4"]


class RowFormat(NamedTuple):
    """How the values of a row are stored.

    `dtype` is NumPy's type of what holds a row; a block of `block_values` values takes
    `block_bytes`.
    """

    name: str
    dtype: np.dtype[Any]
    block_values: int
    block_bytes: int

    @property
    def is_packed(self) -> bool:
        """Whether values share bytes, and a scale."""
        return self.block_values > 1

    @property
    def is_4_bit(self) -> bool:
        """Whether a value takes 4 bits."""
        return self.block_bytes < self.block_values

    def row_bytes(self, n_values: int) -> int:
        """Return the bytes of so many values, which are whole blocks."""
        return n_values // self.block_values * self.block_bytes


def _plain(name: str, dtype: type[np.generic]) -> RowFormat:
    item = np.dtype(dtype)
    return RowFormat(name, item, 1, item.itemsize)


FORMATS: dict[str, RowFormat] = {
    "float16": _plain("float16", np.float16),
    "float32": _plain("float32", np.float32),
    "bfloat16": _plain("bfloat16", np.uint16),  # NumPy has none: the bits travel as uint16
    "q8_0": RowFormat("q8_0", np.dtype(np.uint8), 32, 34),
    "q4_0": RowFormat("q4_0", np.dtype(np.uint8), 32, 18),
    "int4": RowFormat("int4", np.dtype(np.uint8), 32, 18),
}
