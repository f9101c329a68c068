"""What pagealloc does, shown: profiles, metrics, snapshots, a doctor.

Rooms, bottom up: system_report (the machine's memory, as the kernel tells it), snapshot (all that
the process counts, read once), readings (every figure of it, named), profiles (values by stack),
pprof (their files), flamegraph (their pages), snapshot_json (snapshots as text), feed (shows this
process to this user's others), feed_reader (reads them), live (what changes between snapshots),
web (the page of `pagealloc serve`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagealloc.observe.feed import start_feed
    from pagealloc.observe.web import serve

__all__ = ["serve", "start_feed"]

_ROOMS = {"serve": "web", "start_feed": "feed"}


def __getattr__(name: str) -> Any:
    """Import a room when it is asked for: the report of the machine takes none of them."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
