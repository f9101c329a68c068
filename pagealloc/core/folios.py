"""64 KiB folios behind a memfd: whether the kernel offers them.

Linux gives shared memory large folios by size, switched in
``/sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled`` (Linux 6.8 and later; "never"
by default).  A 64 KiB folio takes one fault, and on arm64 one entry of the TLB.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLIO_BYTES", "why_no_folios"]

FOLIO_BYTES = 64 << 10

THP_FOLDER = "sys/kernel/mm/transparent_hugepage"


def why_no_folios(root: Path = Path("/")) -> str | None:
    """Return why a memfd gets no 64 KiB folios here, None if it does.

    Parameters
    ----------
    root : Path
        Another folder than ``/`` for a machine of a test's own.
    """
    own = root / THP_FOLDER / "hugepages-64kB/shmem_enabled"
    chosen = _chosen(own)
    if chosen is None:
        return "the kernel has no switch hugepages-64kB/shmem_enabled (it takes Linux 6.8)"
    whose = "hugepages-64kB/shmem_enabled"
    if chosen == "inherit":
        chosen, whose = _chosen(root / THP_FOLDER / "shmem_enabled") or "never", "shmem_enabled"
    if chosen in ("always", "within_size", "advise", "force"):
        return None
    return f"/{THP_FOLDER}/{whose} is {chosen!r}; root may write 'advise' to it"


def _chosen(path: Path) -> str | None:
    """Return the word in brackets, as the kernel writes such switches."""
    try:
        text = path.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None
