"""A writer, readers, and who closes: any two of them at once end in rows or in a clear error."""

import contextlib
import gc
import signal
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from stress import running

from pagealloc.errors import ClosedError
from pagealloc.kv import KVCache, KVLayout, Rope

N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 64
ORDERS = ["interleaved", "split", "block"]


@pytest.fixture
def hasty():
    """Threads change places as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def make_cache(order, max_tokens=512, **options):
    layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, max_tokens, order=order, block_tokens=4)
    return KVCache(layout, **options)


def token(number):
    return np.full((N_LAYERS, 2, N_HEADS, HEAD_DIM), number, np.float16)


QUANTISED = {"quantize": "recommended", "residual_tokens": 8}


@pytest.mark.parametrize("options", [{}, QUANTISED], ids=["float16", "quantised"])
@pytest.mark.parametrize("closer", ["sequence", "cache"])
@pytest.mark.parametrize("order", ORDERS)
def test_closing_while_another_thread_appends(hasty, order, closer, options):
    def append(sequence, started):
        started.set()
        try:
            for number in range(512):
                sequence.append_token(token(number))
        except ClosedError:
            pass

    for _ in range(60):
        cache = make_cache(order, **options)
        sequence = cache.sequence()
        started = threading.Event()
        thread = threading.Thread(target=append, args=(sequence, started))
        thread.start()
        started.wait()
        {"sequence": sequence, "cache": cache}[closer].close()
        thread.join()
        cache.close()


@pytest.mark.parametrize("order", ORDERS)
def test_no_reader_sees_rows_that_the_writer_took_back(hasty, duration_s, order):
    """An array stays as it was when it was made, though the writer truncates and writes anew."""
    cache = make_cache(order)
    sequence = cache.sequence()
    failures, stop = [], threading.Event()
    for number in range(40):
        sequence.append_token(token(number))

    def read():
        while not stop.is_set():
            if order == "block":  # the array does not say which of its last rows are valid
                rows = sequence.k_blocks(1).reshape(-1, N_HEADS, HEAD_DIM)[:10]
            else:
                rows = sequence.k(1)
            before = rows[:, 0, 0].copy()
            time.sleep(0)
            after = rows[:, 0, 0].copy()
            if not (before == after).all() or not (before[:10] == np.arange(10)).all():
                failures.append((before, after))
            del rows

    generation = 0
    with running(stop, *(threading.Thread(target=read) for _ in range(2))):
        end = time.monotonic() + duration_s
        while time.monotonic() < end and not failures:
            try:
                sequence.truncate(10)
            except BufferError:
                continue
            generation += 1
            for number in range(10, 40):
                sequence.append_token(token(number + 100 * (generation % 2)))
    assert not failures, failures[0]
    assert generation > 0
    cache.check()
    cache.close()


class Interrupted(BaseException):
    """As a KeyboardInterrupt is: no Exception."""


@pytest.mark.parametrize("order", ORDERS)
def test_an_interrupt_during_an_append_loses_no_page(order):
    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    rows = np.ones((4096, 8, 128), np.float16)
    layout = KVLayout(n_layers=2, n_kv_heads=8, head_dim=128, max_tokens=8192, order=order)
    n_interrupted = 0
    gc.disable()  # an exception raised in one of its callbacks or finalizers would be ignored
    try:
        for step in range(12):
            cache = KVCache(layout)
            sequence = cache.sequence()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + step * 0.0007)
                sequence.append(0, rows, rows)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                n_interrupted += 1
            cache.check()
            sequence.rollback()
            assert cache.stats().committed_bytes == 0
            cache.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    if not n_interrupted:
        pytest.skip("every append was quicker than the timer")


@pytest.mark.parametrize("order", ["interleaved", "block"])
def test_leaving_with_an_exception_lets_it_through(order):
    def fail():
        with make_cache(order) as cache, cache.sequence() as sequence:
            sequence.append_token(token(1))
            arrays.append(sequence.k_blocks(0) if order == "block" else sequence.k(0))
            raise KeyError("what the user must see")

    arrays = []
    with pytest.raises(KeyError, match="what the user must see"):
        fail()
    assert arrays[0].ravel()[0] == 1


def change(sequence, number):
    """What a writer may do; an array of a reader's that is alive may forbid some of it."""
    for i in range(number, number + 9):
        if len(sequence) < 500:  # readers may have kept it from being cut
            sequence.append_token(token(i % 1000))
    position = int(sequence.positions[5])
    for operation, *arguments in (
        (sequence.rm, position, position + 4),
        (sequence.slide, 60, 4),
        (partial(sequence.add, lossy=True), -1, -1, 3),
    ):
        with contextlib.suppress(BufferError):
            operation(*arguments)
    with sequence.fork() as child:
        child.append_token(token(1))
    if len(sequence) > 300:
        with contextlib.suppress(BufferError):
            sequence.truncate(40)


@pytest.mark.parametrize("quantised", [False, True], ids=["float16", "quantised"])
@pytest.mark.parametrize("order", ORDERS)
def test_two_readers_while_one_writes(hasty, duration_s, order, quantised):
    """A reader finds rows that were there, whole: every V row is one number over and over."""
    options = {"v_type": "q8_0", "residual_tokens": 20} if quantised else {}
    layout = KVLayout(
        N_LAYERS, N_HEADS, HEAD_DIM, 512, order=order, block_tokens=4, rope=Rope(HEAD_DIM)
    )
    cache = KVCache(layout, purge_after_s=0.01, **options)
    sequence = cache.sequence()
    failures, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            copies = (sequence.v(1, on_cross="copy"), cache.gather([sequence], 2, "v"))
            failures.extend(rows for rows in copies if not (rows == rows[:, :1, :1]).all())
            sequence.k(0, on_cross="copy")
            del copies

    for number in range(40):
        sequence.append_token(token(number))
    number = 40
    with running(stop, *(threading.Thread(target=read) for _ in range(2))):
        end = time.monotonic() + duration_s
        while time.monotonic() < end and not failures:
            change(sequence, number)
            number += 9
    assert not failures, failures[0]
    assert number > 40
    cache.check()
    cache.close()
