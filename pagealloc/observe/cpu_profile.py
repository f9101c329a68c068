r"""CPUProfiler: which lines spend CPU time, and how much of it inside pagealloc.

Purpose
    A hundred times a second, each thread that has worked since is noted with the CPU time it has
    spent and its Python stack; where it is in one of pagealloc's modules, that is its last frame.
Structure
    ::

        thread_capture: clocks and a signal, without the GIL --> native_code: whose code it is
                                          \--> sys._current_frames: Python stacks --> Profile
Invariants
    what the profile adds up to is the CPU time of all threads, but for what each spent since it was
    last noted: less than half a period, or less than two where the thread has ended
Locking
    stacks.lock
Units
    Nanoseconds.

Samplers on PyPI look from outside, which containers forbid (py-spy, austin: ptrace), see one thread
(pyinstrument), or trace every call (yappi).  A thread that holds the GIL shows its Python stack a
moment after its native one: when it next lets go.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pagealloc.observe.native_code import NativeCode
from pagealloc.observe.profiles import Frame, Profile, ValueType
from pagealloc.observe.stacks import frames_of, lock, stack_of
from pagealloc.observe.thread_capture import capture_threads, install_capture, thread_spent_ns

if TYPE_CHECKING:
    from pagealloc.observe.profiles import Stack
    from pagealloc.observe.stacks import Calls

__all__ = ["CPUProfiler"]

VALUE_TYPES = (ValueType("samples", "count"), ValueType("cpu", "nanoseconds"))
PERIOD_NS = 10_000_000
MIN_PERIOD_NS = 1_000_000
STOP_S = 2.0
"""How long the end waits for the last look.  It may come in a signal's handler, which has
interrupted a thread that has the lock, and then the look would wait for that thread for ever."""
NATIVE_THREAD = (Frame("(threads without a Python stack)", "native code"),)


class CPUProfiler:
    """Samples all threads of the process, but its own, from `start` to `stop`.

    Parameters
    ----------
    period_ns : int
        How often it looks, at least every millisecond.

    Raises
    ------
    ValueError
        `period_ns` is shorter.

    Notes
    -----
    Thread-safe.  Linux, x86-64 and aarch64.  Handles SIGPROF, also after it was stopped.
    """

    _running: CPUProfiler | None = None

    def __init__(self, period_ns: int = PERIOD_NS) -> None:
        if period_ns < MIN_PERIOD_NS:
            raise ValueError(f"period_ns={period_ns}: at least {MIN_PERIOD_NS} is possible")
        self.period_ns = period_ns
        self._samples: dict[Stack, list[int]] = {}
        self._started_ns = 0
        self._is_stopped = threading.Event()
        self._code = NativeCode()
        self._thread = threading.Thread(
            target=self._sample, name="pagealloc CPU profiler", daemon=True
        )

    def start(self) -> None:
        """Begin.

        Raises
        ------
        RuntimeError
            Another one is running, here or another profiler's that handles SIGPROF.
        OSError
            This system tells no thread's CPU time.
        """
        with lock:
            if CPUProfiler._running is not None:
                raise RuntimeError("CPU time is profiled already: stop that profile first")
            error = install_capture()
            if error == errno.EBUSY:
                raise RuntimeError("another profiler handles SIGPROF: stop it first")
            if error:
                raise OSError(error, f"no CPU profiles here: {os.strerror(error)}")
            CPUProfiler._running = self
        try:
            self._code.refresh()
            self._thread.start()
        except BaseException:
            self._let_others()
            raise
        self._started_ns = time.monotonic_ns()

    def stop(self) -> None:
        """Look no more."""
        self._is_stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_S)
        self._let_others()

    def _let_others(self) -> None:
        with lock:
            if CPUProfiler._running is self:
                CPUProfiler._running = None

    def _sample(self) -> None:
        own_tid = threading.get_native_id()
        spent_ns = {tid: thread_spent_ns(tid) for tid in _tids()}
        while not self._is_stopped.is_set():
            tids = _tids()
            tids.remove(own_tid)
            found = capture_threads(tids, spent_ns, self.period_ns)
            if not found:
                continue
            idents = {thread.native_id: thread.ident for thread in threading.enumerate()}
            calls_of = _calls_of_threads()
            with lock:
                for tid, cpu_ns, addresses in found:
                    stack = frames_of(calls_of.get(idents.get(tid) or 0, ())) or NATIVE_THREAD
                    inside = self._code.pagealloc_frame(addresses)
                    if inside is not None:
                        stack = (inside, *stack)
                    values = self._samples.setdefault(stack, [0, 0])
                    values[0] += 1
                    values[1] += cpu_ns

    def profile(self) -> Profile:
        """Return what was seen so far."""
        found = Profile(VALUE_TYPES, ValueType("cpu", "nanoseconds"), self.period_ns)
        found.time_ns = time.time_ns()
        found.duration_ns = time.monotonic_ns() - self._started_ns
        with lock:
            for stack, values in self._samples.copy().items():
                found.add(stack, list(values))
        return found


def _forget_running() -> None:
    """Let a child of fork(), which has no thread that samples, take a profile of its own."""
    CPUProfiler._running = None  # noqa: SLF001  # this room's own


os.register_at_fork(after_in_child=_forget_running)


def _calls_of_threads() -> dict[int, Calls]:
    """Return the calls of each thread, and keep no frame: its variables would live as long.

    There is no other way to them.  A variable would keep them until the next collection: this
    thread's own frame, which has it, is one of them.
    """
    return {ident: stack_of(frame) for ident, frame in sys._current_frames().items()}  # noqa: SLF001


def _tids() -> list[int]:
    """Return the threads of this process, as the kernel numbers them."""
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]
