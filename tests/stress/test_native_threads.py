"""Native threads, without the GIL, on the allocator: churn, double frees, refusals, forks.

Each block is stamped, and verified before it is freed, so that one which is handed out twice shows.
"""

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import native
import pytest
from stress import assert_nothing_is_left, in_child, running

from pagealloc import PageAllocator
from pagealloc.core.os_memory import page_size_bytes
from pagealloc.errors import InvariantError

HERE = Path(__file__).resolve().parent
N_TAGS = 254  # so many threads' caches have a tag of their own; those of further ones share


@pytest.fixture(scope="module")
def native_churn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native_churn")
    native.compile_c(HERE / "native_churn.c", "native_churn", folder, PAGE_BYTES=page_size_bytes())
    return native.load("native_churn", folder)


@pytest.fixture
def allocator():
    return PageAllocator(backing="base", arena_bytes="4MiB")


@contextmanager
def meddling(allocator, calls=("trim", "collect", "stats", "check"), pause_s=0.001):
    """Another thread that looks into every thread's magazines all the time."""
    stop, failures = threading.Event(), []
    rng = random.Random(1)

    def meddle():
        try:
            while not stop.wait(pause_s):
                with suppress(InvariantError):  # check() is exact only when the others are done
                    getattr(allocator, rng.choice(calls))()
        except BaseException as error:
            failures.append(error)
            raise

    with running(stop, threading.Thread(target=meddle)):
        yield
    assert not failures


def in_thread(function, *args, **keywords):
    """The result of a call in a thread that is gone when it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **keywords)))
    thread.start()
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.0001)  # Python is done with it, its thread-local storage may not be
    (result,) = results
    return result


def assert_all_was_counted(allocator, report):
    stats = allocator.stats()
    assert report["n_refused"] == stats.n_failed == 0
    assert (stats.n_allocs, stats.n_frees) == (report["n_blocks"], report["n_blocks"])
    assert stats.n_live == 0


# --- churn ---


def test_threads_pass_blocks_while_others_come_and_go(native_churn, allocator, duration_s):
    n_conflicts = allocator.stats().n_conflicts
    with meddling(allocator):
        report = native_churn.churn(allocator, duration_s, n_short=300)
    assert report["n_threads"] > 300
    assert report["n_passed"] > 0
    assert_all_was_counted(allocator, report)
    assert allocator.stats().n_conflicts == n_conflicts
    assert_nothing_is_left(allocator)


def test_small_blocks_alone_undisturbed(native_churn, allocator, duration_s):
    """The magazines' own ways, which trim() all the time would cut short."""
    report = native_churn.churn(allocator, duration_s, n_threads=3, max_bytes=512, seed=2)
    assert_all_was_counted(allocator, report)
    assert_nothing_is_left(allocator)


def test_more_threads_than_tags(native_churn, allocator, duration_s):
    with meddling(allocator, pause_s=0.02):
        report = native_churn.churn(
            allocator,
            duration_s,
            n_threads=N_TAGS + 50,
            max_bytes=64 << 10,
            held_bytes=256 << 10,
            seed=3,
        )
    assert_all_was_counted(allocator, report)
    assert_nothing_is_left(allocator)


def test_a_small_budget_refuses_and_loses_nothing(native_churn, duration_s):
    allocator = PageAllocator(backing="base", arena_bytes="4MiB", budget_bytes="8MiB")
    with meddling(allocator, calls=("collect", "stats")):
        report = native_churn.churn(
            allocator, duration_s, n_short=40, max_bytes=2 << 20, held_bytes=8 << 20, seed=4
        )
    stats = allocator.stats()
    assert report["n_refused"] == stats.n_failed > 0
    assert stats.n_live == 0
    # All of the budget is to be had again.
    native_churn.release(allocator, native_churn.hold(allocator, 100, 4096, 1))
    allocator.alloc("8MiB").close()
    assert_nothing_is_left(allocator)


def test_what_a_thread_leaves_behind_serves_the_next(allocator):
    """Of runs, which come one by one and not in batches: the very same."""

    def use():
        with ExitStack() as stack:
            return {stack.enter_context(allocator.alloc(50_000)).address for _ in range(20)}

    addresses = in_thread(use)
    for _ in range(N_TAGS + 10):
        assert in_thread(use) == addresses
    assert_nothing_is_left(allocator)


# --- double frees ---


