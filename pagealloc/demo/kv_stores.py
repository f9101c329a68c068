"""The two places the engine can keep its KV cache in.

`PreallocatedKV` is what inference code does today: one float16 array a conversation, as long as
the context, cleared at creation. `PagedKV` keeps the rows in a sequence of `pagealloc.kv`. The
engine cannot tell them apart: both hand the rows out as contiguous float32.

Letters in shape comments: L layers, T tokens, H KV heads, D head_dim, B KV blocks.
"""

import mmap
from typing import Any, Protocol, Self

import numpy as np

from pagealloc.demo.weights import Floats, LlamaShape
from pagealloc.kv import KVLayout, Sequence
from pagealloc.kv.quantisation import KV_KINDS

__all__ = ["KVStore", "PagedKV", "PreallocatedKV", "every_row", "paged_layout"]


def every_row(kind: str) -> dict[str, Any]:
    """Return the arguments with which every row is stored so, the newest among them."""
    return KV_KINDS[kind] and KV_KINDS[kind] | {"residual_tokens": 0}


class KVStore(Protocol):
    """Rows of K and V, by layer."""

    def __len__(self) -> int:
        """Tokens that every layer holds."""

    def append(self, layer: int, k: Floats, v: Floats) -> None:
        """Add rows (T, H, D) to one layer."""

    def read(self, layer: int, k: Floats, v: Floats) -> None:
        """Copy all rows of one layer into two contiguous float32 arrays (T, H, D)."""


class PreallocatedKV:
    """A float16 cache of `max_tokens` rows, preallocated and cleared as llama.cpp does it.

    The memory is an anonymous private mapping under the array, so that the bytes resident in it
    can be counted.
    """

    def __init__(self, shape: LlamaShape, max_tokens: int) -> None:
        self._mapping = mmap.mmap(
            -1, max_tokens * shape.kv_token_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        rows = np.frombuffer(self._mapping, np.float16)
        self._rows = rows.reshape(
            shape.n_layers, 2, max_tokens, shape.n_kv_heads, shape.head_dim
        )  # (L, 2, T, H, D)
        self._rows.fill(0)
        self._lengths_tokens = [0] * shape.n_layers

    def __len__(self) -> int:
        return min(self._lengths_tokens)

    @property
    def address(self) -> int:
        """Where the mapping starts."""
        return int(self._rows.ctypes.data)

    @property
    def mapped_bytes(self) -> int:
        """Length of the mapping."""
        return self._rows.nbytes

    def append(self, layer: int, k: Floats, v: Floats) -> None:
        """Add rows (T, H, D) to one layer."""
        start = self._lengths_tokens[layer]
        end = start + len(k)
        if end > self._rows.shape[2]:
            raise ValueError(f"{end} tokens do not fit into a context of {self._rows.shape[2]}")
        self._rows[layer, 0, start:end] = k
        self._rows[layer, 1, start:end] = v
        self._lengths_tokens[layer] = end

    def read(self, layer: int, k: Floats, v: Floats) -> None:
        """Copy all rows of one layer into two contiguous float32 arrays (T, H, D)."""
        n_tokens = self._lengths_tokens[layer]
        np.copyto(k, self._rows[layer, 0, :n_tokens])
        np.copyto(v, self._rows[layer, 1, :n_tokens])


def paged_layout(shape: LlamaShape, max_tokens: int, kv_dtype: str = "float16") -> KVLayout:
    """Return the layout of `PagedKV`: block order, in which a fork is one mapping."""
    return KVLayout(
        n_layers=shape.n_layers,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_tokens=max_tokens,
        dtype=kv_dtype,
        order="block",
    )


class PagedKV:
    """A sequence of `pagealloc.kv` in block order."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._dtype = np.dtype(sequence.cache.layout.k_dtype)

    def __len__(self) -> int:
        return len(self._sequence)

    def fork(self) -> Self:
        """Return a second conversation that shares all pages of this one."""
        return type(self)(self._sequence.fork())

    def append(self, layer: int, k: Floats, v: Floats) -> None:
        """Add rows (T, H, D) to one layer."""
        self._sequence.append(layer, k.astype(self._dtype), v.astype(self._dtype))

    def read(self, layer: int, k: Floats, v: Floats) -> None:
        """Copy all rows of one layer into two contiguous float32 arrays (T, H, D)."""
        self._sequence.k(layer, out=k)
        self._sequence.v(layer, out=v)

    def close(self) -> None:
        """Give the pages back that no other sequence shares."""
        self._sequence.close()
