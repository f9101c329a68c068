"""What is counted, listed once: the fields of ``stats()``, with units and how each is measured."""

from dataclasses import dataclass

__all__ = ["AllocatorStats", "ArenaStats", "ClassStats", "PoolStats"]


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """One arena.

    Attributes
    ----------
    address : int
        Where it starts.
    requested_backing, achieved_backing : str
        What was asked for, and what a touch was seen to be backed by: ``"hugetlb"``, ``"thp"`` or
        ``"base"``.
    reserved_bytes : int
        Address space taken.
    committed_bytes : int
        What of it may be backed.
    held_bytes : int
        Physical memory behind it, counted by mincore.
    huge_bytes : int or None
        The part of it that huge pages map (PAGEMAP_SCAN); None: the kernel cannot say, before
        Linux 6.7.
    numa_node : int or None
        The node its first backed page lies on (move_pages); None: nothing is backed yet, or the
        kernel does not say.
    dedicated : bool
        It was made for one large request and goes back to the kernel with it.
    """

    address: int
    requested_backing: str
    achieved_backing: str
    reserved_bytes: int
    committed_bytes: int
    held_bytes: int
    huge_bytes: int | None
    numa_node: int | None
    dedicated: bool


@dataclass(frozen=True, slots=True)
class ClassStats:
    """One size class: slots below a page, or page runs of one length and alignment.

    Attributes
    ----------
    block_bytes : int
        Length of a slot or run; 0: runs of several lengths that found no class of their own.
    n_live, n_idle : int
        Handed out; freed and kept at hand, in threads' magazines and the list behind them.
    n_slabs, n_unused : int
        The slabs that hold the slots, and the slots in them that are neither; 0 for runs.
    """

    block_bytes: int
    n_live: int
    n_idle: int
    n_slabs: int
    n_unused: int


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """What an allocator holds.

    The first sentence on each attribute is what metrics say of it (``pagealloc.observe``).

    Attributes
    ----------
    budget_bytes : int or None
        Most bytes that an allocator may commit.  None: no limit.
    reserved_bytes : int
        Address space that an allocator took from the kernel, which costs nothing by itself.
    committed_bytes : int
        Bytes of an allocator that may be backed: handed out, or freed and not yet purged.
    active_bytes : int
        Bytes of the pages that are handed out or kept at hand, and of those of slabs.
    held_bytes : int
        Physical memory behind all arenas, counted by mincore.  A page that was read and never
        written counts too, though the kernel backs all of these with one page of zeros.  The
        tables of the allocator itself, at most 4 % of what they describe, are not in it.
    huge_bytes : int or None
        Physical memory behind all arenas that huge pages map.  None: the kernel cannot say, before
        Linux 6.7.
    live_bytes : int
        Bytes handed out, in whole slots and pages.
    idle_bytes : int
        Bytes freed and kept at hand, in threads' magazines and the lists behind them.
    purged_bytes : int
        Physical memory that went back to the kernel since the start: by itself, by ``trim()``, or
        for the budget.  Not counted: what `close` and the end of a large block unmap.
    n_live : int
        Blocks handed out now: open Buffers, and what native code has.
    n_allocs : int
        Requests served since the start.
    n_frees : int
        Blocks given back since the start.
    n_failed : int
        Requests refused since the start.
    n_faults : int
        Page faults of the whole process since the allocator was made, minor and major.
    n_collections : int
        Times that an allocator went through what is idle, see `PageAllocator.collect`.
    n_conflicts : int
        Blocks of the whole process that two threads freed in the same instant, a defect of the
        program.  One of the two was the block's own; both were told that it worked, and it was
        freed once.
    abandoned_bytes : int
        Address space of the whole process that the kernel refused to take back (munmap).
    arenas : tuple of ArenaStats
    classes : tuple of ClassStats
    """

    budget_bytes: int | None
    reserved_bytes: int
    committed_bytes: int
    active_bytes: int
    held_bytes: int
    huge_bytes: int | None
    live_bytes: int
    idle_bytes: int
    purged_bytes: int
    n_live: int
    n_allocs: int
    n_frees: int
    n_failed: int
    n_faults: int
    n_collections: int
    n_conflicts: int
    abandoned_bytes: int
    arenas: tuple[ArenaStats, ...]
    classes: tuple[ClassStats, ...]

    @property
    def fragmentation(self) -> float:
        """Held bytes for each live one; 1: nothing is held but what is in use, infinite: no use."""
        return self.held_bytes / self.live_bytes if self.live_bytes else float("inf")


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool did, and what lies idle in it.

    Attributes
    ----------
    hits : int
        Calls of ``get()`` that an idle item served.
    misses : int
        Calls of ``get()`` that made a new item.  Calls that raised are in neither.
    steals : int
        The hits that took another thread's private item.
    dropped : int
        Items let go: put over `max_idle_bytes`, with a reset that raised, idle for two
        collections, closed or viewed while idle, or idle when the pool was closed.
    n_idle, n_victims : int
        Items in the pool now, and those of them that the next collection drops.
    idle_bytes : int
        What the items in the pool count together.
    """

    hits: int
    misses: int
    steals: int
    dropped: int
    n_idle: int
    n_victims: int
    idle_bytes: int
