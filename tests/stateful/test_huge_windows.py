"""Windows whose pages are backed by huge pages: cut, shared and copied in any order.

The machine of test_window_machine works on a few pages, which are never collapsed.  Here the unit
is an eighth of a huge page, so that ranges cross, fill and cut huge pages.
"""

import mmap
import random
import resource

import numpy as np
import pytest

from pagealloc import ExtentStore, Window, huge_page_size_bytes
from pagealloc.core import os_memory

HUGE_BYTES = huge_page_size_bytes()
UNIT_BYTES = HUGE_BYTES // 8
N_UNITS = 32

pytestmark = pytest.mark.skipif(
    HUGE_BYTES > 8 << 20, reason=f"a huge page has {HUGE_BYTES} bytes here: too large to play with"
)


def minor_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def commit_in_huge_pages(window, nbytes):
    """Commit, and skip the test where the kernel gives no huge pages for a memfd."""
    faults_before = minor_faults()
    window.commit(0, nbytes)
    if minor_faults() - faults_before > nbytes // mmap.PAGESIZE // 4:
        window.close()
        pytest.skip("this kernel did not collapse the pages of a memfd into huge pages")


@pytest.fixture
def store():
    with ExtentStore(name="huge-windows") as store:
        yield store
        store.check()


class Twin:
    """A window, and what each of its units should hold (-1: uncommitted)."""

    def __init__(self, store):
        self.window = Window(store, N_UNITS * UNIT_BYTES)
        self.units = np.full(N_UNITS, -1)

    def fill(self, unit, number):
        view = self.window.view(unit * UNIT_BYTES, UNIT_BYTES, writable=True)
        np.frombuffer(view, np.uint8)[:] = number
        self.units[unit] = number

    def check(self):
        self.window.check()
        for unit in np.flatnonzero(self.units >= 0):
            view = self.window.view(int(unit) * UNIT_BYTES, UNIT_BYTES)
            assert (np.frombuffer(view, np.uint8)[::1021] == self.units[unit]).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_random_life(store, seed):
    rng = random.Random(seed)
    twins = [Twin(store) for _ in range(3)]
    for step in range(120):
        twin, other = rng.sample(twins, 2)
        start = rng.randrange(N_UNITS)
        stop = min(start + rng.choice([1, 2, 8, 16, 24]), N_UNITS)
        span = (start * UNIT_BYTES, (stop - start) * UNIT_BYTES)
        part = twin.units[start:stop]
        action = rng.choice(["commit", "commit", "write", "share", "release"])
        if action == "commit":
            twin.window.commit(*span)
            part[part < 0] = 0
        elif action == "write":
            twin.window.make_private(*span)
            for unit in np.flatnonzero(part >= 0) + start:
                twin.fill(int(unit), step % 251)
        elif action == "share":
            twin.window.release(*span)
            twin.window.share_from(other.window, *span)
            part[:] = other.units[start:stop]
        else:
            twin.window.release(*span)
            part[:] = -1
        store.check()
        # What is punched out of a huge page goes back: the kernel splits it.
        assert store.held_bytes == store.committed_bytes
        twin.check()
        other.check()
    for twin in twins:
        twin.window.close()
    assert store.held_bytes == 0


def test_whole_huge_pages_take_few_faults_and_not_one_byte_more(store):
    window = Window(store, 4 * HUGE_BYTES)
    commit_in_huge_pages(window, 4 * HUGE_BYTES)
    assert store.held_bytes == 4 * HUGE_BYTES
    window.close()
    window = Window(store, 4 * HUGE_BYTES)
    window.commit(UNIT_BYTES, HUGE_BYTES)  # no whole huge page among them
    assert store.held_bytes == HUGE_BYTES
    window.close()


def test_the_first_read_of_shared_huge_pages_takes_a_fault_each(store):
    window, child = Window(store, 4 * HUGE_BYTES), Window(store, 4 * HUGE_BYTES)
    commit_in_huge_pages(window, 4 * HUGE_BYTES)
    child.share_from(window, 0, 4 * HUGE_BYTES)
    faults_before = minor_faults()
    np.frombuffer(child.view(0, 4 * HUGE_BYTES), np.uint8)[:: mmap.PAGESIZE].sum()
    assert minor_faults() - faults_before < 64
    child.close()
    window.close()


@pytest.mark.parametrize("step", [1, 3])
def test_a_huge_page_is_collapsed_when_the_last_of_its_pages_comes(store, step):
    commit_in_huge_pages(first := Window(store, HUGE_BYTES), HUGE_BYTES)
    first.close()
    window, child = Window(store, 3 * HUGE_BYTES), Window(store, 3 * HUGE_BYTES)
    for unit in range(0, 24, step):
        window.commit(unit * UNIT_BYTES, step * UNIT_BYTES)
        twin = np.frombuffer(
            window.view(unit * UNIT_BYTES, step * UNIT_BYTES, writable=True), np.uint8
        )
        twin[:] = unit
        del twin
    child.share_from(window, 0, 3 * HUGE_BYTES)
    faults_before = minor_faults()
    seen = np.frombuffer(child.view(0, 3 * HUGE_BYTES), np.uint8)[:: mmap.PAGESIZE].copy()
    assert minor_faults() - faults_before < 64
    units = np.arange(24).repeat(UNIT_BYTES // mmap.PAGESIZE)
    assert (seen == units // step * step).all()
    assert store.held_bytes == store.committed_bytes == 3 * HUGE_BYTES
    child.close()
    window.close()


@pytest.mark.parametrize("skip", range(4))
def test_refused_huge_pages_become_base_pages(store, skip):
    window = Window(store, 2 * HUGE_BYTES)
    with os_memory.refusing("madvise", 22, skip=skip):  # EINVAL, as older kernels say
        window.commit(0, 2 * HUGE_BYTES)
    assert store.held_bytes == store.committed_bytes == 2 * HUGE_BYTES
    np.frombuffer(window.view(0, 2 * HUGE_BYTES, writable=True), np.uint8)[:] = 1
    window.close()
