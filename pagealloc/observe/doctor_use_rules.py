"""Rules about the use of memory: what the program does with what it has.

Structure
    one function a rule: Evidence -> Finding or None
Invariants
    a rule speaks only of what was seen; what is unknown is no finding
    of one allocator, faulted in = growth of held + purged + unmapped
Units
    Bytes, seconds and nanoseconds, as the names say.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pagealloc import huge_page_size_bytes, page_size_bytes
from pagealloc.observe.doctor_finding import Finding
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagealloc import AllocatorStats
    from pagealloc.observe.doctor_evidence import Evidence
    from pagealloc.observe.snapshot import AllocatorReading, CacheReading

__all__ = [
    "HELD_FOR_S",
    "budget_pressure",
    "contention",
    "fragmentation",
    "is_fragmented",
    "kv_row_straddling",
    "steady_faults",
]

FULL_BUDGET_SHARE = 0.95
"""What is left then is less than one request of a twentieth; idle memory is given up before."""

MIN_FRAGMENTED_BYTES = 32 << 20
"""Half an arena: what an allocator keeps of its last one is no fragmentation."""

FRAGMENTATION = 2.0
"""Held for each live byte; 10,000 random sizes need 1.02 on base pages and 1.10 on huge ones."""

HELD_FOR_S = 1.0
"""Memory that is free goes back after `purge_after_s`, half a second by default; what is held for
twice as long is kept by what lies beside it."""

MIN_REFAULTED_BYTES = 64 << 20
MIN_REFAULTED_BYTES_S = 64 << 20
"""16,384 pages of 4 KiB a second: 4 % of a core at 2.5 µs a fault, as in a virtual machine here,
and 1 % where faults are cheap."""

MIN_ROUNDS = 3
"""Memory that went and came once or twice belongs to a phase of the program."""

WAIT_SHARE = 0.05
"""Of one thread's time.  Eight threads that fight over one central list on two cores waited for 100
to 220 % together; threads that keep to their magazines, for nothing."""

MIN_LOCK_WAITS = 20
"""The same eight waited 70 times a second, where the kernel let them sleep meanwhile, to 80,000
times.  Fewer long waits are for a thread that the kernel had stopped while it held a lock."""

STRADDLING_SHARE = 0.1
"""Of all rows: whoever reads rows one by one touches a tenth more pages.  SmolLM2-135M, 384 bytes a
row, has 6 %."""


def budget_pressure(evidence: Evidence) -> Finding | None:
    """A budget is nearly used up by what is in use, or requests were refused for it."""
    seen = []
    needed_bytes = 0
    for name, timed in evidence.allocator_series().items():
        readings = [reading for _, reading in timed]
        fullest = max(readings, key=lambda reading: reading.stats.live_bytes).stats
        n_failed = _growth(evidence, readings, "n_failed")
        if fullest.budget_bytes is None:
            continue
        if n_failed or fullest.live_bytes >= FULL_BUDGET_SHARE * fullest.budget_bytes:
            needed_bytes = max(needed_bytes, fullest.budget_bytes)
            refused = f", requests refused: {n_failed:,}" if n_failed else ""
            seen.append(
                f"allocator {name}: {format_bytes(fullest.live_bytes)} of "
                f"{format_bytes(fullest.budget_bytes)} in use "
                f"({fullest.live_bytes / fullest.budget_bytes:.0%}){refused}"
            )
    for name, readings_of_cache in evidence.cache_series().items():
        fullest_cache = max(readings_of_cache, key=_kept_bytes)
        kept_bytes, budget_bytes = _kept_bytes(fullest_cache), fullest_cache.stats.budget_bytes
        if budget_bytes is not None and kept_bytes >= FULL_BUDGET_SHARE * budget_bytes:
            needed_bytes = max(needed_bytes, budget_bytes)
            seen.append(
                f"KV cache {name}: {format_bytes(kept_bytes)} of {format_bytes(budget_bytes)} "
                f"({kept_bytes / budget_bytes:.0%}) cannot be given up"
            )
    if not seen:
        return None
    return Finding(
        rule="budget-pressure",
        severity="problem",
        title="a memory budget is used up",
        figure="; ".join(seen),
        why="Before a request is refused, all that is idle goes back to the kernel, and comes back "
        "with a page fault a page; then it is OutOfMemoryError.",
        fix=(
            (
                f"A larger budget_bytes, such as {format_bytes(2 * needed_bytes)}; for the default "
                "allocator, PAGEALLOC_BUDGET_BYTES."
            ),
            (
                "Or give way: PageAllocator.on_pressure(callback), KVCache(on_pressure=...), "
                "Sequence.evictable = True."
            ),
            'Or fewer bytes: KVCache(quantize="recommended") takes 59 % fewer than float16.',
        ),
    )


def fragmentation(evidence: Evidence) -> Finding | None:
    """An allocator goes on holding much more than is live."""
    seen = []
    for name, timed in evidence.allocator_series().items():
        held = _longest_fragmented(timed)
        if held is not None:
            stats, for_s = held
            seen.append(
                f"allocator {name}: {format_bytes(stats.held_bytes)} held for "
                f"{format_bytes(stats.live_bytes)} live ({stats.held_bytes / stats.live_bytes:.1f} "
                f"times as much), for {for_s:.1f} s"
            )
    if not seen:
        return None
    return Finding(
        rule="fragmentation",
        severity="problem",
        title="much more memory is held than is in use",
        figure="; ".join(seen),
        why="Single blocks keep the pages around them: a slot its page, any block its huge page, "
        "for those go back whole.  Other processes have less, and the control group counts it.",
        fix=(
            "allocator.trim() gives back what is free now, and splits huge pages for it.",
            "Keep what lives long apart from what lives short: an allocator for each.",
            (
                'backing="base" where blocks are small and few of many survive.  What '
                "purge_after_s=None and prefault() keep on purpose is no fragmentation."
            ),
        ),
    )


def steady_faults(evidence: Evidence) -> Finding | None:
    """Memory goes back to the kernel and is faulted in again, over and over."""
    seen = []
    is_unmapped = False
    for name, timed in evidence.allocator_series().items():
        churn = _churn(timed)
        if churn is None:
            continue
        is_unmapped |= churn.unmapped_bytes > churn.purged_bytes
        seen.append(
            f"allocator {name}: {format_bytes(churn.refaulted_bytes)} were given back and faulted "
            f"in again within {churn.span_s:.1f} s, {format_bytes(round(churn.bytes_s))}/s, while "
            f"at most {format_bytes(churn.peak_held_bytes)} were held"
        )
    if not seen:
        return None
    n_faults = evidence.snapshots[-1].n_minor_faults - evidence.snapshots[0].n_minor_faults
    large = (
        "Blocks above half an arena get an arena of their own, which is unmapped with them: "
        'arena_bytes="512MiB", or keep them: pagealloc.Pool, Buffer.resize.'
    )
    return Finding(
        rule="steady-faults",
        severity="problem",
        title="page faults in steady state",
        figure="; ".join(seen) + f"; {n_faults:,} page faults of the whole process meanwhile",
        why="Each page that comes back is a fault, and zeros written by the kernel: about 2.5 µs "
        "for 4 KiB in a virtual machine, and at the moment when memory is wanted.",
        fix=(
            *([large] if is_unmapped else []),
            (
                "PageAllocator(purge_after_s=30), or None for never; PAGEALLOC_PURGE_AFTER_S for "
                "the default allocator.  Call trim() at the end of a phase, not in its loop."
            ),
            "Or have it there before: PageAllocator.prefault().",
        ),
    )


def contention(evidence: Evidence) -> Finding | None:
    """Threads wait for the locks behind their magazines."""
    span_s = evidence.span_s
    if span_s <= 0:
        return None
    first, last = evidence.snapshots[0], evidence.snapshots[-1]
    n_waits = last.n_lock_waits - first.n_lock_waits
    wait_ns = last.lock_wait_ns - first.lock_wait_ns
    share = wait_ns / 1e9 / span_s
    if share < WAIT_SHARE or n_waits < MIN_LOCK_WAITS:
        return None
    return Finding(
        rule="contention",
        severity="problem",
        title="threads wait for each other to allocate",
        figure=f"{n_waits:,} waits for mutexes of the core, {wait_ns / 1e6:,.0f} ms in "
        f"{span_s:.1f} s: {share:.0%} of one thread's time",
        why="Magazines serve a thread without a lock; what passes them by, or goes from a thread "
        "that allocates to another that frees, takes one.",
        fix=(
            "Many at a time: alloc_many() takes the lock once for a batch.",
            "Keep blocks in their thread: pagealloc.Pool gives each thread its own back first.",
            "Or an allocator for each group of threads.",
        ),
    )


def kv_row_straddling(evidence: Evidence) -> Finding | None:
    """The layout of a cache has rows that reach into one page more than they need."""
    seen, padding = [], []
    for name, readings in evidence.cache_series().items():
        rows = readings[-1].straddling
        if rows.share >= STRADDLING_SHARE:
            seen.append(
                f"KV cache {name}: {rows.n_straddling:,} of {rows.n_rows:,} rows "
                f"({rows.share:.0%}), {readings[-1].layout}"
            )
            if rows.padding_share is not None:
                padding.append(rows.padding_share)
    if not seen:
        return None
    cost = f" (costs {max(padding):.0%} more bytes a token)" if padding else ""
    return Finding(
        rule="kv-row-straddling",
        severity="advice",
        title="rows of a KV cache straddle pages",
        figure="; ".join(seen),
        why="A row in two pages takes two TLB entries where one would do, a fork that writes it "
        "copies both, and pages are moved by mapping only where whole rows fill them.",
        fix=(
            f"KVLayout(..., pad_rows=True){cost}.",
            "Where memory matters more than that, leave it as it is.",
        ),
    )


# --- what the rules ask of the evidence ---


def _growth(evidence: Evidence, readings: Sequence[AllocatorReading], field: str) -> int:
    """Return by how much a counter grew; all of it, of an allocator made while we watched."""
    first = {reading.name: reading for reading in evidence.snapshots[0].allocators}
    name = readings[-1].name
    before = getattr(first[name].stats, field) if name in first else 0
    return int(getattr(readings[-1].stats, field)) - int(before)


def _kept_bytes(reading: CacheReading) -> int:
    """Return what a cache would not give up for a request: warm windows go, and prefixes."""
    stats, prefixes = reading.stats, reading.prefixes
    n_free = prefixes.n_blocks - prefixes.n_pinned_blocks
    free_bytes = prefixes.nbytes * n_free // prefixes.n_blocks if prefixes.n_blocks else 0
    return max(stats.committed_bytes - stats.warm_bytes - free_bytes, 0)


class _Held(NamedTuple):
    stats: AllocatorStats
    for_s: float


def _longest_fragmented(timed: Sequence[tuple[float, AllocatorReading]]) -> _Held | None:
    """Return the best reading of the longest time in which all were fragmented; None if short.

    As many allocations as there are live blocks end such a time: who allocates that often may have
    used the free memory meanwhile, between two readings.
    """
    longest: _Held | None = None
    start_s = 0.0
    first: AllocatorStats | None = None
    best: AllocatorStats | None = None
    for time_s, reading in timed:
        stats = reading.stats
        if not is_fragmented(stats):
            first = best = None
            continue
        if first is None or best is None or stats.n_allocs - first.n_allocs > stats.n_live:
            start_s, first, best = time_s, stats, stats
        elif stats.held_bytes - stats.live_bytes < best.held_bytes - best.live_bytes:
            best = stats
        for_s = time_s - start_s
        if for_s >= HELD_FOR_S and (longest is None or for_s >= longest.for_s):
            longest = _Held(best, for_s)
    return longest


def is_fragmented(stats: AllocatorStats) -> bool:
    """Whether much is held beside live blocks; with none, nothing is in the way of giving back."""
    return (
        stats.live_bytes > 0
        and stats.n_frees > 0
        and stats.held_bytes - stats.live_bytes >= MIN_FRAGMENTED_BYTES
        and stats.held_bytes >= FRAGMENTATION * stats.live_bytes
    )


class _Churn(NamedTuple):
    """What of an allocator's memory went and came back."""

    refaulted_bytes: int
    purged_bytes: int
    unmapped_bytes: int
    peak_held_bytes: int
    span_s: float

    @property
    def bytes_s(self) -> float:
        return self.refaulted_bytes / self.span_s


