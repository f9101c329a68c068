"""Central lists: many idle blocks, taken from one end and given back from the other."""

import random
import statistics
import time

import pytest

from pagealloc import PageAllocator, page_size_bytes


@pytest.mark.parametrize("nbytes", [64, page_size_bytes()])
def test_cold_blocks_leave_while_others_come(nbytes):
    """Whatever is taken and collected in between, no block is handed out twice or lost."""
    rng = random.Random(0)
    with PageAllocator(backing="base") as allocator:
        live = []
        n_left = 0  # how often a collection let go of blocks while others stayed idle
        for _ in range(1000):
            step = rng.random()
            if step < 0.4:
                n_blocks = rng.choice((10, 10, 10, 3000))
                live.append(allocator.alloc_many(nbytes, n_blocks))
            elif step < 0.7 and live:
                live.pop(rng.randrange(len(live))).close()
            else:
                idle_bytes = allocator.stats().idle_bytes
                allocator.collect()
                n_left += 200 * nbytes < allocator.stats().idle_bytes < idle_bytes
            allocator.check()
            addresses = [address for batch in live for address in batch.addresses]
            assert len(set(addresses)) == len(addresses) == allocator.stats().n_live
            if len(addresses) > 20_000:
                live.pop(0).close()
        assert n_left > 10
        for batch in live:
            batch.close()
        allocator.trim()
        assert allocator.stats().reserved_bytes == 0


def test_a_block_costs_the_same_to_give_back_however_many_are_idle():
    ns_a_block = {25_000: [], 200_000: []}
    for _ in range(5):
        for n_blocks, times in ns_a_block.items():
            with PageAllocator(backing="base") as allocator:
                allocator.alloc_many(page_size_bytes(), n_blocks).close()
                start = time.perf_counter_ns()
                allocator.trim()
                times.append((time.perf_counter_ns() - start) / n_blocks)
    few, many = map(statistics.median, ns_a_block.values())
    assert many < 4 * few  # eight times, where each moved all others
