"""Each of the doctor's rules: evidence it speaks of, and evidence it does not."""

import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest

from pagealloc import AllocatorStats, ArenaStats, PageAllocator
from pagealloc.kv import KVCache, KVLayout, KVStats, PrefixStats, is_page_safe
from pagealloc.observe import doctor
from pagealloc.observe.backing_trial import Trial
from pagealloc.observe.doctor import RULES, Finding, examine, examine_process
from pagealloc.observe.doctor_evidence import (
    Evidence,
    NumaCounts,
    ProcessFacts,
    parse_cpus,
    read_numa_counts,
    read_process_facts,
)
from pagealloc.observe.doctor_finding import as_json, as_text
from pagealloc.observe.doctor_watch import MOST_SNAPSHOTS, Watch
from pagealloc.observe.snapshot import AllocatorReading, CacheReading, Snapshot, take_snapshot
from pagealloc.observe.straddling import NO_ROWS, StraddlingRows, straddling_rows
from pagealloc.observe.system_report import (
    HugePageSetting,
    HugetlbPool,
    MemoryCgroup,
    NumaNode,
    SystemReport,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
THP = "/sys/kernel/mm/transparent_hugepage"
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"

MACHINE = SystemReport(
    page_bytes=4096,
    huge_page_bytes=2 * MIB,
    total_bytes=16 * GIB,
    available_bytes=8 * GIB,
    thp_enabled=HugePageSetting(f"{THP}/enabled", "madvise", ("always", "madvise", "never")),
    thp_defrag=HugePageSetting(f"{THP}/defrag", "madvise", ("always", "madvise", "never")),
    shmem_enabled=HugePageSetting(f"{THP}/shmem_enabled", "never", ("always", "never")),
    mthp_enabled={},
    hugetlb_pools=(HugetlbPool("/pool", 2 * MIB, 0, 0, is_default_size=True),),
    numa_nodes=(NumaNode(0, 16 * GIB, 8 * GIB, "0-3"),),
    cgroup=MemoryCgroup(2, "/sys/fs/cgroup/app", "/sys/fs/cgroup/app/memory.max", None, GIB),
    max_map_count=65_530,
    overcommit_memory=0,
    overcommit_ratio=50,
)

ARENA = ArenaStats(
    address=1 << 30,
    requested_backing="auto",
    achieved_backing="thp",
    reserved_bytes=64 * MIB,
    committed_bytes=64 * MIB,
    held_bytes=64 * MIB,
    huge_bytes=64 * MIB,
    numa_node=0,
    dedicated=False,
)

STATS = AllocatorStats(
    budget_bytes=None,
    reserved_bytes=64 * MIB,
    committed_bytes=64 * MIB,
    active_bytes=64 * MIB,
    held_bytes=64 * MIB,
    huge_bytes=64 * MIB,
    live_bytes=60 * MIB,
    idle_bytes=0,
    purged_bytes=0,
    n_live=60,
    n_allocs=100,
    n_frees=40,
    n_failed=0,
    n_faults=0,
    n_collections=0,
    n_conflicts=0,
    abandoned_bytes=0,
    arenas=(ARENA,),
    classes=(),
)

KV_STATS = KVStats(
    file_bytes=10 * MIB,
    page_table_bytes=0,
    committed_bytes=10 * MIB,
    needed_bytes=10 * MIB,
    shared_bytes=0,
    warm_bytes=0,
    n_sequences=1,
    n_tokens=100,
    n_mappings=60,
    budget_bytes=None,
)

NO_PREFIXES = PrefixStats(**{each.name: 0 for each in fields(PrefixStats)})


def allocator(name="0", backing="auto", **changes):
    return AllocatorReading(name, replace(STATS, **changes), (), backing)


def cache(name="0", prefixes=NO_PREFIXES, straddling=NO_ROWS, **changes):
    return CacheReading(name, replace(KV_STATS, **changes), prefixes, "<KVLayout>", straddling)


def series(*moments, interval_s=1.0, n_lock_waits=0, lock_wait_s=0.0):
    """Return a snapshot for each moment, which is a list of readings.

    Threads waited for locks between each and the next.
    """
    return tuple(
        Snapshot(
            pid=1,
            time_s=1000.0 + number * interval_s,
            n_minor_faults=number,
            n_major_faults=0,
            resident_bytes=100 * MIB,
            n_lock_waits=7 + number * n_lock_waits,
            lock_wait_ns=10**12 + round(number * lock_wait_s * 1e9),
            allocators=tuple(each for each in moment if isinstance(each, AllocatorReading)),
            caches=tuple(each for each in moment if isinstance(each, CacheReading)),
        )
        for number, moment in enumerate(moments)
    )


def evidence(*moments, machine=MACHINE, interval_s=1.0, waited=(0, 0.0), **changes):
    snapshots = series(
        *moments, interval_s=interval_s, n_lock_waits=waited[0], lock_wait_s=waited[1]
    )
    return Evidence(machine=machine, snapshots=snapshots, **changes)


def names(found: Evidence) -> list[str]:
    return [finding.rule for finding in examine(found)]


def only(found: Evidence, name: str) -> Finding:
    """Return the one finding, which must be of this rule."""
    findings = examine(found)
    assert [finding.rule for finding in findings] == [name]
    return findings[0]


def machine_with(**changes):
    return replace(MACHINE, **changes)


def setting(name, value):
    return HugePageSetting(f"{THP}/{name}", value, ("always", "inherit", "madvise", "never"))


class TestHealthy:
    def test_two_readings_of_a_process_that_works(self):
        assert names(evidence([allocator(), cache()], [allocator(n_allocs=900), cache()])) == []

    def test_a_machine_that_tells_nothing(self):
        nothing = SystemReport(
            4096, None, None, None, None, None, None, {}, (), (), None, None, None, None
        )
        assert names(Evidence(machine=nothing)) == []
        assert names(evidence([], [], machine=nothing)) == []

    def test_a_pool_that_nobody_asked_for(self):
        trials = (Trial("auto", "thp", None), Trial("hugetlb", None, "no pool"))
        assert names(Evidence(machine=MACHINE, trials=trials)) == []

    def test_one_reading(self):
        assert names(evidence([allocator(), cache()])) == []


class TestHugePages:
    def on_base(self, held_bytes, **changes):
        arena = replace(
            ARENA, achieved_backing="base", held_bytes=held_bytes, huge_bytes=0, **changes
        )
        return allocator(arenas=(arena,), held_bytes=held_bytes, backing=arena.requested_backing)

    def test_auto_that_got_base_pages(self):
        finding = only(evidence([self.on_base(4 * MIB)]), "huge-pages-not-achieved")
        assert finding.severity == "problem"
        assert "4.00 MiB" in finding.figure
        assert "1,024 page faults" in finding.why
        assert "$ echo 1 | sudo tee /proc/sys/vm/compact_memory" in finding.fix
        assert "$ sudo sysctl vm.nr_hugepages=2" in finding.fix

    def test_the_worst_moment_counts(self):
        found = evidence([allocator()], [self.on_base(40 * MIB)], [allocator(arenas=())])
        assert "40.0 MiB" in only(found, "huge-pages-not-achieved").figure

    def test_little_on_base_pages(self):
        assert names(evidence([self.on_base(4 * MIB - 4096)])) == []

    def test_base_pages_that_were_asked_for(self):
        assert names(evidence([self.on_base(64 * MIB, requested_backing="base")])) == []

    def test_arenas_in_which_no_huge_page_has_room(self):
        machine = machine_with(page_bytes=65536, huge_page_bytes=512 * MIB)
        assert names(evidence([self.on_base(2 * GIB)], machine=machine)) == []

    def test_the_command_is_that_of_what_stands_in_the_way(self):
        machine = machine_with(thp_defrag=setting("defrag", "never"))
        finding = only(
            evidence([self.on_base(8 * MIB)], machine=machine), "huge-pages-not-achieved"
        )
        assert finding.fix[0] == f"$ echo madvise | sudo tee {THP}/defrag"

    def test_a_refused_request_for_the_pool(self):
        refused = allocator(backing="hugetlb", arenas=(), n_failed=3, held_bytes=0, live_bytes=0)
        finding = only(evidence([refused]), "huge-pages-not-achieved")
        assert "requests refused: 3" in finding.figure
        assert finding.fix == ("$ sudo sysctl vm.nr_hugepages=32",)

    def test_a_refusal_that_ended_the_program(self):
        message = "asked for 4 bytes with backing='hugetlb', and the kernel refused"
        finding = only(evidence([], unavailable=(message,)), "huge-pages-not-achieved")
        assert message in finding.figure
        assert finding.fix == ("$ sudo sysctl vm.nr_hugepages=32",)
        assert names(evidence([], unavailable=("backing='folios': no",))) == []

    def test_the_pool_grows_by_what_is_missing(self):
        pool = HugetlbPool("/pool", 2 * MIB, 40, 10, is_default_size=True)
        refused = allocator(backing="hugetlb", arenas=(), n_failed=1, held_bytes=0, live_bytes=0)
        finding = only(
            evidence([refused], machine=machine_with(hugetlb_pools=(pool,))),
            "huge-pages-not-achieved",
        )
        assert finding.fix == ("$ sudo sysctl vm.nr_hugepages=62",)

    @pytest.mark.parametrize(("huge_bytes", "is_found"), [(0, True), (31, True), (32, False)])
    def test_huge_pages_that_are_split(self, huge_bytes, is_found):
        arena = replace(ARENA, huge_bytes=huge_bytes * MIB)
        assert names(evidence([allocator(arenas=(arena,))])) == (
            ["huge-pages-not-achieved"] if is_found else []
        )

    def test_a_kernel_that_does_not_say(self):
        arena = replace(ARENA, huge_bytes=None)
        assert names(evidence([allocator(arenas=(arena,), huge_bytes=None)])) == []

    def test_the_machine_alone_is_tried(self):
        trials = (Trial("auto", "base", None),)
        assert names(Evidence(machine=MACHINE, trials=trials)) == ["huge-pages-not-achieved"]


class TestThp:
    def test_never(self):
        finding = only(
            Evidence(machine=machine_with(thp_enabled=setting("enabled", "never"))), "thp-disabled"
        )
        assert finding.severity == "problem"
        assert finding.fix == (f"$ echo madvise | sudo tee {THP}/enabled",)

    @pytest.mark.parametrize("value", ["madvise", "always"])
    def test_on(self, value):
        assert names(Evidence(machine=machine_with(thp_enabled=setting("enabled", value)))) == []

    @pytest.mark.parametrize(
        ("by_size", "whole", "command"),
        [
            ("never", "madvise", f"$ echo inherit | sudo tee {THP}/2M"),
            ("never", "never", f"$ echo madvise | sudo tee {THP}/2M"),
            ("inherit", "never", f"$ echo madvise | sudo tee {THP}/enabled"),
            ("inherit", "madvise", None),
            ("madvise", "never", None),
        ],
    )
    def test_the_switch_of_the_size_wins(self, by_size, whole, command):
        machine = machine_with(
            thp_enabled=setting("enabled", whole),
            mthp_enabled={64 * KIB: setting("64k", "never"), 2 * MIB: setting("2M", by_size)},
        )
        fixes = [finding.fix for finding in examine(Evidence(machine=machine))]
        assert fixes == ([] if command is None else [(command,)])

    def test_the_process_may_not(self):
        finding = only(
            Evidence(machine=MACHINE, process=ProcessFacts(allows_thp=False)), "thp-disabled"
        )
        assert "PR_SET_THP_DISABLE" in finding.figure

    def test_a_kernel_without_them_says_no_too(self):
        machine = machine_with(thp_enabled=None)
        assert names(Evidence(machine=machine, process=ProcessFacts(allows_thp=False))) == []

    def test_advice_where_huge_pages_are_had_all_the_same(self):
        machine = machine_with(thp_enabled=setting("enabled", "never"))
        assert only(evidence([allocator()], machine=machine), "thp-disabled").severity == "advice"


class TestMappings:
    @pytest.mark.parametrize(("n_mappings", "is_found"), [(749, False), (750, True)])
    def test_of_the_process(self, n_mappings, is_found):
        found = Evidence(
            machine=machine_with(max_map_count=1000), process=ProcessFacts(n_mappings=n_mappings)
        )
        assert names(found) == (["max-map-count"] if is_found else [])

    @pytest.mark.parametrize(("n_mappings", "is_found"), [(187, False), (188, True)])
    def test_of_windows_which_stop_to_share_at_half(self, n_mappings, is_found):
        found = evidence(
            [cache("0", n_mappings=n_mappings), cache("1", n_mappings=187)],
            machine=machine_with(max_map_count=1000),
        )
        assert names(found) == (["max-map-count"] if is_found else [])

    def test_the_command_allows_more(self):
        found = Evidence(
            machine=machine_with(max_map_count=500_000), process=ProcessFacts(n_mappings=500_000)
        )
        finding = only(found, "max-map-count")
        assert "500,000 mappings of 500,000" in finding.figure
        assert finding.fix[0] == "$ sudo sysctl vm.max_map_count=2000000"


class TestCgroup:
    @pytest.mark.parametrize(
        ("limit_bytes", "used_bytes", "is_found"),
        [
            (GIB, GIB - 103 * MIB, False),
            (GIB, GIB - 102 * MIB, True),
            (64 * GIB, 62 * GIB, False),  # less than a tenth, and more than a GiB
            (64 * GIB, 63 * GIB + MIB, True),
            (None, GIB, False),
            (GIB, None, False),
        ],
    )
    def test_what_is_left(self, limit_bytes, used_bytes, is_found):
        group = MemoryCgroup(2, "/group", "/group/memory.max", limit_bytes, used_bytes)
        found = Evidence(machine=machine_with(cgroup=group))
        assert names(found) == (["cgroup-limit"] if is_found else [])

    def test_the_command_doubles_the_limit(self):
        group = MemoryCgroup(2, "/group", "/group/memory.max", 100 * MIB, 99 * MIB)
        finding = only(Evidence(machine=machine_with(cgroup=group)), "cgroup-limit")
        assert finding.fix[0] == f"$ echo {200 * MIB} | sudo tee /group/memory.max"
        assert "1.00 MiB left" in finding.figure


class TestBudget:
    @pytest.mark.parametrize(("live_mib", "is_found"), [(94, False), (95, True), (97, True)])
    def test_what_is_in_use(self, live_mib, is_found):
        full = allocator(budget_bytes=100 * MIB, live_bytes=live_mib * MIB)
        assert names(evidence([full])) == (["budget-pressure"] if is_found else [])

    def test_idle_memory_is_given_up(self):
        idle = allocator(budget_bytes=64 * MIB, live_bytes=40 * MIB, committed_bytes=64 * MIB)
        assert names(evidence([idle])) == []

    def test_refused_requests(self):
        calm, refused = (allocator(budget_bytes=GIB, n_failed=n) for n in (2, 5))
        finding = only(evidence([calm], [refused]), "budget-pressure")
        assert "requests refused: 3" in finding.figure
        assert names(evidence([refused], [refused])) == []  # before we looked

    def test_refused_by_an_allocator_made_meanwhile(self):
        finding = only(evidence([], [allocator(budget_bytes=GIB, n_failed=1)]), "budget-pressure")
        assert "requests refused: 1" in finding.figure

    @pytest.mark.parametrize(
        ("changes", "is_found"),
        [
            ({}, True),
            ({"warm_bytes": 6 * MIB}, False),
            ({"prefixes": replace(NO_PREFIXES, n_blocks=4, nbytes=8 * MIB)}, False),
            (
                {"prefixes": replace(NO_PREFIXES, n_blocks=4, n_pinned_blocks=4, nbytes=8 * MIB)},
                True,
            ),
        ],
    )
    def test_a_cache_that_can_give_nothing_up(self, changes, is_found):
        full = cache(budget_bytes=100 * MIB, committed_bytes=97 * MIB, **changes)
        assert names(evidence([full])) == (["budget-pressure"] if is_found else [])


class TestFragmentation:
    def held(self, held_mib=128, live_mib=8, **changes):
        return allocator(
            held_bytes=held_mib * MIB, live_bytes=live_mib * MIB, n_live=512, **changes
        )

    def test_much_held_for_little(self):
        finding = only(evidence([self.held()], [self.held()]), "fragmentation")
        assert "128 MiB held for 8.00 MiB live (16.0 times" in finding.figure

    @pytest.mark.parametrize(
        "reading",
        [
            {"held_mib": 64, "live_mib": 33},  # not twice as much
            {"held_mib": 31, "live_mib": 0.5},  # not much
            {"live_mib": 0},  # nothing is in the way
            {"n_frees": 0},  # prefaulted
        ],
    )
    def test_what_is_none(self, reading):
        assert names(evidence([self.held(**reading)], [self.held(**reading)])) == []

    def test_memory_about_to_go_back(self):
        assert names(evidence([self.held()], [self.held()], interval_s=0.9)) == []
        assert names(evidence([self.held()], [allocator()], [self.held()])) == []

    def test_memory_that_is_used_again_and_again(self):
        moments = [[self.held(n_allocs=n)] for n in (1000, 1600, 2200)]
        assert names(evidence(*moments)) == []
        moments = [[self.held(n_allocs=n)] for n in (1000, 1200, 1400)]
        assert names(evidence(*moments)) == ["fragmentation"]


class TestNuma:
    TWO_NODES = machine_with(
        numa_nodes=(
            NumaNode(0, 8 * GIB, GIB, "0-3"),
            NumaNode(1, 8 * GIB, 7 * GIB, "4-7"),
            NumaNode(2, 8 * GIB, 7 * GIB, ""),  # memory without CPUs
        )
    )

    @pytest.mark.parametrize(
        ("n_hits", "n_misses", "is_found"),
        [(19_000, 1023, False), (19_456, 1024, True), (19_500, 1024, False), (0, 0, False)],
    )
    def test_pages_of_another_node(self, n_hits, n_misses, is_found):
        before = NumaCounts(5_000_000, 70_000, 80_000)
        after = NumaCounts(5_000_000 + n_hits, 70_000 + n_misses, 80_000)
        found = evidence([], [], machine=self.TWO_NODES, numa_before=before, numa_after=after)
        assert names(found) == (["numa-misses"] if is_found else [])

    @pytest.mark.parametrize(
        ("node", "cpus", "is_found"),
        [
            (1, {0, 1}, True),
            (1, {0, 4}, False),
            (0, {0}, False),
            (2, {0}, False),  # chosen, for nobody runs there
            (None, {0}, False),
            (1, None, False),
        ],
    )
    def test_arenas_where_the_process_must_not_run(self, node, cpus, is_found):
        found = evidence(
            [allocator(arenas=(replace(ARENA, numa_node=node),))],
            machine=self.TWO_NODES,
            process=ProcessFacts(cpus=None if cpus is None else frozenset(cpus)),
        )
        assert names(found) == (["numa-misses"] if is_found else [])

    def test_the_command_names_the_node_of_the_cpus(self):
        found = evidence(
            [allocator()], machine=self.TWO_NODES, process=ProcessFacts(cpus=frozenset({5, 6}))
        )
        finding = only(found, "numa-misses")
        assert finding.fix[0].startswith("$ numactl --cpunodebind=1 --membind=1 ")


class TestContention:
    @pytest.mark.parametrize(
        ("n_waits", "wait_s", "is_found"),
        [(19, 9.0, False), (20, 0.499, False), (20, 0.5, True)],
    )
    def test_waiting(self, n_waits, wait_s, is_found):
        found = evidence([allocator()], [allocator()], interval_s=10.0, waited=(n_waits, wait_s))
        assert names(found) == (["contention"] if is_found else [])

    def test_what_was_waited_before_does_not_count(self):
        assert names(evidence([allocator()], waited=(10**6, 9.0))) == []


class TestSteadyFaults:
    def churned(self, purged_mib, held_mib=20, live_mib=0, **changes):
        return allocator(
            purged_bytes=purged_mib * MIB,
            held_bytes=held_mib * MIB,
            live_bytes=live_mib * MIB,
            **changes,
        )

    def test_memory_that_goes_and_comes(self):
        finding = only(evidence([self.churned(0)], [self.churned(64)]), "steady-faults")
        assert "64.0 MiB/s" in finding.figure

    @pytest.mark.parametrize(
        ("first", "last"),
        [
            ((0, 20), (63, 20)),  # too slow
            ((0, 22), (65, 20)),  # less once what did not come back is taken off
            ((0, 22), (64, 22)),  # not three times as much as is held
            ((0, 200), (200, 0)),  # the end of a program
        ],
    )
    def test_what_is_none(self, first, last):
        assert names(evidence([self.churned(*first)], [self.churned(*last)])) == []

    def test_what_stays_live_does_not_go_round(self):
        moments = [[self.churned(0, 1020, 1000)], [self.churned(64, 1020, 1000)]]
        assert names(evidence(*moments)) == ["steady-faults"]

    def test_growth_is_no_return(self):
        moments = [[self.churned(0, 0)], [self.churned(0, 4000, 4000, n_faults=10**6)]]
        assert names(evidence(*moments)) == []

    def large(self, n_frees, held_mib=48, n_faults=0, arenas=()):
        own = replace(ARENA, dedicated=True, held_bytes=held_mib * MIB, reserved_bytes=48 * MIB)
        return self.churned(0, held_mib, n_frees=n_frees, n_faults=n_faults, arenas=(own, *arenas))

    def test_large_blocks_that_were_seen_to_go(self):
        moments = [[self.large(0, held_mib=mib)] for mib in (48, 0, 48, 0, 48, 0, 48)]
        finding = only(evidence(*moments, interval_s=0.1), "steady-faults")
        assert any("arena_bytes" in step for step in finding.fix)

    def test_large_blocks_that_went_between_the_looks(self):
        moments = [[self.large(0)], [self.large(4, n_faults=10**6)]]
        assert names(evidence(*moments)) == ["steady-faults"]
        moments = [[self.large(0)], [self.large(4, n_faults=0)]]  # nobody touched them
        assert names(evidence(*moments)) == []
        moments = [[self.large(n, n_faults=n * 10**6, arenas=(ARENA,))] for n in (0, 4)]
        assert names(evidence(*moments)) == []  # which blocks were freed, nobody knows


class TestStraddling:
    @pytest.mark.parametrize(("n_straddling", "is_found"), [(9, False), (10, True)])
    def test_a_tenth_of_the_rows(self, n_straddling, is_found):
        found = evidence([cache(straddling=StraddlingRows(100, n_straddling, 0.25))])
        findings = examine(found)
        assert [finding.rule for finding in findings] == (["kv-row-straddling"] * is_found)
        for finding in findings:
            assert finding.severity == "advice"
            assert "25%" in finding.fix[0]

    @pytest.mark.parametrize("order", ["interleaved", "split", "block"])
    @pytest.mark.parametrize("shape", [(3, 64), (5, 100), (7, 1), (1, 3000), (8, 128), (32, 80)])
    @pytest.mark.parametrize("n_layers", [1, 3])
    def test_rows_are_counted_as_they_lie(self, order, shape, n_layers):
        layout = KVLayout(n_layers, *shape, max_tokens=4096, order=order, page_bytes=4096)
        n_rows = n_straddling = 0
        for layer in range(n_layers):
            for token in range(layout.remap_tokens):
                for kv in (0, 1):
                    offset, nbytes = layout.offset(layer, token, kv), layout.row_bytes(layer, kv)
                    n_pages = (offset + nbytes - 1) // 4096 - offset // 4096 + 1
                    n_rows += 1
                    n_straddling += n_pages > -(-nbytes // 4096)
                    if nbytes <= 4096:
                        assert (n_pages == 1) == is_page_safe(offset, nbytes, 4096)
        found = straddling_rows(layout)
        assert (found.n_rows, found.n_straddling) == (n_rows, n_straddling)
        padded = straddling_rows(replace(layout, pad_rows=True))
        assert padded.n_straddling == 0

    def test_what_padding_costs(self):
        layout = KVLayout(1, 5, 100, max_tokens=4096, page_bytes=4096)
        assert straddling_rows(layout).padding_share == pytest.approx(2048 / 2000 - 1)

    def test_packed_rows_are_left_out(self):
        layout = KVLayout(1, 8, 128, max_tokens=64, dtype="q8_0")
        assert straddling_rows(layout) == (0, 0, 0.0)
        assert straddling_rows(layout).share == 0

    def test_padding_that_fits_no_address_space(self):
        layout = KVLayout(1, 1, 1025, max_tokens=(1 << 34) + 1, page_bytes=4096)
        assert straddling_rows(layout).padding_share is None
        assert straddling_rows(layout).share > 0.4

    def test_a_snapshot_has_them(self):
        with KVCache(KVLayout(2, 5, 100, max_tokens=64)) as one:
            reading = take_snapshot().caches[-1]
            assert reading.straddling == straddling_rows(one.layout)


class TestReading:
    def test_this_process(self):
        facts = read_process_facts()
        assert facts.n_mappings is not None
        assert facts.n_mappings > 10
        assert facts.cpus

    def test_a_machine_of_ones_own(self, tmp_path):
        folder = tmp_path / "proc/7"
        folder.mkdir(parents=True)
        (folder / "maps").write_text("a\nb\nc\n")
        (folder / "status").write_text("Name:\tx\nTHP_enabled:\t0\nCpus_allowed_list:\t0-2,5\n")
        assert read_process_facts(7, tmp_path) == (3, False, frozenset({0, 1, 2, 5}))
        assert read_process_facts(8, tmp_path) == (None, None, None)

    @pytest.mark.parametrize("text", ["", "x", "3-", "-3", "1-2-3", "5-4", "1;2"])
    def test_no_list_of_cpus(self, text):
        assert parse_cpus(text) == frozenset()

    def test_numa_counters_of_all_nodes(self, tmp_path):
        for node in (0, 1):
            folder = tmp_path / f"sys/devices/system/node/node{node}"
            folder.mkdir(parents=True)
            (folder / "numastat").write_text(f"numa_hit 10\nnuma_miss {node}\nother_node 3\n")
        assert read_numa_counts(tmp_path) == (20, 1, 6)
        assert read_numa_counts(tmp_path / "nowhere") is None


class TestWatching:
    def test_what_is_kept_is_bounded_and_reaches_from_first_to_last(self, tmp_path):
        watch = Watch(tmp_path)
        for _ in range(3 * MOST_SNAPSHOTS):
            watch.look()
        snapshots = watch.evidence().snapshots
        times = [snapshot.time_s for snapshot in snapshots]
        assert MOST_SNAPSHOTS / 2 <= len(snapshots) <= MOST_SNAPSHOTS
        assert times == sorted(times)
        watch.look()
        assert watch.evidence().snapshots[0] == snapshots[0]

    def test_the_thread_ends(self, tmp_path):
        with Watch(tmp_path) as watch:
            assert any(thread.name == "pagealloc-doctor" for thread in threading.enumerate())
        assert not any(thread.name == "pagealloc-doctor" for thread in threading.enumerate())
        n_snapshots = len(watch.evidence().snapshots)
        assert n_snapshots >= 2
        watch.stop()
        assert len(watch.evidence().snapshots) == n_snapshots

    def test_the_worst_moment_of_the_machine_is_kept(self, tmp_path):
        def use(nbytes, n_lines):
            for name, text in {
                "proc/self/cgroup": "0::/\n",
                "proc/self/maps": "line\n" * n_lines,
                "proc/sys/vm/max_map_count": "100\n",
                "sys/fs/cgroup/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/memory.current": f"{nbytes}\n",
            }.items():
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)

        watch = Watch(tmp_path)
        for nbytes, n_lines in ((0, 1), (GIB - MIB, 80), (MIB, 2)):
            use(nbytes, n_lines)
            watch.look()
        assert set(names(watch.evidence())) == {"cgroup-limit", "max-map-count"}

    def test_a_process_examines_itself(self, tmp_path):
        with PageAllocator(budget_bytes="1MiB") as one, one.alloc("1MiB"):
            assert [finding.rule for finding in examine_process(0.01, root=tmp_path)] == [
                "budget-pressure"
            ]

    @pytest.mark.parametrize("seconds", [0, -1, float("nan")])
    def test_no_time_to_look(self, seconds):
        with pytest.raises(ValueError, match="above 0"):
            examine_process(seconds)


class TestShowing:
    FINDINGS = (
        Finding("a-rule", "advice", "a title", "1 of 2", "it costs", ("do this", "$ a command")),
        Finding("other", "problem", "worse", "3 KiB " * 60, "it " * 80, ("$ " + "long " * 60,)),
    )

    def test_text_has_all_of_it_and_problems_first(self):
        text = as_text(self.FINDINGS)
        assert text.startswith("problem: worse  [other]\n")
        assert "advice: a title  [a-rule]\n  seen  1 of 2\n  why   it costs\n" in text
        assert "  fix   do this\n        $ a command\n" in text
        assert text.endswith("1 problem, 1 piece of advice")
        assert "\x1b" not in text

    def test_prose_is_wrapped_and_commands_are_not(self):
        lines = as_text(self.FINDINGS).splitlines()
        assert all(len(line) <= 96 for line in lines if "$" not in line)
        assert any(line.count("long") == 60 for line in lines)

    def test_colour(self):
        assert "\x1b[1;31mproblem" in as_text(self.FINDINGS, colour=True)

    def test_nothing(self):
        assert as_text([]) == "nothing found"
        assert as_json([]) == {"healthy": True, "findings": []}


def test_every_rule_has_its_section_in_the_docs():
    text = (DOCS / "doctor.md").read_text()
    sections = [line[4:-1] for line in text.splitlines() if line.startswith("## `")]
    assert sections == list(RULES)


def test_findings_have_the_names_of_their_rules():
    """What speaks under one name here is looked up under that name in the docs."""
    sick = evidence(
        [allocator(budget_bytes=MIB, live_bytes=MIB, held_bytes=64 * MIB, arenas=()), cache()],
        [allocator(budget_bytes=MIB, live_bytes=MIB, held_bytes=64 * MIB, arenas=()), cache()],
        machine=machine_with(thp_enabled=setting("enabled", "never")),
    )
    for finding in examine(sick):
        assert doctor.RULES[finding.rule](sick) == finding
    assert len(examine(sick)) == 3
