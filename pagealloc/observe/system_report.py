"""What the machine says about its memory, read from /proc and /sys.

Everything is read below a root folder, so that the tests bring machines of their own.  A file that
is missing, unreadable or malformed is a None in the report, never an exception: kernels differ,
and containers hide files.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = [
    "THP_FOLDER",
    "HugePageSetting",
    "HugetlbPool",
    "MemoryCgroup",
    "NumaNode",
    "SystemReport",
    "read_system_report",
]

THP_FOLDER = "sys/kernel/mm/transparent_hugepage"
HUGETLB_FOLDER = "sys/kernel/mm/hugepages"

# cgroup v1 writes "no limit" as the largest multiple of a page below 2^63.
V1_UNLIMITED_BYTES = 1 << 62


@dataclass(frozen=True)
class HugePageSetting:
    """One switch of the kernel's transparent huge pages, such as ``always [madvise] never``."""

    path: str
    """The file that shows the switch, and takes a new value."""
    value: str
    """The value in force."""
    choices: tuple[str, ...]
    """Every value this kernel offers."""


@dataclass(frozen=True)
class HugetlbPool:
    """The pool of huge pages of one size that an administrator has set aside."""

    path: str
    """The file that shows the pool's size, and takes a new one."""
    page_bytes: int
    total_pages: int
    free_pages: int
    is_default_size: bool
    """Whether ``vm.nr_hugepages`` means this pool."""


@dataclass(frozen=True)
class NumaNode:
    """One memory node and the CPUs beside it."""

    node: int
    total_bytes: int | None
    free_bytes: int | None
    cpus: str


@dataclass(frozen=True)
class MemoryCgroup:
    """The control group that bounds this process's memory."""

    version: int
    path: str
    """Folder of the group whose limit binds, or of our own group where none does."""
    limit_file: str
    limit_bytes: int | None
    """The smallest limit of our group and its ancestors; None is no limit."""
    used_bytes: int | None
    """What counts against that limit, less file pages the kernel would drop first."""

    @property
    def available_bytes(self) -> int | None:
        """What may still be taken under the limit; None without a limit."""
        if self.limit_bytes is None:
            return None
        return max(self.limit_bytes - (self.used_bytes or 0), 0)


@dataclass(frozen=True)
class SystemReport:
    """Memory as the kernel reports it; None where it says nothing."""

    page_bytes: int
    huge_page_bytes: int | None
    """What one transparent huge page holds (2 MiB on x86-64; 512 MiB with 64 KiB pages)."""
    total_bytes: int | None
    available_bytes: int | None
    """The kernel's estimate, MemAvailable; it knows nothing of control groups."""
    thp_enabled: HugePageSetting | None
    thp_defrag: HugePageSetting | None
    shmem_enabled: HugePageSetting | None
    mthp_enabled: dict[int, HugePageSetting]
    """The same switch for each smaller size of transparent huge page, by its bytes."""
    hugetlb_pools: tuple[HugetlbPool, ...]
    numa_nodes: tuple[NumaNode, ...]
    cgroup: MemoryCgroup | None
    max_map_count: int | None
    overcommit_memory: int | None
    overcommit_ratio: int | None

    @property
    def usable_bytes(self) -> int | None:
        """What this process may still take: the smaller of MemAvailable and the cgroup's rest."""
        bounds = [self.available_bytes, self.cgroup.available_bytes if self.cgroup else None]
        return min((bound for bound in bounds if bound is not None), default=None)


def read_system_report(root: Path = Path("/"), page_bytes: int | None = None) -> SystemReport:
    """Read the report of the machine whose /proc and /sys lie below `root`.

    Parameters
    ----------
    root : Path
        Another folder than ``/`` for a machine of a test's own.
    page_bytes : int, optional
        The page size, which no file tells; asked of the running machine by default.
    """
    meminfo = _read_meminfo(root)
    thp = root / THP_FOLDER
    mthp = {
        kib << 10: setting
        for folder, kib in _sized_folders(thp)
        if (setting := _read_setting(root, folder / "enabled"))
    }
    return SystemReport(
        page_bytes=page_bytes or os.sysconf("SC_PAGE_SIZE"),
        huge_page_bytes=_read_int(thp / "hpage_pmd_size"),
        total_bytes=meminfo.get("MemTotal"),
        available_bytes=meminfo.get("MemAvailable"),
        thp_enabled=_read_setting(root, thp / "enabled"),
        thp_defrag=_read_setting(root, thp / "defrag"),
        shmem_enabled=_read_setting(root, thp / "shmem_enabled"),
        mthp_enabled=dict(sorted(mthp.items())),
        hugetlb_pools=tuple(_read_hugetlb_pools(root, meminfo.get("Hugepagesize"))),
        numa_nodes=tuple(_read_numa_nodes(root)),
        cgroup=_read_cgroup(root),
        max_map_count=_read_int(root / "proc/sys/vm/max_map_count"),
        overcommit_memory=_read_int(root / "proc/sys/vm/overcommit_memory"),
        overcommit_ratio=_read_int(root / "proc/sys/vm/overcommit_ratio"),
    )


# --- files ---


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _read_int(path: Path) -> int | None:
    try:
        return int(_read_text(path) or "")
    except ValueError:
        return None


def _shown(root: Path, path: Path) -> str:
    """Return the path as it is on the machine itself, not below a test's root."""
    return "/" + path.relative_to(root).as_posix()


