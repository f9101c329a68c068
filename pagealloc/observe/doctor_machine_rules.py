"""Rules about the machine: what it refuses the process, or soon will.

Structure
    one function a rule: Evidence -> Finding or None
Invariants
    a rule speaks only of what was seen; what is unknown is no finding
Units
    Bytes, pages and counts, as the names say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.observe.doctor_evidence import parse_cpus
from pagealloc.observe.doctor_finding import Finding
from pagealloc.observe.system_report import THP_FOLDER
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from pagealloc.observe.doctor_evidence import Evidence
    from pagealloc.observe.snapshot import AllocatorReading
    from pagealloc.observe.system_report import SystemReport

__all__ = [
    "cgroup_limit",
    "huge_pages_not_achieved",
    "max_map_count",
    "numa_misses",
    "thp_disabled",
]

HUGE_BACKINGS = ("hugetlb", "thp")

MIN_ON_BASE_HUGE_PAGES = 2
"""Less than that on base pages costs a few page faults."""

MIN_SPLIT_BYTES = 64 << 20
"""One arena.  trim() and purges split huge pages of small heaps on purpose."""

SPLIT_SHARE = 0.5
"""Below it, most accesses miss the huge pages there are."""

DEFAULT_ARENA_BYTES = 64 << 20
"""What a pool of huge pages must have free for an allocator's first arena."""

WANTED_MAP_COUNT = 262_144
"""What databases and search engines ask their administrators for, too."""

NEAR_MAP_COUNT_SHARE = 0.75
"""A process that threads and libraries grow passes the rest in one step: a fork of a layer-major
sequence takes two mappings a layer."""

SHARING_MAP_COUNT_SHARE = 0.5
"""Where windows stop to share by mapping and copy, see `pagealloc.ExtentStore`."""

NEAR_LIMIT_SHARE = 0.1
NEAR_LIMIT_BYTES = 1 << 30
"""A rest is small if it is both a tenth of the limit and less than a GiB: of 64 GiB, 6 are much."""

MISS_SHARE = 0.05
"""One page in twenty: remote memory takes one and a half to two times as long, so that is where a
program begins to feel it."""

MIN_MISS_PAGES = 1024
"""The counters are those of the whole machine: fewer are others' business."""

MIN_REMOTE_BYTES = 32 << 20
"""Less than the last-level cache of a server holds is no matter of nodes."""


def thp_disabled(evidence: Evidence) -> Finding | None:
    """Transparent huge pages are off: on the machine, for their usual size, or for the process."""
    machine = evidence.machine
    if machine.thp_enabled is None:  # a kernel without them, or hidden: nothing to switch
        return None
    setting = _thp_switch_off(machine)
    if setting is not None:
        figure = f"{setting} says never"
        fix: tuple[str, ...] = (f"$ echo {_on_value(machine, setting)} | sudo tee {setting}",)
    elif evidence.process.allows_thp is False:
        figure = "THP_enabled is 0 in /proc/PID/status: prctl(PR_SET_THP_DISABLE) was called"
        fix = (
            (
                "Leave that call out, in the program or in what starts it: container runtimes and "
                "service managers pass it on to their children."
            ),
        )
    else:
        return None
    is_had = any(
        arena.achieved_backing in HUGE_BACKINGS
        for snapshot in evidence.snapshots
        for reading in snapshot.allocators
        for arena in reading.stats.arenas
    ) or any(trial.achieved in HUGE_BACKINGS for trial in evidence.trials)
    return Finding(
        rule="thp-disabled",
        severity="advice" if is_had else "problem",
        title="transparent huge pages are disabled",
        figure=figure
        + (
            "; huge pages were achieved all the same, by hugetlb or MADV_COLLAPSE" if is_had else ""
        ),
        why="Every 4 KiB page costs a page fault of its own, and its own entry in the TLB; one of "
        "2 MiB costs one for 512 of them.  With madvise, only who asks gets them."
        if machine.page_bytes == 4096
        else "Every page costs a fault and a TLB entry of its own, where one huge page costs one.",
        fix=fix,
    )


