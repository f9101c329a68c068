import json
import re
import shlex
from dataclasses import replace

import pytest

from pagealloc.cli import info
from pagealloc.cli.main import main
from pagealloc.observe.system_report import (
    HugePageSetting,
    HugetlbPool,
    MemoryCgroup,
    SystemReport,
    read_system_report,
)

THP = "/sys/kernel/mm/transparent_hugepage"

NOTHING = SystemReport(
    page_bytes=4096,
    huge_page_bytes=None,
    total_bytes=None,
    available_bytes=None,
    thp_enabled=None,
    thp_defrag=None,
    shmem_enabled=None,
    mthp_enabled={},
    hugetlb_pools=(),
    numa_nodes=(),
    cgroup=None,
    max_map_count=None,
    overcommit_memory=None,
    overcommit_ratio=None,
)


def switch(name: str, value: str) -> HugePageSetting:
    return HugePageSetting(f"{THP}/{name}", value, ("always", "inherit", "madvise", "never"))


def commands(report: SystemReport) -> list[str]:
    return [row.command for _, rows in info.sections(report, []) for row in rows if row.command]


def test_it_runs_here_and_tries_every_backing(capsys):
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for backing in info.BACKINGS:
        assert re.search(rf"^  {backing} +\S", out, re.MULTILINE)


def test_json_is_one_object_with_numbers_in_bytes(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["page_bytes"] == read_system_report().page_bytes
    assert set(report["backings"]) == set(info.BACKINGS)
    auto = report["backings"]["auto"]
    assert auto["achieved"] in ("hugetlb", "thp", "base")
    assert auto["reason"] is None
    assert report["backings"]["base"]["achieved"] == "base"


def test_a_backing_that_cannot_be_had_says_why():
    trials = [info.try_backing(name) for name in info.BACKINGS]
    for trial in trials:
        assert (trial.achieved is None) == bool(trial.reason)


def test_a_machine_that_tells_nothing_is_still_a_report():
    for _, rows in info.sections(NOTHING, [info.Trial("auto", "base", None)]):
        assert all(row.label and row.value for row in rows)


def test_each_switch_comes_with_the_command_that_changes_it():
    report = replace(
        NOTHING,
        thp_enabled=switch("enabled", "never"),
        shmem_enabled=HugePageSetting(
            f"{THP}/shmem_enabled", "never", ("always", "within_size", "advise", "never")
        ),
        hugetlb_pools=(
            HugetlbPool("/pool-2M", 2 << 20, 0, 0, is_default_size=True),
            HugetlbPool("/pool-1G", 1 << 30, 0, 0, is_default_size=False),
        ),
        cgroup=MemoryCgroup(2, "/group", "/group/memory.max", 1 << 30, 0),
        max_map_count=65530,
    )
    assert commands(report) == [
        f"echo madvise | sudo tee {THP}/enabled",
        f"echo advise | sudo tee {THP}/shmem_enabled",
        "sudo sysctl vm.nr_hugepages=N",
        "echo N | sudo tee /pool-1G",
        "echo BYTES | sudo tee /group/memory.max",
        "sudo sysctl vm.max_map_count=262144",
    ]


@pytest.mark.parametrize("value", ["always", "inherit", "madvise", "never"])
def test_the_command_never_names_the_value_in_force(value):
    report = replace(
        NOTHING, thp_enabled=switch("enabled", value), thp_defrag=switch("defrag", value)
    )
    for command in commands(report):
        assert shlex.split(command)[1] not in (value, "never")


def test_sizes_that_stand_alike_share_a_line():
    report = replace(
        NOTHING,
        thp_enabled=switch("enabled", "madvise"),
        mthp_enabled={
            kib << 10: switch(f"hugepages-{kib}kB/enabled", value)
            for kib, value in ((16, "never"), (64, "never"), (2048, "inherit"))
        },
    )
    assert commands(report)[1:3] == [
        f"echo madvise | sudo tee {THP}/hugepages-{{16,64}}kB/enabled",
        f"echo madvise | sudo tee {THP}/hugepages-2048kB/enabled",
    ]
