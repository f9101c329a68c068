"""Profiles of a running process by HTTP, where Go has them: ``/debug/pprof/heap`` and so on.

Purpose
    ``go tool pprof http://127.0.0.1:PORT/debug/pprof/heap?token=...`` looks into a live process.
Structure
    HTTP --serve_in_thread: Host checked--> ProfilesApp: token checked --> profilers --> to_pprof
Locking
    One CPU profile at a time: a second one is told so (409).
Units
    Seconds in ``?seconds=``.
Source
    Paths and parameters: https://pkg.go.dev/net/http/pprof
"""

from __future__ import annotations

import hmac
import os
import secrets
import sys
import threading
from typing import TYPE_CHECKING, Self
from urllib.parse import parse_qs, quote

from pagealloc.observe.cpu_profile import CPUProfiler
from pagealloc.observe.flamegraph import flame_graph
from pagealloc.observe.heap_profile import HeapProfiler
from pagealloc.observe.http_server import serve_in_thread
from pagealloc.observe.pprof import to_pprof
from pagealloc.observe.wait_profile import WaitProfiler

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

    from pagealloc.observe.profiles import Profile
    from pagealloc.observe.profiling import Profiler

__all__ = ["ProfileServer", "ProfilesApp", "start_profile_server"]

PREFIX = "/debug/pprof/"
MAX_SECONDS = 600
HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),  # the page's own says the rest
    ("Referrer-Policy", "no-referrer"),  # the token is in the address
    ("X-Content-Type-Options", "nosniff"),
]
CPU_SECONDS = 30
INDEX = """pagealloc: profiles of this process, each with ?token=TOKEN

heap      bytes allocated and live by Python stack, since the server was started
mutex     time waited for the core's mutexes by Python stack, since then
profile   CPU time by Python stack, of the next 30 seconds

&seconds=N: of the next N seconds.  &html=1: a flame graph to look at.
"""


class ProfilesApp:
    """A WSGI app, to be mounted where ``/debug/pprof/`` is to be; `close` ends its profilers.

    Parameters
    ----------
    token : str
        What who wants a profile must show: ``?token=`` or ``Authorization: Bearer``.
    heap_period : int or str
        Of how many bytes allocated one is picked.

    Raises
    ------
    ValueError
        The token is empty, or `heap_period` is no number of bytes.
    RuntimeError
        The heap or contention is being profiled already.

    Notes
    -----
    Thread-safe.  The heap and contention are profiled from here on.
    """

    def __init__(self, token: str, *, heap_period: int | str = "512KiB") -> None:
        if not token:
            raise ValueError("an empty token: anybody would be let in")
        self._token = token.encode()
        heap, waits = HeapProfiler(heap_period), WaitProfiler()
        heap.start()
        try:
            waits.start()
        except RuntimeError:
            heap.stop()
            raise
        self._since_start: dict[str, Profiler] = {"heap": heap, "mutex": waits}
        self._is_closed = threading.Event()

    def close(self) -> None:
        """Profile no more; what is being profiled ends now.  A second call does nothing."""
        self._is_closed.set()
        for profiler in self._since_start.values():
            profiler.stop()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        status, kind, body = self._answer(environ)
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        headers += HEADERS
        if kind == "application/octet-stream":
            name = environ.get("PATH_INFO", "").removeprefix(PREFIX)
            headers.append(("Content-Disposition", f'attachment; filename="{name}.pb.gz"'))
        start_response(status, headers)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment) -> tuple[str, str, bytes]:
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _text("405 Method Not Allowed", "a profile is read by GET")
        query = parse_qs(environ.get("QUERY_STRING", ""))
        name = environ.get("PATH_INFO", "").removeprefix(PREFIX)
        if not self._is_allowed(environ, query):
            return _text(
                "401 Unauthorized", "?token=TOKEN is missing or wrong: the process printed it"
            )
        if name == "":
            return _text("200 OK", INDEX)
        try:
            seconds = _seconds(query.get("seconds", [""])[-1])
            profile = self._profile(name, seconds)
        except KeyError:
            return _text("404 Not Found", f"no profile {name[:50]!r}: heap, mutex, profile are")
        except ValueError as error:
            return _text("400 Bad Request", str(error))
        except (OSError, RuntimeError) as error:
            return _text("409 Conflict", str(error))
        if query.get("html", [""])[-1] == "1":
            page = flame_graph(profile, f"{name}, process {os.getpid()}")
            return "200 OK", "text/html; charset=utf-8", page.encode()
        return "200 OK", "application/octet-stream", to_pprof(profile)

    def _is_allowed(self, environ: WSGIEnvironment, query: dict[str, list[str]]) -> bool:
        kind, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        shown = bearer if kind.lower() == "bearer" else query.get("token", [""])[-1]
        return hmac.compare_digest(shown.encode("utf-8", "replace"), self._token)

    def _profile(self, name: str, seconds: float | None) -> Profile:
        if self._is_closed.is_set():
            raise RuntimeError("these profiles are closed")
        if name == "profile":
            profiler = CPUProfiler()
            profiler.start()
            try:
                self._is_closed.wait(CPU_SECONDS if seconds is None else seconds)
            finally:
                profiler.stop()
            return profiler.profile()
        profiler_since_start = self._since_start[name]
        if seconds is None:
            return profiler_since_start.profile()
        before = profiler_since_start.profile()
        self._is_closed.wait(seconds)
        return profiler_since_start.profile().minus(before)


