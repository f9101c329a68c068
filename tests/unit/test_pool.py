"""Pool: what is reused, what is dropped, what is refused."""

import copy
import gc
import pickle
import random
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest

from pagealloc import Buffer, ClosedError, OutOfMemoryError, PageAllocator, Pool, PoolStats
from pagealloc.core.pool import collect_pools


class Item:
    """An ordinary object: takes attributes and weak references."""


class Bare:
    """An object without weak references."""

    __slots__ = ("pool",)


@pytest.fixture(autouse=True)
def _no_garbage_collection_of_its_own():
    """One in the middle of a test would make what is idle a victim."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def allocator():
    allocator = PageAllocator(backing="base")
    yield allocator
    allocator.check()


@pytest.fixture
def pools():
    """Makes pools that are checked and closed at the end."""
    made = []

    def make(*args, **kwargs):
        made.append(Pool(*args, **kwargs))
        return made[-1]

    yield make
    for pool in made:
        pool.check()
        pool.close()
        pool.check()


def in_thread(work):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def counts(pool):
    """(hits, misses, steals, dropped)."""
    stats = pool.stats()
    return stats.hits, stats.misses, stats.steals, stats.dropped


# --- getting ---


def test_what_was_put_is_got_again(pools):
    pool = pools(Item)
    item = pool.get()
    pool.put(item)
    assert pool.get() is item
    assert counts(pool) == (1, 1, 0, 0)


def test_the_private_item_comes_first_then_the_newest_of_the_shared(pools):
    pool = pools(Item)
    first, second, third = [pool.get() for _ in range(3)]
    for item in (first, second, third):
        pool.put(item)
    assert [pool.get() for _ in range(3)] == [first, third, second]
    assert counts(pool) == (3, 3, 0, 0)


def test_a_private_item_of_another_thread_is_stolen_last(pools):
    pool = pools(Item)
    shared, private = pool.get(), pool.get()

    def put_both():
        pool.put(private)
        pool.put(shared)

    in_thread(put_both)
    assert pool.get() is shared
    assert pool.stats().steals == 0
    assert pool.get() is private
    assert counts(pool) == (2, 2, 1, 0)


def test_each_thread_has_its_own_private_item(pools):
    pool = pools(Item)
    mine, other = pool.get(), pool.get()
    pool.put(mine)

    def use():
        pool.put(other)
        return pool.get() is other

    assert in_thread(use)
    assert pool.get() is mine


def test_threads_that_ended_leave_no_slots_behind(pools):
    pool = pools(Item)
    items = [pool.get() for _ in range(100)]
    barrier = threading.Barrier(len(items))

    def put(item):
        barrier.wait()  # all alive at once: each has a thread id of its own
        pool.put(item)

    threads = [threading.Thread(target=put, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.stats().n_idle == 100
    assert {pool.get() for _ in range(100)} == set(items)
    assert counts(pool) == (100, 100, pool.stats().steals, 0)


# --- Buffers ---


def test_buffers_of_one_length(allocator, pools):
    pool = pools(nbytes="5000", allocator=allocator)
    buffer = pool.get()
    assert isinstance(buffer, Buffer)
    assert (buffer.nbytes, buffer.allocator) == (5000, allocator)
    pool.put(buffer)
    assert pool.get() is buffer
    assert allocator.stats().n_allocs == 1


def test_buffers_come_from_the_default_allocator(pools):
    from pagealloc import default_allocator

    assert pools(nbytes=100).get().allocator is default_allocator()


def test_a_closed_buffer_is_refused(allocator, pools):
    pool = pools(nbytes=5000, allocator=allocator)
    buffer = pool.get()
    buffer.close()
    with pytest.raises(ValueError, match=r"Buffer at 0x\w+ is closed"):
        pool.put(buffer)
    assert pool.stats().n_idle == 0


def test_a_buffer_with_views_is_refused_until_they_are_gone(allocator, pools):
    pool = pools(nbytes=5000, allocator=allocator)
    buffer = pool.get()
    array = np.frombuffer(buffer, np.uint8)
    with pytest.raises(BufferError, match=r"1 view of the Buffer .* drop them"):
        pool.put(buffer)
    del array
    pool.put(buffer)
    assert pool.get() is buffer


def test_views_that_reset_leaves_are_refused(allocator, pools):
    views = []
    pool = pools(nbytes=100, allocator=allocator, reset=lambda b: views.append(memoryview(b)))
    buffer = pool.get()
    with pytest.raises(BufferError):
        pool.put(buffer)
    views.clear()
    with pytest.raises(BufferError):  # out again, hence not "already put"
        pool.put(buffer)
    views.clear()


@pytest.mark.parametrize("misuse", [memoryview, lambda buffer: buffer.close()])
@pytest.mark.parametrize("n_items", [1, 3])
def test_an_idle_buffer_that_somebody_went_on_using_is_not_handed_out(
    allocator, pools, misuse, n_items
):
    pool = pools(nbytes=5000, allocator=allocator)
    buffers = [pool.get() for _ in range(n_items)]
    for buffer in buffers:
        pool.put(buffer)
    held = [misuse(buffer) for buffer in buffers]
    assert pool.get() not in buffers
    assert counts(pool) == (0, n_items + 1, 0, n_items)
    assert pool.stats().idle_bytes == 0
    del held


def test_an_idle_pool_keeps_its_allocator_open(allocator):
    pool = Pool(nbytes=5000, allocator=allocator)
    pool.put(pool.get())
    with pytest.raises(BufferError):
        allocator.close()
    pool.close()
    assert allocator.stats().n_live == 0


def test_a_refusal_of_memory_comes_through(pools):
    with PageAllocator(backing="base", budget_bytes="1MiB") as allocator:
        pool = pools(nbytes="768KiB", allocator=allocator)
        with pool.borrow():
            with pytest.raises(OutOfMemoryError):
                pool.get()
            pool.check()
        assert counts(pool) == (0, 1, 0, 0)
        pool.close()


# --- max_idle_bytes ---


def test_what_is_put_beyond_the_limit_is_dropped_and_closed(allocator, pools):
    pool = pools(nbytes=4096, max_idle_bytes=8192, allocator=allocator)
    buffers = [pool.get() for _ in range(3)]
    for buffer in buffers:
        pool.put(buffer)
    assert [buffer.closed for buffer in buffers] == [False, False, True]
    assert (pool.stats().idle_bytes, pool.stats().dropped) == (8192, 1)
    assert allocator.stats().n_live == 2
    with pytest.raises(ValueError, match="foreign"):
        pool.put(buffers[2])


def test_objects_count_with_nbytes(pools):
    pool = pools(Item, nbytes=10, max_idle_bytes=29)
    items = [pool.get() for _ in range(3)]
    for item in items:
        pool.put(item)
    assert (pool.stats().n_idle, pool.stats().idle_bytes, pool.stats().dropped) == (2, 20, 1)


def test_buffers_that_new_made_count_their_length(allocator, pools):
    pool = pools(lambda: allocator.alloc(5000), nbytes=1)
    pool.put(pool.get())
    assert pool.stats().idle_bytes == 5000


def test_a_limit_of_nothing_keeps_nothing(pools):
    pool = pools(Item, nbytes=1, max_idle_bytes=0)
    pool.put(pool.get())
    assert (pool.stats().n_idle, pool.stats().dropped) == (0, 1)


def test_victims_count_for_the_limit(pools):
    pool = pools(Item, nbytes=10, max_idle_bytes=10)
    first, second = pool.get(), pool.get()
    pool.put(first)
    pool.collect()
    pool.put(second)
    assert pool.stats() == PoolStats(0, 2, 0, 1, n_idle=1, n_victims=1, idle_bytes=10)


# --- reset ---


def test_reset_runs_on_put(pools):
    pool = pools(list, reset=list.clear)
    item = pool.get()
    item.append(1)
    pool.put(item)
    assert item == []
    assert pool.get() is item


def test_an_item_whose_reset_raises_is_dropped(allocator, pools):
    def reset(buffer):
        raise RuntimeError("no reset")

    pool = pools(nbytes=100, reset=reset, allocator=allocator)
    buffer = pool.get()
    with pytest.raises(RuntimeError, match="no reset"):
        pool.put(buffer)
    assert buffer.closed
    assert counts(pool) == (0, 1, 0, 1)
    with pytest.raises(ValueError, match="foreign"):
        pool.put(buffer)


def test_reset_may_use_the_pool(pools):
    others = []

    def reset(item):
        with pytest.raises(ValueError, match="reset is running"):
            pool.put(item)
        if not others:
            others.append(pool.get())
            pool.put(others[0])
            pool.collect()
            pool.check()

    pool = pools(Item, reset=reset)
    item = pool.get()
    pool.put(item)
    assert pool.stats().n_idle == 2
    assert pool.get() is item
    assert pool.get() is others[0]


def test_a_pool_closed_by_reset_lets_the_item_go(allocator):
    pool = Pool(nbytes=100, reset=lambda _: pool.close(), allocator=allocator)
    buffer = pool.get()
    pool.put(buffer)
    assert buffer.closed
    pool.check()


# --- new ---


def test_new_may_raise(pools):
    fail = True

    def new():
        if fail:
            raise RuntimeError("none today")
        return Item()

    pool = pools(new)
    with pytest.raises(RuntimeError, match="none today"):
        pool.get()
    assert counts(pool) == (0, 0, 0, 0)
    fail = False
    assert isinstance(pool.get(), Item)


def test_new_may_use_the_pool(pools):
    depth = 0

    def new():
        nonlocal depth
        depth += 1
        if depth < 3:
            pool.put(pool.get())
        return Item()

    pool = pools(new)
    pool.get()
    # The innermost call's item is put, and so is the one around it.
    assert (pool.stats().misses, pool.stats().n_idle) == (3, 2)


def test_a_pool_closed_by_new(allocator):
    made = []

    def new():
        pool.close()
        made.append(Item())
        return made[0]

    pool = Pool(new)
    with pytest.raises(ClosedError):
        pool.get()
    reference = weakref.ref(made.pop())
    assert reference() is None


def test_new_returns_none(pools):
    pool = pools(lambda: None)
    with pytest.raises(TypeError, match="returned None"):
        pool.get()


@pytest.mark.parametrize("kind", [Item, list])
def test_new_returns_an_idle_item(pools, kind):
    one = kind()
    pool = pools(lambda: one)
    pool.put(pool.get())

    def get_second():
        pool.get()
        return pool.get()

    if kind is Item:
        with pytest.raises(ValueError, match="is an item of this Pool already"):
            get_second()
    else:  # out, and without weak references: might be another list at the address
        assert get_second() is one


def test_new_returns_the_item_that_is_being_reset(pools):
    one = Item()

    def reset(item):
        with pytest.raises(ValueError, match="already"):
            pool.get()

    pool = pools(lambda: one, reset=reset)
    pool.put(pool.get())


# --- foreign and already put ---


@pytest.mark.parametrize("kind", [Item, Bare, list, bytearray])
def test_a_foreign_object_is_refused(pools, kind):
    pool = pools(kind)
    with pytest.raises(ValueError, match=f"the {kind.__name__} at 0x.* foreign"):
        pool.put(kind())
    pool.get()
    with pytest.raises(ValueError, match="foreign"):
        pool.put("a text")
    assert pool.stats().n_idle == 0


def test_a_foreign_buffer_is_refused(allocator, pools):
    pool, other = pools(nbytes=100, allocator=allocator), pools(nbytes=100, allocator=allocator)
    with pytest.raises(ValueError, match="foreign"):
        pool.put(allocator.alloc(100))
    with pytest.raises(ValueError, match="foreign"):
        pool.put(other.get())


@pytest.mark.parametrize("kind", [Item, Bare, list])
@pytest.mark.parametrize("n_others", [0, 2])
def test_an_item_put_twice_is_refused(pools, kind, n_others):
    pool = pools(kind)
    items = [pool.get() for _ in range(n_others + 1)]
    for item in items:
        pool.put(item)
    for collect in (lambda: None, pool.collect):
        collect()
        with pytest.raises(ValueError, match="is in this Pool already"):
            pool.put(items[-1])
    assert pool.stats().n_idle == n_others + 1


def test_an_object_at_the_address_of_a_dead_item_is_foreign(pools):
    pool = pools(Item)
    pool.get()  # dies at once
    address_reused = False
    for _ in range(100):
        item = pool.get()
        address = id(item)
        del item
        other = Item()
        address_reused |= id(other) == address
        with pytest.raises(ValueError, match="foreign"):
            pool.put(other)
        del other
    if not address_reused:
        pytest.skip("no address was used again")


def test_items_that_are_never_put_leave_nothing_behind(pools):
    pool = pools(Item)
    for _ in range(10_000):
        pool.get()
    items = [pool.get() for _ in range(1000)]
    most_nbytes = sys.getsizeof(pool)
    for item in items:
        pool.put(item)
    del items, item
    pool.collect()
    pool.collect()
    assert sys.getsizeof(pool) < most_nbytes < 1000 * 500


@pytest.mark.parametrize("kind", [Item, list])
def test_thousands_of_items_are_told_apart(pools, kind):
    def reset(item):
        if id(item) in refused:
            raise RuntimeError

    rng = random.Random(1)
    pool = pools(kind, reset=reset)
    items = [pool.get() for _ in range(3000)]
    refused = {id(item) for item in rng.sample(items, 1500)}
    rng.shuffle(items)
    for step, item in enumerate(items):
        with pytest.raises(RuntimeError) if id(item) in refused else nullcontext():
            pool.put(item)
        if step % 100 == 0:
            pool.check()
    assert pool.stats().n_idle == pool.stats().dropped == 1500
    for item in items:
        with pytest.raises(ValueError, match="foreign" if id(item) in refused else "already"):
            pool.put(item)


# --- collecting ---


def test_idle_items_survive_one_collection_and_not_two(allocator, pools):
    pool = pools(nbytes=5000, allocator=allocator)
    buffers = [pool.get() for _ in range(3)]
    for buffer in buffers:
        pool.put(buffer)
    assert pool.collect() == 0
    assert pool.stats() == PoolStats(0, 3, 0, 0, n_idle=3, n_victims=3, idle_bytes=15000)
    used = pool.get()
    pool.put(used)  # used in between: no victim any more
    assert pool.collect() == 2
    assert [buffer.closed for buffer in buffers] == [buffer is not used for buffer in buffers]
    assert pool.get() is used
    assert counts(pool) == (2, 3, 0, 2)


def test_a_full_garbage_collection_collects_pools(pools):
    pool = pools(Item)
    pool.put(pool.get())
    for generation in (0, 1):
        gc.collect(generation)
    assert pool.stats().n_victims == 0
    gc.collect()
    assert (pool.stats().n_idle, pool.stats().n_victims) == (1, 1)
    gc.collect()
    assert (pool.stats().n_idle, pool.stats().dropped) == (0, 1)


def test_collect_pools_collects_all(pools):
    two = [pools(Item), pools(list)]
    for pool in two:
        pool.put(pool.get())
    collect_pools()
    assert [pool.stats().n_victims for pool in two] == [1, 1]
    assert collect_pools() >= 2
    assert [pool.stats().n_idle for pool in two] == [0, 0]


def test_destructors_may_use_the_pool(pools):
    n_calls = 0

    class Loud:
        def __del__(self):
            nonlocal n_calls
            n_calls += 1
            pool.check()
            if n_calls < 30:  # what it makes dies in turn
                pool.put(pool.get())
                pool.collect()
                pool.check()

    pool = pools(Loud, nbytes=1, max_idle_bytes=3)
    for _ in range(3):
        items = [pool.get() for _ in range(5)]
        while items:
            pool.put(items.pop())
        pool.collect()
        pool.collect()
    assert n_calls > 10
    n_calls = 30


@pytest.mark.parametrize("kind", [Item, Bare])
def test_items_that_refer_to_their_pool_are_garbage_with_it(kind):
    pool = Pool(kind)
    items = [pool.get() for _ in range(3)]
    for item in items:
        item.pool = pool
        pool.put(item)
    reference = weakref.ref(pool)
    del pool, item, items
    gc.collect()
    assert reference() is None


# --- borrow ---


def test_borrow_puts_at_the_end_of_the_block(pools):
    pool = pools(Item)
    with pool.borrow() as item:
        assert pool.stats().n_idle == 0
    assert pool.get() is item


def test_borrow_puts_when_the_block_raises(pools):
    pool = pools(Item)
    with pytest.raises(KeyError), pool.borrow():
        raise KeyError
    assert pool.stats().n_idle == 1


def test_a_borrow_may_be_entered_again_but_not_twice_at_once(pools):
    pool = pools(Item)
    borrow = pool.borrow()
    for _ in range(2):
        with borrow, pytest.raises(ValueError, match="in use"):
            borrow.__enter__()
    assert counts(pool) == (1, 1, 0, 0)


def test_borrow_with_views_left(allocator, pools):
    pool = pools(nbytes=100, allocator=allocator)
    with pytest.raises(BufferError), pool.borrow() as buffer:
        view = memoryview(buffer)
    held = []
    with pytest.raises(KeyError), pool.borrow() as other:
        raise KeyError(held.append(memoryview(other)))
    view.release()
    held.pop().release()
    pool.put(buffer)
    pool.put(other)


def test_borrow_from_a_pool_closed_meanwhile(allocator):
    pool = Pool(nbytes=100, allocator=allocator)
    with pool.borrow() as buffer:
        pool.close()
    assert buffer.closed


# --- closing ---


def test_close_drops_everything(allocator):
    with Pool(nbytes=100, allocator=allocator) as pool:
        assert not pool.closed
        out, *idle = [pool.get() for _ in range(4)]
        pool.put(idle[0])
        pool.collect()
        pool.put(idle[1])
        pool.put(idle[2])
    assert pool.closed
    assert [buffer.closed for buffer in idle] == [True] * 3
    assert pool.stats() == PoolStats(0, 4, 0, 3, n_idle=0, n_victims=0, idle_bytes=0)
    memoryview(out)[:] = bytes(100)  # still its user's
    for use in (pool.get, pool.borrow().__enter__, pool.__enter__):
        with pytest.raises(ClosedError):
            use()
    for item in (out, idle[0]):
        with pytest.raises(ClosedError):
            pool.put(item)
    pool.close()
    assert pool.collect() == 0
    assert "closed" in repr(pool)
    pool.check()


def test_a_dying_pool_gives_its_buffers_back(allocator):
    pool = Pool(nbytes=100, allocator=allocator)
    pool.put(pool.get())
    del pool
    assert allocator.stats().n_live == 0


# --- what cannot be made ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "needs new="),
        ({"new": 3}, TypeError, "new must be callable, not int"),
        ({"new": list, "reset": 3}, TypeError, "reset must be callable, not int"),
        ({"nbytes": 0}, ValueError, "too small"),
        ({"nbytes": "much"}, ValueError, "not a size"),
        ({"nbytes": 1, "max_idle_bytes": -1}, ValueError, "max_idle_bytes=-1 is too small"),
        ({"new": list, "max_idle_bytes": 1}, ValueError, "needs nbytes="),
        ({"nbytes": 1, "allocator": 3}, TypeError, "must be a PageAllocator, not int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Pool(**arguments)


def test_an_allocator_that_would_not_be_used(allocator):
    with pytest.raises(ValueError, match="let new allocate from it"):
        Pool(list, allocator=allocator)


def test_neither_made_again_nor_copied(pools):
    pool = pools(list)
    with pytest.raises(TypeError, match="made already"):
        pool.__init__(list)
    for thing in (pool, pool.borrow()):
        for action in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="no copy, no pickle"):
                action(thing)


def test_a_pool_and_a_borrow_without_init_crash_nothing():
    pool = Pool.__new__(Pool)
    for use in (pool.get, lambda: pool.put([]), pool.borrow().__enter__):
        with pytest.raises(ClosedError):
            use()
    pool.collect()
    pool.close()
    pool.check()
    borrow = type(pool.borrow())
    with pytest.raises(TypeError, match="borrow"):
        borrow()
    with pytest.raises(TypeError, match="borrow"):
        borrow.__new__(borrow).__enter__()


def test_repr(pools):
    pool = pools(Item, nbytes="1KiB")
    pool.put(pool.get())
    assert repr(pool) == "<Pool with 1 idle item of 1.00 KiB>"
    assert Pool[Item].__origin__ is Pool
