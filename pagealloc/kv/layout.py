"""KVLayout: where each row of K and V lies inside a window.

Purpose
    All offset arithmetic of the KV cache, and nothing else: no memory is touched here.
Structure
    A row is the bytes of K (or V) of one token in one layer.  Three orders::

        interleaved   | layer 0: k0 v0 k1 v1 k2 v2 ...  | layer 1: k0 v0 ...        |  layer-major
        split         | layer 0: k0 k1 k2 ... v0 v1 ... | layer 1: k0 k1 ...        |  layer-major
        block         | block 0: layer 0: k0 v0 ... k15 v15, layer 1: ... | block 1 |

    Layer-major orders give a layer one token axis.  Block order keeps a prefix in one contiguous
    run: a fork is one mapping and page tables stay small; a layer has two token axes.
Invariants
    layer_base[i] % page_bytes == 0 (layer-major);  block_bytes % page_bytes == 0
    token_stride == k_row_bytes + v_row_bytes;  token_bytes == n_layers * token_stride
    0 <= offset(...) < window_bytes <= MAX_BYTES, so every sum fits into an int64.
Units
    Bytes, unless the name says tokens.
"""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, cast, get_args

import numpy as np

from pagealloc import page_size_bytes
from pagealloc.errors import PageBoundaryError
from pagealloc.units import MAX_BYTES, format_bytes

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = ["KVDtype", "KVLayout", "KVOrder", "round_up"]

KVDtype = Literal["float16", "float32", "bfloat16"]
KVOrder = Literal["interleaved", "split", "block"]

MAX_LAYERS = 1 << 16
"""A layer-major window may need a mapping a layer; kernels stop at 65,530 a process by default."""

_STORAGE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),  # NumPy has no bfloat16: the bits travel as uint16
}


def round_up(nbytes: int, unit_bytes: int) -> int:
    """Return the smallest multiple of `unit_bytes`, a power of two, that is >= `nbytes`."""
    return (nbytes + unit_bytes - 1) & -unit_bytes


def _dtype_name(dtype: DTypeLike) -> KVDtype:
    """Return the name of a dtype given by name, NumPy type or NumPy dtype."""
    name = dtype if isinstance(dtype, str) else ""
    if not name:
        with suppress(TypeError, ValueError):
            numpy_dtype = np.dtype(dtype)
            # ml_dtypes registers its bfloat16 with NumPy under that name
            name = numpy_dtype.name if numpy_dtype.isnative else ""
    if name not in _STORAGE:
        hint = "; for bfloat16 bits kept in uint16 say 'bfloat16'" if name == "uint16" else ""
        raise ValueError(f"dtype={dtype!r}: 'float16', 'float32' and 'bfloat16' are possible{hint}")
    return cast("KVDtype", name)


