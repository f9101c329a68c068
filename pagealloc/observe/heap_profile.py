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
    window, and of a Buffer that was made shorter, the share that it still has
Locking
    stacks.lock; none where a weak reference dies, for that may be wherever others hold their locks
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

from pagealloc import Buffer, Window
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
    """What was noted of one block: once, and of Buffers and Windows some times they have grown."""

    reference: weakref.ref[Any]
    by_stack: dict[Calls, tuple[float, float]]
    """Blocks and bytes that it stands for."""
    nbytes: int
    """Of itself, in all that was noted."""

    def live_share(self) -> float:
        """Return how much of it is live, 0 to 1."""
        block = self.reference()
        if block is None or block.closed:
            return 0.0
        if isinstance(block, Window):
            return min(1.0, block.committed_bytes / block.noted_bytes)
        if isinstance(block, Buffer):
            return min(1.0, block.nbytes / self.nbytes)
        return 1.0


class HeapProfiler:
    """Notes Buffers, Batches, NumPy's arrays and the pages that windows commit, `start` to `stop`.

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
    Thread-safe.  Arrays of NumPy's under `pagealloc.numpy_handler` are noted, too.  What native
    code takes through the C API is not: that would cost each of its calls more than one percent,
    and would have it wait for the GIL.
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
        noted.start_heap_profile(self._note, self.period_bytes)
        self._started_ns = time.monotonic_ns()

    def stop(self) -> None:
        """Note no more allocations; what is live is followed on."""
        noted.stop_heap_profile(self._note)

    def _note(self, block: Block, nbytes: int, n_parts: int) -> None:
        # What is noted costs Python's own memory, hence only what was picked gets so far.
        weight = 1.0 if self.period_bytes == 1 else 1 / -math.expm1(-nbytes / self.period_bytes)
        # There is no other way to it; a thread that runs native code alone has no caller's frame.
        calls = stack_of(sys._getframe().f_back)  # noqa: SLF001
        key = id(block)

        def forget(_: object) -> None:
            self._noted.pop(key, None)

        with lock:
            allocated = self._allocated.setdefault(calls, [0.0, 0.0])
            allocated[0] += weight * n_parts
            allocated[1] += weight * nbytes
            known = self._noted.get(key)
            if known is None or known.reference() is not block:
                known = self._noted[key] = _Noted(weakref.ref(block, forget), {}, 0)
            n_blocks, so_far = known.by_stack.get(calls, (0.0, 0.0))
            known.by_stack[calls] = n_blocks + weight * n_parts, so_far + weight * nbytes
            known.nbytes += nbytes

    def profile(self) -> Profile:
        """Return what was allocated since the start, and what of it is live."""
        found = Profile(VALUE_TYPES, ValueType("space", "bytes"), self.period_bytes)
        found.time_ns = time.time_ns()
        found.duration_ns = time.monotonic_ns() - self._started_ns
        live: dict[Calls, list[float]] = {}
        with lock:
            # Copies, each made in one step: a collection meanwhile may free what was noted, and run
            # code that allocates.  What is live first: all of it is in what was allocated.
            for block in self._noted.copy().values():
                share = block.live_share()
                for calls, (n_blocks, nbytes) in block.by_stack.copy().items():
                    of_stack = live.setdefault(calls, [0.0, 0.0])
                    of_stack[0] += share * n_blocks
                    of_stack[1] += share * nbytes
            allocated = self._allocated.copy()
        for calls, counted in allocated.items():
            values = (*counted, *live.get(calls, (0.0, 0.0)))
            found.add(frames_of(calls), [round(value) for value in values])
        return found
