"""What other processes tell of themselves, by their feed or by URL.

Purpose
    The one place where `pagealloc top` and `pagealloc serve` meet another process.
Invariants
    an answer has at most `MOST_BYTES`, takes at most TIMEOUT_S, and is read strictly
    a feed's folder and process are this user's; a URL is http or https, and leads nowhere else
Locking
    None: each reading is a connection of its own.
"""

from __future__ import annotations

import functools
import http.client
import os
import socket
import stat
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pagealloc.kv import user_socket
from pagealloc.observe.feed import SUFFIX, feed_folders
from pagealloc.observe.snapshot_json import MOST_BYTES, snapshot_from_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pagealloc.observe.snapshot import Snapshot

__all__ = ["find_feeds", "read_feed", "read_url", "source_of"]

TIMEOUT_S = 5.0
PIECE_BYTES = 1 << 16
HOW_TO_FEED = (
    "start it with `python -m pagealloc.observe SCRIPT`, or have it call "
    "`pagealloc.observe.start_feed()`"
)


def source_of(target: str) -> Callable[[], Snapshot]:
    """Return what reads a process, named by pid or URL, anew at each call.

    Raises
    ------
    ValueError
        `target` is neither.
    """
    if target.isascii() and target.isdecimal() and len(target) < 20:
        return functools.partial(read_feed, int(target))
    if urlsplit(target).scheme in ("http", "https") and urlsplit(target).hostname:
        return functools.partial(read_url, target)
    raise ValueError(f"{target!r} is neither a process id nor an http:// or https:// URL")


def find_feeds() -> list[int]:
    """Return the pids of this user's processes that have a feed."""
    found = set()
    for path in (path for folder in feed_folders() for path in folder.glob(f"*{SUFFIX}")):
        with suppress(OSError), _connect(path):
            if path.stem.isdecimal():
                found.add(int(path.stem))
    return sorted(found)


def read_feed(pid: int) -> Snapshot:
    """Return what a process of this user's holds now.

    Raises
    ------
    FileNotFoundError
        It has no feed; the message says how to start one.
    ConnectionError
        It had one, and is gone.
    TimeoutError
        It does not answer within 5 seconds: it is stopped, say.
    PermissionError
        The socket, or who answers there, is another user's.
    ValueError
        What came is no snapshot of that process.
    """
    for folder in feed_folders():
        path = folder / f"{pid}{SUFFIX}"
        if path.exists():
            break
    else:
        raise FileNotFoundError(f"process {pid} has no feed: {HOW_TO_FEED}")
    deadline_s = time.monotonic() + TIMEOUT_S
    try:
        with _connect(path) as connection:
            line = _read_line(connection, deadline_s)
    except TimeoutError:
        raise TimeoutError(f"process {pid} does not answer: it may be stopped") from None
    except ConnectionRefusedError:
        raise ConnectionRefusedError(f"process {pid} is gone: only its socket is left") from None
    snapshot = snapshot_from_json(line)
    if snapshot.pid != pid:
        raise ValueError(f"{path} answers for process {snapshot.pid}")
    return snapshot


def _connect(path: Path) -> socket.socket:
    """Connect to a socket of this user's in a folder of this user's."""
    status = path.parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{path.parent} is no folder of this user's")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(TIMEOUT_S)
        with user_socket.short_path(path) as (_, short):
            connection.connect(short)
        user_socket.check_peer(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _read_line(connection: socket.socket, deadline_s: float) -> bytes:
    """Return what comes before the end of the line.

    A child that was forked meanwhile may keep the connection open for a while after it.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(_time_left_s(deadline_s))
        piece = connection.recv(PIECE_BYTES)
        if not piece:
            raise ConnectionResetError("the process hung up before it had answered")
        line += piece
        if len(line) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes came: no snapshot is as long")
    return bytes(line)


def _time_left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("it takes too long to answer")
    return left_s


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A page that sends its reader elsewhere is not followed."""

    def redirect_request(self, *_: Any) -> None:
        return None


# No proxy: the process is this machine's, or one that its operator can reach.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _StayHere)


def read_url(url: str) -> Snapshot:
    """Return what the process behind the page of ``pagealloc serve`` holds now.

    Parameters
    ----------
    url : str
        Of the page; ``snapshot.json`` beside it is read.

    Raises
    ------
    OSError
        Nobody answers, too slowly, or with something else than a page.
    ValueError
        It is no http or https URL, or what came is no snapshot.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    address = url.rstrip("/") + "/snapshot.json"
    deadline_s = time.monotonic() + TIMEOUT_S
    try:
        with _opener.open(address, timeout=TIMEOUT_S) as answer:
            text = bytearray()
            while piece := answer.read1(PIECE_BYTES):
                text += piece
                _time_left_s(deadline_s)
                if len(text) > MOST_BYTES:
                    raise ValueError(f"{address}: more than {MOST_BYTES} bytes came")
    except urllib.error.HTTPError as error:
        error.close()
        raise ConnectionError(
            f"{address} answers {error.code}: no pagealloc serves there"
        ) from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"{address}: {error.reason}") from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"{address}: {type(error).__name__}") from error
    return snapshot_from_json(bytes(text))
