"""What pagealloc does, shown: profiles, metrics, snapshots, a doctor.

Rooms, bottom up::

    system_report         the machine's memory, as the kernel tells it
    backing_trial         what of it can be had
    straddling            rows that lie in two pages
    snapshot              all that the process counts, read once
    readings              every figure of it, named
    snapshot_json         snapshots as text
    live                  what changes between snapshots
    latency_totals        latency histograms that never fall
    host_check            who may ask by HTTP
    http_server           who answers
    prometheus            metrics as Prometheus has them (extra `metrics`)
    core_events           slow events of the core, told
    otel                  metrics and spans as OpenTelemetry has them (extra `otel`)
    dashboard             what Grafana and Prometheus import
    feed                  shows this process to its user's others
    feed_reader           reads what they show
    web                   the page of `pagealloc serve`
    script                a script, run as python would
    profiles              values by stack
    pprof                 their files
    flamegraph            their pages
    stacks                Python calls, noted; the lock of all samplers
    heap_profile          bytes allocated and live
    wait_profile          time waited for mutexes of the core
    thread_capture        where other threads are in native code
    native_code           whose code that is
    cpu_profile           CPU time
    profiling             a profile of any kind, by name
    pprof_server          profiles by HTTP
    doctor_finding        what a rule finds
    doctor_evidence       what rules look at
    doctor_machine_rules  those about the machine
    doctor_use_rules      those about what a process does
    doctor_watch          evidence, gathered
    doctor                all rules, asked

    >>> import pagealloc.observe
    >>> server, thread = pagealloc.observe.start_http_server(9100)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagealloc.observe.feed import start_feed
    from pagealloc.observe.pprof_server import start_profile_server
    from pagealloc.observe.profiling import profile
    from pagealloc.observe.prometheus import PageallocCollector, start_http_server
    from pagealloc.observe.snapshot import take_snapshot
    from pagealloc.observe.web import serve

__all__ = [
    "PageallocCollector",
    "profile",
    "serve",
    "start_feed",
    "start_http_server",
    "start_profile_server",
    "take_snapshot",
]

_ROOMS = {
    "PageallocCollector": "prometheus",
    "profile": "profiling",
    "serve": "web",
    "start_feed": "feed",
    "start_http_server": "prometheus",
    "start_profile_server": "pprof_server",
    "take_snapshot": "snapshot",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: some of it needs a package of an extra."""
    if name in _ROOMS:
        return getattr(import_module(f"pagealloc.observe.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
