"""The figures as Prometheus gets them."""

import asyncio
import gc
import gzip
import math
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from itertools import pairwise
from wsgiref.util import setup_testing_defaults

import pytest
from prefixes import layout_of, publish
from stress import in_child, running

from pagealloc import LatencyHistogram, PageAllocator, page_size_bytes
from pagealloc.kv import KVCache
from pagealloc.observe import latency_totals
from pagealloc.observe.latency_totals import LatencyTotals
from pagealloc.observe.readings import described_metrics
from pagealloc.observe.snapshot import take_snapshot

prometheus_client = pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402
from prometheus_client.core import Metric  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

import pagealloc.observe  # noqa: E402
from pagealloc.observe import PageallocCollector, prometheus  # noqa: E402

LATENCY = "mem_page_aligned_alloc_latency_seconds"


def churn(allocator, n, nbytes=100):
    for _ in range(n):
        allocator.alloc(nbytes).close()


def n_timed(allocator):
    return sum(histogram.n_samples for histogram in allocator.latencies())


def families(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def collected(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return families(generate_latest(registry).decode())


def n_latencies(found, suffix="_count"):
    return sum(sample.value for sample in found[LATENCY].samples if sample.name == LATENCY + suffix)


@contextmanager
def served(registry, **options):
    server, thread = pagealloc.observe.start_http_server(0, registry=registry, **options)
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


def fetch(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.read()


# --- what is collected ---


def test_counters_and_gauges_are_those_of_the_readings():
    with PageAllocator(backing="base") as allocator:
        churn(allocator, 7)
        found = collected(PageallocCollector())
    assert found.keys() == {metric.name for metric in described_metrics()} | {LATENCY}
    for metric in described_metrics():
        assert found[metric.name].type == metric.kind
        assert found[metric.name].documentation == metric.help
    allocs = found["pagealloc_allocs"].samples[-1]
    assert (allocs.name, allocs.value) == ("pagealloc_allocs_total", 7)


def test_the_histogram_is_cumulative_in_buckets_of_a_factor_of_two():
    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 500, 3 * page_size_bytes())
        collector = PageallocCollector()
        before = {
            sample.labels["le"]: sample.value
            for sample in collected(collector)[LATENCY].samples
            if sample.name == LATENCY + "_bucket"
            and sample.labels["size_class"] == allocator.latencies()[0].size_class
        }
        edges = [float(edge) for edge in before]
        assert edges == sorted(edges)
        assert edges[0] == 16e-9
        assert edges[-1] == math.inf
        assert 65e-3 < edges[-2] < 68e-3
        for lower, upper in pairwise(edges[:-1]):
            assert upper / lower == pytest.approx(2, rel=1e-6)
        counts = list(before.values())
        assert counts == sorted(counts)
        assert counts[-1] >= allocator.latencies()[0].n_samples > 400


def test_a_quantile_of_the_buckets_is_that_of_the_samples():
    counts = [0] * (len(LatencyHistogram.bucket_edges_ns) + 1)
    for ns, n in ((30, 50), (100, 48), (5000, 2)):
        counts[sum(edge <= ns for edge in LatencyHistogram.bucket_edges_ns)] = n
    histogram = LatencyHistogram("128 B", 0, 16300, tuple(counts))
    samples = prometheus._latency_family([histogram]).samples
    buckets = {
        sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")
    }
    assert next(edge for edge, n in buckets.items() if n >= 98) == "1.28e-07"
    assert buckets["+Inf"] == 100
    assert next(one.value for one in samples if one.name.endswith("_sum")) == 16300e-9


def test_histograms_of_all_allocators_are_one():
    with (
        PageAllocator(backing="base", time_every=1) as first,
        PageAllocator(backing="base", time_every=1) as second,
    ):
        collector = PageallocCollector()
        n_before = n_latencies(collected(collector))
        churn(first, 10)
        churn(second, 20)
        found = collected(collector)
        assert n_latencies(found) == n_before + n_timed(first) + n_timed(second)
        series = [(one.name, *one.labels.values()) for one in found[LATENCY].samples]
        assert len(series) == len(set(series))


def test_a_closed_allocator_stays_in_the_histogram():
    collector = PageallocCollector()
    n_before = n_latencies(collected(collector))
    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 50)
        n_after = n_before + n_timed(allocator)
        assert n_latencies(collected(collector)) == n_after > n_before
        sum_s = n_latencies(collected(collector), "_sum")
    gc.collect()
    for _ in range(3):
        found = collected(collector)
        assert n_latencies(found) == n_after
        assert n_latencies(found, "_sum") == pytest.approx(sum_s)
    with PageAllocator(backing="base", time_every=1) as other:
        churn(other, 20)
        assert n_latencies(collected(collector)) == n_after + n_timed(other) > n_after


def test_snapshots_of_one_collector_are_taken_one_after_another(monkeypatch):
    inside, most_inside = [], []

    def take_slowly():
        inside.append(1)
        most_inside.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        return take_snapshot()

    monkeypatch.setattr(latency_totals, "take_snapshot", take_slowly)
    totals = LatencyTotals()
    threads = [threading.Thread(target=totals.update) for _ in range(4)]
    with running(threading.Event(), *threads):
        pass
    assert most_inside == [1] * 4


def test_counters_of_a_closed_allocator_end():
    collector = PageallocCollector()
    allocator = PageAllocator(backing="base")
    label = collected(collector)["pagealloc_allocs"].samples[-1].labels
    allocator.close()
    assert label not in [one.labels for one in collected(collector)["pagealloc_allocs"].samples]


def test_registering_reads_nothing(monkeypatch):
    monkeypatch.setattr(LatencyTotals, "update", lambda _: pytest.fail("it was collected"))
    registry = CollectorRegistry(auto_describe=True)
    registry.register(PageallocCollector())
    assert all(isinstance(one, Metric) for one in PageallocCollector().describe())
    assert all(one.samples == [] for one in PageallocCollector().describe())
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(PageallocCollector())


def test_the_caches_of_a_registry_show_up():
    with KVCache(layout_of()) as cache:
        publish(cache, range(8))
        found = collected(PageallocCollector())
        assert found["pagealloc_prefix_blocks"].samples[-1].value == 2
        assert found["pagealloc_kv_held_bytes"].samples[-1].labels.keys() == {"cache"}


# --- where it is served ---


def test_the_server_serves_a_registry_with_all_that_is_in_it():
    registry = CollectorRegistry()
    prometheus_client.Counter("own_calls", "Calls.", registry=registry).inc(3)
    with served(registry) as url:
        found = families(fetch(url).decode())
        assert found["own_calls"].samples[0].value == 3
        assert LATENCY in found
        assert families(gzip.decompress(fetch(url, **{"Accept-Encoding": "gzip"})).decode())
        open_metrics = fetch(url, Accept="application/openmetrics-text; version=1.0.0")
        assert open_metrics.endswith(b"# EOF\n")
    with served(registry) as url:  # a second server: the registry has its collector
        assert LATENCY in families(fetch(url).decode())


def test_the_server_refuses_other_hosts():
    with served(CollectorRegistry(), hosts=["metrics.example"]) as url:
        assert fetch(url, Host="metrics.example")
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            fetch(url, Host="evil.example")
        with refused.value as answer:
            assert b"pagealloc_" not in answer.read()


def test_mounted_in_a_wsgi_app():
    registry = CollectorRegistry()
    registry.register(PageallocCollector())
    environ = {}
    setup_testing_defaults(environ)
    statuses = []
    app = prometheus_client.make_wsgi_app(registry)
    body = b"".join(app(environ, lambda status, _headers: statuses.append(status)))
    assert statuses == ["200 OK"]
    assert LATENCY in families(body.decode())


def test_mounted_in_an_asgi_app():
    registry = CollectorRegistry()
    registry.register(PageallocCollector())
    app = prometheus_client.make_asgi_app(registry)
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/metrics",
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 200
    assert LATENCY in families(b"".join(one.get("body", b"") for one in sent).decode())


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    (tmp_path / "prometheus_client.py").write_text(
        "raise ModuleNotFoundError('gone', name='prometheus_client')"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import pagealloc.observe\n"
        "try:\n    pagealloc.observe.start_http_server(0)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout.count("\n") == 1
    assert "pip install 'pagealloc[metrics]'" in process.stdout


def test_importing_observe_loads_no_client():
    code = "import sys, pagealloc.observe; print('prometheus_client' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pagealloc.observe.no_such_name


# --- while others work ---


def open_use_close(stop, problems):
    try:
        while not stop.is_set():
            with PageAllocator(backing="base", time_every=1) as allocator:
                churn(allocator, 200)
            with KVCache(layout_of()) as cache:
                publish(cache, range(8))
    except Exception as problem:
        problems.append(problem)
        raise


def collect_on(collector, stop, problems):
    n_before = 0.0
    try:
        while not stop.is_set():
            n = n_latencies(collected(collector))
            assert n >= n_before, "the histogram fell"
            n_before = n
    except BaseException as problem:
        problems.append(problem)
        raise


def test_collecting_while_allocators_and_caches_come_and_go(duration_s):
    stop, problems = threading.Event(), []
    shared = PageAllocator(backing="base", time_every=1)
    workers = [threading.Thread(target=open_use_close, args=(stop, problems)) for _ in range(2)]
    # Each reader has a collector of its own: two scrapes of one may be shown in another order.
    readers = [
        threading.Thread(target=collect_on, args=(PageallocCollector(), stop, problems))
        for _ in range(2)
    ]
    allocate = threading.Thread(target=lambda: [churn(shared, 50) for _ in iter(stop.is_set, True)])
    with running(stop, *workers, *readers, allocate):
        stop.wait(duration_s)
    assert not problems
    shared.close()


@pytest.mark.fork_under_load
def test_a_child_forked_amid_a_collection_can_collect(duration_s):
    stop, problems = threading.Event(), []
    collector = PageallocCollector()
    cache = KVCache(layout_of())
    publish(cache, range(8))

    def child_collects():
        assert n_latencies(collected(collector)) > 0
        with PageAllocator(backing="base", time_every=1) as allocator:
            churn(allocator, 10)
            assert collected(collector)["pagealloc_allocs"].samples[-1].value == 10
        with served(CollectorRegistry()) as url:
            assert os.getpid() != parent
            assert LATENCY in families(fetch(url).decode())

    parent = os.getpid()
    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 100)
        reader = threading.Thread(target=collect_on, args=(collector, stop, problems))
        with running(stop, reader):
            for _ in range(max(3, int(duration_s))):
                assert in_child(child_collects) == 0
    assert not problems
    cache.close()
