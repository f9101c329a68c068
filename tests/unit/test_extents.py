"""ExtentStore: budget, reuse of file offsets, refused punches, life and death."""

import copy
import errno
import gc
import itertools
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pagealloc.core.extents import ExtentStore
from pagealloc.core.os_memory import (
    call_counts,
    huge_page_size_bytes,
    page_size_bytes,
    refusing,
)
from pagealloc.core.window import Window
from pagealloc.errors import ClosedError, OutOfMemoryError

PAGE = page_size_bytes()


def maps_of(name):
    lines = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    return [line for line in lines if f"/memfd:{name} " in line]


def n_open_files():
    gc.collect()  # what an earlier test left to be closed
    return len(list(Path("/proc/self/fd").iterdir()))


# --- numbers ---


def test_a_new_store_holds_nothing():
    with ExtentStore(name="fresh") as store:
        assert store.page_bytes == PAGE
        assert store.budget_bytes is None
        assert store.stats() == (PAGE, None, 0, 0, 0, 0, 0, 0)
        store.check()


def test_numbers_follow_pages():
    store = ExtentStore()
    first, second = Window(store, "4MiB"), Window(store, "4MiB")
    first.commit(0, 8 * PAGE)
    second.share_from(first, 0, 8 * PAGE)
    second.commit(8 * PAGE, 1)
    stats = store.stats()
    assert stats.committed_bytes == stats.held_bytes == 9 * PAGE
    assert stats.shared_bytes == 8 * PAGE
    assert stats.n_windows == 2
    assert (store.committed_bytes, store.held_bytes, store.shared_bytes) == stats[2:5]
    second.make_private(0, PAGE)
    assert (store.committed_bytes, store.shared_bytes) == (10 * PAGE, 7 * PAGE)
    store.check()


def test_mappings_are_counted_as_the_kernel_counts_them():
    store = ExtentStore(name="counted")
    first, second = Window(store, "4MiB"), Window(store, "4MiB")
    assert store.n_mappings == len(maps_of("counted")) == 2
    first.commit(0, 16 * PAGE)
    second.share_from(first, 2 * PAGE, 4 * PAGE)  # own, shared, own
    second.share_from(first, 6 * PAGE, 2 * PAGE)  # longer, not more
    assert store.n_mappings == len(maps_of("counted")) == 4
    second.make_private(4 * PAGE, PAGE)
    assert store.n_mappings == len(maps_of("counted")) == 6
    second.make_private(0, 16 * PAGE)
    assert store.n_mappings == len(maps_of("counted")) == 2
    store.check()


def test_repr_says_how_much():
    store = ExtentStore(budget_bytes="64MiB", name="shown")
    window = Window(store, PAGE)
    assert "'shown': 0 B of 64.0 MiB committed" in repr(store)
    assert "1 windows" in repr(store)
    window.close()
    store.close()
    assert repr(store) == "<ExtentStore 'shown': closed>"


