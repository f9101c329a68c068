"""Every figure is named once, explained, and what the statistics say."""

import dataclasses
import gc
import re
import subprocess
import sys
from pathlib import Path

from prefixes import layout_of, publish

from pagealloc import AllocatorStats, PageAllocator, page_size_bytes
from pagealloc.kv import KVCache, KVStats, PrefixStats
from pagealloc.observe.readings import ALLOCATOR_INFO, TABLES, described_metrics, readings
from pagealloc.observe.snapshot import Snapshot, take_snapshot

ROOT = Path(__file__).resolve().parent.parent.parent

# Numbers that are no figures, and why.
LEFT_OUT = {
    AllocatorStats: {
        "n_faults": "of the process; pagealloc_process_page_faults has them by kind",
        "fragmentation": "held / live, which a query divides; infinite where nothing is live",
    },
    KVStats: {},
    PrefixStats: {},
    Snapshot: {
        "pid": "a name, no quantity",
        "lock_wait_ns": "pagealloc_lock_wait_seconds has it in Prometheus's unit",
        "time_s": "Prometheus and OpenTelemetry have a clock",
        "n_minor_faults": "a sample of pagealloc_process_page_faults",
        "n_major_faults": "a sample of pagealloc_process_page_faults",
    },
}


def numeric_names(stats_class):
    """Fields and properties that are numbers, by their annotations."""
    annotations = {
        name: str(annotation)
        for each in reversed(stats_class.__mro__)
        for name, annotation in vars(each).get("__annotations__", {}).items()
    }
    for name, found in vars(stats_class).items():
        if isinstance(found, property):
            annotations[name] = str(found.fget.__annotations__["return"])
    return {name for name, text in annotations.items() if re.search(r"\b(int|float)\b", text)}


def values(metrics):
    return {
        (metric.name, *labels.values()): value
        for metric in metrics
        for labels, value in metric.samples
    }


def test_every_number_is_a_figure_or_left_out_for_a_reason():
    for stats_class, left_out in LEFT_OUT.items():
        shown = [
            figure.field
            for table in TABLES
            if table.stats_class is stats_class
            for figure in table.figures
        ]
        assert len(shown) == len(set(shown))
        assert sorted([*shown, *left_out]) == sorted(numeric_names(stats_class))


def test_the_search_for_numbers_finds_them():
    assert {"budget_bytes", "n_live", "fragmentation"} <= numeric_names(AllocatorStats)
    assert "arenas" not in numeric_names(AllocatorStats)
    assert {"held_bytes", "budget_bytes"} <= numeric_names(KVStats)
    assert {"nbytes", "hit_rate"} <= numeric_names(PrefixStats)


def test_every_figure_is_explained_in_a_sentence_of_its_own():
    metrics = described_metrics()
    for metric in metrics:
        assert re.fullmatch(r"[A-Z].*[^.]\.", metric.help), metric
        assert len(metric.help.split()) > 1, metric
        assert not re.search(r"[`\n]|  ", metric.help), metric
    assert len({metric.help for metric in metrics}) == len(metrics)


