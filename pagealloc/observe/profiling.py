"""profile(): a profiler of a kind, for as long as a with block lasts.

Structure
    profile(kind) -> Profiling --owns--> HeapProfiler, WaitProfiler or CPUProfiler -> Profile
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pagealloc.observe.cpu_profile import CPUProfiler
from pagealloc.observe.flamegraph import flame_graph
from pagealloc.observe.heap_profile import HeapProfiler
from pagealloc.observe.pprof import to_pprof
from pagealloc.observe.wait_profile import WaitProfiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagealloc.observe.profiles import Profile

__all__ = ["KINDS", "Profiling", "profile", "write_profile"]


class Profiler(Protocol):
    """What counts something by stack."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """Count no more."""

    def profile(self) -> Profile:
        """Return what was counted."""


_PROFILERS: dict[str, Callable[..., Profiler]] = {
    "heap": HeapProfiler,
    "cpu": CPUProfiler,
    "contention": WaitProfiler,
}
KINDS = tuple(_PROFILERS)
"""What can be profiled."""


def profile(kind: str, **options: Any) -> Profiling:
    """Return a profile to be taken; ``with`` starts and stops it.

    Parameters
    ----------
    kind : "heap", "cpu" or "contention"
        Bytes allocated and live by Python stack; CPU time; time waited for mutexes of the core.
    **options
        ``period`` of ``"heap"``: of how many bytes one is picked, 512 KiB by default.
        ``period_ns`` of ``"cpu"``: how often it looks, 10,000,000 by default.

    Returns
    -------
    Profiling

    Raises
    ------
    ValueError
        There is no such kind, or an option is out of range.

    Examples
    --------
    >>> with profile("heap") as p:
    ...     buffer = pagealloc.default_allocator().alloc("4MiB")
    >>> p.write("heap.pb.gz")
    """
    if kind not in _PROFILERS:
        raise ValueError(f"kind={kind!r}: {', '.join(KINDS)} are possible")
    return Profiling(kind, _PROFILERS[kind](**options))


class Profiling:
    """A profile that is being taken, or was.  Thread-safe; `profile` makes one.

    Attributes
    ----------
    kind : str
    """

    def __init__(self, kind: str, profiler: Profiler) -> None:
        self.kind = kind
        self._profiler = profiler

    def start(self) -> Self:
        """Begin, as ``with`` does.

        Raises
        ------
        RuntimeError
            Another profile of the kind is being taken.
        OSError
            The system cannot.
        """
        self._profiler.start()
        return self

    def stop(self) -> None:
        """End."""
        self._profiler.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def profile(self) -> Profile:
        """What was counted so far."""
        return self._profiler.profile()

    def write(self, path: str | Path) -> None:
        """Write the profile to a file, as its name ends.

        Parameters
        ----------
        path : str or Path
            ``.pb.gz``: as ``go tool pprof`` reads it.  ``.html``: a flame graph.  ``.folded``:
            stacks as lines.

        Raises
        ------
        ValueError
            The name ends otherwise.
        OSError
            The file cannot be written.
        """
        write_profile(self.profile, path, f"{self.kind} profile")


def write_profile(profile: Profile, path: str | Path, title: str) -> None:
    """Write a profile to a file; see `Profiling.write`."""
    path = Path(path)
    if path.name.endswith(".pb.gz"):
        path.write_bytes(to_pprof(profile))
    elif path.suffix == ".html":
        path.write_text(flame_graph(profile, title), encoding="utf-8")
    elif path.suffix == ".folded":
        path.write_text(profile.folded(), encoding="utf-8")
    else:
        raise ValueError(f"{path.name}: names that end in .pb.gz, .html or .folded are possible")
