"""The page of ``pagealloc serve``: a process, live, in a browser.

Purpose
    One page without anything from elsewhere, and what it reads each second.
Structure
    ::

        /               web.html: draws what it reads
        /live.json      the latest snapshot's figures, and the history of the last minute
        /snapshot.json  the latest snapshot itself, for `pagealloc top URL`

Invariants
    however many pages are open, the process is read at most about once a second
    who asks by another name than this machine's gets nothing (`HostCheck`); the page may load
    nothing but the two JSON texts (Content-Security-Policy), and no page may frame it
Locking
    A lock around reading and the history; answers are made from what was read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from functools import cache
from importlib.resources import files
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from pagealloc.observe.http_server import serve_in_thread
from pagealloc.observe.live import History
from pagealloc.observe.snapshot import take_snapshot
from pagealloc.observe.snapshot_json import as_plain, snapshot_to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

    from pagealloc.observe.snapshot import Snapshot

__all__ = ["LivePage", "PageServer", "live_json", "serve", "serve_source"]

LEAST_AGE_S = 0.9
"""A reading is shown again until it is as old: a page that asks each second gets a new one."""


class LivePage:
    """The WSGI app.

    Parameters
    ----------
    read : callable
        Returns a snapshot of the process that is shown.

    Notes
    -----
    Thread-safe.  If the process cannot be read any more, the page shows what was read last, and
    why.
    """

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        self._read = read
        self._lock = Lock()
        self._history = History()
        self._read_at_s = -LEAST_AGE_S
        self._trouble: str | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", "text/plain", "only GET\n")
        match environ.get("PATH_INFO", "/"):
            case "/" | "":
                return _answer(start_response, "200 OK", "text/html", _page(), csp=_policy())
            case "/live.json":
                return self._answer_json(start_response, live_json)
            case "/snapshot.json":
                return self._answer_json(start_response, _latest_json)
        return _answer(start_response, "404 Not Found", "text/plain", "nothing is here\n")

    def _answer_json(
        self, start_response: StartResponse, text_of: Callable[[History, str | None], str]
    ) -> Iterable[bytes]:
        with self._lock:
            self._refresh()
            if self._history.latest is None or (self._trouble and text_of is _latest_json):
                status, text = "503 Service Unavailable", json.dumps({"trouble": self._trouble})
            else:
                status, text = "200 OK", text_of(self._history, self._trouble)
        return _answer(start_response, status, "application/json", text)

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if now_s - self._read_at_s < LEAST_AGE_S:
            return
        self._read_at_s = now_s
        try:
            self._history.add(self._read())
        except (OSError, ValueError) as error:
            self._trouble = str(error)
        else:
            self._trouble = None


class PageServer:
    """A page that is served in a thread; made by `serve`.

    Attributes
    ----------
    url : str
        Of the page; it may be given to `pagealloc top`, too.
    """

    def __init__(
        self, read: Callable[[], Snapshot], port: int, addr: str, hosts: Iterable[str]
    ) -> None:
        self._server, self._thread = serve_in_thread(LivePage(read), port, addr, hosts=hosts)
        host = f"[{addr}]" if ":" in addr else addr
        self.url = f"http://{host}:{self._server.server_port}"
        self._is_closed = False

    def close(self) -> None:
        """End the thread and free the port.  A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def serve(port: int = 0, addr: str = "127.0.0.1", *, hosts: Iterable[str] = ()) -> PageServer:
    """Serve a page that shows this process, live.

    Parameters
    ----------
    port : int
        0: any that is free, see ``url`` of what is returned.
    addr : str
        Where to listen; this machine alone by default.  Whoever reaches it may read the page.
    hosts : iterable of str
        Names by which browsers may ask besides `addr` and ``localhost``.

    Returns
    -------
    PageServer
        To be closed; a daemon thread serves until then, or until the process ends.

    Raises
    ------
    OSError
        The port is taken, or `addr` is not of this machine.

    Notes
    -----
    Thread-safe.  A forked child serves nothing.
    """
    return serve_source(take_snapshot, port, addr, hosts=hosts)


def serve_source(
    read: Callable[[], Snapshot], port: int, addr: str, *, hosts: Iterable[str] = ()
) -> PageServer:
    """Serve as `serve` does a page that shows whatever process `read` returns snapshots of."""
    return PageServer(read, port, addr, hosts)


def live_json(history: History, trouble: str | None = None) -> str:
    """Return what the page draws: all sizes in bytes, times as their names say, None if unknown.

    Parameters
    ----------
    history : History
        Of at least one snapshot.
    trouble : str or None
        Why the latest snapshot is not of now.
    """
    snapshot = history.latest
    if snapshot is None:
        raise ValueError("a history without snapshots has nothing to show")
    return json.dumps(
        {
            "trouble": trouble,
            "pid": snapshot.pid,
            "time_s": snapshot.time_s,
            "duration_s": history.duration_s,
            "allocators": [
                {"name": each.name, **as_plain(each.stats)} for each in snapshot.allocators
            ],
            "caches": [
                {
                    "name": each.name,
                    "layout": each.layout,
                    **as_plain(each.stats),
                    "held_bytes": each.stats.held_bytes,
                    "waste_bytes": each.stats.waste_bytes,
                    "prefixes": {**as_plain(each.prefixes), "hit_rate": each.prefixes.hit_rate},
                }
                for each in snapshot.caches
            ],
            "latencies": [
                {
                    "size_class": name,
                    **latency._asdict(),
                    "p50s_ns": [each.p50_ns for each in history.series(name)],
                    "p99s_ns": [each.p99_ns for each in history.series(name)],
                }
                for name, latency in history.latencies().items()
            ],
            "points": [_plain_point(point) for point in history.points],
        },
        allow_nan=False,
        separators=(",", ":"),
    )


def _plain_point(point: Any) -> dict[str, Any]:
    plain: dict[str, Any] = as_plain(point)
    del plain["latencies"]  # they are there by size
    return plain


def _latest_json(history: History, _trouble: str | None) -> str:
    assert history.latest is not None
    return snapshot_to_json(history.latest)


def _answer(
    start_response: StartResponse,
    status: str,
    kind: str,
    text: str,
    csp: str = "default-src 'none'; frame-ancestors 'none'",
) -> Iterable[bytes]:
    body = text.encode()
    start_response(
        status,
        [
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", csp),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ],
    )
    return [body]


@cache
def _page() -> str:
    return files("pagealloc.observe").joinpath("web.html").read_text(encoding="utf-8")


@cache
def _policy() -> str:
    """Allow the page its own lines, by their hashes, and nothing else."""
    sources = {
        name: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{name}>(.*?)</{name}>", _page(), re.DOTALL)
        )
        for name in ("style", "script")
    }
    return (
        f"default-src 'none'; style-src {sources['style']}; script-src {sources['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
