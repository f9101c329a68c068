"""What pagealloc does, shown: profiles, metrics, snapshots, a doctor.

Rooms, bottom up: system_report (the machine's memory, as the kernel tells it), snapshot (all that
the process counts, read once), readings (every figure of it, named), profiles (values by stack),
pprof (their files), flamegraph (their pages), latency_totals (histograms that never fall),
host_check and http_server (who may ask, and who answers), prometheus (extra `metrics`), otel (extra
`otel`).

    >>> import pagealloc.observe
    >>> server, thread = pagealloc.observe.start_http_server(9100)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagealloc.observe.prometheus import PageallocCollector, start_http_server

__all__ = ["PageallocCollector", "start_http_server"]


def __getattr__(name: str) -> Any:
    """Import what needs a package of an extra when it is asked for."""
    if name in __all__:
        from pagealloc.observe import prometheus

        return getattr(prometheus, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
