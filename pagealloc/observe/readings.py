"""Readings: every figure there is to show, named once.

Purpose
    What Prometheus, OpenTelemetry, `pagealloc top` and its web page show, out of the counters that
    ``stats()`` reads: nothing is counted here.
Structure
    ::

        Snapshot: AllocatorStats, KVStats, PrefixStats --TABLES--> Metric: name, kind, samples

    The help texts are the first sentences of what those classes say of their fields.
Units
    In the names: bytes, seconds, or a count.
"""

from __future__ import annotations

import re
from functools import cache
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pagealloc import AllocatorStats
from pagealloc.kv import KVStats, PrefixStats
from pagealloc.observe.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Metric", "Sample", "described_metrics", "readings"]

Kind = Literal["counter", "gauge"]


class Sample(NamedTuple):
    """One value, of whatever its labels say."""

    labels: Mapping[str, str]
    value: float


class Metric(NamedTuple):
    """A figure, and its values now."""

    name: str
    """As Prometheus has it, without the "_total" of a counter."""
    kind: Kind
    help: str
    samples: tuple[Sample, ...]


class Figure(NamedTuple):
    """What of some statistics is shown, and as what."""

    field: str
    name: str
    kind: Kind


class Table(NamedTuple):
    """The figures of one kind of statistics, and where in a snapshot these are."""

    figures: tuple[Figure, ...]
    stats_class: type
    find: Callable[[Snapshot], Iterator[tuple[Mapping[str, str], Any]]]


ALLOCATOR_FIGURES = (
    Figure("n_allocs", "pagealloc_allocs", "counter"),
    Figure("n_frees", "pagealloc_frees", "counter"),
    Figure("n_failed", "pagealloc_failed_allocs", "counter"),
    Figure("n_live", "pagealloc_live_blocks", "gauge"),
    Figure("live_bytes", "pagealloc_live_bytes", "gauge"),
    Figure("idle_bytes", "pagealloc_idle_bytes", "gauge"),
    Figure("active_bytes", "pagealloc_active_bytes", "gauge"),
    Figure("committed_bytes", "pagealloc_committed_bytes", "gauge"),
    Figure("held_bytes", "pagealloc_held_bytes", "gauge"),
    Figure("huge_bytes", "pagealloc_huge_bytes", "gauge"),
    Figure("reserved_bytes", "pagealloc_reserved_bytes", "gauge"),
    Figure("budget_bytes", "pagealloc_budget_bytes", "gauge"),
    Figure("purged_bytes", "pagealloc_purged_bytes", "counter"),
    Figure("n_collections", "pagealloc_collections", "counter"),
)
KV_FIGURES = (
    Figure("n_sequences", "pagealloc_kv_sequences", "gauge"),
    Figure("n_tokens", "pagealloc_kv_tokens", "gauge"),
    Figure("held_bytes", "pagealloc_kv_held_bytes", "gauge"),
    Figure("file_bytes", "pagealloc_kv_file_bytes", "gauge"),
    Figure("page_table_bytes", "pagealloc_kv_page_table_bytes", "gauge"),
    Figure("needed_bytes", "pagealloc_kv_needed_bytes", "gauge"),
    Figure("shared_bytes", "pagealloc_kv_shared_bytes", "gauge"),
    Figure("waste_bytes", "pagealloc_kv_waste_bytes", "gauge"),
    Figure("warm_bytes", "pagealloc_kv_warm_bytes", "gauge"),
    Figure("committed_bytes", "pagealloc_kv_committed_bytes", "gauge"),
    Figure("budget_bytes", "pagealloc_kv_budget_bytes", "gauge"),
    Figure("n_mappings", "pagealloc_kv_mappings", "gauge"),
)
PREFIX_FIGURES = (
    Figure("n_blocks", "pagealloc_prefix_blocks", "gauge"),
    Figure("n_tokens", "pagealloc_prefix_tokens", "gauge"),
    Figure("nbytes", "pagealloc_prefix_bytes", "gauge"),
    Figure("n_disk_blocks", "pagealloc_prefix_disk_blocks", "gauge"),
    Figure("n_pinned_blocks", "pagealloc_prefix_pinned_blocks", "gauge"),
    Figure("n_lookups", "pagealloc_prefix_lookups", "counter"),
    Figure("n_hits", "pagealloc_prefix_hits", "counter"),
    Figure("n_asked_tokens", "pagealloc_prefix_asked_tokens", "counter"),
    Figure("n_hit_tokens", "pagealloc_prefix_hit_tokens", "counter"),
    Figure("n_stored_blocks", "pagealloc_prefix_stored_blocks", "counter"),
    Figure("n_evicted_blocks", "pagealloc_prefix_evicted_blocks", "counter"),
    Figure("n_collisions", "pagealloc_prefix_collisions", "counter"),
    Figure("n_damaged_blocks", "pagealloc_prefix_damaged_blocks", "counter"),
    Figure("hit_rate", "pagealloc_prefix_hit_ratio", "gauge"),
)
# Every allocator tells these of the whole process.
ANY_ALLOCATOR_FIGURES = (
    Figure("n_conflicts", "pagealloc_conflicting_frees", "counter"),
    Figure("abandoned_bytes", "pagealloc_abandoned_bytes", "gauge"),
)
PROCESS_FIGURES = (
    Figure("resident_bytes", "pagealloc_process_resident_bytes", "gauge"),
    Figure("n_lock_waits", "pagealloc_lock_waits", "counter"),
    Figure("lock_wait_s", "pagealloc_lock_wait_seconds", "counter"),
)
PAGE_FAULTS = Metric(
    "pagealloc_process_page_faults",
    "counter",
    "Page faults of the whole process since it started.",
    samples=(),
)
ALLOCATOR_INFO = Metric(
    "pagealloc_allocator_info",
    "gauge",
    "Always 1, for each allocator with the backing that was asked for.",
    samples=(),
)