def huge_pages_not_achieved(evidence: Evidence) -> Finding | None:
    """An allocator asked for huge pages, and works on base pages or was refused."""
    machine = evidence.machine
    huge_bytes = machine.huge_page_bytes or (2 << 20)
    seen, hugetlb_asked, base_bytes = [], False, 0
    for name, series in evidence.allocator_series().items():
        readings = [reading for _, reading in series]
        hugetlb_asked |= readings[-1].backing == "hugetlb"
        worst = max(readings, key=lambda reading: _base_bytes(reading, huge_bytes))
        on_base_bytes = _base_bytes(worst, huge_bytes)
        split = max(readings, key=_split_bytes)
        n_refused = _n_refused_without_arena(readings)
        if on_base_bytes >= MIN_ON_BASE_HUGE_PAGES * huge_bytes:
            base_bytes += on_base_bytes
            seen.append(
                f"allocator {name}: asked for {worst.backing!r}, and {format_bytes(on_base_bytes)} "
                f"of {format_bytes(worst.stats.held_bytes)} held lie on base pages"
            )
        elif n_refused:
            base_bytes += DEFAULT_ARENA_BYTES
            seen.append(
                f"allocator {name}: asked for {readings[-1].backing!r}; requests refused: "
                f"{n_refused:,}"
            )
        elif _split_bytes(split):
            base_bytes += _split_bytes(split)
            seen.append(
                f"allocator {name}: of {format_bytes(split.stats.held_bytes)} held, huge pages map "
                f"only {format_bytes(split.stats.huge_bytes or 0)}"
            )
    for message in () if seen else evidence.unavailable:
        asked = [name for name in HUGE_BACKINGS if f"backing={name!r}" in message]
        if asked:
            hugetlb_asked |= "hugetlb" in asked
            base_bytes += DEFAULT_ARENA_BYTES
            seen.append(f"the program ended of it: {message}")
    if not evidence.snapshots and huge_bytes <= 2 * DEFAULT_ARENA_BYTES:
        for trial in evidence.trials:
            if trial.requested == "auto" and trial.achieved == "base":
                base_bytes = DEFAULT_ARENA_BYTES
                seen.append("tried here: 'auto' got base pages")
    if not seen:
        return None
    return Finding(
        rule="huge-pages-not-achieved",
        severity="problem",
        title="huge pages were asked for, and not achieved",
        figure="; ".join(seen),
        why=f"{format_bytes(base_bytes)} on base pages are {base_bytes // machine.page_bytes:,} "
        f"page faults at first touch, on huge pages {-(-base_bytes // huge_bytes):,}; and as many "
        "entries compete for the TLB.",
        fix=tuple(_huge_page_steps(evidence, base_bytes, hugetlb_asked=hugetlb_asked)),
    )


def max_map_count(evidence: Evidence) -> Finding | None:
    """The process has nearly as many mappings as the kernel allows."""
    most = evidence.machine.max_map_count
    if not most:
        return None
    n_mappings = evidence.process.n_mappings or 0
    n_of_windows = max(
        (sum(each.stats.n_mappings for each in snap.caches) for snap in evidence.snapshots),
        default=0,
    )
    windows_most = SHARING_MAP_COUNT_SHARE * most
    if max(n_mappings, n_of_windows) < NEAR_MAP_COUNT_SHARE * most and (
        n_of_windows < NEAR_MAP_COUNT_SHARE * windows_most
    ):
        return None
    n_wanted = max(WANTED_MAP_COUNT, 4 * most)
    of_windows = f", {n_of_windows:,} of them of KV windows" if n_of_windows else ""
    return Finding(
        rule="max-map-count",
        severity="problem",
        title="the process is near the kernel's limit of mappings",
        figure=f"{max(n_mappings, n_of_windows):,} mappings of {most:,} (vm.max_map_count)"
        f"{of_windows}",
        why="At half of the limit, forks and shared prompts of KV caches copy pages instead of "
        "mapping them; at the limit mmap fails, in every library of the process.",
        fix=(
            f"$ sudo sysctl vm.max_map_count={n_wanted}",
            f"$ echo vm.max_map_count={n_wanted} | sudo tee /etc/sysctl.d/90-pagealloc.conf",
            (
                'Or fewer mappings: KVLayout(..., order="block") takes 2 a forked sequence, not 2 '
                "a layer."
            ),
        ),
    )


