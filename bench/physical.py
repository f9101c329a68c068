"""How much memory of the machine is in use, as the kernel counts it.

By the memory cgroup this process and its children are in, if there is one: it sees them alone.
Else by MemFree, which is everybody's, and from which each CPU's lists of free pages are missing.
"""

from __future__ import annotations

from pathlib import Path

from pagealloc.core.machine_memory import memory_mounts, own_cgroups, read_text

__all__ = ["source", "used_bytes"]

USAGE = {"cgroup2": "memory.current", "cgroup": "memory.usage_in_bytes"}


def usage_file() -> Path | None:
    """Return the file of this process's own memory cgroup; None: there is none."""
    paths = dict(own_cgroups(read_text(Path("/proc/self/cgroup"))))
    for version, mounted, root in memory_mounts(read_text(Path("/proc/self/mountinfo"))):
        if version not in paths:
            continue
        below = paths[version].removeprefix(root.rstrip("/")).strip("/")
        for file in (mounted / below / USAGE[version], mounted / USAGE[version]):
            if file.exists():
                return file
    return None


def used_bytes() -> int:
    """Return how many bytes are in use; differences are what counts."""
    file = usage_file()
    if file is not None:
        return int(file.read_text())
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return -int(lines["MemFree"].split()[0]) << 10


def source() -> str:
    """Say where the figures come from."""
    file = usage_file()
    return "MemFree of the machine" if file is None else f"the cgroup's {file.name}"
