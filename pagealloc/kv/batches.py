"""Batches: one decode step of many sequences, and rows of many sequences in one array.

Purpose
    `KVCache.append_batch` and `gather`: checks, pages for all or for none, and the copying shared
    among threads.
Structure
    check everything --> pages ready for all --> BatchRows copies, part by part --> lengths
Locking
    The sequences' one writer, for all of them.  Helper threads touch rows only, and are done when
    the call returns.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pagealloc.kv import boundary
from pagealloc.kv.batch_rows import BatchRows
from pagealloc.kv.conversions import check_out, wanted_type
from pagealloc.kv.row_formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Items

    import numpy.typing as npt

    from pagealloc.kv.cache import KVCache
    from pagealloc.kv.sequence import Sequence

__all__ = ["append_batch", "gather"]

# ruff: noqa: SLF001  methods of KVCache, in a room of their own

MAX_THREADS = 4  # more wait for the memory
THREAD_BYTES = 1 << 20  # what a thread should have to copy: it takes about 0.1 ms
_helpers: tuple[int, ThreadPoolExecutor] | None = None  # with the process that made them


def append_batch(
    cache: KVCache,
    sequences: Iterable[Sequence],
    kv: npt.NDArray[Any],
    positions: Items[int] | None,
) -> None:
    """See `KVCache.append_batch`."""
    batch, layout = _checked(cache, sequences), cache.layout
    if not layout.is_uniform:
        raise ValueError(
            "append_batch() needs layers of one shape and type: call append_token() with pairs"
        )
    shape = (len(batch), layout.n_layers, 2, *layout.row_shape(0, 0))
    dtype = getattr(kv, "dtype", type(kv).__name__)
    if dtype != layout.storage_dtypes[0]:
        raise TypeError(f"kv must be an array of {layout.storage_dtypes[0]}, not {dtype}")
    kv = np.asarray(kv)
    if kv.shape != shape:
        raise ValueError(f"kv has shape {kv.shape}, expected {shape}")
    if positions is not None and len(positions) != len(batch):
        raise ValueError(f"{len(positions)} positions for {len(batch)} sequences")
    if not batch:
        return
    for sequence in batch:
        sequence._check_writable()
    firsts = [
        sequence._token_position(None if positions is None else positions[i])
        for i, sequence in enumerate(batch)
    ]
    for sequence in batch:
        sequence._make_token_ready(batch)
    rows = BatchRows(cache._table, batch, 0)
    _share_out(
        len(batch),
        len(batch) * layout.token_bytes,
        lambda start, end: rows.write(kv, start, end),
    )
    rows.finish_write(firsts)


def gather(
    cache: KVCache,
    sequences: Iterable[Sequence],
    layer: int,
    kv: str,
    out: npt.NDArray[Any] | None,
) -> npt.NDArray[Any]:
    """See `KVCache.gather`."""
    if kv not in ("k", "v"):
        raise ValueError(f"kv={kv!r}: 'k' and 'v' are possible")
    kind, layout = "kv".index(kv), cache.layout
    boundary.check_layer(layout, layer)
    batch = _checked(cache, sequences)
    rows = BatchRows(cache._table, batch, layer)
    shape = (rows.n_rows, *layout.head_shape(layer, kind))  # (sum of T, H, D)
    is_packed = cache._quantisation is not None
    wanted = wanted_type(layout.formats[kind].name, None, out, is_packed=is_packed)
    if out is None:
        out = np.empty(shape, FORMATS[wanted].dtype)
    check_out(out, shape)
    if batch:
        rows.gather_rings(layer, kind, out, wanted)
        _share_out(
            len(batch),
            out.nbytes,
            lambda start, end: rows.gather(layer, kind, out, wanted, start, end),
        )
    return out


def _checked(cache: KVCache, sequences: Iterable[Sequence]) -> list[Sequence]:
    """Return the sequences as a list: open, of this cache, none twice."""
    batch = list(sequences)
    for sequence in batch:
        if getattr(sequence, "cache", None) is not cache:
            raise ValueError(f"{sequence!r} is no sequence of this cache")
        sequence._check_open()
    if len({id(sequence) for sequence in batch}) < len(batch):
        raise ValueError("a sequence is in the batch twice: its tokens come one step after another")
    return batch


def _share_out(n_items: int, nbytes: int, work: Callable[[int, int], None]) -> None:
    """Have `work` done for items [0, n_items), by several threads if that is worth it."""
    n_threads = min(MAX_THREADS, os.cpu_count() or 1, nbytes // THREAD_BYTES + 1, n_items)
    if n_threads <= 1:
        work(0, n_items)
        return
    edges = [i * n_items // n_threads for i in range(n_threads + 1)]
    parts = list(pairwise(edges))
    futures = [_pool().submit(work, start, end) for start, end in parts[1:]]
    try:
        work(*parts[0])
    finally:
        for future in futures:
            future.result()


def _pool() -> ThreadPoolExecutor:
    """Return this process's helpers; those of a parent are not there after a fork."""
    global _helpers  # noqa: PLW0603  threads are a thing of the process
    if _helpers is None or _helpers[0] != os.getpid():
        _helpers = (os.getpid(), ThreadPoolExecutor(MAX_THREADS - 1, "pagealloc-kv"))
    return _helpers[1]