def test_the_file_is_private_to_its_user_and_closed_on_exec():
    store = ExtentStore(name="private file")
    assert stat.S_IMODE(os.fstat(store.fd).st_mode) == 0o600
    assert not os.get_inheritable(store.fd)
    window = Window(store, PAGE)
    assert maps_of("private file")
    window.close()


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"budget_bytes": "much"}, ValueError),
        ({"budget_bytes": -1}, ValueError),
        ({"budget_bytes": 1.5}, TypeError),
        ({"name": "a\0b"}, ValueError),
        ({"name": "x" * 300}, ValueError),
        ({"name": b"bytes"}, TypeError),
        ({"max_mappings": -1}, ValueError),
        ({"max_mappings": "many"}, TypeError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        ExtentStore(**arguments)


@pytest.mark.parametrize("change", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_store_cannot_be_pickled_or_copied(change):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        change(ExtentStore())


# --- the budget ---


def test_the_budget_is_hard_and_the_store_stays_usable():
    store = ExtentStore(budget_bytes=10 * PAGE + 1)
    assert store.budget_bytes == 10 * PAGE
    first, second = Window(store, "2MiB"), Window(store, "2MiB")
    first.commit(0, 8 * PAGE)
    with pytest.raises(OutOfMemoryError, match=r"budget of .* has .* committed; close windows"):
        second.commit(0, 3 * PAGE)
    assert second.runs() == []
    second.share_from(first, 0, 8 * PAGE)  # costs nothing
    with pytest.raises(OutOfMemoryError, match="budget"):
        second.make_private(0, 3 * PAGE)
    assert not second.is_private(0, PAGE)
    second.make_private(0, 2 * PAGE)
    assert store.committed_bytes == store.held_bytes == 10 * PAGE
    first.close()
    second.commit(0, 10 * PAGE)
    assert store.committed_bytes == store.held_bytes == 10 * PAGE
    store.check()


# --- file offsets ---


def test_closed_windows_leave_their_file_offsets_to_others():
    store = ExtentStore()
    for nbytes in ("2MiB", "5MiB", "8MiB", "6MiB") * 25:
        window = Window(store, nbytes)
        window.commit(0, PAGE)
        window.close()
    assert os.fstat(store.fd).st_size <= 4 * max(8 << 20, huge_page_size_bytes())
    assert store.held_bytes == 0
    store.check()


def test_offsets_wait_for_the_last_window_that_maps_them():
    store = ExtentStore()
    first, second = Window(store, "2MiB"), Window(store, "2MiB")
    first.commit(0, 3 * PAGE)
    second.share_from(first, 0, 3 * PAGE)
    [shared] = second.runs()
    first.close()
    third = Window(store, "2MiB")
    third.commit(0, PAGE)
    assert third.runs()[0].file_offset != shared.file_offset
    second.close()
    length = os.fstat(store.fd).st_size
    others = [Window(store, "2MiB"), Window(store, "2MiB")]
    assert os.fstat(store.fd).st_size == length
    for other in others:
        other.commit(0, PAGE)
    assert shared.file_offset in {other.runs()[0].file_offset for other in others}
    store.check()


def test_a_stray_page_in_a_hole_goes_with_its_window():
    store = ExtentStore()
    window = Window(store, "2MiB")
    np.frombuffer(window.view(0, PAGE, holes="allowed"), np.uint8).sum()
    assert (store.committed_bytes, store.held_bytes) == (0, PAGE)
    store.check()
    window.close()
    assert store.held_bytes == 0


# --- refusals ---


def test_pages_the_kernel_does_not_take_back_are_stale_until_it_does():
    store = ExtentStore(budget_bytes=8 * PAGE)
    window = Window(store, "2MiB")
    window.commit(0, 6 * PAGE)
    np.frombuffer(window.view(0, 6 * PAGE, writable=True), np.uint8)[:] = 7
    with refusing("fallocate"):
        window.release(0, 6 * PAGE)
        assert window.committed_bytes == 0
        assert store.stale_bytes == store.committed_bytes == store.held_bytes == 6 * PAGE
        store.check()
        with pytest.raises(OutOfMemoryError, match="budget"):
            window.commit(0, 3 * PAGE)
        assert store.trim() == 0
    with refusing("fallocate", times=1):
        window.commit(0, 2 * PAGE)  # elsewhere: stale pages are not handed out
    assert store.stale_bytes == 6 * PAGE
    assert not np.frombuffer(window.view(0, 2 * PAGE), np.uint8).any()
    store.check()
    assert store.trim() == 6 * PAGE
    assert store.stale_bytes == 0
    assert store.committed_bytes == store.held_bytes == 2 * PAGE
    store.check()


@pytest.mark.parametrize("retry", ["commit", "release", "close"])
def test_stale_pages_are_punched_by_the_next_change(retry):
    store = ExtentStore()
    window, other = Window(store, "2MiB"), Window(store, "2MiB")
    window.commit(0, 6 * PAGE)
    other.commit(0, PAGE)
    with refusing("fallocate"):
        window.release(PAGE, 2 * PAGE)
        window.release(4 * PAGE, PAGE)
    assert store.stale_bytes == 3 * PAGE
    if retry == "commit":
        other.commit(PAGE, PAGE)
    elif retry == "release":
        other.release(0, PAGE)
    else:
        window.close()
        store.trim()
    assert store.stale_bytes == 0
    assert store.committed_bytes == store.held_bytes
    store.check()


@pytest.mark.parametrize(
    ("call", "error"),
    [("memfd_create", errno.ENOMEM), ("memfd_create", errno.EMFILE), ("fchmod", errno.EPERM)],
)
def test_a_refused_file_leaves_nothing_open(call, error):
    before = n_open_files()
    with refusing(call, error), pytest.raises((OutOfMemoryError, OSError), match="kernel refused"):
        ExtentStore()
    assert n_open_files() == before


def test_a_window_that_cannot_be_unmapped_is_unmapped_later():
    store = ExtentStore(name="abandoned")
    window = Window(store, "2MiB")
    window.commit(0, 4 * PAGE)
    with refusing("munmap"):
        with pytest.raises(OutOfMemoryError, match="close"):
            window.close()
        assert not window.closed
        window.check()
        del window
        assert store.n_windows == 0
        assert store.held_bytes == 4 * PAGE
        store.check()
        with pytest.raises(OutOfMemoryError, match="nobody refers to"):
            store.close()
    assert store.trim() == 4 * PAGE
    assert (store.n_mappings, store.held_bytes, maps_of("abandoned")) == (0, 0, [])
    store.check()
    store.close()


def test_numbers_without_fstat():
    store = ExtentStore()
    with refusing("fstat", errno.EIO):
        with pytest.raises(OSError, match="refused to say"):
            _ = store.held_bytes
        store.check()


# --- life and death ---


def test_close_wants_closed_windows():
    store = ExtentStore()
    window = Window(store, PAGE)
    with pytest.raises(BufferError, match="1 open windows"):
        store.close()
    window.close()
    store.close()
    store.close()
    assert store.closed
    assert store.fd == -1
    assert (store.committed_bytes, store.held_bytes, store.shared_bytes) == (0, 0, 0)
    store.check()
    for use in (store.trim, store.stats, lambda: Window(store, PAGE)):
        with pytest.raises(ClosedError, match="closed"):
            use()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_death(order):
    files = n_open_files()
    store = ExtentStore(name="mortal")
    first, second = Window(store, "2MiB"), Window(store, "2MiB")
    first.commit(0, 2 * PAGE)
    second.share_from(first, 0, 2 * PAGE)
    alive = [store, first, second, np.frombuffer(second.view(0, PAGE), np.uint8)]
    del store, first, second
    for i in order:
        alive[i] = None
    assert maps_of("mortal") == []
    assert n_open_files() == files


def test_with_closes_window_and_store():
    with ExtentStore() as store, Window(store, PAGE) as window:
        window.commit(0, 1)
    assert window.closed
    assert store.closed


@pytest.mark.parametrize("end", ["pass", "sys.exit()", "os._exit(0)", "gc.collect(); keep = None"])
def test_interpreter_exit_with_everything_alive(end):
    program = f"""
import gc, os, sys
from pagealloc.core.extents import ExtentStore
from pagealloc.core.window import Window
store = ExtentStore()
window, other = Window(store, "2MiB"), Window(store, "2MiB")
window.commit(0, {PAGE})
other.share_from(window, 0, {PAGE})
keep = memoryview(window.view(0, {PAGE}))
keep_cycle = [keep]; keep_cycle.append(keep_cycle)
{end}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_what_is_committed_already_makes_no_kernel_call():
    store = ExtentStore()
    window = Window(store, "2MiB")
    window.commit(0, 4 * PAGE)
    before = call_counts()
    window.commit(PAGE, PAGE)
    window.make_private(0, 4 * PAGE)
    window.view(0, PAGE, writable=True)
    assert call_counts() == before
