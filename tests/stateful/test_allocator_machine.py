"""Any order of alloc, write, resize, free, trim: nothing overlaps or is lost, all adds up."""

import random
import time

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

from pagealloc import OutOfMemoryError, PageAllocator, page_size_bytes

PAGE_BYTES = page_size_bytes()
BUDGET_BYTES = 24 << 20
sizes = st.one_of(
    st.integers(1, PAGE_BYTES),
    st.integers(1, 64).map(lambda n: n * PAGE_BYTES),
    st.integers(1, 6 << 20),
)


class AllocatorMachine(RuleBasedStateMachine):
    """Each live buffer is filled with a byte of its own; its content is the oracle."""

    buffers = Bundle("buffers")
    backing = "base"

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(
            backing=self.backing,
            arena_bytes="4MiB",
            budget_bytes=BUDGET_BYTES,
            purge_after_s=0.01,
        )
        self.fill = 0
        self.live = {}
        self.has_changed = False  # since the purger was last waited for

    @rule(target=buffers, nbytes=sizes, align_log2=st.integers(0, 22))
    def alloc(self, nbytes, align_log2):
        self.has_changed = True
        try:
            buffer = self.allocator.alloc(nbytes, align=1 << align_log2)
        except OutOfMemoryError:
            if self.backing == "base":  # exact: what is live, and the request, in whole pages
                stats = self.allocator.stats()
                slab_bytes = sum(c.n_slabs * max(65536, PAGE_BYTES) for c in stats.classes)
                slot_bytes = sum(c.n_live * c.block_bytes for c in stats.classes if c.n_slabs)
                used_bytes = stats.live_bytes - slot_bytes + slab_bytes
                assert used_bytes + -(-nbytes // PAGE_BYTES) * PAGE_BYTES > BUDGET_BYTES
            return None
        assert buffer.address % (1 << align_log2) == 0
        view = np.frombuffer(buffer, np.uint8)
        if buffer.fresh:
            assert not view.any()
        self.fill = self.fill % 255 + 1
        view.fill(self.fill)
        self.live[buffer] = self.fill
        return buffer

    @rule(buffer=consumes(buffers))
    def free(self, buffer):
        if buffer is None:
            return
        assert (np.frombuffer(buffer, np.uint8) == self.live.pop(buffer)).all()
        buffer.close()
        self.has_changed = True

    @rule(buffer=buffers, nbytes=sizes)
    def resize(self, buffer, nbytes):
        if buffer is None or buffer.closed:
            return
        self.has_changed = True
        n_kept = min(nbytes, buffer.nbytes)
        address, before = buffer.address, buffer.nbytes
        try:
            buffer.resize(nbytes)
        except OutOfMemoryError:
            assert (buffer.address, buffer.nbytes) == (address, before)
            n_kept = before
        view = np.frombuffer(buffer, np.uint8)
        assert (view[:n_kept] == self.live[buffer]).all()
        view.fill(self.live[buffer])

    @precondition(lambda self: self.has_changed)
    @rule()
    def pass_a_while(self):
        """The purger comes by a few times; once it did it has nothing more to do."""
        time.sleep(0.02)
        self.has_changed = False

    @rule()
    def trim(self):
        self.allocator.trim()
        stats = self.allocator.stats()
        if self.backing == "base":  # whole slabs and pages are all that may stay
            kept = sum(c.n_slabs * max(65536, PAGE_BYTES) for c in stats.classes)
            kept += sum(-(-b.nbytes // PAGE_BYTES) * PAGE_BYTES for b in self.live)
            assert stats.held_bytes <= kept

    @invariant()
    def nothing_is_broken(self):
        self.allocator.check()
        stats = self.allocator.stats()
        assert stats.n_live == len(self.live)
        assert stats.live_bytes >= sum(b.nbytes for b in self.live)
        assert stats.held_bytes <= stats.committed_bytes <= BUDGET_BYTES

    def teardown(self):
        for buffer, fill in self.live.items():
            assert (np.frombuffer(buffer, np.uint8) == fill).all()
            buffer.close()
        self.allocator.close()


class HugePageMachine(AllocatorMachine):
    backing = "auto"


for machine in (AllocatorMachine, HugePageMachine):
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestBasePages = AllocatorMachine.TestCase
TestHugePages = HugePageMachine.TestCase


@pytest.mark.parametrize("seed", range(3))
def test_a_long_random_life(seed):
    """20,000 steps: fragmentation and coalescing that short examples do not reach."""
    rng = random.Random(seed)
    with PageAllocator(backing="base", arena_bytes="4MiB") as allocator:
        live = []
        for step in range(20_000):
            if live and rng.random() < 0.5:
                i = rng.randrange(len(live))
                live[i], live[-1] = live[-1], live[i]
                live.pop().close()
            else:
                live.append(allocator.alloc(int(2 ** rng.uniform(0, 22))))
            if step % 2000 == 0:
                allocator.check()
        allocator.check()
        for buffer in live:
            buffer.close()
        allocator.trim()
        assert allocator.stats().reserved_bytes == 0