def cgroup_limit(evidence: Evidence) -> Finding | None:
    """The control group has little left."""
    group = evidence.machine.cgroup
    if group is None or group.limit_bytes is None or group.used_bytes is None:
        return None
    rest_bytes = group.available_bytes
    small_bytes = min(NEAR_LIMIT_SHARE * group.limit_bytes, NEAR_LIMIT_BYTES)
    if rest_bytes is None or rest_bytes >= small_bytes:
        return None
    return Finding(
        rule="cgroup-limit",
        severity="problem",
        title="the control group's memory limit is near",
        figure=f"{format_bytes(group.used_bytes)} of {format_bytes(group.limit_bytes)} used, "
        f"{format_bytes(rest_bytes)} left ({group.path}); file pages that can be dropped are not "
        "counted",
        why="At the limit the kernel reclaims, which stalls all that allocate, and then kills a "
        "process of the group.",
        fix=(
            f"$ echo {_round_up(2 * group.limit_bytes)} | sudo tee {group.limit_file}",
            (
                'Or have pagealloc refuse first: budget_bytes="auto" takes what is left when the '
                "allocator is made, and PAGEALLOC_BUDGET_BYTES bounds the default one."
            ),
        ),
    )


def numa_misses(evidence: Evidence) -> Finding | None:
    """Memory lies on another node than that which was meant, or than the CPUs that use it."""
    seen = []
    before, after = evidence.numa_before, evidence.numa_after
    if before is not None and after is not None:
        n_missed = after.n_miss_pages - before.n_miss_pages
        n_placed = n_missed + after.n_hit_pages - before.n_hit_pages
        if n_missed >= MIN_MISS_PAGES and n_missed >= MISS_SHARE * n_placed:
            n_remote = after.n_remote_pages - before.n_remote_pages
            seen.append(
                f"{n_missed:,} of {n_placed:,} pages ({n_missed / n_placed:.0%}) were placed on "
                f"another node than meant (numa_miss), {n_remote:,} on another than the CPU's "
                "(other_node), of the whole machine while it was watched"
            )
    remote = _remote_bytes(evidence)
    for node, nbytes in sorted(remote.items()):
        if nbytes >= MIN_REMOTE_BYTES:
            seen.append(
                f"{format_bytes(nbytes)} of arenas lie on node {node}, on whose CPUs the process "
                "must not run"
            )
    if not seen:
        return None
    free = ", ".join(
        f"node {node.node} {format_bytes(node.free_bytes)}"
        for node in evidence.machine.numa_nodes
        if node.free_bytes is not None
    )
    nodes = [node.node for node in evidence.machine.numa_nodes]
    home = _home_node(evidence)
    chosen = home if home is not None else (nodes[0] if nodes else 0)
    return Finding(
        rule="numa-misses",
        severity="problem",
        title="memory lies on the wrong NUMA node",
        figure="; ".join(seen) + (f"; free now: {free}" if free else ""),
        why="Each access goes over the link between the sockets, which takes about one and a half "
        "times as long and is narrower.",
        fix=(
            f"$ numactl --cpunodebind={chosen} --membind={chosen} python SCRIPT.py",
            (
                f"Or bind the memory alone: PageAllocator(numa_node={chosen}); preferred={chosen} "
                "takes other nodes when that one is full."
            ),
        ),
    )


# --- what the rules ask of the evidence ---


def _thp_switch_off(machine: SystemReport) -> str | None:
    """Return the file of the switch that says never; None if none does."""
    if machine.thp_enabled is None:
        return None
    by_size = machine.mthp_enabled.get(machine.huge_page_bytes or 0)
    if by_size is not None and by_size.value != "inherit":  # that of the size wins
        return by_size.path if by_size.value == "never" else None
    return machine.thp_enabled.path if machine.thp_enabled.value == "never" else None


