"""KVStats: what a cache holds, needs, shares and wastes, and how each figure is measured.

Invariants
    held_bytes == file_bytes + page_table_bytes;  waste_bytes == held_bytes - needed_bytes
"""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["KVStats", "page_table_bytes"]


@dataclass(frozen=True, kw_only=True, repr=False)
class KVStats:
    """One reading of a `KVCache`.  Frozen; take another with ``cache.stats()``.

    The first sentence on each parameter and property is what metrics say of it
    (``pagealloc.observe``).

    Parameters
    ----------
    file_bytes : int
        Physical bytes of the cache's memory file: ``st_blocks * 512`` by fstat.  A page that many
        sequences share counts once (RSS counts it once a mapping).
    page_table_bytes : int
        Growth of the process's page tables since the cache was made.  That is VmPTE in
        ``/proc/self/status``; 0 if it shrank or where the kernel does not tell.  What else the
        process mapped meanwhile is in it.
    committed_bytes : int
        Bytes of the pages that a cache committed, which count against its budget.  By the store's
        own ledger; equals `file_bytes` unless something else wrote into the file.
    needed_bytes : int
        Bytes of the distinct rows: a row that several sequences inherited from the same fork counts
        once.  Computed from lengths and lineage.
    shared_bytes : int
        Bytes that sharing saves: of each page, all references beyond the first.  From the store's
        ledger.
    warm_bytes : int
        Bytes of pages in windows of closed sequences, kept for new ones; a part of what is
        committed.
    n_sequences : int
        Open sequences.
    n_tokens : int
        Sum of the lengths of all open sequences, shared tokens counted in each.
    n_mappings : int
        Kernel mappings that a cache's windows cost the process, of ``vm.max_map_count``.
    budget_bytes : int or None
        Most bytes that a cache may commit.  None: no limit.
    """

    file_bytes: int
    page_table_bytes: int
    committed_bytes: int
    needed_bytes: int
    shared_bytes: int
    warm_bytes: int
    n_sequences: int
    n_tokens: int
    n_mappings: int
    budget_bytes: int | None

    @property
    def held_bytes(self) -> int:
        """Physical memory of a cache: its memory file and its page tables together."""
        return self.file_bytes + self.page_table_bytes

    @property
    def waste_bytes(self) -> int:
        """Bytes held beyond the rows: rounding to pages and blocks, copied tails, page tables."""
        return self.held_bytes - self.needed_bytes

    def __repr__(self) -> str:
        names = ("held_bytes", *(field.name for field in fields(self)), "waste_bytes")
        return f"KVStats({', '.join(f'{name}={getattr(self, name)}' for name in names)})"


def page_table_bytes() -> int:
    """Return VmPTE of this process, 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("VmPTE:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
