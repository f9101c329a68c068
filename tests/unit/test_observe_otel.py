"""The figures as OpenTelemetry gets them, and slow events as spans."""

import gc
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import entry_points

import pytest
from prefixes import layout_of, publish
from quiet import quieten

from pagealloc import PageAllocator
from pagealloc.kv import KVCache
from pagealloc.observe.readings import described_metrics, readings
from pagealloc.observe.snapshot import take_snapshot
from pagealloc.slow_events import SlowEvent, slow_event, tell_slow_event

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)
from opentelemetry.trace import StatusCode

from pagealloc.observe import otel


def churn(allocator, n):
    for _ in range(n):
        allocator.alloc(100).close()


def n_timed(allocator):
    return sum(histogram.n_samples for histogram in allocator.latencies())


@contextmanager
def metered(*readers):
    provider = MeterProvider(metric_readers=readers, shutdown_on_exit=False)
    stop = otel.instrument(meter_provider=provider)
    try:
        yield stop
    finally:
        stop()
        provider.shutdown()


@pytest.fixture
def reader():
    reader = InMemoryMetricReader()
    with metered(reader):
        yield reader


@pytest.fixture
def exporter():
    quieten()
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    stop = otel.instrument(tracer_provider=provider)
    exporter.tracer = provider.get_tracer("test")
    exporter.stop = stop
    yield exporter
    stop()


def collected(reader):
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name: metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def points(metric):
    return {tuple(point.attributes.values()): point.value for point in metric.data.data_points}


# --- metrics ---


def test_the_instruments_are_the_readings(reader):
    with PageAllocator(backing="base") as allocator, KVCache(layout_of()) as cache:
        churn(allocator, 7)
        publish(cache, range(8))
        found = collected(reader)
        read = readings(take_snapshot())
    for metric in read:
        if not metric.samples:
            continue
        seen = found[metric.name]
        assert seen.description == metric.help
        assert isinstance(seen.data, Sum) == (metric.kind == "counter")
        labels = {tuple(sample.labels.values()) for sample in metric.samples}
        assert points(seen).keys() == labels
    assert list(points(found["pagealloc_allocs"]).values())[-1] == 7
    assert found["pagealloc_allocs"].data.is_monotonic


def test_units(reader):
    with PageAllocator(backing="base"), KVCache(layout_of()):
        found = collected(reader)
    assert found["pagealloc_live_bytes"].unit == "By"
    assert found["pagealloc_prefix_hit_ratio"].unit == "1"
    assert found["pagealloc_lock_wait_seconds"].unit == "s"
    assert found["pagealloc_live_blocks"].unit == ""
    assert {metric.name for metric in described_metrics()} >= {
        name for name in found if name.startswith("pagealloc_")
    }


def test_the_latency_histogram_is_counters_by_edge(reader):
    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 300)
        found = collected(reader)
        (own,) = allocator.latencies()
        buckets = [
            point
            for point in found[otel.BUCKET_NAME].data.data_points
            if point.attributes["size_class"] == own.size_class
        ]
        counts = [point.value for point in buckets]
        assert counts == sorted(counts)
        assert counts[0] > 0
        assert counts[-1] >= own.n_samples > 0
        assert buckets[-1].attributes["le"] == "+Inf"
        assert {"size_class", "numa_node", "le"} == set(buckets[0].attributes)
        assert sum(points(found[otel.SUM_NAME]).values()) >= own.sum_ns / 1e9


def test_latencies_of_closed_allocators_stay(reader):
    def n_samples():
        found = points(collected(reader)[otel.BUCKET_NAME])
        return sum(value for key, value in found.items() if "+Inf" in key)

    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 50)
        n_open = n_samples()
        assert n_open >= n_timed(allocator) > 0
    gc.collect()
    assert n_samples() == n_open


def test_one_snapshot_serves_a_collection(monkeypatch):
    n_taken = []
    take = otel.LatencyTotals.update
    monkeypatch.setattr(
        otel.LatencyTotals, "update", lambda totals: n_taken.append(1) or take(totals)
    )
    readers = InMemoryMetricReader(), InMemoryMetricReader()
    with metered(*readers), PageAllocator(backing="base") as allocator:
        for n, reader in enumerate([*readers, *readers], 1):
            churn(allocator, 1)
            found = collected(reader)
            assert len(n_taken) == n
            assert list(points(found["pagealloc_allocs"]).values())[-1] == n


def test_what_was_stopped_shows_nothing():
    reader = InMemoryMetricReader()
    with metered(reader) as stop, PageAllocator(backing="base"):
        assert collected(reader)
        stop()
        assert not any(metric.data.data_points for metric in collected(reader).values())


