"""os.fork() while threads change windows: the child reads, changes nothing, and never hangs."""

import faulthandler
import random
import signal
import threading
import time

import numpy as np
import pytest
from stress import in_child, running

from pagealloc.core.extents import ExtentStore
from pagealloc.core.os_memory import page_size_bytes, refusing
from pagealloc.core.window import Window
from pagealloc.errors import ClosedError, ForkedError

PAGE = page_size_bytes()
N_PAGES = 64
N_FORKS = 25


def write(window, offset, nbytes, value):
    window.make_private(offset, nbytes)
    np.frombuffer(window.view(offset, nbytes, writable=True), np.uint8)[:] = value


def read_only(store, windows):
    """What a child may do, and what it may not."""
    for window in windows:
        data = np.frombuffer(window.view(0, N_PAGES * PAGE), np.uint8)
        assert (data == 5).all()
        window.check()
    store.check()
    window = windows[0]
    changes = [
        lambda: window.commit(0, PAGE),
        lambda: window.commit(N_PAGES * PAGE, PAGE),
        lambda: window.release(0, PAGE),
        lambda: window.make_private(0, PAGE),
        lambda: window.share_from(windows[1], 0, PAGE),
        lambda: window.view(0, PAGE, writable=True),
        lambda: Window(store, PAGE),
        store.trim,
    ]
    for change in changes:
        with pytest.raises(ForkedError, match="inherited"):
            change()
    assert store.held_bytes >= N_PAGES * PAGE
    with ExtentStore() as own, Window(own, PAGE) as mine:  # its own are as good as anybody's
        mine.commit(0, PAGE)
        write(mine, 0, PAGE, 1)


def two_windows():
    store = ExtentStore()
    parent, child = Window(store, "8MiB"), Window(store, "8MiB")
    parent.commit(0, N_PAGES * PAGE)
    write(parent, 0, N_PAGES * PAGE, 5)
    child.share_from(parent, 0, N_PAGES * PAGE)
    return store, [parent, child]


def test_a_child_reads_and_changes_nothing():
    store, windows = two_windows()
    before = store.stats()

    def child():
        read_only(store, windows)
        assert in_child(lambda: read_only(store, windows)) == 0  # grandchildren, too
        for window in windows:
            window.close()
            assert window.closed
        store.check()
        store.close()

    assert in_child(child) == 0
    assert store.stats() == before
    for window in windows:
        assert bytes(window.view(0, N_PAGES * PAGE)) == b"\5" * N_PAGES * PAGE
        write(window, 0, PAGE, 6)
    store.check()


def test_a_write_in_the_child_dies_there():
    """NumPy would let it: the kernel does not."""
    _, windows = two_windows()
    windows[0].make_private(0, PAGE)
    array = np.frombuffer(windows[0].view(0, PAGE, writable=True), np.uint8)

    def child():
        faulthandler.disable()
        array[0] = 1

    assert in_child(child) == -signal.SIGSEGV
    assert array[0] == 5


def test_dropping_everything_in_the_child_takes_nothing_from_the_parent():
    store, windows = two_windows()
    held = store.held_bytes

    def child():
        nonlocal store, windows
        del store, windows

    assert in_child(child) == 0
    assert store.held_bytes == held
    assert bytes(windows[1].view(0, PAGE)) == b"\5" * PAGE
    store.check()


def test_a_window_that_cannot_be_protected_is_not_left_writable():
    store, windows = two_windows()
    array = np.frombuffer(windows[0].view(0, PAGE), np.uint8)

    def child():
        faulthandler.disable()
        with pytest.raises(ClosedError):
            windows[0].view(0, PAGE)
        windows[1].close()
        store.check()
        array[0]

    with refusing("mprotect"):
        assert in_child(child) == -signal.SIGSEGV
    assert array[0] == 5
    store.check()


class Load(threading.Thread):
    """Opens, forks, writes and drops windows over a shared prefix until told to stop."""

    def __init__(self, stop, store, prefix, seed):
        super().__init__()
        self.stop, self.store, self.prefix = stop, store, prefix
        self.random = random.Random(seed)
        self.value = seed
        self.n_rounds = 0
        self.failure = None

    def run(self):
        try:
            while not self.stop.is_set():
                self.round()
                self.n_rounds += 1
        except BaseException as failure:  # noqa: BLE001  (the test raises it)
            self.failure = failure

    def round(self):
        window = Window(self.store, "2MiB")
        window.share_from(self.prefix, 0, N_PAGES // 4 * PAGE)
        page = self.random.randrange(N_PAGES // 4)
        write(window, page * PAGE, PAGE, self.value)
        window.commit(N_PAGES // 4 * PAGE, self.random.randrange(1, 8) * PAGE)
        view = np.frombuffer(window.view(0, N_PAGES // 4 * PAGE), np.uint8).reshape(-1, PAGE)
        assert (view[page] == self.value).all()
        assert (np.delete(view, page, axis=0) == 5).all()
        if self.random.random() < 0.5:
            del view
            window.close()


def test_forks_under_load(duration_s):
    store, windows = two_windows()
    stop = threading.Event()
    threads = [Load(stop, store, windows[0], seed) for seed in (11, 12, 13)]
    with running(stop, *threads):
        i = 0
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            i += 1
            assert in_child(lambda: read_only(store, windows)) == 0
            assert store.n_windows >= len(windows)
            store.stats()
            if i % 5 == 0:
                time.sleep(0.01)
    for thread in threads:
        assert thread.failure is None
        assert thread.n_rounds
    threads.clear()
    del thread
    store.check()
    for window in windows:
        assert bytes(window.view(0, N_PAGES * PAGE)) == b"\5" * N_PAGES * PAGE
        window.check()
        window.close()
    assert store.held_bytes == store.committed_bytes == 0
    store.close()


@pytest.mark.fork_under_load
def test_stores_come_and_go_while_others_fork():
    """The registry: stores made and dropped by threads, forks between."""
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            store = ExtentStore()
            window = Window(store, PAGE)
            window.commit(0, PAGE)

    store, windows = two_windows()
    with running(stop, *(threading.Thread(target=come_and_go) for _ in range(2))):
        for _ in range(N_FORKS):
            assert in_child(lambda: read_only(store, windows)) == 0
    store.check()
