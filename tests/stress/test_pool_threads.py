"""Threads that share a pool: no item is ever with two of them; and forks among them."""

import gc
import random
import threading
import time

import numpy as np
import pytest
from stress import in_child, running

from pagealloc import ClosedError, PageAllocator, Pool

N_THREADS = 4


class Item:
    """An item that knows who has it."""

    owner = None


def use(pool, seed, stop, failures, n_gets):
    rng = random.Random(seed)
    mine, n = [], 0
    try:
        while not stop.is_set():
            if len(mine) < 5 and rng.random() < 0.5:
                item = pool.get()
                n += 1
                assert item.owner is None
                item.owner = seed
                mine.append(item)
            elif mine:
                item = mine.pop(rng.randrange(len(mine)))
                assert item.owner == seed
                if rng.random() < 0.95:  # else it is lost
                    pool.put(item)
            if rng.random() < 0.01:
                with pytest.raises(ValueError, match="foreign"):
                    pool.put(Item())
    except BaseException as error:
        failures.append(error)
        raise
    n_gets.append(n)


def reset_slowly(item):
    """Let others run in the middle of a put."""
    time.sleep(0)
    item.owner = None


def run(pool, meanwhile, seconds):
    stop, failures, n_gets = threading.Event(), [], []
    threads = [
        threading.Thread(target=use, args=(pool, seed, stop, failures, n_gets))
        for seed in range(N_THREADS)
    ]
    with running(stop, *threads):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not failures:
            meanwhile()
    assert not failures
    pool.check()
    stats = pool.stats()
    assert stats.hits + stats.misses == sum(n_gets)


def test_no_item_is_with_two_threads(duration_s):
    pool = Pool(Item, reset=reset_slowly, nbytes=1, max_idle_bytes=8)

    def meanwhile():
        pool.check()
        random.choice([pool.collect, pool.stats, gc.collect])()
        time.sleep(0.001)

    run(pool, meanwhile, duration_s)
    assert pool.stats().hits > 0


def test_threads_that_come_and_go():
    pool = Pool(nbytes=4096, allocator=PageAllocator(backing="base"))

    def work():
        for _ in range(20):
            with pool.borrow() as first, pool.borrow() as second:
                np.frombuffer(first, np.uint8)[:] = 1
                np.frombuffer(second, np.uint8)[:] = 2
                assert (np.frombuffer(first, np.uint8) == 1).all()

    for _ in range(100):
        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    pool.check()
    stats = pool.stats()
    assert stats.hits + stats.misses == 100 * 5 * 20 * 2
    assert stats.misses <= 10  # never more than are in use at once
    pool.close()


def test_a_pool_is_closed_while_threads_use_it():
    for _ in range(100):
        allocator = PageAllocator(backing="base", arena_bytes="2MiB")
        pool = Pool(nbytes=4096, allocator=allocator, reset=lambda _: time.sleep(0))
        failures = []

        def work(pool=pool, failures=failures):
            try:
                while True:
                    with pool.borrow(), pool.borrow():
                        pass
            except ClosedError:
                pass
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        pool.close()
        for thread in threads:
            thread.join()
        assert not failures
        pool.check()
        assert allocator.stats().n_live == 0
        allocator.close()


def test_a_child_has_the_items_private_to_the_parent_s_threads():
    pool = Pool(nbytes=4096, allocator=PageAllocator(backing="base"))
    buffers = [pool.get() for _ in range(3)]
    put, end = threading.Barrier(4), threading.Event()

    def hold(buffer):
        memoryview(buffer)[:1] = b"x"
        pool.put(buffer)
        put.wait()
        end.wait()

    def work():
        got = [pool.get() for _ in range(3)]
        assert set(got) == set(buffers)
        assert all(bytes(memoryview(buffer)[:1]) == b"x" for buffer in got)
        assert pool.stats().steals == 3
        for buffer in got:
            memoryview(buffer)[:1] = b"y"  # copy on write: the parent must not see it
            pool.put(buffer)
        pool.check()
        pool.close()

    with running(end, *(threading.Thread(target=hold, args=(buffer,)) for buffer in buffers)):
        put.wait()
        assert in_child(work) == 0
    assert {bytes(memoryview(pool.get())[:1]) for _ in range(3)} == {b"x"}
    assert pool.stats().misses == 3


@pytest.mark.fork_under_load
def test_a_child_forked_under_load_can_use_the_pool(duration_s):
    pool = Pool(Item, reset=reset_slowly)

    def work():
        pool.check()
        for _ in range(100):
            pool.put(pool.get())
        pool.collect()
        pool.check()
        pool.close()

    def meanwhile():
        assert in_child(work) == 0

    run(pool, meanwhile, duration_s)
