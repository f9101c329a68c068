"""Quantisation: what a cache stores rows as, and what follows from it for its sequences' windows.

Structure
    ::

        layout (as given) --k_type, v_type--> cold_layout   the window of cold rows
                          --residual_tokens-> ring_layout   the ring of the newest rows
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pagealloc.kv.row_formats import FORMATS

if TYPE_CHECKING:
    from pagealloc.kv.layout import KVLayout
    from pagealloc.kv.row_formats import KVType

__all__ = ["KV_KINDS", "RECOMMENDED", "RESIDUAL_TOKENS", "Quantisation", "quantisation_of"]

KV_KINDS: dict[str, dict[str, Any]] = {
    "f16": {},
    "q8_0": {"k_type": "q8_0", "v_type": "q8_0"},
    "recommended": {"quantize": "recommended"},
    "q4_0": {"k_type": "q4_0", "v_type": "q4_0"},
}
"""What ``--kv`` of the command line offers: arguments of `KVCache`."""

RECOMMENDED: tuple[KVType, KVType] = ("q8_0", "q4_0")
"""Types of K and V that cost little: 8 bits for keys, 4 for values, which are rotated."""
RESIDUAL_TOKENS = 128


@dataclass(frozen=True)
class Quantisation:
    """How a cache quantises.

    Parameters
    ----------
    cold_layout, ring_layout : KVLayout
        Where rows lie in the two windows of a sequence.
    rotate : str
        Which rows are rotated before they are packed: any of the letters k and v.
    residual_tokens, step_tokens : int
        How many of the newest tokens stay as they came, and how many are packed at a time.
    """

    cold_layout: KVLayout
    ring_layout: KVLayout
    rotate: str
    residual_tokens: int
    step_tokens: int

    def n_cold(self, n_tokens: int) -> int:
        """Return how many rows of a layer are packed that grew to `n_tokens`."""
        n_old = max(0, n_tokens - self.residual_tokens)
        return n_old - n_old % self.step_tokens


def quantisation_of(
    layout: KVLayout,
    quantize: str | None,
    types: tuple[KVType | None, KVType | None],
    rotate: str | None,
    residual_tokens: int | None,
) -> Quantisation | None:
    """Return what these arguments of `KVCache` mean; None: nothing is quantised.

    Raises
    ------
    TypeError, ValueError
        They contradict each other, or the layout; the message says what is possible.
    """
    if any(row_format.is_packed for row_format in layout.formats):
        raise ValueError(
            f"the layout's rows are {layout.k_dtype} and {layout.v_dtype}: give a layout of the "
            "rows that come (float16, float32, bfloat16), and k_type= and v_type="
        )
    if quantize is not None:
        if quantize != "recommended":
            raise ValueError(f"quantize={quantize!r}: 'recommended' is possible")
        if types != (None, None):
            raise ValueError("quantize='recommended' says k_type and v_type: leave them out")
        types = RECOMMENDED
    stored = [
        _stored_type(f"{letter}_type", asked, str(given))
        for letter, asked, given in zip("kv", types, (layout.k_dtype, layout.v_dtype), strict=True)
    ]
    if not any(FORMATS[name].is_packed for name in stored):
        for name, value in (("rotate", rotate), ("residual_tokens", residual_tokens)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} is about quantised rows: give k_type or v_type of 8 or 4 "
                    "bits"
                )
        return None
    residual_tokens = _residual(residual_tokens, layout.max_tokens)
    cold_layout = replace(layout, dtype=stored[0], k_dtype=stored[0], v_dtype=stored[1])
    step_tokens = min(layout.block_tokens, layout.max_tokens) if residual_tokens else 1
    block_tokens = step_tokens if layout.order == "block" else 1
    ring_tokens = -(-(residual_tokens + step_tokens) // block_tokens) * block_tokens
    return Quantisation(
        cold_layout=cold_layout,
        ring_layout=replace(layout, max_tokens=ring_tokens, block_tokens=step_tokens),
        rotate=_rotated(rotate, stored),
        residual_tokens=residual_tokens,
        step_tokens=step_tokens,
    )


def _stored_type(name: str, asked: str | None, given: str) -> str:
    if asked is None:
        return given
    possible = [given, *(key for key, each in FORMATS.items() if each.is_packed)]
    if asked not in possible:
        raise ValueError(f"{name}={asked!r}: {', '.join(map(repr, possible))} are possible")
    return asked


def _residual(residual_tokens: int | None, max_tokens: int) -> int:
    if residual_tokens is None:
        return min(RESIDUAL_TOKENS, max_tokens)
    number = operator.index(residual_tokens)
    if number < 0:
        raise ValueError(f"residual_tokens={number}: must not be negative")
    return min(number, max_tokens)


def _rotated(rotate: str | None, stored: list[str]) -> str:
    """Return the letters of what is rotated: by default what has 4 bits."""
    if rotate is None:
        pairs = zip("kv", stored, strict=True)
        return "".join(letter for letter, name in pairs if FORMATS[name].is_4_bit)
    if rotate not in ("", "k", "v", "kv"):
        raise ValueError(f"rotate={rotate!r}: '', 'k', 'v' and 'kv' are possible")
    for letter, name in zip("kv", stored, strict=True):
        if letter in rotate and not FORMATS[name].is_packed:
            raise ValueError(f"rotate={rotate!r}: {letter.upper()} rows are {name}, not quantised")
    return rotate
