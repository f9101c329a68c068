"""NumPy's handler over an allocator: switching, lifetimes, the four functions, and misuse."""

import asyncio
import contextvars
import copy
import ctypes
import gc
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stress import in_child

import pagealloc
from pagealloc import ClosedError, PageAllocator
from pagealloc.core.heap_owner import alloc_address, free_address

PAGE_BYTES = pagealloc.page_size_bytes()
MIB = 1 << 20


def handler_name(array=None):
    try:
        from numpy._core.multiarray import get_handler_name
    except ImportError:  # NumPy 1.26
        from numpy.core.multiarray import get_handler_name
    return get_handler_name() if array is None else get_handler_name(array)


@pytest.fixture
def allocator():
    """Closed at the end: whatever a test leaves alive or installed fails it."""
    with PageAllocator(backing="base") as allocator:
        yield allocator
        gc.collect()
        if not allocator.closed:
            allocator.check()


@pytest.fixture
def handler(allocator):
    return pagealloc.numpy_handler(allocator)


# --- switching ---


def test_arrays_made_in_the_block_are_the_allocator_s(allocator, handler):
    before = np.ones(100)
    with handler:
        assert handler.active
        assert handler_name() == "pagealloc"
        inside = np.ones(100)
    assert not handler.active
    assert handler_name(inside) == "pagealloc"
    assert handler_name(before) == handler_name(np.ones(100)) == handler_name() != "pagealloc"
    assert allocator.stats().n_live == 1
    del inside
    assert allocator.stats().n_live == 0


def test_of_an_allocator_there_is_one_handler_while_it_is_in_use(allocator):
    handler = pagealloc.numpy_handler(allocator)
    assert pagealloc.numpy_handler(allocator) is handler
    assert handler.allocator is allocator
    pagealloc.numpy_handler(allocator).install()
    del handler
    pagealloc.numpy_handler(allocator).uninstall()
    with PageAllocator(backing="base") as other:
        assert pagealloc.numpy_handler(other).allocator is other


def test_no_allocator_means_the_default_one():
    assert pagealloc.numpy_handler().allocator is pagealloc.default_allocator()


def test_blocks_nest(handler):
    with PageAllocator(backing="base") as other:
        inner = pagealloc.numpy_handler(other)
        with handler as entered:
            assert entered is handler
            with inner, handler, inner:
                assert inner.active
            assert handler.active
            with handler:
                assert handler.active
            assert handler.active
        assert handler_name() != "pagealloc"


def test_an_exception_leaves_the_block_restored(allocator, handler):
    with pytest.raises(ZeroDivisionError), handler:
        np.ones(10)[0] = 1 // 0
    assert not handler.active
    assert allocator.stats().n_live == 0


def test_install_and_uninstall(handler):
    handler.install()
    handler.install()  # once
    assert handler_name(np.empty(1)) == "pagealloc"
    handler.uninstall()
    assert not handler.active
    with pytest.raises(RuntimeError, match="installed last"):
        handler.uninstall()


def test_uninstall_goes_in_the_reverse_order(handler):
    with PageAllocator(backing="base") as other:
        second = pagealloc.numpy_handler(other)
        handler.install()
        second.install()
        with pytest.raises(RuntimeError, match="reverse order"):
            handler.uninstall()
        assert second.active
        second.uninstall()
        assert handler.active
        handler.uninstall()


def test_a_block_is_not_uninstalled(handler):
    with handler:
        with pytest.raises(RuntimeError, match="installed last"):
            handler.uninstall()
        assert handler.active


def test_what_is_installed_in_a_block_ends_with_it(handler):
    with PageAllocator(backing="base") as other:
        second = pagealloc.numpy_handler(other)
        with handler:
            second.install()
            handler.install()
        assert handler_name() != "pagealloc"
        with pytest.raises(RuntimeError, match="installed last"):
            second.uninstall()


def test_blocks_of_generators_need_not_end_inside_out(handler):
    def block():
        with handler:
            yield

    with PageAllocator(backing="base") as other:
        second, third = pagealloc.numpy_handler(other), pagealloc.numpy_handler()
        generator = block()
        next(generator)
        with second:
            third.install()
            generator.close()
            assert third.active
            third.uninstall()
            assert second.active
    assert handler_name() != "pagealloc"


def test_a_block_ends_in_the_context_in_which_it_began(handler):
    with handler, pytest.raises(RuntimeError, match="not entered in this context"):
        contextvars.Context().run(handler.__exit__, None, None, None)
    assert not handler.active


