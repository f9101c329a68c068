"""How much memory this process may still use: what ``budget_bytes="auto"`` is.

The machine's MemAvailable, or less where a memory cgroup of the process, or one above it, has less
left.  Both versions of cgroups are read, for a machine may have both.  What cannot be read is no
limit.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CgroupLimit", "available_bytes", "cgroup_limits"]

NO_LIMIT_BYTES = 1 << 60
"""Version 1 says "none" by a number near 2**63, rounded to pages."""

# The files of each version: limit, usage, and the line of memory.stat with what can be reclaimed.
FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """One memory cgroup that has a limit.

    Attributes
    ----------
    path : Path
        Its folder.
    limit_bytes, usage_bytes : int
        What it may use, and does.
    reclaimable_bytes : int
        The part of that which is file cache the kernel can drop.
    """

    path: Path
    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int

    @property
    def available_bytes(self) -> int:
        """What is left."""
        return max(0, self.limit_bytes - self.usage_bytes + self.reclaimable_bytes)


def available_bytes(proc: str = "/proc") -> int:
    """Return how many bytes this process may still use before the machine, or a cgroup, refuses.

    Parameters
    ----------
    proc : str
        Where procfs is mounted.

    Notes
    -----
    A snapshot: others may use the same bytes a moment later.
    """
    import psutil  # takes longer than all else here

    machine_bytes: int = psutil.virtual_memory().available
    return min([machine_bytes, *(limit.available_bytes for limit in cgroup_limits(proc))])


def cgroup_limits(proc: str = "/proc") -> list[CgroupLimit]:
    """Return the limits of this process's memory cgroups, from its own up to the root."""
    paths = dict(own_cgroups(read_text(Path(proc, "self/cgroup"))))
    limits: list[CgroupLimit] = []
    for version, mounted, root in memory_mounts(read_text(Path(proc, "self/mountinfo"))):
        if version in paths:
            for folder in folders_up(mounted, root, paths[version]):
                limits += read_limit(folder, version)
    return limits


def read_text(path: Path) -> str:
    """Return a file's text; an empty one if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""


def own_cgroups(text: str) -> Iterator[tuple[str, str]]:
    """Find version and path in ``/proc/self/cgroup``: lines of number, controllers, path."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def memory_mounts(text: str) -> Iterator[tuple[str, Path, str]]:
    """Find version, mount point and root in ``/proc/self/mountinfo``, see proc(5)."""
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, types = head.split(" "), tail.split(" ")
        if len(fields) < 5 or len(types) < 3 or types[0] not in FILES:
            continue
        if types[0] == "cgroup2" or "memory" in types[2].split(","):
            yield types[0], Path(unescape(fields[4])), unescape(fields[3])


def unescape(path: str) -> str:
    """Undo the kernel's octal escapes, such as 040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def folders_up(mounted: Path, root: str, path: str) -> Iterator[Path]:
    """Go from a cgroup's folder up to the mount point.

    In a container the path may be one that only the host sees: the mount point is the cgroup then.
    """
    if "\0" in path or "\0" in str(mounted):
        return
    below = path.removeprefix(root.rstrip("/")).strip("/")
    folder = mounted / below
    if ".." not in folder.parts and folder.is_dir():
        while folder != mounted:
            yield folder
            folder = folder.parent
    yield mounted


def read_limit(folder: Path, version: str) -> Iterator[CgroupLimit]:
    """Read one folder; nothing if it has no limit, or does not say so in numbers."""
    limit_name, usage_name, reclaimable_name = FILES[version]
    try:
        limit_bytes = int(read_text(folder / limit_name))
        usage_bytes = int(read_text(folder / usage_name))
    except ValueError:  # "max", or no such file
        return
    if not 0 <= limit_bytes < NO_LIMIT_BYTES or usage_bytes < 0:
        return
    lines = [line.split() for line in read_text(folder / "memory.stat").splitlines()]
    found = [line[1] for line in lines if len(line) == 2 and line[0] == reclaimable_name]
    reclaimable_bytes = int(found[0]) if found and found[0].isdecimal() else 0
    yield CgroupLimit(folder, limit_bytes, usage_bytes, reclaimable_bytes)