class ProfileServer:
    """An HTTP server of profiles; ``with`` or `close` ends it.

    Attributes
    ----------
    url : str
        Of the index, with the token.
    """

    def __init__(
        self, app: ProfilesApp, port: int, addr: str, hosts: Iterable[str], token: str
    ) -> None:
        self._app = app
        try:
            self._server, self._thread = serve_in_thread(app, port, addr, hosts=hosts)
        except BaseException:
            app.close()
            raise
        host = f"[{addr}]" if ":" in addr else addr
        self.url = f"http://{host}:{self._server.server_port}{PREFIX}?token={quote(token, safe='')}"

    def close(self) -> None:
        """End the server and its profilers.  A second call does nothing."""
        if self._thread.is_alive():  # a forked child does not have it, and would wait for ever
            self._server.shutdown()
        self._server.server_close()
        self._app.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def start_profile_server(
    port: int = 0,
    addr: str = "127.0.0.1",
    *,
    hosts: Iterable[str] = (),
    token: str | None = None,
    heap_period: int | str = "512KiB",
) -> ProfileServer:
    """Serve ``/debug/pprof/heap``, ``profile`` and ``mutex`` of this process, in a thread.

    Parameters
    ----------
    port : int
        0: any that is free, see ``server.url``.
    addr : str
        This machine alone by default.
    hosts : iterable of str
        Names by which clients may ask besides `addr` and those of loopback, see `HostCheck`.
    token : str, optional
        What clients must show; a random one by default, which is printed on stderr.
    heap_period : int or str
        Of how many bytes allocated one is picked.

    Returns
    -------
    ProfileServer

    Raises
    ------
    OSError
        The port is taken.
    ValueError
        The token is empty, or `heap_period` is no number of bytes.
    RuntimeError
        The heap or contention is being profiled already.
    """
    shown = secrets.token_urlsafe(24) if token is None else token
    app = ProfilesApp(shown, heap_period=heap_period)
    server = ProfileServer(app, port, addr, hosts, shown)
    if token is None:
        print(f"pagealloc: profiles at {server.url}", file=sys.stderr, flush=True)
    return server


def _seconds(text: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds={text[:20]!r}: more than 0, at most {MAX_SECONDS} are possible")
    return seconds


def _text(status: str, text: str) -> tuple[str, str, bytes]:
    return status, "text/plain; charset=utf-8", (text.rstrip() + "\n").encode()
