"""The kernel's own account of a memfd's mappings in this process."""

import os
from pathlib import Path

SMAPS = Path("/proc/self/smaps")

# A sanitizer's shadow memory would make every look at smaps a walk over gigabytes.
CAN_WEIGH = SMAPS.exists() and "PAGEALLOC_SANITIZE" not in os.environ


def weigh(fd: int) -> tuple[int, int]:
    """Return the sum of Pss over a file's mappings in bytes, and how many mappings there are.

    Pss counts a page once, however often it is mapped.  It is rounded down to KiB in each mapping.
    """
    head = f" {os.fstat(fd).st_ino} ".encode()  # ... inode, spaces, path
    text = SMAPS.read_bytes()
    pss_kib = n_mappings = 0
    position = text.find(b"/memfd:")
    while position >= 0:
        if head in text[text.rfind(b"\n", 0, position) + 1 : position]:
            pss = text.index(b"\nPss:", position) + 5
            pss_kib += int(text[pss : text.index(b" kB", pss)])
            n_mappings += 1
        position = text.find(b"/memfd:", position + 1)
    return pss_kib * 1024, n_mappings