def test_the_documentation_lists_them_as_they_are():
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(pagealloc_\w+)` \| (.*) \|$", text, re.MULTILINE)
    suffixes = {"counter": "_total", "gauge": ""}
    assert rows == [
        (metric.name + suffixes[metric.kind], metric.help) for metric in described_metrics()
    ]


def test_names_are_prometheus_s():
    metrics = described_metrics()
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert re.fullmatch(r"pagealloc_[a-z]+(_[a-z]+)*", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.name.endswith("_info") == (metric is ALLOCATOR_INFO)


def test_what_is_described_is_what_is_read():
    described = [(metric.name, metric.kind, metric.help) for metric in described_metrics()]
    assert all(metric.samples == () for metric in described_metrics())
    assert [metric[:3] for metric in readings(take_snapshot())] == described


def test_the_figures_of_an_allocator():
    page_bytes = page_size_bytes()
    with PageAllocator(backing="base", budget_bytes="1MiB") as allocator:
        with allocator.alloc(3 * page_bytes) as kept, allocator.alloc(page_bytes):
            memoryview(kept)[:] = bytes(len(kept))
        snapshot = take_snapshot()
        (own,) = [one for one in snapshot.allocators if one.stats.budget_bytes == 1 << 20]
        found = values(readings(snapshot))
        assert found["pagealloc_allocs", own.name] == 2
        assert found["pagealloc_frees", own.name] == 2
        assert found["pagealloc_live_blocks", own.name] == 0
        assert found["pagealloc_budget_bytes", own.name] == 1 << 20
        assert found["pagealloc_held_bytes", own.name] == own.stats.held_bytes
        assert found["pagealloc_conflicting_frees",] == own.stats.n_conflicts


def test_what_every_allocator_tells_of_the_process_is_told_once():
    with PageAllocator(backing="base"), PageAllocator(backing="base"):
        metrics = {metric.name: metric for metric in readings(take_snapshot())}
    assert len(metrics["pagealloc_allocs"].samples) >= 2
    for name in ("pagealloc_conflicting_frees", "pagealloc_abandoned_bytes"):
        assert [sample.labels for sample in metrics[name].samples] == [{}]


def test_what_is_unknown_or_unlimited_has_no_sample():
    with PageAllocator(backing="base"):
        snapshot = take_snapshot()
        one = snapshot.allocators[-1]
        unknown = dataclasses.replace(
            one, stats=dataclasses.replace(one.stats, huge_bytes=None, budget_bytes=None)
        )
        found = values(readings(dataclasses.replace(snapshot, allocators=(unknown,))))
        assert ("pagealloc_held_bytes", one.name) in found
        assert ("pagealloc_huge_bytes", one.name) not in found
        assert ("pagealloc_budget_bytes", one.name) not in found


def test_the_figures_of_a_cache():
    with KVCache(layout_of()) as cache:
        publish(cache, range(8))
        with cache.sequence(range(8)) as sequence:
            snapshot = take_snapshot()
            one = snapshot.caches[-1]
            found = values(readings(snapshot))
            assert found["pagealloc_kv_sequences", one.name] == 1
            assert found["pagealloc_kv_tokens", one.name] == len(sequence) == 8
            assert found["pagealloc_prefix_hits", one.name] == 1
            assert found["pagealloc_prefix_hit_ratio", one.name] == 0.5
            assert found["pagealloc_kv_waste_bytes", one.name] == (
                found["pagealloc_kv_held_bytes", one.name]
                - found["pagealloc_kv_needed_bytes", one.name]
            )


def test_what_is_closed_has_no_sample():
    allocator, cache = PageAllocator(backing="base"), KVCache(layout_of())
    snapshot = take_snapshot()
    names = snapshot.allocators[-1].name, snapshot.caches[-1].name
    allocator.close()
    cache.close()
    gc.collect()
    found = values(readings(take_snapshot()))
    assert ("pagealloc_live_blocks", names[0]) not in found
    assert ("pagealloc_kv_sequences", names[1]) not in found


def test_the_figures_of_the_process():
    snapshot = take_snapshot()
    found = values(readings(snapshot))
    assert found["pagealloc_process_page_faults", "minor"] == snapshot.n_minor_faults > 0
    assert ("pagealloc_process_page_faults", "major") in found
    assert found["pagealloc_process_resident_bytes",] > 1 << 20


def test_without_docstrings_there_are_still_figures():
    code = (
        "from pagealloc.observe.readings import readings\n"
        "from pagealloc.observe.snapshot import take_snapshot\n"
        "print(len(readings(take_snapshot())))"
    )
    process = subprocess.run(
        [sys.executable, "-OO", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(process.stdout) == len(described_metrics())
