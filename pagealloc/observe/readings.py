"""Readings: every figure there is to show, named once.

Purpose
    What Prometheus, OpenTelemetry, `pagealloc top` and its web page show, out of the counters that
    ``stats()`` reads: nothing is counted here.
Structure
    ::

        Snapshot: AllocatorStats, KVStats, PrefixStats --FIGURES--> Metric: name, kind, samples
Units
    In the names: bytes, seconds, or a count.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pagealloc import AllocatorStats
from pagealloc.kv import KVStats, PrefixStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pagealloc.observe.snapshot import Snapshot

__all__ = ["Metric", "Sample", "readings"]

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
    Figure("n_pinned_blocks", "pagealloc_prefix_pinned_blocks", "gauge"),
    Figure("n_lookups", "pagealloc_prefix_lookups", "counter"),
    Figure("n_hits", "pagealloc_prefix_hits", "counter"),
    Figure("n_asked_tokens", "pagealloc_prefix_asked_tokens", "counter"),
    Figure("n_hit_tokens", "pagealloc_prefix_hit_tokens", "counter"),
    Figure("n_stored_blocks", "pagealloc_prefix_stored_blocks", "counter"),
    Figure("n_evicted_blocks", "pagealloc_prefix_evicted_blocks", "counter"),
    Figure("hit_rate", "pagealloc_prefix_hit_ratio", "gauge"),
)


def readings(snapshot: Snapshot) -> list[Metric]:
    """Return all figures of a snapshot; those that are unknown or unlimited are left out."""
    allocators = [({"allocator": each.name}, each.stats) for each in snapshot.allocators]
    caches = [({"cache": each.name}, each.stats) for each in snapshot.caches]
    prefixes = [({"cache": each.name}, each.prefixes) for each in snapshot.caches]
    return [
        *_metrics(ALLOCATOR_FIGURES, AllocatorStats, allocators),
        *_metrics(KV_FIGURES, KVStats, caches),
        *_metrics(PREFIX_FIGURES, PrefixStats, prefixes),
        _page_faults(snapshot),
    ]


def _metrics(
    figures: Iterable[Figure],
    stats_class: type,
    found: Sequence[tuple[Mapping[str, str], Any]],
) -> Iterable[Metric]:
    texts = _field_texts(stats_class)
    for figure in figures:
        samples = tuple(
            Sample(labels, float(value))
            for labels, stats in found
            if (value := getattr(stats, figure.field)) is not None
        )
        yield Metric(figure.name, figure.kind, texts.get(figure.field, figure.field), samples)


def _page_faults(snapshot: Snapshot) -> Metric:
    return Metric(
        "pagealloc_process_page_faults",
        "counter",
        "Page faults of the whole process.",
        (
            Sample({"kind": "minor"}, snapshot.n_minor_faults),
            Sample({"kind": "major"}, snapshot.n_major_faults),
        ),
    )


def _field_texts(stats_class: type) -> dict[str, str]:
    """Return what the docstring says of each field: the first sentence, on one line."""
    lines = (stats_class.__doc__ or "").partition("----------\n")[2]
    entries = re.findall(r"^    ([\w, ]+) : .*\n((?:        .*\n|\n)+)", lines, re.MULTILINE)
    texts: dict[str, str] = {}
    for names, text in entries:
        sentence = re.split(r"(?<=[.])\s", " ".join(text.split()))[0]
        texts |= dict.fromkeys(names.split(", "), sentence)
    return texts
