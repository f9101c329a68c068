"""``pagealloc info``: what this machine offers, what would change it, and what "auto" gets here."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pagealloc.observe.backing_trial import BACKINGS, PROBE_BYTES, Trial, try_backing
from pagealloc.observe.system_report import (
    THP_FOLDER,
    HugePageSetting,
    SystemReport,
    read_system_report,
)
from pagealloc.units import format_bytes

NAME = "info"
HELP = "show the memory this machine offers, and what would change it"

WANTED_MAP_COUNT = 262_144
OVERCOMMIT_MODES = {0: "heuristic", 1: "always", 2: "never"}


@dataclass(frozen=True)
class Row:
    """One line of the report, with the command that would change what it says."""

    label: str
    value: str
    command: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pagealloc info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = read_system_report()
    trials = [try_backing(name) for name in BACKINGS]
    if args.json:
        print(json.dumps(as_json(report, trials), indent=2))
        return 0
    for title, rows in sections(report, trials):
        print(title)
        width = max(len(row.label) for row in rows)
        for row in rows:
            print(f"  {row.label:<{width}}  {row.value}")
            if row.command:
                print(f"      to change: {row.command}")
        print()
    return 0


def as_json(report: SystemReport, trials: list[Trial]) -> dict[str, Any]:
    """Return the report for machines: every number in bytes or pages, None where unknown."""
    return {
        **asdict(report),
        "usable_bytes": report.usable_bytes,
        "backings": {trial.requested: asdict(trial) for trial in trials},
    }


def sections(report: SystemReport, trials: list[Trial]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the parts of the report for people."""
    yield "Pages", list(_page_rows(report))
    yield "Transparent huge pages (THP)", list(_thp_rows(report))
    yield "Huge pages set aside (hugetlb)", list(_hugetlb_rows(report))
    yield "Memory", list(_memory_rows(report))
    yield (
        f"Backing achieved here, tried with {format_bytes(PROBE_BYTES)}",
        [
            Row(trial.requested, trial.achieved or f"not available: {trial.reason}")
            for trial in trials
        ],
    )


def _known(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _known_bytes(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else format_bytes(nbytes)


def _page_rows(report: SystemReport) -> Iterator[Row]:
    yield Row("page", format_bytes(report.page_bytes))
    if report.huge_page_bytes is not None:
        yield Row("transparent huge page", format_bytes(report.huge_page_bytes))
    sizes = [format_bytes(pool.page_bytes) for pool in report.hugetlb_pools]
    yield Row("hugetlb pages", ", ".join(sizes) or "none offered by this kernel")


def _setting_row(
    label: str, setting: HugePageSetting, wanted: tuple[str, ...], of: str = ""
) -> Row:
    """Return the row of a switch, with the command to the first wanted value not in force."""
    others = [choice for choice in setting.choices if choice != setting.value]
    value = next((choice for choice in wanted if choice in others), wanted[0])
    command = f"echo {value} | sudo tee {setting.path}"
    return Row(label, f"{setting.value}{of}  (others: {', '.join(others)})", command)


def _thp_rows(report: SystemReport) -> Iterator[Row]:
    if report.thp_enabled is None:
        yield Row("enabled", "not offered by this kernel, or not visible here")
        return
    yield _setting_row("enabled", report.thp_enabled, ("madvise", "always"))
    if report.thp_defrag is not None:
        yield _setting_row("defrag", report.thp_defrag, ("madvise", "defer+madvise", "always"))
    if report.shmem_enabled is not None:
        yield _setting_row("shmem_enabled", report.shmem_enabled, ("advise", "within_size"))
        yield Row("", "(KV windows collapse whole huge pages by themselves, whatever it says)")
    for shared, sizes in _by_setting(report.mthp_enabled).items():
        kib = ",".join(str(page_bytes >> 10) for page_bytes in sizes)
        # The shell spells out the braces, and tee writes to each file.
        folders = "hugepages-" + (f"{{{kib}}}" if len(sizes) > 1 else kib) + "kB"
        of = " for " + ", ".join(format_bytes(page_bytes) for page_bytes in sizes)
        setting = replace(shared, path=f"/{THP_FOLDER}/{folders}/enabled")
        yield _setting_row("by size", setting, ("madvise", "inherit"), of)


def _by_setting(mthp_enabled: dict[int, HugePageSetting]) -> dict[HugePageSetting, list[int]]:
    """Return the sizes that stand alike, by what they share."""
    groups: dict[HugePageSetting, list[int]] = {}
    for page_bytes, setting in mthp_enabled.items():
        groups.setdefault(replace(setting, path=""), []).append(page_bytes)
    return groups


def _hugetlb_rows(report: SystemReport) -> Iterator[Row]:
    if not report.hugetlb_pools:
        yield Row("pools", "none offered by this kernel, or not visible here")
    for pool in report.hugetlb_pools:
        yield Row(
            f"{format_bytes(pool.page_bytes)} pages",
            f"{pool.total_pages:,} set aside, {pool.free_pages:,} free",
            "sudo sysctl vm.nr_hugepages=N"
            if pool.is_default_size
            else f"echo N | sudo tee {pool.path}",
        )


def _memory_rows(report: SystemReport) -> Iterator[Row]:
    yield Row("total", _known_bytes(report.total_bytes))
    yield Row("available", _known_bytes(report.available_bytes))
    only = " (the only one: numa_node= changes nothing)" if len(report.numa_nodes) == 1 else ""
    for node in report.numa_nodes:
        yield Row(
            f"NUMA node {node.node}",
            f"{_known_bytes(node.total_bytes)}, {_known_bytes(node.free_bytes)} free, "
            f"CPUs {node.cpus or 'none'}{only}",
        )
    group = report.cgroup
    if group is None:
        yield Row("control group", "none for memory, or not visible here")
    else:
        limit = "none" if group.limit_bytes is None else format_bytes(group.limit_bytes)
        yield Row(
            f"control group v{group.version}",
            f"limit {limit}, used {_known_bytes(group.used_bytes)}  ({group.path})",
            f"echo BYTES | sudo tee {group.limit_file}",
        )
    yield Row("usable by this process", _known_bytes(report.usable_bytes))
    yield Row(
        "vm.max_map_count",
        _known(report.max_map_count),
        f"sudo sysctl vm.max_map_count={WANTED_MAP_COUNT}",
    )
    mode = report.overcommit_memory
    if mode is not None:
        name = OVERCOMMIT_MODES.get(mode, "unknown")
        ratio = f", ratio {report.overcommit_ratio} %" if mode == 2 else ""
        other = 0 if mode else 1
        yield Row(
            "vm.overcommit_memory",
            f"{mode} ({name}{ratio})",
            f"sudo sysctl vm.overcommit_memory={other}",
        )
