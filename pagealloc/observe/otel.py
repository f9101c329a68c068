"""OpenTelemetry: the figures of this process as observable instruments, slow events as spans.

Purpose
    ``instrument()`` once, after the program has configured its providers; or
    ``opentelemetry-instrument program``, which does both.
Structure
    ::

        readings, LatencyTotals <--asks-- observable instruments <--collects-- the reader
        slow_events             --tells-> spans, below the span that is current in that thread
        core_events             --tells-> slow_events, in a thread of its own

    OpenTelemetry has no observable histogram, and a synchronous one would want every sample anew.
    So the latency histogram is two observable counters.  ``mem_page_aligned_alloc_latency_bucket``
    is cumulative by the attribute ``le`` (seconds), as Prometheus has it, where a quantile is then
    ``histogram_quantile(0.99, sum by (le) (mem_page_aligned_alloc_latency_bucket_total))``;
    ``mem_page_aligned_alloc_latency_seconds_sum`` is the sum of all samples.
Locking
    A lock of its own: a snapshot serves all instruments of one collection.
Units
    UCUM, as OpenTelemetry wants them: By, s; none for counts.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING

try:
    from opentelemetry import metrics, trace
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise ImportError(
        "OpenTelemetry needs the package opentelemetry-api, which is not installed. "
        "Install it with: pip install 'pagealloc[otel]'"
    ) from missing

from pagealloc import LatencyHistogram, __version__
from pagealloc.observe.core_events import follow_core_events
from pagealloc.observe.latency_totals import LATENCY_EDGES, LatencyTotals
from pagealloc.observe.readings import Metric, described_metrics, readings
from pagealloc.slow_events import SlowEvent, on_slow_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Instrumentor", "instrument"]

BUCKET_NAME = "mem_page_aligned_alloc_latency_bucket"
SUM_NAME = "mem_page_aligned_alloc_latency_seconds_sum"


def instrument(
    meter_provider: metrics.MeterProvider | None = None,
    tracer_provider: trace.TracerProvider | None = None,
) -> Callable[[], None]:
    """Report to OpenTelemetry what this process's allocators and caches do.

    Parameters
    ----------
    meter_provider : opentelemetry.metrics.MeterProvider, optional
        Gets an observable counter or gauge for each figure, named as for Prometheus without
        ``_total``; the process's own provider by default.  Once a provider.
    tracer_provider : opentelemetry.trace.TracerProvider, optional
        Gets a span for each slow event, such as ``pagealloc.prefix_restore``; the process's own
        provider by default.  Those of arenas, ``pagealloc.arena_growth`` and ``pagealloc.purge``,
        come up to a second late, and only if that provider was configured before.

    Returns
    -------
    callable
        Ends it when it is called, without arguments: no more spans, and instruments without
        values, as OpenTelemetry knows no way to remove them.

    Notes
    -----
    Figures are read when a reader collects, in its thread; what is not configured costs nothing but
    the clock at each slow event.  Works in a forked child as far as the providers do, but for the
    spans of arenas, which want a call in the child.
    """
    meter = metrics.get_meter("pagealloc", __version__, meter_provider)
    figures = _Figures()
    for metric in described_metrics():
        create = (
            meter.create_observable_counter
            if metric.kind == "counter"
            else meter.create_observable_gauge
        )
        create(metric.name, [figures.observe(metric.name)], _unit(metric), metric.help)
    meter.create_observable_counter(
        BUCKET_NAME,
        [figures.observe(BUCKET_NAME)],
        description="Sampled allocations that took less than the attribute le, in seconds.",
    )
    meter.create_observable_counter(
        SUM_NAME,
        [figures.observe(SUM_NAME)],
        "s",
        "Time that the sampled allocations took together.",
    )
    ends = ExitStack()
    ends.callback(figures.stop)
    tracer = trace.get_tracer("pagealloc", __version__, tracer_provider)
    ends.callback(on_slow_event(_span_maker(tracer)))
    if not isinstance(tracer, trace.ProxyTracer | trace.NoOpTracer):
        ends.callback(follow_core_events())
    return ends.close


class Instrumentor:
    """What ``opentelemetry-instrument`` finds by the entry point, and makes."""

    def instrument(self, **_options: object) -> None:
        """Report to the providers that it has configured."""
        instrument()


def _unit(metric: Metric) -> str:
    suffix = metric.name.rpartition("_")[2]
    return {"bytes": "By", "seconds": "s", "ratio": "1"}.get(suffix, "")


class _Figures:
    """What all instruments show, read once a collection.

    A reader asks each instrument once; one that asks again begins the next collection.
    """

    def __init__(self) -> None:
        self._latencies = LatencyTotals()
        self._lock = Lock()
        self._asked: set[str] = set()
        self._found: dict[str, list[metrics.Observation]] = {}
        self._is_stopped = False

    def stop(self) -> None:
        self._is_stopped = True

    def observe(
        self, name: str
    ) -> Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]:
        """Return the callback of an instrument."""

        def callback(_options: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
            if self._is_stopped:
                return []
            with self._lock:
                if not self._found or name in self._asked:
                    self._asked = set()
                    self._found = self._read()
                self._asked.add(name)
                return self._found[name]

        return callback

    def _read(self) -> dict[str, list[metrics.Observation]]:
        snapshot, histograms = self._latencies.update()
        found = {
            metric.name: [
                metrics.Observation(value, dict(labels)) for labels, value in metric.samples
            ]
            for metric in readings(snapshot)
        }
        found[BUCKET_NAME] = [one for histogram in histograms for one in _buckets(histogram)]
        found[SUM_NAME] = [
            metrics.Observation(histogram.sum_ns / 1e9, _attributes(histogram))
            for histogram in histograms
        ]
        return found


def _attributes(histogram: LatencyHistogram) -> dict[str, str | int]:
    node = {} if histogram.numa_node is None else {"numa_node": histogram.numa_node}
    return {"size_class": histogram.size_class, **node}


def _buckets(histogram: LatencyHistogram) -> Iterator[metrics.Observation]:
    """Yield cumulative counts, from the first that is not 0 on: SDKs limit how many there are."""
    counts = accumulate(histogram.factor_two_counts())
    for edge, count in zip(LATENCY_EDGES, counts, strict=True):
        if count:
            yield metrics.Observation(count, {**_attributes(histogram), "le": edge})


def _span_maker(tracer: trace.Tracer) -> Callable[[SlowEvent], None]:
    def make_span(event: SlowEvent) -> None:
        span = tracer.start_span(
            f"pagealloc.{event.name}",
            attributes={f"pagealloc.{key}": value for key, value in event.attributes.items()},
            start_time=event.begun_at_ns,
        )
        if event.error is not None:
            span.record_exception(event.error, timestamp=event.ended_at_ns)
            span.set_status(trace.StatusCode.ERROR, str(event.error))
        span.end(event.ended_at_ns)

    return make_span
