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

    ``layout.layers[i]`` is the table of one layer (`LayerRows`).  With it, in layer-major orders::

        offset(layer, token, kv) = base + (v_offset if kv) + token * (v_stride if kv else k_stride)

    and in block order the same for ``token % block_tokens``, plus
    ``token // block_tokens * block_bytes``.
Invariants
    layers[i].base % page_bytes == 0 (layer-major);  block_bytes % page_bytes == 0
    k_row_bytes <= k_stride;  v_row_bytes <= v_stride
    pad_rows: a row of at most a page lies in one page, a longer one starts on a page
    0 <= offset(...) < window_bytes <= MAX_BYTES, so every sum fits into an int64.
Units
    Bytes, unless the name says tokens.
"""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, cast, get_args

import numpy as np

from pagealloc import page_size_bytes
from pagealloc.errors import PageBoundaryError
from pagealloc.kv.layer_rows import KVOrder, LayerRows, RowShape, place_layers, round_up
from pagealloc.kv.model_shape import ModelShape, read_gguf, read_hf_config
from pagealloc.kv.rope import Rope
from pagealloc.kv.row_formats import FORMATS, KVType, RowFormat
from pagealloc.units import MAX_BYTES, format_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from numpy.typing import DTypeLike

__all__ = ["KVLayout"]

MAX_LAYERS = 1 << 16
"""A layer-major window may need a mapping a layer; kernels stop at 65,530 a process by default."""


@dataclass(frozen=True, repr=False)
class KVLayout:
    """Shape, types, order and byte offsets of the rows in a sequence's window.

    Parameters
    ----------
    n_layers : int
        Layers that keep K and V.
    n_kv_heads, head_dim : int or sequence of int
        Shape of a row; one number a layer where layers differ.  Grouped-query models have fewer KV
        heads than heads, multi-query ones have 1.
    max_tokens : int
        Tokens a sequence can hold.  Costs address space only; memory is committed by the page
        as rows arrive.
    dtype : {"float16", "float32", "bfloat16", "q8_0", "q4_0", "int4"} or NumPy dtype
        Type of the rows; reads back as the name.  bfloat16 is stored, given and returned as
        ``uint16``.  The last three are packed, and what a cache stores rows as that it quantises,
        see `KVCache`; rows of 32 values or a multiple can be.
    order : {"interleaved", "split", "block"}
        How the rows lie in the window; see the module's docstring, and the table in the docs that
        says which to use when.
    block_tokens : int
        Tokens of a KV block.
    page_bytes : int
        Page to align to: the machine's by default, or a larger power of two.
    v_head_dim : int or sequence of int, optional
        Values of a V head, where they are not those of a K head.
    k_dtype, v_dtype : as `dtype`, optional
        Types of K and V, where they differ; `dtype` by default.
    pad_rows : bool
        Pad rows so that none of at most a page crosses from one page into the next; longer ones
        start on a page.
    rope : Rope, optional
        How the model rotates K; what `Sequence.add` and `Sequence.div` need.

    Raises
    ------
    TypeError
        A count is no integer.
    ValueError
        A count is below 1, there are not as many as layers, the dtype or order is unknown, or the
        window would not fit into an address space; the message says what is possible.

    Examples
    --------
    >>> layout = KVLayout(n_layers=30, n_kv_heads=3, head_dim=64, max_tokens=8192)
    >>> layout.layers[0].k_row_bytes, layout.token_bytes
    (384, 23040)
    >>> layout.offset(layer=0, token=2, kv=1) == 2 * 768 + 384
    True
    """

    n_layers: int
    n_kv_heads: int | Sequence[int]
    head_dim: int | Sequence[int]
    max_tokens: int
    dtype: DTypeLike = "float16"
    order: KVOrder = "interleaved"
    block_tokens: int = 16
    page_bytes: int = field(default_factory=page_size_bytes)
    v_head_dim: int | Sequence[int] | None = None
    k_dtype: DTypeLike | None = None
    v_dtype: DTypeLike | None = None
    pad_rows: bool = False
    rope: Rope | None = None

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("n_layers", "max_tokens", "block_tokens", "page_bytes"):
            settle(name, _count(name, getattr(self, name)))
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers={self.n_layers}: at most {MAX_LAYERS} are possible")
        for name in ("n_kv_heads", "head_dim"):
            settle(name, _count_per_layer(name, getattr(self, name), self.n_layers))
        if self.v_head_dim is not None:
            v_head_dim = _count_per_layer("v_head_dim", self.v_head_dim, self.n_layers)
            settle("v_head_dim", None if v_head_dim == self.head_dim else v_head_dim)
        settle("dtype", _dtype_name("dtype", self.dtype))
        for name in ("k_dtype", "v_dtype"):
            given = getattr(self, name)
            settle(name, self.dtype if given is None else _dtype_name(name, given))
        if self.k_dtype == self.v_dtype:  # however it was said, it is the same layout
            settle("dtype", self.k_dtype)
        if self.order not in get_args(KVOrder):
            raise ValueError(
                f"order={self.order!r}: 'interleaved', 'split' and 'block' are possible"
            )
        if self.page_bytes & (self.page_bytes - 1):
            raise ValueError(f"page_bytes={self.page_bytes}: must be a power of two")
        self._check_blocks()
        self._check_rope()
        if self.window_bytes > MAX_BYTES:
            raise ValueError(
                f"{self.max_tokens} tokens of {format_bytes(self.token_bytes)} need a window of "
                f"{self.window_bytes} bytes; at most {MAX_BYTES} ({format_bytes(MAX_BYTES)}) are "
                f"possible, which is {self._most_tokens()} tokens of this shape"
            )

    def _check_blocks(self) -> None:
        """Refuse rows that are no whole blocks of a packed format."""
        for kv, row_format in enumerate(self.formats):
            for layer in range(self.n_layers if row_format.is_packed else 0):
                n_heads, head_dim = self.head_shape(layer, kv)
                if n_heads * head_dim % row_format.block_values:
                    raise ValueError(
                        f"{'KV'[kv]} rows of layer {layer} cannot be {row_format.name}: "
                        f"{n_heads} heads of {head_dim} values are no multiple of "
                        f"{row_format.block_values}"
                    )

    def _check_rope(self) -> None:
        if self.rope is None:
            return
        if not isinstance(self.rope, Rope):
            raise TypeError(f"rope must be a Rope, not {type(self.rope).__name__}")
        for rows in self.layers:
            self.rope.check_head_dim(rows.k_head_dim)

    @classmethod
    def from_gguf(
        cls, path: str | os.PathLike[str], max_tokens: int | None = None, **options: Any
    ) -> Self:
        """Return the layout of the model in a GGUF file; of the weights nothing is read.

        Layers without KV heads, as hybrid models have them, are left out: layer i of the layout is
        the i-th that has some.  `rope` is set where the model's kind is known to rotate all layers
        alike.

        Parameters
        ----------
        path : str or path
            The file.
        max_tokens : int, optional
            The model's whole context by default.
        **options
            What else `KVLayout` takes, such as `order` and `dtype`.

        Raises
        ------
        ModuleNotFoundError
            The package gguf is not installed; the message says how to.
        FileNotFoundError, ValueError
            There is no such file; it is no GGUF, or tells no shape.
        """
        return cls._of_shape(read_gguf(path), max_tokens, options)

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], max_tokens: int | None = None, **options: Any
    ) -> Self:
        """Return the layout of a Hugging Face model, from the dict of its ``config.json``.

        As `from_gguf`; `dtype` is by default what the config says, if it is one that is stored.

        Raises
        ------
        TypeError, ValueError
            `config` is no mapping, or tells no shape; the message names what is missing.
        """
        shape = read_hf_config(config)
        if shape.dtype in FORMATS and not FORMATS[shape.dtype].is_packed:
            options.setdefault("dtype", shape.dtype)
        return cls._of_shape(shape, max_tokens, options)

    @classmethod
    def _of_shape(cls, shape: ModelShape, max_tokens: int | None, options: dict[str, Any]) -> Self:
        max_tokens = shape.context_tokens if max_tokens is None else max_tokens
        if max_tokens is None:
            raise ValueError("the model does not tell its context's length: give max_tokens")
        options.setdefault("rope", shape.rope)
        return cls(
            n_layers=len(shape.n_kv_heads),
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.k_head_dim,
            v_head_dim=shape.v_head_dim,
            max_tokens=max_tokens,
            **options,
        )

    def __repr__(self) -> str:
        block = f", block_tokens={self.block_tokens}" if self.order == "block" else ""
        padded = ", pad_rows=True" if self.pad_rows else ""
        dtype = self.k_dtype
        if self.k_dtype != self.v_dtype:
            dtype = f"K {self.k_dtype} V {self.v_dtype}"
        head_dim = _shown(self.head_dim)
        if self.v_head_dim is not None:
            head_dim += f" (V {_shown(self.v_head_dim)})"
        return (
            f"<KVLayout {self.n_layers} layers x {_shown(self.n_kv_heads)} KV heads x {head_dim} "
            f"{dtype}, order={self.order!r}{block}{padded}, max_tokens={self.max_tokens}: "
            f"{format_bytes(self.token_bytes)} a token, "
            f"{format_bytes(self.window_bytes)} a full sequence>"
        )

    # --- the tables: each line is one formula of the design -----------------------------------

    @cached_property
    def storage_dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """NumPy dtypes of K and V: ``uint16`` for bfloat16, ``uint8`` for packed rows."""
        return self.formats[0].dtype, self.formats[1].dtype

    @cached_property
    def formats(self) -> tuple[RowFormat, RowFormat]:
        """How K and V rows are stored."""
        return FORMATS[str(self.k_dtype)], FORMATS[str(self.v_dtype)]

    @cached_property
    def _places(self) -> tuple[tuple[LayerRows, ...], int]:
        """The layers, and where the last one ends in the window, or in its block."""
        n_heads = _each(self.n_kv_heads, self.n_layers)
        k_dims = _each(self.head_dim, self.n_layers)
        v_dims = k_dims if self.v_head_dim is None else _each(self.v_head_dim, self.n_layers)
        k, v = self.formats
        shapes = (
            RowShape(heads, k_dim, v_dim, k.row_bytes(heads * k_dim), v.row_bytes(heads * v_dim))
            for heads, k_dim, v_dim in zip(n_heads, k_dims, v_dims, strict=True)
        )
        n_tokens = self.block_tokens if self.order == "block" else self.max_tokens
        return place_layers(shapes, self.order, n_tokens, self.page_bytes, pad_rows=self.pad_rows)

    @property
    def layers(self) -> tuple[LayerRows, ...]:
        """Where the rows of each layer lie."""
        return self._places[0]

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all rows are of one shape and type, so that a token is one array."""
        return (
            self.k_dtype == self.v_dtype
            and self.v_head_dim is None
            and isinstance(self.n_kv_heads, int)
            and isinstance(self.head_dim, int)
        )

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of a token's rows, K and V of all layers; padding left out."""
        return sum(layer.token_bytes for layer in self.layers)

    @cached_property
    def token_stride_bytes(self) -> int:
        """Bytes a token takes in the window, padding included."""
        return sum(
            layer.k_stride + (layer.v_stride if self.order == "split" else 0)
            for layer in self.layers
        )

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a KV block in block order; 0 in layer-major orders, where blocks lie apart."""
        if self.order != "block":
            return 0
        return round_up(self._places[1], self.page_bytes)

    @cached_property
    def window_bytes(self) -> int:
        """Bytes of address space a sequence needs."""
        if self.order == "block":
            return self.n_blocks(self.max_tokens) * self.block_bytes
        return round_up(self._places[1], self.page_bytes)

    @cached_property
    def remap_tokens(self) -> int:
        """Tokens whose rows are whole pages in every layer.

        Where a multiple of it is removed, `Sequence.rm` maps pages elsewhere instead of moving
        rows.  A KV block in block order.
        """
        if self.order == "block":
            return self.block_tokens
        steps = (
            self.page_bytes // math.gcd(self.page_bytes, stride)
            for rows in self.layers
            for stride in (rows.k_stride, rows.v_stride)
        )
        return max(steps)  # divisors of a power of two: the largest is a multiple of all

    @cached_property
    def can_remap(self) -> bool:
        """Whether V of each layer starts on a page in `split` order, as it does with `pad_rows`."""
        return self.order != "split" or all(
            rows.v_offset % self.page_bytes == 0 for rows in self.layers
        )

    # --- arithmetic ---------------------------------------------------------------------------

    def n_blocks(self, n_tokens: int) -> int:
        """Return how many KV blocks hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_tokens)

    def head_shape(self, layer: int, kv: int) -> tuple[int, int]:
        """Return (H, D) of the K or V rows of a layer, however they are stored."""
        rows = self.layers[layer]
        return rows.n_kv_heads, rows.v_head_dim if kv else rows.k_head_dim

    def row_shape(self, layer: int, kv: int) -> tuple[int, int]:
        """Return the shape in which a K or V row is stored: (H, D), of packed ones (1, bytes)."""
        if self.formats[kv].is_packed:
            return 1, self.row_bytes(layer, kv)
        return self.head_shape(layer, kv)

    def strides(self, layer: int, kv: int) -> tuple[int, ...]:
        """Return the strides of a layer's array: (T, H, D), in block order (B, b, H, D)."""
        rows, item_bytes = self.layers[layer], self.storage_dtypes[kv].itemsize
        row_stride = rows.v_stride if kv else rows.k_stride
        in_layer = (row_stride, self.row_shape(layer, kv)[1] * item_bytes, item_bytes)
        return (self.block_bytes, *in_layer) if self.order == "block" else in_layer

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
            `kv` is neither 0 nor 1, or packed blocks reach over several heads.
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
        if kv not in (0, 1):
            raise ValueError(f"kv={kv!r}: 0 (K) and 1 (V) are possible")
        n_heads, head_dim = self.head_shape(layer, kv)
        if not 0 <= head < n_heads:
            raise PageBoundaryError(
                f"layer {layer}, token {token}, head {head}: a row has {n_heads} KV heads"
            )
        row_format = self.formats[kv]
        if head and head_dim % row_format.block_values:
            raise ValueError(
                f"head {head}: heads of {head_dim} values share blocks of {row_format.block_values}"
            )
        return self.row_offset(layer, token, kv) + head * row_format.row_bytes(head_dim)

    def row_offset(self, layer: int, token: int, kv: int) -> int:
        """Return the offset of a row without checks; `boundary` is what checks an access."""
        rows = self.layers[layer]
        base = rows.base
        if self.order == "block":
            block, token = divmod(token, self.block_tokens)
            base += block * self.block_bytes
        if kv:
            return base + rows.v_offset + token * rows.v_stride
        return base + token * rows.k_stride

    def row_bytes(self, layer: int, kv: int) -> int:
        """Return the bytes of a K or V row of a layer."""
        rows = self.layers[layer]
        return rows.v_row_bytes if kv else rows.k_row_bytes

    def _most_tokens(self) -> int:
        """Return about the largest `max_tokens` this shape leaves room for, never more."""
        if self.order == "block":
            return MAX_BYTES // self.block_bytes * self.block_tokens
        rounding_bytes = 2 * self.n_layers * self.page_bytes
        return (MAX_BYTES - rounding_bytes) // self.token_stride_bytes