@pytest.mark.parametrize("n_bystanders", [0, N_TAGS])
def test_a_second_free_is_refused_in_whatever_thread(native_churn, allocator, n_bystanders):
    end = threading.Event()
    with running(end, *holders_of_caches(n_bystanders, allocator, end)):
        for seed in range(5):
            for release in (
                native_churn.release,
                lambda *args: in_thread(native_churn.release, *args),
            ):
                records = native_churn.hold(allocator, 300, 2 << 20, 2 * seed)
                kept = native_churn.hold(allocator, 300, 64 << 10, 2 * seed + 1)
                release(allocator, records)
                for meanwhile in (lambda: None, allocator.collect, allocator.trim):
                    meanwhile()
                    assert native_churn.free_again(allocator, records) == 0
                    assert in_thread(native_churn.free_again, allocator, records) == 0
                native_churn.release(allocator, kept)
                allocator.check()
    assert_nothing_is_left(allocator)


def holders_of_caches(n_threads, allocator, end):
    def hold_a_cache():
        allocator.alloc(64).close()
        end.wait()

    return [threading.Thread(target=hold_a_cache) for _ in range(n_threads)]


@pytest.mark.parametrize("owner", ["OWNER_RACES", "OWNER_WATCHES", "OWNER_IS_DEAD"])
def test_blocks_freed_twice_in_one_instant_have_one_owner(
    native_churn, allocator, duration_s, owner
):
    n_conflicts = allocator.stats().n_conflicts
    with meddling(allocator):
        report = native_churn.race(allocator, duration_s, getattr(native_churn, owner))
    allocator.trim()  # whoever was told so in vain finds out now
    n_in_vain = report["n_told_freed"] - report["n_raced"]
    assert allocator.stats().n_conflicts - n_conflicts == n_in_vain
    assert_nothing_is_left(allocator)


def test_of_blocks_without_an_owner_one_free_wins(native_churn, allocator, duration_s):
    report = native_churn.race(
        allocator, duration_s, native_churn.OWNER_WATCHES, n_bystanders=N_TAGS
    )
    assert report["n_told_freed"] == report["n_raced"] > 0
    assert_nothing_is_left(allocator)


# --- other circumstances ---


@pytest.mark.fork_under_load
def test_a_child_forked_under_load_allocates_frees_and_checks(native_churn, allocator, duration_s):
    kept = native_churn.hold(allocator, 200, 2 << 20, 5)
    kept += in_thread(native_churn.hold, allocator, 200, 64 << 10, 6)
    reports = []
    churning = threading.Thread(
        target=lambda: reports.append(
            native_churn.churn(allocator, duration_s, n_short=40, max_bytes=1 << 20, seed=7)
        )
    )

    def work():
        n_live = allocator.stats().n_live
        allocator.check()
        native_churn.release(allocator, kept)
        native_churn.churn(allocator, 0.005, n_threads=2, n_short=8, seed=8)
        allocator.check()
        allocator.trim()
        allocator.check()
        assert allocator.stats().n_live == n_live - 400

    churning.start()
    n_forks = 0
    while churning.is_alive() or n_forks == 0:
        assert in_child(work) == 0
        native_churn.verify(allocator, kept)
        n_forks += 1
    churning.join()
    assert reports
    native_churn.release(allocator, kept)
    assert_nothing_is_left(allocator)


def address_space_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.fork_under_load
def test_a_child_drops_the_caches_of_threads_that_it_has_not(allocator):
    end, n_threads = threading.Event(), 50

    def work():
        before = address_space_bytes()
        allocator.trim()
        # Each takes half a megabyte, and would go on to have a tag.
        assert before - address_space_bytes() > n_threads * 250_000

    with running(end, *holders_of_caches(n_threads, allocator, end)):
        allocator.trim()  # so that the child's has nothing to do but that
        assert in_child(work) == 0
    assert_nothing_is_left(allocator)


@pytest.mark.skipif("PAGEALLOC_BARRIER" in os.environ, reason="this is the run without membarrier")
def test_all_of_this_without_membarrier(request, duration_s):
    """As in a kernel without it: the tests above, in a process that is told to do without."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-m", request.config.getoption("markexpr"), f"--minutes={duration_s / 60}"),
            __file__,
        ],
        cwd=request.config.rootpath,
        env={**os.environ, "PAGEALLOC_BARRIER": "0"},
        check=True,
    )
