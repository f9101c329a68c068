"""Windows that share in any order, against NumPy arrays; the books against the kernel's."""

import errno
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)
from mappings import CAN_WEIGH, weigh

from pagealloc.core.extents import ExtentStore
from pagealloc.core.os_memory import page_size_bytes, refusing
from pagealloc.core.window import Window
from pagealloc.errors import OutOfMemoryError

PAGE = page_size_bytes()
STRIDE = PAGE // 1024  # enough bytes of a page to compare: they were all written at once
N_PAGES = 16  # of the window that are used
BUDGET_PAGES = 120
ranges = st.tuples(st.integers(0, N_PAGES - 1), st.integers(1, N_PAGES)).map(
    lambda pair: slice(pair[0], min(sum(pair), N_PAGES))
)
calls = st.sampled_from(["mmap", "madvise", "fallocate", "pwrite"])


def span(pages):
    return pages.start * PAGE, (pages.stop - pages.start) * PAGE


class Mirror:
    """What a window should hold: one number a page (-1: uncommitted), and its live views."""

    def __init__(self, window):
        self.window = window
        self.pages = np.full(N_PAGES, -1)
        self.views = []  # (pages, array)

    def read(self, page):
        return np.frombuffer(self.window.view(page * PAGE, PAGE), np.uint8)