# --- spans ---


def test_a_restored_prefix_is_a_span(exporter):
    with KVCache(layout_of()) as cache:
        publish(cache, range(8))
        assert exporter.get_finished_spans() == ()
        with exporter.tracer.start_as_current_span("request") as request:
            cache.sequence(range(9)).close()
    span, outer = exporter.get_finished_spans()
    assert span.name == "pagealloc.prefix_restore"
    assert span.attributes == {"pagealloc.n_tokens": 8, "pagealloc.source": "memory"}
    assert span.parent.span_id == request.get_span_context().span_id
    assert outer.start_time <= span.start_time <= span.end_time <= outer.end_time
    assert span.status.status_code == StatusCode.UNSET


def test_a_loaded_cache_is_a_span(tmp_path, exporter):
    pytest.importorskip("xxhash")
    path = tmp_path / "blocks.kv"
    with KVCache(layout_of()) as cache:
        publish(cache, range(8))
        cache.save(path)
    with KVCache.load(path) as cache, cache.sequence(range(8)):
        pass
    names = [span.name for span in exporter.get_finished_spans()]
    assert names == ["pagealloc.cache_load", "pagealloc.prefix_restore"]
    assert exporter.get_finished_spans()[1].attributes["pagealloc.source"] == "file"


def test_what_fails_is_an_error_span(exporter):
    with pytest.raises(OSError, match="full"), slow_event("nap"):
        raise OSError("full")
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code == StatusCode.ERROR
    assert span.events[0].attributes["exception.message"] == "full"


def test_a_span_has_the_times_of_its_event(exporter):
    tell_slow_event(SlowEvent("nap", begun_at_ns=5, ended_at_ns=7, attributes={}))
    (span,) = exporter.get_finished_spans()
    assert (span.start_time, span.end_time) == (5, 7)


def test_an_arena_and_a_purge_are_spans(exporter):
    with PageAllocator(backing="base", arena_bytes="8MiB", purge_after_s=None) as allocator:
        with exporter.tracer.start_as_current_span("request"):
            allocator.alloc("1MiB", prefault=True).close()
            trimmed_bytes = allocator.trim()
        exporter.stop()  # tells what the thread did not yet
    # The thread may have told some before the request's span ended.
    growth, purge = (one for one in exporter.get_finished_spans() if one.name != "request")
    assert growth.name == "pagealloc.arena_growth"
    heap = growth.attributes["pagealloc.heap"]
    assert growth.attributes == {"pagealloc.heap": heap, "pagealloc.nbytes": 8 << 20}
    assert purge.name == "pagealloc.purge"
    assert purge.attributes == {
        "pagealloc.heap": heap,
        "pagealloc.nbytes": trimmed_bytes,
        "pagealloc.cause": "trim",
    }
    assert growth.parent is None
    assert purge.parent is None
    assert growth.start_time < growth.end_time <= purge.start_time < purge.end_time


def test_two_providers_get_each_span_once(exporter):
    other = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(other))
    stop = otel.instrument(tracer_provider=provider)
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        allocator.trim()
    stop()
    for one in (exporter, other):
        assert [span.name for span in one.get_finished_spans()] == ["pagealloc.purge"]


def test_no_span_after_the_end(exporter):
    exporter.stop()
    with slow_event("nap"):
        pass
    assert exporter.get_finished_spans() == ()


# --- how it is switched on ---


def test_opentelemetry_instrument_finds_it(monkeypatch):
    switched_on = []
    monkeypatch.setattr(otel, "instrument", lambda: switched_on.append(1))
    (entry,) = [
        one
        for one in entry_points(group="opentelemetry_instrumentor")
        if one.value.startswith("pagealloc.")
    ]
    entry.load()().instrument(skip_dep_check=True)
    assert switched_on == [1]


# --- without OpenTelemetry ---


def run(code):
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return process.stdout


def test_without_providers_it_works_and_does_nothing():
    code = (
        "from pagealloc.observe.otel import instrument\n"
        "from pagealloc.slow_events import slow_event\n"
        "import threading\n"
        "stop = instrument()\n"
        "assert threading.active_count() == 1\n"
        "with slow_event('nap'): pass\n"
        "stop()\nprint('fine')\n"
    )
    assert run(code) == "fine\n"


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    (tmp_path / "opentelemetry.py").write_text(
        "raise ModuleNotFoundError('gone', name='opentelemetry')"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import pagealloc.observe.otel\n"
        "except ImportError as error:\n    print(error)\n"
    )
    output = run(code)
    assert output.count("\n") == 1
    assert "pip install 'pagealloc[otel]'" in output
