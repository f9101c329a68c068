"""A pool against a model that knows who has each item, from two threads in turn."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pagealloc import Buffer, PageAllocator, Pool
from pagealloc.core.pool import collect_pools

N_BYTES = 4096
MOST_IDLE = 6
threads = st.integers(0, 1)


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Each rule's collection need not go through what the tests before these have made."""
    gc.collect()
    gc.freeze()


class ResetError(Exception):
    pass


class PoolMachine(RuleBasedStateMachine):
    """The items are ordinary objects."""

    def __init__(self):
        super().__init__()
        gc.disable()  # the model knows of no collection but its own
        self.executors = [ThreadPoolExecutor(1) for _ in range(2)]
        self.out = []
        self.idle = []
        self.victims = []
        self.n_gets = 0
        self.n_dropped = 0
        self.reset_raises = False
        self.make_pool()

    def make_pool(self):
        self.kind = type("Item", (), {})
        self.pool = Pool(
            self.kind,
            reset=self.reset,
            nbytes=N_BYTES,
            max_idle_bytes=MOST_IDLE * N_BYTES,
        )

    def reset(self, _item):
        self.pool.check()
        if self.reset_raises:
            raise ResetError

    def on(self, thread, call, *args):
        return self.executors[thread].submit(call, *args).result()

    def some(self, data, items):
        return items[data.draw(st.integers(0, len(items) - 1))]

    @rule(thread=threads)
    def get(self, thread):
        item = self.on(thread, self.pool.get)
        self.n_gets += 1
        assert not any(item is other for other in self.out)
        if self.idle or self.victims:
            source = self.idle or self.victims  # a victim is the last choice
            assert any(item is other for other in source)
            source[:] = [other for other in source if other is not item]
        self.out.append(item)

    @precondition(lambda self: self.out)
    @rule(thread=threads, data=st.data())
    def put(self, thread, data):
        item = self.some(data, self.out)
        self.on(thread, self.pool.put, item)
        self.out.remove(item)
        if len(self.idle) + len(self.victims) < MOST_IDLE:
            self.idle.append(item)
        else:
            self.dropped(item)

    @precondition(lambda self: self.out)
    @rule(thread=threads, data=st.data())
    def put_with_a_reset_that_raises(self, thread, data):
        item = self.some(data, self.out)
        self.reset_raises = True
        with pytest.raises(ResetError):
            self.on(thread, self.pool.put, item)
        self.reset_raises = False
        self.out.remove(item)
        self.dropped(item)

    @precondition(lambda self: self.idle or self.victims)
    @rule(thread=threads, data=st.data())
    def put_twice(self, thread, data):
        with pytest.raises(ValueError, match="in this Pool already"):
            self.on(thread, self.pool.put, self.some(data, self.idle + self.victims))

    @rule(thread=threads)
    def put_a_foreign_object(self, thread):
        with pytest.raises(ValueError, match="foreign"):
            self.on(thread, self.pool.put, object())

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def lose(self, data):
        self.out.remove(self.some(data, self.out))

    @rule(thread=threads)
    def use_a_new_thread(self, thread):
        self.executors[thread].shutdown()
        self.executors[thread] = ThreadPoolExecutor(1)

    @rule(how=st.sampled_from(["collect", "collect_pools", "gc"]))
    def collect(self, how):
        {"collect": self.pool.collect, "collect_pools": collect_pools, "gc": gc.collect}[how]()
        for item in self.victims:
            self.dropped(item)
        self.victims, self.idle = self.idle, []

    def dropped(self, item):
        self.n_dropped += 1
        assert isinstance(item, self.kind)

    @invariant()
    def nothing_is_broken(self):
        self.pool.check()
        stats = self.pool.stats()
        assert stats.hits + stats.misses == self.n_gets
        assert stats.n_idle == len(self.idle) + len(self.victims)
        assert stats.n_victims == len(self.victims)
        assert stats.idle_bytes == stats.n_idle * N_BYTES
        assert stats.dropped == self.n_dropped

    def teardown(self):
        gc.enable()
        for executor in self.executors:
            executor.shutdown()
        self.pool.close()
        self.pool.check()


class BufferPoolMachine(PoolMachine):
    """The items are Buffers."""

    def make_pool(self):
        self.allocator = PageAllocator(backing="base", arena_bytes="2MiB")
        self.kind = Buffer
        self.pool = Pool(
            nbytes=N_BYTES,
            reset=self.reset,
            max_idle_bytes=MOST_IDLE * N_BYTES,
            allocator=self.allocator,
        )

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_with_a_view(self, data):
        item = self.some(data, self.out)
        with memoryview(item), pytest.raises(BufferError):
            self.pool.put(item)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_closed(self, data):
        item = self.some(data, self.out)
        item.close()
        with pytest.raises(ValueError, match="closed"):
            self.pool.put(item)
        self.out.remove(item)

    def dropped(self, item):
        super().dropped(item)
        assert item.closed

    @invariant()
    def no_buffer_is_lost(self):
        n_known = len(self.out) + len(self.idle) + len(self.victims)
        assert self.allocator.stats().n_live == n_known

    def teardown(self):
        super().teardown()
        self.out.clear()
        self.allocator.close()


for machine in (PoolMachine, BufferPoolMachine):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestObjects = PoolMachine.TestCase
TestBuffers = BufferPoolMachine.TestCase
