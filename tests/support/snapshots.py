"""Snapshots made up, and taken of a process that holds a little of everything."""

from contextlib import contextmanager
from dataclasses import replace

from prefixes import layout_of, publish

from pagealloc import AllocatorStats, LatencyHistogram, PageAllocator
from pagealloc.kv import KVCache
from pagealloc.observe.snapshot import AllocatorReading, Snapshot, take_snapshot

__all__ = ["allocator_of", "busy_process", "histogram_of", "snapshot_of"]

NO_STATS = AllocatorStats(
    budget_bytes=None,
    reserved_bytes=0,
    committed_bytes=0,
    active_bytes=0,
    held_bytes=0,
    huge_bytes=None,
    live_bytes=0,
    idle_bytes=0,
    purged_bytes=0,
    n_live=0,
    n_allocs=0,
    n_frees=0,
    n_failed=0,
    n_faults=0,
    n_collections=0,
    n_conflicts=0,
    abandoned_bytes=0,
    arenas=(),
    classes=(),
)


def histogram_of(durations_ns, size_class="4 KiB", numa_node=0):
    """A histogram of these durations."""
    edges_ns = LatencyHistogram.bucket_edges_ns
    counts = [0] * (len(edges_ns) + 1)
    for duration_ns in durations_ns:
        counts[sum(edge_ns <= duration_ns for edge_ns in edges_ns)] += 1
    return LatencyHistogram(size_class, numa_node, sum(durations_ns), tuple(counts))


def allocator_of(name="0", latencies=(), **stats):
    """An allocator that counted nothing but this."""
    return AllocatorReading(name, replace(NO_STATS, **stats), tuple(latencies))


def snapshot_of(*allocators, time_s=1000.0, n_minor_faults=0, **values):
    """A snapshot with these allocators, at a time of one's choice."""
    counts = dict.fromkeys(("n_major_faults", "resident_bytes", "n_lock_waits", "lock_wait_ns"), 0)
    found = {"pid": 1, "caches": (), **counts} | values
    return Snapshot(
        time_s=time_s, n_minor_faults=n_minor_faults, allocators=tuple(allocators), **found
    )


@contextmanager
def busy_process():
    """Hold blocks, runs, published and forked rows; yield the snapshot of it."""
    with (
        PageAllocator(backing="base", time_every=1, budget_bytes="64MiB") as allocator,
        KVCache(layout_of(), budget_bytes="64MiB") as cache,
    ):
        blocks = [allocator.alloc(nbytes) for nbytes in (64, 100, 4096, 65536, 1 << 20) * 20]
        del blocks[::3]
        publish(cache, [1] * 16)
        try:
            with cache.sequence([1] * 16) as seq, seq.fork():
                yield take_snapshot()
        finally:
            blocks.clear()
