"""What one side of the demo costs its process, read from the kernel (Linux)."""

import os
import platform
import resource
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pagealloc.demo.errors import DemoError
from pagealloc.kv.stats import page_table_bytes

__all__ = [
    "describe_machine",
    "page_faults",
    "page_table_bytes",
    "peak_rss_bytes",
    "pss_bytes",
    "resident_bytes",
]

PAGEMAP_ENTRY_BYTES = 8
PAGEMAP_PRESENT_BIT = np.uint64(63)


def page_faults() -> int:
    """Return the page faults of this process so far, minor and major."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def peak_rss_bytes() -> int:
    """Return the largest RSS so far (VmHWM); a shared page counts once per mapping."""
    return _field_bytes("status", "VmHWM")


def pss_bytes() -> int:
    """Return this process's share of physical memory: a page mapped n times counts an nth each."""
    return _field_bytes("smaps_rollup", "Pss")


def resident_bytes(address: int, mapped_bytes: int) -> int:
    """Return how much of an address range is in physical memory.

    Read from pagemap, one entry a page. smaps would tell only about whole mappings, and the kernel
    merges neighbouring anonymous ones.
    """
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    first_page = address // page_bytes
    n_pages = -(-(address + mapped_bytes) // page_bytes) - first_page
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(first_page * PAGEMAP_ENTRY_BYTES)
        entries = np.frombuffer(pagemap.read(n_pages * PAGEMAP_ENTRY_BYTES), np.uint64)
    return int((entries >> PAGEMAP_PRESENT_BIT).sum()) * page_bytes


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to know to repeat the measurement."""
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "transparent_huge_pages": thp.read_text().strip() if thp.exists() else "none",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _field_bytes(file: str, field: str) -> int:
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except FileNotFoundError as missing:
        raise DemoError(
            "the comparison reads its figures from /proc, which only Linux has; "
            "`pagealloc demo --prompt TEXT` runs without it"
        ) from missing
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _cpu_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