def _dtype_name(name: str, dtype: DTypeLike) -> KVType:
    """Return the name of a dtype given by name, NumPy type or NumPy dtype."""
    found = dtype if isinstance(dtype, str) else ""
    if not found:
        with suppress(TypeError, ValueError):
            numpy_dtype = np.dtype(dtype)
            # ml_dtypes registers its bfloat16 with NumPy under that name
            found = numpy_dtype.name if numpy_dtype.isnative else ""
    if found not in FORMATS:
        hint = "; for bfloat16 bits kept in uint16 say 'bfloat16'" if found == "uint16" else ""
        possible = ", ".join(map(repr, FORMATS))
        raise ValueError(f"{name}={dtype!r}: possible are {possible}{hint}")
    return cast("KVType", found)


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


def _count_per_layer(name: str, value: int | Sequence[int], n_layers: int) -> int | tuple[int, ...]:
    """Return a count, or a tuple of one a layer if they differ."""
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        return _count(name, cast("int", value))
    counts = tuple(
        _count(f"{name}[{i}]", number) for i, number in enumerate(cast("Sequence[int]", value))
    )
    if len(counts) != n_layers:
        raise ValueError(
            f"{name} has {len(counts)} numbers for {n_layers} layers: one for all, or one for "
            "each, are possible"
        )
    return counts[0] if len(set(counts)) == 1 else counts


def _each(value: int | Sequence[int], n_layers: int) -> Sequence[int]:
    return (value,) * n_layers if isinstance(value, int) else value


def _shown(value: int | Sequence[int]) -> str:
    """Return a count as a message shows it: 8, or 8/4 where layers differ."""
    return str(value) if isinstance(value, int) else "/".join(map(str, dict.fromkeys(value)))
