"""The kernel's own account of a memfd's mappings in this process."""

import mmap
import os
from pathlib import Path

import numpy as np

MAPS = Path("/proc/self/maps")
PAGEMAP = Path("/proc/self/pagemap")
IS_PRESENT, IS_OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 61))

CAN_WEIGH = PAGEMAP.exists() and "PAGEALLOC_SANITIZE" not in os.environ


def weigh(fd: int) -> tuple[int, int]:
    """Return how much of a file is mapped here in bytes, and how many mappings there are.

    A page counts once, however often it is mapped; a private copy of it counts too.  It is what
    the sum of Pss in smaps would be without its rounding, but smaps walks every page of the whole
    process, which takes milliseconds.
    """
    head = f" {os.fstat(fd).st_ino} ".encode()  # ... inode, spaces, path
    n_copies = n_mappings = 0
    shared = [np.empty(0, np.int64)]
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        for line in MAPS.read_bytes().splitlines():
            if b"/memfd:" not in line or head not in line:
                continue
            span, _, offset, *_ = line.split()
            start, end = (int(address, 16) // mmap.PAGESIZE for address in span.split(b"-"))
            entries = np.frombuffer(os.pread(pagemap.fileno(), (end - start) * 8, start * 8), "u8")
            assert len(entries) == end - start
            is_present, is_of_a_file = entries & IS_PRESENT != 0, entries & IS_OF_A_FILE != 0
            n_copies += np.count_nonzero(is_present & ~is_of_a_file)
            pages = np.flatnonzero(is_present & is_of_a_file)
            shared.append(pages + int(offset, 16) // mmap.PAGESIZE)
            n_mappings += 1
    n_pages = len(np.unique(np.concatenate(shared))) + n_copies
    return n_pages * mmap.PAGESIZE, n_mappings