def _on_value(machine: SystemReport, path: str) -> str:
    """Return what to write into a switch; the size's own can follow that of the machine."""
    enabled = machine.thp_enabled
    is_of_size = enabled is not None and path != enabled.path
    return "inherit" if is_of_size and enabled and enabled.value != "never" else "madvise"


def _base_bytes(reading: AllocatorReading, huge_bytes: int) -> int:
    """Return what is held on base pages though huge ones were asked for and would have fitted."""
    return sum(
        arena.held_bytes
        for arena in reading.stats.arenas
        if arena.requested_backing != "base"
        and arena.achieved_backing == "base"
        and 2 * arena.reserved_bytes >= huge_bytes
    )


def _split_bytes(reading: AllocatorReading) -> int:
    """Return what arenas that were seen on THP hold on base pages now; 0 if that is little."""
    arenas = [arena for arena in reading.stats.arenas if arena.achieved_backing == "thp"]
    held_bytes = sum(arena.held_bytes for arena in arenas)
    known = [arena.huge_bytes for arena in arenas if arena.huge_bytes is not None]
    if len(known) < len(arenas) or held_bytes < MIN_SPLIT_BYTES:
        return 0
    is_split = sum(known) < SPLIT_SHARE * held_bytes
    return held_bytes - sum(known) if is_split else 0


def _n_refused_without_arena(readings: list[AllocatorReading]) -> int:
    """Return how often huge pages were refused to an allocator that takes nothing else."""
    last = readings[-1]
    has_any = any(reading.stats.arenas for reading in readings)
    return last.stats.n_failed if last.backing in HUGE_BACKINGS and not has_any else 0


def _huge_page_steps(evidence: Evidence, nbytes: int, *, hugetlb_asked: bool) -> list[str]:
    machine = evidence.machine
    steps = []
    setting = _thp_switch_off(machine)
    if setting is not None and not hugetlb_asked:
        steps.append(f"$ echo {_on_value(machine, setting)} | sudo tee {setting}")
    elif machine.thp_enabled is not None and not hugetlb_asked:
        if evidence.process.allows_thp is False:
            steps.append("Leave out prctl(PR_SET_THP_DISABLE), in the program or what starts it.")
        elif machine.thp_defrag is not None and machine.thp_defrag.value in ("never", "defer"):
            steps.append(f"$ echo madvise | sudo tee /{THP_FOLDER}/defrag")
        else:
            steps.append("$ echo 1 | sudo tee /proc/sys/vm/compact_memory")
    pool = next((pool for pool in machine.hugetlb_pools if pool.is_default_size), None)
    if pool is not None:
        n_pages = pool.total_pages + max(-(-nbytes // pool.page_bytes) - pool.free_pages, 0)
        steps.append(f"$ sudo sysctl vm.nr_hugepages={max(n_pages, pool.total_pages + 1)}")
    if not steps:
        steps.append('This kernel offers no huge pages: backing="base" asks for none.')
    return steps


def _remote_bytes(evidence: Evidence) -> dict[int, int]:
    """Return what arenas hold on nodes with CPUs none of which the process may use, by node."""
    cpus_of = {node.node: parse_cpus(node.cpus) for node in evidence.machine.numa_nodes}
    allowed = evidence.process.cpus
    if not allowed or len(cpus_of) < 2 or not evidence.snapshots:
        return {}
    remote: dict[int, int] = {}
    for reading in evidence.snapshots[-1].allocators:
        for arena in reading.stats.arenas:
            cpus = cpus_of.get(-1 if arena.numa_node is None else arena.numa_node)
            if arena.numa_node is not None and cpus and not cpus & allowed:
                remote[arena.numa_node] = remote.get(arena.numa_node, 0) + arena.held_bytes
    return remote


def _home_node(evidence: Evidence) -> int | None:
    """Return the node with most of the CPUs that the process may use."""
    allowed = evidence.process.cpus or frozenset()
    counts = [
        (len(parse_cpus(node.cpus) & allowed), -node.node) for node in evidence.machine.numa_nodes
    ]
    n_cpus, node = max(counts, default=(0, 0))
    return -node if n_cpus else None


def _round_up(nbytes: int) -> int:
    return -(-nbytes // (1 << 20)) << 20