# --- contexts ---


def test_a_new_thread_starts_with_numpy_s_own(handler):
    with handler, ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler_name).result() != "pagealloc"
        copied = contextvars.copy_context()
        assert pool.submit(copied.run, handler_name).result() == "pagealloc"
        assert pool.submit(handler_name).result() != "pagealloc"
    del copied


def test_install_as_the_initializer_of_a_pool(allocator, handler):
    with ThreadPoolExecutor(4, initializer=handler.install) as pool:
        arrays = list(pool.map(lambda n: np.full(n, n), range(1, 200)))
        assert handler_name() != "pagealloc"
    assert {handler_name(array) for array in arrays} == {"pagealloc"}
    assert all((array == n).all() for n, array in enumerate(arrays, 1))
    del arrays
    assert allocator.stats().n_live == 0  # and with the threads the contexts have gone


def test_tasks_of_asyncio_are_apart(allocator, handler):
    async def inside(started, go_on):
        with handler:
            started.set()
            await go_on.wait()
            return handler_name()

    async def outside(started, go_on):
        await started.wait()
        name = handler_name()
        go_on.set()
        return name

    async def both():
        started, go_on = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(inside(started, go_on), outside(started, go_on))

    ours, other = asyncio.run(both())
    assert ours == "pagealloc" != other


def test_a_task_keeps_what_it_was_started_with(allocator, handler):
    async def start():
        go_on = asyncio.Event()

        async def work():
            await go_on.wait()
            return handler_name(np.ones(3))

        with handler:
            task = asyncio.create_task(work())
        assert not handler.active
        with pytest.raises(BufferError, match="in every thread and task"):
            allocator.close()
        go_on.set()
        return await task

    assert asyncio.run(start()) == "pagealloc"


