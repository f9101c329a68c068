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
    dedicated : bool
        It was made for one large request and goes back to the kernel with it.
    """

    address: int
    requested_backing: str
    achieved_backing: str
    reserved_bytes: int
    committed_bytes: int
    held_bytes: int
    dedicated: bool


@dataclass(frozen=True, slots=True)
class ClassStats:
    """One size class: its slot size, live and free slots, and the slabs that hold them."""

    slot_bytes: int
    n_live: int
    n_free: int
    n_slabs: int


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """What an allocator holds.

    Attributes
    ----------
    budget_bytes : int or None
        Hard limit of `committed_bytes`.
    reserved_bytes : int
        Address space taken from the kernel; costs nothing by itself.
    committed_bytes : int
        What may be backed: handed out, or freed and not yet purged.
    held_bytes : int
        Physical memory behind all arenas, counted by mincore.  A page that was read and never
        written counts too, though the kernel backs all of these with one page of zeros.  The
        tables of the allocator itself, at most 4 % of what they describe, are not in it.
    live_bytes : int
        What is handed out, in whole slots and pages.
    idle_bytes : int
        What was freed and is kept at hand, in threads' magazines and the lists behind them.
    n_live, n_allocs, n_frees, n_failed : int
        Buffers open now; requests served, given back, and refused since the start.
    n_collections : int
        How often the allocator went through what is idle (see `PageAllocator.collect`).
    n_conflicts : int
        Blocks of the whole process that two threads freed in the same instant, one of them the
        block's own: both were told that it worked, and it was freed once.  A defect of the program.
    abandoned_bytes : int
        Address space of the whole process that the kernel refused to take back (munmap).
    arenas : tuple of ArenaStats
    classes : tuple of ClassStats
    """

    budget_bytes: int | None
    reserved_bytes: int
    committed_bytes: int
    held_bytes: int
    live_bytes: int
    idle_bytes: int
    n_live: int
    n_allocs: int
    n_frees: int
    n_failed: int
    n_collections: int
    n_conflicts: int
    abandoned_bytes: int
    arenas: tuple[ArenaStats, ...]
    classes: tuple[ClassStats, ...]


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
