"""RemotePrefixes: a client's connection to the process that owns published prefixes.

Invariants
    the connection stays open while a lease lives: hanging up would end it
    what comes from the owner is checked against the file's length, as it is at that moment
    the file cannot shrink (F_SEAL_SHRINK), so that no mapped page ends in SIGBUS
Locking
    One request at a time.  A lease ends without the lock: it leaves a note, which goes to the owner
    with the next request, or when a sequence is closed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pagealloc.errors import WireError
from pagealloc.kv import prefix_wire, user_socket
from pagealloc.kv.prefix_wire import HungUpError, Run

if TYPE_CHECKING:
    from pagealloc import ExtentStore

__all__ = ["RemoteFound", "RemoteLease", "RemotePrefixes"]

TIMEOUT_S = 10.0
LEAST_ADDED_BYTES = 1 << 30
F_GET_SEALS, F_SEAL_SHRINK = 1034, 2
"""Of Linux's fcntl.h; Python has names for them on some builds only."""


class RemoteLease:
    """While it lives, the owner keeps the pages of a prefix.

    Parameters
    ----------
    number : int
        The owner's for it.
    ended : deque of int
        Where to leave the note.
    """

    __slots__ = ("_ended", "number")

    def __init__(self, number: int, ended: deque[int]) -> None:
        self.number = number
        self._ended = ended

    def __del__(self) -> None:
        self._ended.append(self.number)


class RemoteFound(NamedTuple):
    """A prefix in the owner's memory."""

    lease: RemoteLease
    n_tokens: int
    file: int
    """Where the client's store has the owner's file."""
    runs: list[Run]


class RemotePrefixes:
    """A connection to an owner.

    Parameters
    ----------
    path : path
        Of its socket.
    owner_key : bytes
        Name of owner and model, see `prefix_hash`.

    Raises
    ------
    OSError
        Nobody serves there, or another user does.
    WireError
        It is no owner of prefixes, or one of another model or salt; or its file could shrink.
    """

    def __init__(self, path: str | os.PathLike[str], owner_key: bytes) -> None:
        self.path = os.fspath(path)
        self._ended: deque[int] = deque()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._file = -1
        self._added_bytes = self._added = 0
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.is_alive = True
        try:
            self._connection.settimeout(TIMEOUT_S)
            with user_socket.short_path(Path(self.path)) as (_, short):
                self._connection.connect(short)
            user_socket.check_peer(self._connection)
            self._connection.sendall(prefix_wire.pack_message(prefix_wire.CLIENT, owner_key))
            self.owner, self._file = prefix_wire.receive_owner(self._connection)
            self._check_seals()
        except BaseException:
            self.close()
            raise

    def join(self, root_key: bytes, window_bytes: int, store: ExtentStore) -> None:
        """Say into which store the owner's pages are to be mapped.

        Raises
        ------
        WireError
            The owner's rows are of another kind than those whose `root_key` this is.
        """
        if (root_key, window_bytes) != (self.owner.root_key, self.owner.window_bytes):
            raise WireError(
                f"{self.path}: the owner's rows are of another kind; give attach() no types, and "
                "no options that change them"
            )
        self._store = store

    def _check_seals(self) -> None:
        if not fcntl.fcntl(self._file, F_GET_SEALS) & F_SEAL_SHRINK:
            raise WireError(f"{self.path}: the owner's file could shrink")

    def find(self, tokens: bytes) -> RemoteFound | None:
        """Return the longest prefix of a prompt that the owner has; None: it has none, or is gone.

        Raises
        ------
        WireError
            The owner says what it cannot mean.
        """
        if not self.is_alive or os.getpid() != self._pid:
            return None
        with self._lock:
            try:
                self._send_notes()
                self._connection.sendall(prefix_wire.pack_message(prefix_wire.FIND, tokens))
                message = prefix_wire.receive(self._connection)
                if message.kind != prefix_wire.FOUND:
                    raise WireError(f"{self.path}: message {message.kind} is no answer")
                file_bytes = os.fstat(self._file).st_size
                number, n_tokens, runs = prefix_wire.unpack_found(
                    message.payload, self.owner.page_bytes, self.owner.window_bytes, file_bytes
                )
            except (HungUpError, TimeoutError, ConnectionResetError, BrokenPipeError):
                self.is_alive = False  # it hangs, or died: what is mapped stays as it is
                return None
            except OSError:
                self.is_alive = False
                raise
            if not n_tokens:
                return None
            lease = RemoteLease(number, self._ended)
            if file_bytes > self._added_bytes:  # with room to grow: each time takes a descriptor
                self._added_bytes = max(LEAST_ADDED_BYTES, 2 * file_bytes)
                self._added = self._store.add_foreign(self._file, self._added_bytes)
            return RemoteFound(lease, n_tokens, self._added, runs)

    def settle(self) -> None:
        """Tell the owner which leases ended, unless another thread is asking it something."""
        if self._ended and self.is_alive and self._lock.acquire(blocking=False):
            try:
                with suppress(OSError):
                    self._send_notes()
            finally:
                self._lock.release()

    def _send_notes(self) -> None:
        while self._ended and os.getpid() == self._pid:
            number = self._ended.popleft().to_bytes(8, "little")
            self._connection.sendall(prefix_wire.pack_message(prefix_wire.RELEASE, number))

    def close(self) -> None:
        """Hang up: the owner may let go of all pages this client had."""
        self.is_alive = False
        self._connection.close()
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
