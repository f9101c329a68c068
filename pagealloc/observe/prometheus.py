"""Prometheus: the figures of this process, as prometheus_client collects them.

Purpose
    ``start_http_server(9100)`` in a program without a server of its own.  In others
    ``REGISTRY.register(PageallocCollector())`` adds the figures to what they serve already, such as
    ``prometheus_client.make_wsgi_app()`` or ``make_asgi_app()`` below ``/metrics``; who may ask is
    then up to that server (`host_check.HostCheck` is a WSGI middleware for it).
Locking
    That of `LatencyTotals`, while a snapshot is taken.
Units
    Prometheus's base units, bytes and seconds.
Source
    Names as prometheus.io/docs/practices/naming has it.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING

try:
    from prometheus_client import make_wsgi_app
    from prometheus_client.core import (
        REGISTRY,
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "prometheus_client":
        raise
    raise ImportError(
        "metrics for Prometheus need the package prometheus_client, which is not installed. "
        "Install it with: pip install 'pagealloc[metrics]'"
    ) from missing

from pagealloc.observe.http_server import serve_in_thread
from pagealloc.observe.latency_totals import LATENCY_EDGES, LatencyTotals
from pagealloc.observe.readings import described_metrics, readings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import CollectorRegistry, Metric

    from pagealloc import LatencyHistogram
    from pagealloc.observe.readings import Metric as Reading

__all__ = ["PageallocCollector", "start_http_server"]

LATENCY_NAME = "mem_page_aligned_alloc_latency_seconds"
LATENCY_HELP = "How long sampled allocations took, by size and the NUMA node the thread ran on."
LATENCY_LABELS = ("size_class", "numa_node")


class PageallocCollector(Collector):
    """All figures of this process's allocators and caches.

    Counters and gauges as `readings` names them, with a label ``allocator`` or ``cache``: a number,
    in the order these were made.  The histogram ``mem_page_aligned_alloc_latency_seconds`` is of
    all allocators together, and keeps what those counted that are closed now; its buckets end
    below their edge ``le``, as the core counts whole nanoseconds.

    Notes
    -----
    Thread-safe, and to be used in a forked child as well.  One collector a registry.

    Examples
    --------
    >>> from prometheus_client import REGISTRY
    >>> REGISTRY.register(PageallocCollector())
    """

    def __init__(self) -> None:
        self._latencies = LatencyTotals()

    def describe(self) -> Iterator[Metric]:
        """Yield the names, so that a registry need not collect to know them."""
        yield from map(_family, described_metrics())
        yield _latency_family([])

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, read now."""
        snapshot, histograms = self._latencies.update()
        yield from map(_family, readings(snapshot))
        yield _latency_family(histograms)


def _family(metric: Reading) -> Metric:
    family_class = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    names = list(metric.samples[0].labels) if metric.samples else []
    family = family_class(metric.name, metric.help, labels=names)
    for labels, value in metric.samples:
        family.add_metric(list(labels.values()), value)
    return family


def _latency_family(histograms: Iterable[LatencyHistogram]) -> Metric:
    family = HistogramMetricFamily(LATENCY_NAME, LATENCY_HELP, labels=LATENCY_LABELS)
    for histogram in histograms:
        counts = accumulate(histogram.factor_two_counts())
        family.add_metric(
            [histogram.size_class, str(histogram.numa_node)],
            buckets=list(zip(LATENCY_EDGES, map(float, counts), strict=True)),
            sum_value=histogram.sum_ns / 1e9,
        )
    return family


def start_http_server(
    port: int,
    addr: str = "127.0.0.1",
    *,
    registry: CollectorRegistry = REGISTRY,
    hosts: Iterable[str] = (),
) -> tuple[WSGIServer, Thread]:
    """Serve the figures at ``http://addr:port/metrics``, in a thread of its own.

    Parameters
    ----------
    port : int
        0: any that is free, see ``server.server_port``.
    addr : str
        Where to listen; this machine alone by default.
    registry : CollectorRegistry
        Whose other metrics are served, too.  A collector is added to it if it has none.
    hosts : iterable of str
        Names by which clients may ask besides `addr` and those of loopback: requests with another
        Host header get 403, so that no web page reads the figures by DNS rebinding.

    Returns
    -------
    server, thread
        ``server.shutdown()`` ends the thread, ``server.server_close()`` then frees the port.

    Raises
    ------
    OSError
        The port is taken, or `addr` is not of this machine.

    Notes
    -----
    A child of ``os.fork()`` has no such thread: it serves nothing until it calls this again.
    """
    with suppress(ValueError):  # the names are taken: it has a collector
        registry.register(PageallocCollector())
    return serve_in_thread(make_wsgi_app(registry), port, addr, hosts=hosts)