class WindowMachine(RuleBasedStateMachine):
    mirrors = Bundle("mirrors")
    max_mappings = None

    def __init__(self):
        super().__init__()
        self.store = ExtentStore(
            budget_bytes=BUDGET_PAGES * PAGE, name="machine", max_mappings=self.max_mappings
        )
        self.live = []
        self.number = 0

    # --- rules ---

    @precondition(lambda self: len(self.live) < 8)
    @rule(target=mirrors, nbytes=st.sampled_from(["2MiB", "4MiB"]))
    def open(self, nbytes):
        self.live.append(Mirror(Window(self.store, nbytes)))
        return self.live[-1]

    @rule(mirror=mirrors, pages=ranges)
    def commit(self, mirror, pages):
        if self.tries(mirror.window.commit, *span(pages)):
            part = mirror.pages[pages]
            part[part < 0] = 0

    @rule(mirror=mirrors, pages=ranges)
    def write(self, mirror, pages):
        """As every mutator must: make private, then write through a writable view."""
        if not self.tries(mirror.window.make_private, *span(pages)):
            return
        self.number = self.number % 255 + 1
        for page in range(pages.start, pages.stop):
            if mirror.pages[page] >= 0:
                view = mirror.window.view(page * PAGE, PAGE, writable=True)
                np.frombuffer(view, np.uint8)[:] = self.number
                mirror.pages[page] = self.number

    @rule(mirror=mirrors, other=mirrors, pages=ranges)
    def share(self, mirror, other, pages):
        if mirror is other:
            return
        if (mirror.pages[pages] >= 0).any():
            with pytest.raises(ValueError, match="committed here"):
                mirror.window.share_from(other.window, *span(pages))
        elif self.tries(mirror.window.share_from, other.window, *span(pages)):
            mirror.pages[pages] = other.pages[pages]

    @rule(target=mirrors, other=mirrors)
    def fork(self, other):
        mirror = self.open("2MiB")
        if self.tries(mirror.window.share_from, other.window, 0, N_PAGES * PAGE):
            mirror.pages[:] = other.pages
        return mirror

    @rule(mirror=mirrors, pages=ranges)
    def release(self, mirror, pages):
        if any(v.start < pages.stop and pages.start < v.stop for v, _ in mirror.views):
            with pytest.raises(BufferError, match="live views"):
                mirror.window.release(*span(pages))
        elif self.tries(mirror.window.release, *span(pages)):
            mirror.pages[pages] = -1

    @rule(mirror=mirrors, pages=ranges)
    def look(self, mirror, pages):
        """Hold a view while everything else goes on."""
        if (mirror.pages[pages] >= 0).all():
            view = mirror.window.view(*span(pages))
            mirror.views.append((pages, np.frombuffer(view, np.uint8).reshape(-1, PAGE)))

    @rule(mirror=mirrors)
    def look_away(self, mirror):
        mirror.views.clear()

    @rule(
        mirror=mirrors, pages=ranges, call=calls, skip=st.integers(0, 3), change=st.integers(0, 3)
    )
    def refused(self, mirror, pages, call, skip, change):
        """A refusal, once, leaves everything as it was."""
        name = ["commit", "release", "make_private", "share_from"][change]
        arguments = span(pages)
        if name == "release" and mirror.views:
            return
        if name == "share_from":
            arguments = (self.live[0].window, *arguments)
            if mirror is self.live[0] or (mirror.pages[pages] >= 0).any():
                return
        before = mirror.window.runs(), self.store.committed_bytes - self.store.stale_bytes
        with refusing(call, errno.ENOMEM, skip=skip, times=1):
            is_done = self.tries(getattr(mirror.window, name), *arguments)
        if is_done:
            self.entered(mirror, pages, name)
        else:
            after = mirror.window.runs(), self.store.committed_bytes - self.store.stale_bytes
            assert after == before

    @rule(mirror=consumes(mirrors))
    def close(self, mirror):
        if mirror.views:
            with pytest.raises(BufferError, match="live views"):
                mirror.window.close()
            mirror.views.clear()
        mirror.window.close()
        self.live.remove(mirror)

    # --- what they share ---

    def tries(self, change, *arguments):
        try:
            change(*arguments)
        except OutOfMemoryError:
            return False
        return True

    def entered(self, mirror, pages, name):
        part = mirror.pages[pages]
        if name == "commit":
            part[part < 0] = 0
        elif name == "release":
            part[:] = -1
        elif name == "share_from":
            part[:] = self.live[0].pages[pages]

    # --- what must hold ---

    @invariant()
    def books_agree(self):
        self.store.check()
        references = Counter()
        for mirror in self.live:
            mirror.window.check()
            committed = np.zeros(N_PAGES, bool)
            for run in mirror.window.runs():
                first, n_pages = run.offset // PAGE, run.nbytes // PAGE
                committed[first : first + n_pages] = True
                references.update(run.file_offset // PAGE + page for page in range(n_pages))
            assert (committed == (mirror.pages >= 0)).all()
        for mirror in self.live:
            for run in mirror.window.runs():
                assert references[run.file_offset // PAGE] == run.n_refs
        stats = self.store.stats()
        assert stats.committed_bytes - stats.stale_bytes == len(references) * PAGE
        assert stats.shared_bytes == (references.total() - len(references)) * PAGE
        assert stats.held_bytes <= stats.committed_bytes <= BUDGET_PAGES * PAGE

    @invariant()
    def bytes_agree(self):
        for mirror in self.live:
            for page in np.flatnonzero(mirror.pages >= 0):
                assert (mirror.read(page)[::STRIDE] == mirror.pages[page]).all()
            for pages, array in mirror.views:
                assert (array[:, ::STRIDE] == mirror.pages[pages, None]).all()

    def teardown(self):
        self.store.trim()
        stats = self.store.stats()
        assert stats.stale_bytes == 0
        # Every committed page was just read, so each is mapped.
        if CAN_WEIGH:
            mapped_bytes, n_mappings = weigh(self.store.fd)
            assert mapped_bytes == stats.held_bytes
            assert n_mappings <= stats.n_mappings  # neighbouring windows may merge
        assert stats.held_bytes == stats.committed_bytes
        for mirror in self.live:
            mirror.views.clear()
            mirror.window.close()
        assert self.store.held_bytes == self.store.committed_bytes == 0
        self.store.check()
        self.store.close()


class CopyingMachine(WindowMachine):
    """Past the limit of mappings, sharing copies: all the same."""

    max_mappings = 0


WindowMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
CopyingMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=30)
TestWindows = WindowMachine.TestCase
TestCopyingWindows = CopyingMachine.TestCase