def _churn(timed: Sequence[tuple[float, AllocatorReading]]) -> _Churn | None:
    """Return what was faulted in again, if that is much; None if not, or with one reading.

    By the equation above, what was faulted in is at least what was purged and seen unmapped, and
    by how much held grew; what is live now and was not held before is no return, so growth is left
    out.
    """
    if len(timed) < 2:
        return None
    readings = [reading.stats for _, reading in timed]
    span_s = timed[-1][0] - timed[0][0]
    purged_bytes = readings[-1].purged_bytes - readings[0].purged_bytes
    unmapped_bytes = _unmapped_bytes(readings)
    shrunk_bytes = max(readings[0].held_bytes - readings[-1].held_bytes, 0)
    refaulted_bytes = purged_bytes + unmapped_bytes - shrunk_bytes
    peak_held_bytes = max(stats.held_bytes for stats in readings)
    goes_round_bytes = peak_held_bytes - min(stats.live_bytes for stats in readings)
    if (
        span_s <= 0
        or refaulted_bytes < MIN_REFAULTED_BYTES
        or refaulted_bytes < MIN_REFAULTED_BYTES_S * span_s
        or refaulted_bytes < MIN_ROUNDS * goes_round_bytes
    ):
        return None
    return _Churn(refaulted_bytes, purged_bytes, unmapped_bytes, peak_held_bytes, span_s)


def _unmapped_bytes(readings: Sequence[AllocatorStats]) -> int:
    """Return what large blocks surely took with them when they were freed, which nobody counts.

    Either arenas of their own were seen and then gone.  Or all arenas are such, so that each free
    unmapped one; of what they held, page faults are the most there can have been.
    """
    dedicated = [[arena for arena in stats.arenas if arena.dedicated] for stats in readings]
    held_bytes = [sum(arena.held_bytes for arena in arenas) for arenas in dedicated]
    dropped_bytes = sum(max(before - after, 0) for before, after in pairwise(held_bytes))
    seen = [arena for arenas in dedicated for arena in arenas]
    if not seen or any(
        len(arenas) < len(stats.arenas) for arenas, stats in zip(dedicated, readings, strict=True)
    ):
        return dropped_bytes
    is_huge = any(arena.achieved_backing != "base" for arena in seen)
    fault_bytes = huge_page_size_bytes() if is_huge else page_size_bytes()
    n_freed = readings[-1].n_frees - readings[0].n_frees
    n_faults = readings[-1].n_faults - readings[0].n_faults
    smallest_bytes = min(arena.reserved_bytes for arena in seen)
    return max(dropped_bytes, min(n_freed * smallest_bytes, n_faults * fault_bytes))
