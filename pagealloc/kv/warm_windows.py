"""WarmWindows: windows of closed sequences, their pages still committed, for the next sequence.

Purpose
    A new sequence finds its first pages committed and in the page tables: no system call, no
    fault.  All windows of a cache are of one layout and one owner, so whose rows they held is
    nobody else's business.
Structure
    put() --> newest last [window, window, ...] --> take() the newest of its kind
                  |
                  after purge_after_s, or when the budget is short: the oldest is closed

    There are two kinds: those whose first page is there serve new sequences, those of forks, whose
    first pages were shared and are gone, serve forks.  A window serves the use it had: the caller
    numbers these.
Invariants
    nobody else has a window that is in here, or a view of it
    refused: windows that the kernel refused to close, which no sequence gets
    a timer runs while there is a window, in the process that made the cache
Locking
    None, so that os.fork() leaves none taken behind: single operations of a list are atomic, and
    whoever takes a window out of it owns it.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from pagealloc.errors import PageallocError

if TYPE_CHECKING:
    from pagealloc import Window

    # with since when it lies idle, its use, and whether it serves forks
    Entry = tuple[Window, float, tuple[int, bool]]

__all__ = ["WarmWindows"]

PATIENCE_STEP_S, PATIENCE_STEPS = 0.001, 2000
"""How long another thread's close is waited for: not for ever, for a fork may have lost it."""


class WarmWindows:
    """The warm windows of one cache.

    Parameters
    ----------
    purge_after_s : float
        How long a window lies idle before it is closed; 0: nothing is kept.
    """

    __slots__ = ("__weakref__", "_closing", "_entries", "_refused", "_timer", "purge_after_s")

    def __init__(self, purge_after_s: float) -> None:
        self.purge_after_s = purge_after_s
        self._entries: list[Entry] = []
        self._closing: list[Entry] = []
        self._refused: list[Window] = []
        self._timer: threading.Timer | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages committed in it."""
        windows = [window for window, _, _ in list(self._entries)]
        return sum(window.committed_bytes for window in [*windows, *self._refused])

    def put(self, window: Window, use: int) -> bool:
        """Keep a window that nobody uses any more; False if it has to be closed instead."""
        if not self.purge_after_s:
            return False
        try:
            for run in window.runs():
                if run.n_refs > 1:
                    window.release(run.offset, run.nbytes)
        except PageallocError:  # the kernel refused to map the own pages back
            return False
        runs = window.runs()
        if not runs:
            return False
        self._entries.append((window, time.monotonic(), (use, runs[0].offset > 0)))
        self._watch()
        return True

    def put_refused(self, window: Window) -> None:
        """Keep a window that the kernel refused to close, to try again with the next one."""
        self._refused.append(window)

    def take(self, use: int, *, for_fork: bool) -> Window | None:
        """Return the window of a use and kind put last, None if there is none."""
        for entry in reversed(list(self._entries)):
            if entry[2] == (use, for_fork):
                with suppress(ValueError):  # another thread was quicker
                    self._entries.remove(entry)
                    return entry[0]
        return None

    def close_oldest(self) -> bool:
        """Give back the pages of the window that lay idle longest; False if there is none."""
        for window in list(self._refused):
            with suppress(PageallocError, OSError, ValueError):
                window.close()
                self._refused.remove(window)
        for entry in list(self._entries):
            self._closing.append(entry)  # first: a window is always in one of the two lists
            try:
                self._entries.remove(entry)
                entry[0].close()
            except ValueError:  # another thread was quicker
                continue
            except (PageallocError, OSError):
                self.put_refused(entry[0])
            finally:
                self._closing.remove(entry)
            return True
        return False

    def close_all(self) -> None:
        """Give back the pages of all windows; another thread may be doing so for some of them."""
        while self.close_oldest():
            pass
        for _ in range(PATIENCE_STEPS):
            if not self._closing:
                return
            time.sleep(PATIENCE_STEP_S)

    def _watch(self) -> None:
        """Start a timer unless one runs; that two threads start one each does no harm."""
        if self._timer is None and self.purge_after_s != float("inf"):
            self._timer = threading.Timer(self.purge_after_s, _purge, [weakref.ref(self)])
            self._timer.daemon = True
            self._timer.start()

    def _close_idle(self) -> None:
        """Close what has lain idle long enough, and look again later; called by the timer."""
        self._timer = None
        while self._entries:
            with suppress(IndexError):
                if self._entries[0][1] + self.purge_after_s > time.monotonic():
                    self._watch()
                    return
            self.close_oldest()


def _purge(reference: weakref.ref[WarmWindows]) -> None:
    windows = reference()
    if windows is not None:
        windows._close_idle()  # noqa: SLF001  its own timer