TABLES = (
    Table(
        ALLOCATOR_FIGURES,
        AllocatorStats,
        lambda snapshot: (({"allocator": one.name}, one.stats) for one in snapshot.allocators),
    ),
    Table(
        ANY_ALLOCATOR_FIGURES,
        AllocatorStats,
        # The last was read last: what never falls does not seem to.
        lambda snapshot: (({}, one.stats) for one in snapshot.allocators[-1:]),
    ),
    Table(
        KV_FIGURES,
        KVStats,
        lambda snapshot: (({"cache": one.name}, one.stats) for one in snapshot.caches),
    ),
    Table(
        PREFIX_FIGURES,
        PrefixStats,
        lambda snapshot: (({"cache": one.name}, one.prefixes) for one in snapshot.caches),
    ),
    Table(PROCESS_FIGURES, Snapshot, lambda snapshot: iter([({}, snapshot)])),
)


def readings(snapshot: Snapshot) -> list[Metric]:
    """Return all figures of a snapshot; those that are unknown or unlimited are left out.

    Parameters
    ----------
    snapshot : Snapshot

    Returns
    -------
    list of Metric
        Always the same, in the same order: of what is not there, without samples.
    """
    metrics = [
        metric._replace(samples=tuple(_samples(figure, table, snapshot)))
        for table in TABLES
        for figure, metric in zip(table.figures, _described(table), strict=True)
    ]
    faults = (
        Sample({"kind": "minor"}, snapshot.n_minor_faults),
        Sample({"kind": "major"}, snapshot.n_major_faults),
    )
    infos = tuple(
        Sample({"allocator": one.name, "backing": one.backing}, 1) for one in snapshot.allocators
    )
    return [
        *metrics,
        PAGE_FAULTS._replace(samples=faults),
        ALLOCATOR_INFO._replace(samples=infos),
    ]


def described_metrics() -> list[Metric]:
    """Return the metrics of `readings` without samples, for who announces them first."""
    described = (metric for table in TABLES for metric in _described(table))
    return [*described, PAGE_FAULTS, ALLOCATOR_INFO]


@cache
def _described(table: Table) -> tuple[Metric, ...]:
    return tuple(
        Metric(figure.name, figure.kind, _help(table.stats_class, figure.field), samples=())
        for figure in table.figures
    )


def _samples(figure: Figure, table: Table, snapshot: Snapshot) -> Iterator[Sample]:
    for labels, stats in table.find(snapshot):
        value = getattr(stats, figure.field)
        if value is not None:
            yield Sample(labels, float(value))


def _help(stats_class: type, field: str) -> str:
    """Return the first sentence of what a class says of a field; its name under ``python -OO``."""
    found = getattr(stats_class, field, None)
    text = found.__doc__ if isinstance(found, property) else _field_texts(stats_class).get(field)
    sentence = re.split(r"(?<=[.])\s", " ".join((text or field).split()))[0]
    return sentence.replace("`", "")


def _field_texts(stats_class: type) -> dict[str, str]:
    """Return what a numpydoc docstring says of each field."""
    # Python 3.13 takes the indentation away by itself.
    lines = cleandoc(stats_class.__doc__ or "").partition("----------\n")[2] + "\n"
    return dict(re.findall(r"^(\w+) : .*\n((?:    .*\n|\n)+)", lines, re.MULTILINE))