def _sized_folders(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield each subfolder ``hugepages-<KiB>kB`` with its number."""
    for path in sorted(folder.glob("hugepages-*kB")):
        if match := re.fullmatch(r"hugepages-(\d+)kB", path.name):
            yield path, int(match[1])


def _kib_fields(text: str) -> dict[str, int]:
    """Return the fields of meminfo, in bytes: ``MemTotal:  24684084 kB``."""
    return {
        name: int(kib) << 10
        for name, kib in re.findall(r"^(?:Node \d+ )?([\w()]+):\s+(\d+) kB$", text, re.MULTILINE)
    }


def _read_meminfo(root: Path) -> dict[str, int]:
    return _kib_fields(_read_text(root / "proc/meminfo") or "")


# --- huge pages ---


def _read_setting(root: Path, path: Path) -> HugePageSetting | None:
    text = _read_text(path) or ""
    chosen = re.search(r"\[([\w+-]+)\]", text)
    if chosen is None:
        return None
    choices = tuple(text.replace("[", "").replace("]", "").split())
    return HugePageSetting(path=_shown(root, path), value=chosen[1], choices=choices)


def _read_hugetlb_pools(root: Path, default_bytes: int | None) -> Iterator[HugetlbPool]:
    for folder, kib in sorted(_sized_folders(root / HUGETLB_FOLDER), key=lambda found: found[1]):
        total_pages = _read_int(folder / "nr_hugepages")
        free_pages = _read_int(folder / "free_hugepages")
        if total_pages is not None and free_pages is not None:
            yield HugetlbPool(
                path=_shown(root, folder / "nr_hugepages"),
                page_bytes=kib << 10,
                total_pages=total_pages,
                free_pages=free_pages,
                is_default_size=kib << 10 == default_bytes,
            )


# --- NUMA ---


def _read_numa_nodes(root: Path) -> list[NumaNode]:
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node*"):
        if not folder.name[4:].isdecimal():
            continue
        fields = _kib_fields(_read_text(folder / "meminfo") or "")
        nodes.append(
            NumaNode(
                node=int(folder.name[4:]),
                total_bytes=fields.get("MemTotal"),
                free_bytes=fields.get("MemFree"),
                cpus=(_read_text(folder / "cpulist") or "").strip(),
            )
        )
    return sorted(nodes, key=lambda node: node.node)


# --- control groups ---


@dataclass(frozen=True)
class _CgroupFiles:
    """How a version of cgroups names its files."""

    version: int
    limit: str
    usage: str
    inactive_file: str


_V1 = _CgroupFiles(
    1, "memory.limit_in_bytes", "memory.usage_in_bytes", inactive_file="total_inactive_file"
)
_V2 = _CgroupFiles(2, "memory.max", "memory.current", inactive_file="inactive_file")


def _read_cgroup(root: Path) -> MemoryCgroup | None:
    """Return the group that bounds us: of v1 where it has the memory controller, else of v2."""
    for line in (_read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, controllers_path = line.partition(":")
        controllers, _, path = controllers_path.partition(":")
        if "memory" in controllers.split(","):
            return _read_hierarchy(root, _V1, path)
    for line in (_read_text(root / "proc/self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            return _read_hierarchy(root, _V2, line[3:])
    return None


def _read_hierarchy(root: Path, files: _CgroupFiles, path: str) -> MemoryCgroup | None:
    """Walk from our own group to the top of what is mounted here; the smallest rest binds."""
    top, own = _find_group(root, files.version, path)
    folders = [own, *own.parents]
    groups = [
        MemoryCgroup(
            version=files.version,
            path=_shown(root, folder),
            limit_file=_shown(root, folder / files.limit),
            limit_bytes=_read_limit(folder / files.limit),
            used_bytes=_read_used(folder, files),
        )
        for folder in folders[: folders.index(top) + 1]
        if folder.is_dir()
    ]
    bounded = [group for group in groups if group.limit_bytes is not None]
    if bounded:
        return min(bounded, key=lambda group: group.available_bytes or 0)
    return next((group for group in groups if group.used_bytes is not None), None)


def _find_group(root: Path, version: int, path: str) -> tuple[Path, Path]:
    """Return the mounted folders of the top group and of the group `path`.

    A container often mounts only its own part of the tree: then the mount's root is a part of
    `path`, or `path` names a group that is not visible here and the mount itself is ours.
    """
    mount_root, mount_point = _find_cgroup_mount(root, version)
    top = root / mount_point.lstrip("/")
    group = PurePosixPath(path)
    is_below = group.is_relative_to(mount_root) and ".." not in group.parts
    own = top / group.relative_to(mount_root) if is_below else top
    return top, own if own.is_dir() else top


def _find_cgroup_mount(root: Path, version: int) -> tuple[str, str]:
    """Return which group is mounted, and where: fields 4 and 5 of mountinfo."""
    for line in (_read_text(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, kind = line.partition(" - ")
        mount_fields, kind_fields = mount.split(), kind.split()
        if len(mount_fields) < 5 or len(kind_fields) < 3:
            continue
        filesystem, options = kind_fields[0], kind_fields[2].split(",")
        if (version == 2 and filesystem == "cgroup2") or (
            version == 1 and filesystem == "cgroup" and "memory" in options
        ):
            return _unescape(mount_fields[3]), _unescape(mount_fields[4])
    return "/", "/sys/fs/cgroup" if version == 2 else "/sys/fs/cgroup/memory"


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read_limit(path: Path) -> int | None:
    limit_bytes = _read_int(path)  # "max", no limit in v2, is no number
    return None if limit_bytes is None or limit_bytes >= V1_UNLIMITED_BYTES else limit_bytes


def _read_used(folder: Path, files: _CgroupFiles) -> int | None:
    used_bytes = _read_int(folder / files.usage)
    if used_bytes is None:
        return None
    stat = _read_text(folder / "memory.stat") or ""
    inactive = re.search(rf"^{files.inactive_file} (\d+)$", stat, re.MULTILINE)
    return max(used_bytes - int(inactive[1]), 0) if inactive else used_bytes