def test_many_threads_switch_and_allocate(allocator, handler):
    def work(seed):
        random = np.random.default_rng(seed)
        kept = []
        for _ in range(200):
            n = int(random.integers(0, 3 * PAGE_BYTES))
            with handler:
                assert handler.active
                array = np.full(n, seed, np.uint8)
                array.resize(n // 2 + 1, refcheck=False)
            assert not handler.active
            kept.append(array)
            if len(kept) > 20:
                kept.pop(int(random.integers(20)))
        return all((array[:-1] == seed).all() for array in kept)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert allocator.stats().n_live == 0


# --- lifetimes ---


def test_an_array_outlives_block_handler_and_allocator():
    allocator = PageAllocator(backing="base")
    with pagealloc.numpy_handler(allocator):
        array = np.arange(100_000)
    del allocator
    gc.collect()
    array.resize(200_000, refcheck=False)
    assert array[99_999] == 99_999
    assert not array[100_000:].any()
    assert handler_name(array) == "pagealloc"


def test_an_array_is_freed_in_another_thread(allocator, handler):
    with handler:
        arrays = [np.ones(1000) for _ in range(100)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert allocator.stats().n_live == 0


def test_close_is_refused_while_arrays_live_or_numpy_uses_it(allocator, handler):
    handler.install()
    array = np.ones(10)
    with pytest.raises(BufferError, match="1 live buffer"):
        allocator.close()
    del array
    with pytest.raises(BufferError, match="NumPy's handler over this allocator is in use"):
        allocator.close()
    assert np.ones(10).sum() == 10
    handler.uninstall()
    allocator.close()
    for use in (handler.__enter__, handler.install, lambda: pagealloc.numpy_handler(allocator)):
        with pytest.raises(ClosedError):
            use()
    assert handler_name() != "pagealloc"


def test_a_process_may_end_with_it_installed():
    code = (
        "import numpy as np, pagealloc\n"
        "pagealloc.numpy_handler().install()\n"
        "a = np.ones(1_000_000); b = [np.zeros(n) for n in range(100)]\n"
        "other = pagealloc.numpy_handler(pagealloc.PageAllocator())\n"
        "other.install(); c = np.ones(10)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_a_forked_child_goes_on(allocator, handler):
    with handler:
        array = np.arange(10_000)

        def work():
            nonlocal array
            more = np.concatenate([array, np.ones(10_000, int)])
            del array
            assert handler.active
            assert more.sum() == 49_995_000 + 10_000

        assert in_child(work) == 0
        assert array.sum() == 49_995_000
        del array


# --- the four functions ---


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, PAGE_BYTES // 2, PAGE_BYTES - 1])
def test_below_a_page_arrays_are_aligned_to_64_bytes(handler, nbytes):
    with handler:
        for make in (np.empty, np.zeros):
            array = make(nbytes, np.uint8)
            assert array.ctypes.data % 64 == 0
            del array


@pytest.mark.parametrize("nbytes", [PAGE_BYTES, PAGE_BYTES + 1, 3 * MIB, 65 * MIB])
def test_from_a_page_on_arrays_are_page_aligned(handler, nbytes):
    with handler:
        assert np.empty(nbytes, np.uint8).ctypes.data % PAGE_BYTES == 0


@pytest.mark.parametrize("shape", [0, (0, 5), (), (3, 0, 2)])
def test_empty_arrays_have_memory_too(allocator, handler, shape):
    with handler:
        array = np.empty(shape)
        assert handler_name(array) == "pagealloc"
        assert array.ctypes.data
        assert allocator.stats().n_live == 1
        del array


@pytest.mark.parametrize("nbytes", [100, 2000, PAGE_BYTES, 100 * PAGE_BYTES])
def test_zeros_are_zero_where_others_wrote(handler, nbytes):
    with handler:
        for _ in range(3):
            used = np.full(nbytes, 255, np.uint8)
            del used
            array = np.zeros(nbytes, np.uint8)
            assert not array.any()
            array.fill(1)
            del array


def test_fresh_zeros_are_left_untouched(allocator, handler):
    with handler:
        array = np.zeros(32 * MIB, np.uint8)
        assert allocator.stats().held_bytes < MIB
        del array


@pytest.mark.parametrize("start", [0, 1, 100, 3000, PAGE_BYTES, 10 * PAGE_BYTES])
@pytest.mark.parametrize("end", [0, 1, 64, 101, 3000, PAGE_BYTES + 1, 50 * PAGE_BYTES])
def test_resize_keeps_what_fits(allocator, handler, start, end):
    content = np.arange(start).astype(np.uint8)
    with handler:
        array = np.empty(start, np.uint8)
        array[:] = content
        array.resize(end, refcheck=False)
        kept = min(start, end)
        assert (array[:kept] == content[:kept]).all()
        assert not array[kept:].any()
        assert (np.resize(array, 300)[: len(array[:300])] == array[:300]).all()
        assert allocator.stats().n_live == 1
        del array


def test_resize_stays_in_place_until_half_would_be_waste(handler):
    with handler:
        array = np.empty(16 * PAGE_BYTES - 100, np.uint8)
        address = array.ctypes.data
        for nbytes in (16 * PAGE_BYTES, 9 * PAGE_BYTES, 8 * PAGE_BYTES, 12 * PAGE_BYTES):
            array.resize(nbytes, refcheck=False)
            assert array.ctypes.data == address
        array.resize(PAGE_BYTES, refcheck=False)
        assert array.ctypes.data != address


def test_a_refusal_is_numpy_s_memory_error():
    with PageAllocator(backing="base", budget_bytes=MIB) as allocator:
        with pagealloc.numpy_handler(allocator):
            array = np.arange(MIB // 16, dtype=np.int64)  # half of it
            for refused in (
                lambda: np.empty(2 * MIB, np.uint8),
                lambda: np.zeros(2 * MIB, np.uint8),
                partial(array.resize, MIB // 4, refcheck=False),
                lambda: np.empty(1 << 62, np.uint8),
                lambda: np.zeros((1 << 31, 1 << 31), np.uint8),
            ):
                with pytest.raises(MemoryError):
                    refused()
        assert (array == np.arange(MIB // 16)).all()
        del refused
        array.resize(10, refcheck=False)
        assert array.sum() == 45
        del array
        allocator.check()
        assert allocator.stats().n_failed > 0


def test_to_shrink_never_fails():
    with PageAllocator(backing="base", budget_bytes=16 * PAGE_BYTES) as allocator:
        with pagealloc.numpy_handler(allocator):
            array = np.empty(16 * PAGE_BYTES, np.uint8)
            memoryview(array)[:] = b"7" * array.nbytes
            with pytest.raises(MemoryError):
                np.empty(1)
            array.resize(100, refcheck=False)
        assert bytes(array) == b"7" * 100
        del array


def test_a_huge_array(handler):
    """Address space alone: it is not touched."""
    with handler:
        array = np.zeros(1 << 33, np.uint8)
        array[-1] = 1
        assert array[0] == 0
        assert array[-1] == 1
        del array


@pytest.mark.parametrize("dtype", [object, "U5", "datetime64[s]", [("a", "f4"), ("b", "O")]])
def test_other_dtypes(allocator, handler, dtype):
    with handler:
        array = np.empty(50, dtype)
        again = np.concatenate([array, array[::-1]]).copy()
        del array, again
    assert allocator.stats().n_live == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["resize", "sort", "copy", "add", "take", "concatenate", "cumsum"]),
        st.integers(0, 3000),
    ),
    max_size=12,
)


def carry_out(steps, first):
    array = np.arange(first, dtype=np.int64)[::-1].copy()
    for name, n in steps:
        if name == "resize":
            array.resize(n, refcheck=False)
        elif name == "sort":
            array = np.sort(array, kind=("quicksort", "stable")[n % 2])
        elif name == "copy":
            array = array[:: n % 3 + 1].copy()
        elif name == "add":
            array = array + n
        elif name == "take":
            array = array.take(np.arange(n) % len(array)) if len(array) else array
        elif name == "concatenate":
            array = np.concatenate([array[n:], np.zeros(n, array.dtype)])
        else:
            array = array.cumsum()
    return array


@given(st.integers(0, 3000), STEPS)
def test_results_are_those_of_numpy_s_own(first, steps):
    with PageAllocator(backing="base") as allocator:
        with pagealloc.numpy_handler(allocator):
            ours = carry_out(steps, first)
            assert handler_name(ours) == "pagealloc"
        np.testing.assert_array_equal(ours, carry_out(steps, first))
        del ours
        assert allocator.stats().n_live == 0
        allocator.check()


# --- misuse ---


def data_pointer(array):
    """Where an array keeps the address of its data: the first field after the object's head."""
    pointer = ctypes.c_void_p.from_address(id(array) + object.__basicsize__)
    assert pointer.value == array.ctypes.data
    return pointer


@pytest.fixture
def unraisable(monkeypatch):
    caught = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: caught.append(str(found.exc_value)))
    return caught


def test_memory_that_is_not_ours_is_left_alone_and_reported(allocator, handler, unraisable):
    foreign = ctypes.create_string_buffer(b"keep me", 64)
    with handler:
        arrays = [np.ones(8), np.ones(8)]
        addresses = [array.ctypes.data for array in arrays]
        for array in arrays:
            data_pointer(array).value = ctypes.addressof(foreign)
        with pytest.raises(MemoryError):
            arrays[0].resize(1000, refcheck=False)
        del array
        arrays.clear()
    assert foreign.value == b"keep me"
    for _ in range(1000):  # the report waits for the interpreter's next look at its pending calls
        if len(unraisable) > 1:
            break
    assert unraisable
    assert "no live block of the allocator" in unraisable[0]
    assert f"{ctypes.addressof(foreign):#x}" in unraisable[-1]
    for address in addresses:
        free_address(allocator, address)


def test_a_double_free_is_reported(allocator, handler, unraisable):
    with handler:
        array = np.ones(PAGE_BYTES, np.uint8)
        free_address(allocator, array.ctypes.data)
        del array
    for _ in range(1000):
        if unraisable:
            break
    assert "something has freed it before" in unraisable[0]
    free_address(allocator, alloc_address(allocator, 64))
    assert allocator.stats().n_live == 0


@pytest.mark.parametrize("wrong", [1, "auto", np, pagealloc.PageAllocator])
def test_only_allocators(wrong):
    with pytest.raises(TypeError, match="a PageAllocator is expected"):
        pagealloc.numpy_handler(wrong)


def test_only_numpy_handler_makes_one():
    with pytest.raises(TypeError, match="numpy_handler"):
        pagealloc.NumpyHandler()


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_no_copy_and_no_pickle(handler, duplicate):
    with pytest.raises(TypeError, match="no copy, no pickle"):
        duplicate(handler)


def test_arrays_are_copied_and_pickled(allocator, handler):
    with handler:
        array = np.arange(1000)
        again = pickle.loads(pickle.dumps(array))
        twin = copy.deepcopy(array)
    assert (again == array).all()
    assert (twin == array).all()
    del array, again, twin


def test_repr(handler):
    with handler:
        assert repr(handler).startswith("<NumpyHandler active over <PageAllocator ")
    assert repr(handler).startswith("<NumpyHandler over <PageAllocator ")


def test_importing_pagealloc_does_not_import_numpy():
    code = "import sys, pagealloc; print('numpy' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "False\n"


def test_a_handler_that_nobody_made():
    with pytest.raises(TypeError, match="numpy_handler"):
        pagealloc.NumpyHandler.__new__(pagealloc.NumpyHandler).install()
