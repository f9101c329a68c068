"""Snapshots made up, and taken of a process that holds a little of everything."""

from contextlib import contextmanager
from dataclasses import fields, replace

from prefixes import layout_of, publish

from pagealloc import AllocatorStats, LatencyHistogram, PageAllocator
from pagealloc.kv import KVCache
from pagealloc.observe.snapshot import AllocatorReading, Snapshot, take_snapshot

__all__ = ["allocator_of", "busy_process", "histogram_of", "snapshot_of"]

NO_STATS = AllocatorStats(
    **dict.fromkeys((field.name for field in fields(AllocatorStats)), 0)
    | {"budget_bytes": None, "huge_bytes": None, "arenas": (), "classes": ()}
)
NO_SNAPSHOT = Snapshot(
    **dict.fromkeys((field.name for field in fields(Snapshot)), 0)
    | {"pid": 1, "time_s": 1000.0, "allocators": (), "caches": ()}
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


def snapshot_of(*allocators, **values):
    """A snapshot with these allocators and values, and nothing else counted."""
    return replace(NO_SNAPSHOT, allocators=tuple(allocators), **values)


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
