"""Rope: how a model rotates K by position, so that cached K rows can be moved to another one.

Purpose
    Rotary position embedding turns pair i of the first `n_dims` values of each head by the angle
    ``position * frequency[i]``.  Rotations add up: a row cached at position p, turned by
    ``delta * frequency[i]`` once more, is the row at p + delta.  That is what llama.cpp's K-shift
    does, and what `Sequence.add` and `Sequence.div` do.
Source
    Su et al., "RoFormer", 2021, eq. 15; the two pairings are ggml's GGML_ROPE_TYPE_NORMAL and
    GGML_ROPE_TYPE_NEOX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Rope", "RopePairs"]

RopePairs = Literal["halves", "neighbours"]


@dataclass(frozen=True)
class Rope:
    """How a model rotates K.

    Parameters
    ----------
    n_dims : int
        How many values of each head are rotated, from the first; even.
    base : float
        Frequency of pair i is ``base ** (-2 * i / n_dims)``.
    pairs : {"halves", "neighbours"}
        Which values are a pair: i and i + n_dims/2 (GPT-NeoX, Hugging Face), or 2i and 2i + 1
        (llama.cpp's "normal", used for Llama).
    scale : float
        Positions are multiplied by it: 1/4 for a context stretched four times (linear scaling).
    freq_factors : tuple of float, optional
        Frequencies are divided by these, one a pair, as the ``rope_freqs`` of Llama 3.1.

    Raises
    ------
    ValueError
        `n_dims` is odd or below 2, `pairs` is unknown, or there are not as many factors as pairs;
        or a number is not above 0.
    """

    n_dims: int
    base: float = 10000.0
    pairs: RopePairs = "halves"
    scale: float = 1.0
    freq_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.n_dims < 2 or self.n_dims % 2:
            raise ValueError(f"n_dims={self.n_dims}: an even number of at least 2 is possible")
        if self.pairs not in get_args(RopePairs):
            raise ValueError(f"pairs={self.pairs!r}: 'halves' and 'neighbours' are possible")
        for name in ("base", "scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a number above 0")
        if self.freq_factors is not None:
            object.__setattr__(self, "freq_factors", tuple(float(f) for f in self.freq_factors))
            if len(self.freq_factors) != self.n_dims // 2:
                raise ValueError(
                    f"freq_factors: {len(self.freq_factors)} for {self.n_dims // 2} pairs"
                )
            if not all(0 < factor < float("inf") for factor in self.freq_factors):
                raise ValueError("freq_factors: all must be numbers above 0")

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError if a K head is shorter than what is rotated of it."""
        if self.n_dims > head_dim:
            raise ValueError(f"rope rotates {self.n_dims} values of K heads of {head_dim}")

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Return the angle a position, in radians, of each pair: shape (n_dims / 2,)."""
        exponents = np.arange(0, self.n_dims, 2) / -self.n_dims
        frequencies = self.scale * np.power(self.base, exponents)
        return frequencies if self.freq_factors is None else frequencies / self.freq_factors

    def rotate(
        self, k: npt.NDArray[np.float32], deltas: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return K rows (T, H, D) as they would be `deltas` (T,) positions further on."""
        angles = deltas[:, None] * self.frequencies()  # (T, P)
        cos = np.cos(angles).astype(np.float32)[:, None]  # (T, 1, P)
        sin = np.sin(angles).astype(np.float32)[:, None]
        rotated = k.copy()
        half = self.n_dims // 2
        if self.pairs == "halves":
            first, second = slice(0, half), slice(half, self.n_dims)
        else:
            first, second = slice(0, self.n_dims, 2), slice(1, self.n_dims, 2)
        x, y = k[..., first], k[..., second]  # (T, H, P)
        rotated[..., first] = x * cos - y * sin
        rotated[..., second] = x * sin + y * cos
        return rotated
