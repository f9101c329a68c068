r"""HeapProfiler: which lines allocate, and what of it is live.

Purpose
    Of every `period_bytes` allocated, on average, one byte is picked at random, and the block it
    lies in is noted with its Python stack; as Go's and tcmalloc's heap profiles are.
Structure
    ::

        core/noted counts bytes down --> note() --> by stack: allocated so far
                                               \--> by block: live until its weak reference dies
Invariants
    what is live of a stack is the sum of the weights of its blocks that were not closed; of a
    window at most what it has committed now
Locking
    stacks.lock
Units
    Bytes; a weight is how many blocks a noted one stands for.
Source
    A block of s bytes is noted with probability 1 - exp(-s / period), so it stands for the inverse
    of that: https://pkg.go.dev/runtime#MemProfileRate.
"""

from __future__ import annotations

import math
import sys
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagealloc import Window
from pagealloc.core import noted
from pagealloc.observe.profiles import Profile, ValueType
from pagealloc.observe.stacks import frames_of, lock, stack_of
from pagealloc.units import parse_bytes

if TYPE_CHECKING:
    from pagealloc.core.leaks import Block
    from pagealloc.observe.stacks import Calls

__all__ = ["HeapProfiler"]

VALUE_TYPES = (
    ValueType("alloc_objects", "count"),
    ValueType("alloc_space", "bytes"),
    ValueType("inuse_objects", "count"),
    ValueType("inuse_space", "bytes"),
)


@dataclass(slots=True)
class _Noted:
    """What was noted of one block: a Buffer or Batch once, a Window each time it has grown."""

    reference: weakref.ref[Any]
    samples: list[tuple[Calls, float, float]]
    """Stack, blocks and bytes that it stands for."""

    def live_share(self) -> float:
        """Return how much of it is live, 0 to 1."""
        block = self.reference()
        if block is None or block.closed:
            return 0.0
        if isinstance(block, Window):
            return min(1.0, block.committed_bytes / sum(nbytes for *_, nbytes in self.samples))
        return 1.0


class HeapProfiler:
    """Notes Buffers, Batches and the pages that windows commit, from `start` to `stop`.

    Parameters
    ----------
    period : int or str
        Of how many bytes one is picked, on average; 1: each block is noted.

    Raises
    ------
    ValueError
        `period` is no number of bytes.

    Notes
    -----
    Thread-safe.  Blocks of native code (the C API, NumPy's handler) have no Python object, and are
    not noted.
    """

    def __init__(self, period: int | str = "512KiB") -> None:
        self.period_bytes = parse_bytes(period, name="period")
        self._allocated: dict[Calls, list[float]] = {}
        self._noted: dict[int, _Noted] = {}
        self._started_ns = 0

    def start(self) -> None:
        """Begin.

        Raises
        ------
        RuntimeError
            Another one is running: allocations are noted for one at a time.
        """
        self._started_ns = time.monotonic_ns()
        noted.start_heap_profile(self._note, self.period_bytes)

    def stop(self) -> None:
        """Note no more allocations; what is live is followed on."""
        noted.stop_heap_profile()

    def _note(self, block: Block, nbytes: int, n_parts: int) -> None:
        # What is noted costs Python's own memory, hence only what was picked gets so far.
        weight = 1.0 if self.period_bytes == 1 else 1 / -math.expm1(-nbytes / self.period_bytes)
        calls = stack_of(sys._getframe(1))  # noqa: SLF001  # there is no other way to it
        key = id(block)

        def forget(_: object) -> None:
            with lock:
                self._noted.pop(key, None)

        with lock:
            allocated = self._allocated.setdefault(calls, [0.0, 0.0])
            allocated[0] += weight * n_parts
            allocated[1] += weight * nbytes
            known = self._noted.get(key)
            if known is None or known.reference() is not block:
                known = self._noted[key] = _Noted(weakref.ref(block, forget), [])
            known.samples.append((calls, weight * n_parts, weight * nbytes))

    def profile(self) -> Profile:
        """Return what was allocated since the start, and what of it is live."""
        found = Profile(VALUE_TYPES, ValueType("space", "bytes"), self.period_bytes)
        found.time_ns = time.time_ns()
        found.duration_ns = time.monotonic_ns() - self._started_ns
        with lock:
            values = {calls: [*counted, 0.0, 0.0] for calls, counted in self._allocated.items()}
            for block in tuple(self._noted.values()):
                share = block.live_share()
                for calls, n_blocks, nbytes in block.samples:
                    values[calls][2] += share * n_blocks
                    values[calls][3] += share * nbytes
        for calls, each in values.items():
            found.add(frames_of(calls), [round(value) for value in each])
        return found
