"""Which types rows can be read as, and whether an array can take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagealloc.kv.row_formats import FORMATS

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["as_stored", "check_out", "wanted_type"]


def wanted_type(given: str, dtype: DTypeLike | None, out: Any, *, is_packed: bool) -> str:
    """Return the type to read rows as, by name.

    Parameters
    ----------
    given : str
        As what they were given.
    dtype : NumPy dtype, optional
        What was asked for: by default what `out` has, or what was given, or float32 if rows are
        packed.
    out : ndarray, optional
        What they shall be written to.
    is_packed : bool
        Whether any are.

    Raises
    ------
    TypeError, ValueError
        Rows cannot be read as that, or `out` is of another type than `dtype`, or no array.
    """
    if out is not None:
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be an array, not {type(out).__name__}")
        if dtype is not None and out.dtype != np.dtype(dtype):
            raise ValueError(f"out is an array of {out.dtype}, and dtype={np.dtype(dtype)}")
        dtype = out.dtype
    if dtype is None:
        return "float32" if is_packed else given
    found = np.dtype(dtype)
    for name in ("float32", "float16", given):
        if found == FORMATS[name].dtype:
            return name
    raise TypeError(
        f"rows of {given} cannot be read as {found}: float32 and float16 are possible"
        + (", and uint16 for their bits" if given == "bfloat16" else "")
    )


def check_out(out: np.ndarray[Any, Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless rows of this shape can be written to `out`."""
    if out.shape != shape or not out.flags.carray:
        raise ValueError(
            f"out must be a contiguous, writable array of shape {shape}, and has {out.shape}"
        )


def as_stored(rows: NDArray[np.float32], given: str) -> NDArray[Any]:
    """Return float32 rows as the type they were given in, to nearest, ties to even."""
    if given == "bfloat16":
        bits = np.ascontiguousarray(rows).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rows.astype(given)
