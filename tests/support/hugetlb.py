"""The machine's pools of huge pages, filled for a moment where somebody allowed the tests that."""

import contextlib
import os
from pathlib import Path

import pytest

SIMULATED = "PAGEALLOC_HUGE_PAGE_BYTES" in os.environ
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")


def set_or_skip(path, text):
    if os.environ.get("PAGEALLOC_TEST_HUGETLB") != "1":
        pytest.skip("PAGEALLOC_TEST_HUGETLB=1 lets root's tests reserve huge pages for a moment")
    if not os.access(path, os.W_OK):
        pytest.skip(f"only root may change {path}, and only where the kernel has it")
    try:
        path.write_text(text)
    except OSError as error:
        pytest.skip(f"{path} cannot be changed here: {error}")


@contextlib.contextmanager
def pool(path, n_pages):
    """So many huge pages in a pool of the machine's, where somebody allowed the tests that."""
    if path == NR_HUGEPAGES and SIMULATED:
        pytest.skip("the pool's pages are the machine's, and not the simulated ones")
    before = path.read_text() if path.exists() else ""
    set_or_skip(path, str(n_pages))
    try:
        if int(path.read_text()) < n_pages:
            pytest.skip(f"the machine has no {n_pages} free huge pages")
        yield
    finally:
        path.write_text(before)