@dataclass(frozen=True, repr=False)
class KVLayout:
    """Shape, type, order and byte offsets of the rows in a sequence's window.

    Parameters
    ----------
    n_layers, n_kv_heads, head_dim : int
        Shape of the model's KV cache.
    max_tokens : int
        Tokens a sequence can hold.  Costs address space only; memory is committed by the page
        as rows arrive.
    dtype : {"float16", "float32", "bfloat16"} or NumPy dtype
        Type of the rows; reads back as the name.  bfloat16 is stored, given and returned as
        ``uint16``.
    order : {"interleaved", "split", "block"}
        How the rows lie in the window; see the module's docstring.
    block_tokens : int
        Tokens of a KV block.
    page_bytes : int
        Page to align to: the machine's by default, or a larger power of two.

    Raises
    ------
    TypeError
        A count is no integer.
    ValueError
        A count is below 1, the dtype or order is unknown, or the window would not fit into an
        address space; the message says what is possible.

    Examples
    --------
    >>> layout = KVLayout(n_layers=30, n_kv_heads=3, head_dim=64, max_tokens=8192)
    >>> layout.k_row_bytes, layout.token_bytes
    (384, 23040)
    >>> layout.offset(layer=0, token=2, kv=1) == 2 * layout.token_stride + layout.k_row_bytes
    True
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    max_tokens: int
    dtype: DTypeLike = "float16"
    order: KVOrder = "interleaved"
    block_tokens: int = 16
    page_bytes: int = field(default_factory=page_size_bytes)

    def __post_init__(self) -> None:
        for name in (
            "n_layers", "n_kv_heads", "head_dim", "max_tokens", "block_tokens", "page_bytes"
        ):  # fmt: skip
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if self.order not in get_args(KVOrder):
            raise ValueError(
                f"order={self.order!r}: 'interleaved', 'split' and 'block' are possible"
            )
        if self.page_bytes & (self.page_bytes - 1):
            raise ValueError(f"page_bytes={self.page_bytes}: must be a power of two")
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers={self.n_layers}: at most {MAX_LAYERS} are possible")
        if self.window_bytes > MAX_BYTES:
            raise ValueError(
                f"{self.max_tokens} tokens of {format_bytes(self.token_bytes)} need a window of "
                f"{self.window_bytes} bytes; at most {MAX_BYTES} ({format_bytes(MAX_BYTES)}) are "
                f"possible, which is {self._most_tokens()} tokens of this shape"
            )

    def __repr__(self) -> str:
        block = f", block_tokens={self.block_tokens}" if self.order == "block" else ""
        return (
            f"<KVLayout {self.n_layers} layers x {self.n_kv_heads} KV heads x {self.head_dim} "
            f"{self.dtype}, order={self.order!r}{block}, max_tokens={self.max_tokens}: "
            f"{format_bytes(self.token_bytes)} a token, "
            f"{format_bytes(self.window_bytes)} a full sequence>"
        )

    # --- the table of sizes: each line is one formula of the design ---------------------------

    @cached_property
    def storage_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the rows (``uint16`` for bfloat16)."""
        return _STORAGE[str(self.dtype)]

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return int(self.storage_dtype.itemsize)

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one head of a row."""
        return self.head_dim * self.item_bytes

    @cached_property
    def k_row_bytes(self) -> int:
        """Bytes of K of one token in one layer."""
        return self.n_kv_heads * self.head_bytes

    @cached_property
    def v_row_bytes(self) -> int:
        """Bytes of V of one token in one layer."""
        return self.n_kv_heads * self.head_bytes

    @cached_property
    def token_stride(self) -> int:
        """Bytes a token takes in one layer, K and V."""
        return self.k_row_bytes + self.v_row_bytes

    @cached_property
    def token_bytes(self) -> int:
        """Bytes a token takes in all layers, K and V."""
        return self.n_layers * self.token_stride

    @cached_property
    def row_stride(self) -> int:
        """Bytes from a row to the same row of the next token (of the same block)."""
        return self.k_row_bytes if self.order == "split" else self.token_stride

    @cached_property
    def v_offset(self) -> int:
        """Bytes from a token's K row to its V row."""
        return self.k_row_bytes * (self.max_tokens if self.order == "split" else 1)

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes from one layer's first row to the next layer's."""
        if self.order == "block":
            return self.block_tokens * self.token_stride
        return round_up(self.max_tokens * self.token_stride, self.page_bytes)

    @cached_property
    def layer_base(self) -> tuple[int, ...]:
        """Offset of each layer's first row in the window."""
        return tuple(layer * self.layer_bytes for layer in range(self.n_layers))

    @cached_property
    def layer_base_in_block(self) -> tuple[int, ...]:
        """Offset of each layer's first row from the start of its KV block, in block order."""
        part_bytes = self.block_tokens * self.token_stride
        return tuple(layer * part_bytes for layer in range(self.n_layers))

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a KV block in block order."""
        return round_up(self.n_layers * self.block_tokens * self.token_stride, self.page_bytes)

    @cached_property
    def window_bytes(self) -> int:
        """Bytes of address space a sequence needs."""
        if self.order == "block":
            return self.n_blocks(self.max_tokens) * self.block_bytes
        return self.n_layers * self.layer_bytes

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Strides of a layer's array: (T, H, D), or in block order (B, block_tokens, H, D)."""
        row_strides = (self.row_stride, self.head_bytes, self.item_bytes)
        return (self.block_bytes, *row_strides) if self.order == "block" else row_strides

    # --- arithmetic ---------------------------------------------------------------------------

    def n_blocks(self, n_tokens: int) -> int:
        """Return how many KV blocks hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_tokens)

    def offset(self, layer: int, token: int, kv: int, head: int = 0) -> int:
        """Return the offset in the window of one head of one row.

        Parameters
        ----------
        layer, token : int
            Which row.
        kv : int
            0 for K, 1 for V.
        head : int
            Which KV head of the row.

        Raises
        ------
        ValueError
            `kv` is neither 0 nor 1.
        PageBoundaryError
            Layer, token or head lies outside the layout.
        """
        if not 0 <= layer < self.n_layers:
            raise PageBoundaryError(
                f"layer {layer} is outside this layout of {self.n_layers} layers"
            )
        if not 0 <= token < self.max_tokens:
            raise PageBoundaryError(
                f"layer {layer}, token {token} is outside this window of {self.max_tokens} tokens"
            )
        if not 0 <= head < self.n_kv_heads:
            raise PageBoundaryError(
                f"layer {layer}, token {token}, head {head}: a row has {self.n_kv_heads} KV heads"
            )
        if kv not in (0, 1):
            raise ValueError(f"kv={kv!r}: 0 (K) and 1 (V) are possible")
        return self.row_offset(layer, token, kv) + head * self.head_bytes

    def row_offset(self, layer: int, token: int, kv: int) -> int:
        """Return the offset of a row without checks; `boundary` is what checks an access."""
        v_offset = self.v_offset if kv else 0
        if self.order == "block":
            block, token = divmod(token, self.block_tokens)
            base = block * self.block_bytes + self.layer_base_in_block[layer]
        else:
            base = self.layer_base[layer]
        return base + token * self.row_stride + v_offset

    def _most_tokens(self) -> int:
        """Return the largest `max_tokens` this shape leaves room for."""
        if self.order == "block":
            return MAX_BYTES // self.block_bytes * self.block_tokens
        layer_bytes = MAX_BYTES // self.n_layers & -self.page_bytes
        return layer_bytes // self.token_stride


def _count(name: str, value: SupportsIndex) -> int:
    """Return `value` as an int of at least 1."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name}={number}: at least 1 is possible")
    if number > MAX_BYTES:  # not shown: it may have thousands of digits
        raise ValueError(f"{name} is larger than an address space: at most {MAX_BYTES}")
    return number
