"""ErrorStats: what quantising costs the rows of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["ErrorStats"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ErrorStats:
    """One reading of quantisation errors: arrays of a number a layer, NaN where none was sampled.

    Parameters
    ----------
    k_relative, v_relative : ndarray, shape (L,)
        Root of the mean squared error of values, as a share of the values' root mean square.
    k_largest, v_largest : ndarray, shape (L,)
        Largest error of a value.
    n_values : int
        Values that were looked at.
    """

    k_relative: npt.NDArray[np.float64]
    v_relative: npt.NDArray[np.float64]
    k_largest: npt.NDArray[np.float64]
    v_largest: npt.NDArray[np.float64]
    n_values: int

    @classmethod
    def of(cls, sums: npt.NDArray[np.float64]) -> ErrorStats:
        """Return the figures of (L, 2, 4) sums: values, squared errors, squares, largest error."""
        n_values, squared_error, squared, largest = np.moveaxis(sums, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(n_values > 0, np.sqrt(squared_error / squared), np.nan)
        largest = np.where(n_values > 0, largest, np.nan)
        return cls(
            k_relative=relative[:, 0],
            v_relative=relative[:, 1],
            k_largest=largest[:, 0],
            v_largest=largest[:, 1],
            n_values=int(n_values.sum()),
        )

    def __repr__(self) -> str:
        def shown(values: npt.NDArray[Any]) -> str:
            known = values[~np.isnan(values)]
            return f"{known.min():.2%} to {known.max():.2%}" if len(known) else "not sampled"

        return (
            f"<ErrorStats of {len(self.k_relative)} layers: K {shown(self.k_relative)}, "
            f"V {shown(self.v_relative)}>"
        )
