"""Feed: a thread that tells this user's other processes what this one holds.

Purpose
    `pagealloc top` and `pagealloc serve` show a running process; it has to open a feed itself.
Structure
    ::

        reader --connects--> <folder>/<pid>.sock --take_snapshot()--> one line of JSON, hangs up

    A reader says nothing, so there is nothing of a reader's to parse.
Invariants
    the socket is 0600 in a folder of this user's with mode 0700; the other side runs as this user
    a reader that does not read is gone after TIMEOUT_S; the next one waits for no longer than that
    a forked child has no feed: the parent's answers for the parent
Locking
    `_lock` for which feed is open; one thread answers, one reader after the other.
"""

from __future__ import annotations

import atexit
import os
import socket
import stat
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from pagealloc.kv import user_socket
from pagealloc.observe.snapshot import take_snapshot
from pagealloc.observe.snapshot_json import snapshot_to_json

__all__ = ["Feed", "feed_folders", "start_feed"]

TIMEOUT_S = 5.0
"""For one answer, from the first byte to the last."""
RETRY_S = 0.01
SUFFIX = ".sock"

_lock = threading.Lock()
_open_feed: Feed | None = None


class Feed:
    """Answers for this process until it is closed; made by `start_feed`.

    Attributes
    ----------
    path : Path
        Of its Unix socket.

    Notes
    -----
    Thread-safe.  Each reader costs one snapshot, and no thread ever waits for one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{os.getpid()}{SUFFIX}"
        self._pid = os.getpid()
        self._is_closed = False
        self._listener = user_socket.listen(self.path)
        self._listener.setblocking(True)  # noqa: FBT003  its only argument
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="pagealloc-feed", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether `close` was called, here or, before a fork, in the parent."""
        return self._is_closed

    def close(self) -> None:
        """Remove the socket and end the thread.  A second call does nothing."""
        global _open_feed  # noqa: PLW0603
        with _lock:
            if self._is_closed:
                return
            self._is_closed = True
            _open_feed = None
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Feed({str(self.path)!r}{', closed' if self._is_closed else ''})"

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._connection, _ = self._listener.accept()
            except OSError:  # closed, or no descriptor is free: do not spin
                time.sleep(RETRY_S)
                continue
            with self._connection:
                try:
                    self._answer(self._connection)
                except OSError:  # another user's, or it hung up
                    pass
                except Exception as error:  # noqa: BLE001  the next reader may be luckier
                    traceback.print_exception(error)
            self._connection = None

    def _answer(self, connection: socket.socket) -> None:
        user_socket.check_peer(connection)
        connection.settimeout(TIMEOUT_S)
        connection.sendall(snapshot_to_json(take_snapshot()).encode() + b"\n")

    def _forget(self) -> None:
        """Let go, in a child, of what is the parent's: closing is no shutdown."""
        self._is_closed = True
        self._listener.close()
        if self._connection is not None:
            self._connection.close()


def start_feed() -> Feed:
    """Let `pagealloc top` and `pagealloc serve` of this user show this process.

    A daemon thread answers on a Unix socket, ``$XDG_RUNTIME_DIR/pagealloc/<pid>.sock``, or in a
    folder ``pagealloc-<uid>`` of the temporary one where there is no runtime folder.  The socket is
    removed by `Feed.close`, or at exit.  A forked child has no feed until it starts one.

    Returns
    -------
    Feed
        The process's only one: a second call returns the one that is open.

    Raises
    ------
    PermissionError
        The folder is another user's, or others may open it.
    OSError
        The folder or the socket cannot be made.

    Notes
    -----
    Thread-safe.
    """
    global _open_feed  # noqa: PLW0603
    with _lock:
        if _open_feed is None:
            folder = feed_folders()[0]
            _make_own_folder(folder)
            _remove_stale(folder)
            _open_feed = Feed(folder)
        return _open_feed


def feed_folders() -> list[Path]:
    """Return where feeds of this user may be; a new one goes to the first."""
    folders = [Path(tempfile.gettempdir(), f"pagealloc-{os.geteuid()}")]
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and runtime.is_dir():
        folders.insert(0, runtime / "pagealloc")
    return folders


def _make_own_folder(folder: Path) -> None:
    """Make a folder unless it is there; what others put in its place is refused."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(
            f"{folder} is no folder of this user's: remove it, or set XDG_RUNTIME_DIR to a folder "
            "of your own"
        )


def _remove_stale(folder: Path) -> None:
    """Remove the sockets of processes that were killed."""
    for path in folder.glob(f"*{SUFFIX}"):
        if not path.stem.isdecimal() or psutil.pid_exists(int(path.stem)):
            continue
        # Of another PID namespace a process may well live: it would answer.
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
            user_socket.short_path(path) as (_, short),
            suppress(OSError),
        ):
            probe.settimeout(TIMEOUT_S)
            try:
                probe.connect(short)
            except ConnectionRefusedError:
                path.unlink()


def _close_at_exit() -> None:
    if _open_feed is not None:
        _open_feed.close()


def _forget_in_child() -> None:
    global _lock, _open_feed  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have had it
    if _open_feed is not None:
        _open_feed._forget()  # noqa: SLF001  of one module
        _open_feed = None


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_forget_in_child)
