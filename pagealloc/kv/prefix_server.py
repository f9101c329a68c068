"""PrefixServer: an owner's thread that lends published prefixes to other processes.

Purpose
    Answer which pages of the memory file hold a prompt's prefix, and keep these pages for as long
    as a client has them.
Structure
    ::

        client --FIND--> server --find()--> PrefixIndex        a Lease, kept per client
               <-FOUND--        --runs()--> windows            where the pages lie in the file

    A client maps the pages read-only, from a descriptor that is open for reading.
Invariants
    a client's lease ends when it says so or hangs up, not before
    while a lease lives its pages are neither punched nor given to anybody else (`PrefixIndex`), not
    even when the process ends: then nothing is punched any more, and the kernel keeps the pages for
    whoever maps them
Locking
    One thread; the index has its own lock.  After os.fork() the child lets go of all sockets.
"""

from __future__ import annotations

import array
import atexit
import os
import selectors
import socket
import threading
import time
import traceback
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pagealloc.errors import PageallocError, WireError
from pagealloc.kv import prefix_wire, user_socket
from pagealloc.kv.prefix_wire import Message, Owner, Reader, Run

if TYPE_CHECKING:
    from pagealloc import ExtentStore, Window
    from pagealloc.kv.boundary import Span
    from pagealloc.kv.prefix_disk import DiskPrefixIndex
    from pagealloc.kv.prefix_nodes import Lease

__all__ = ["PrefixServer"]

MAX_LEASES = 1 << 16  # of a client
MAX_UNSENT_BYTES = 1 << 24  # to a client that does not read
RECEIVE_BYTES = 1 << 16
PATIENCE_STEPS, PATIENCE_STEP_S = 20, 0.01

_servers: weakref.WeakSet[PrefixServer] = weakref.WeakSet()


class _Client:
    """A connection, and what its other side has."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = Reader()
        self.unsent = bytearray()
        self.leases: dict[int, Lease] = {}
        self.is_welcome = False
        self.next_lease = 1


class PrefixServer:
    """Lends the published prefixes of one cache; made by `KVCache.serve`.

    Parameters
    ----------
    path : path
        Of the Unix socket, in a folder that is this user's alone.
    index : DiskPrefixIndex
        What is published.
    store : ExtentStore
        Whose file the pages are in.
    owner_key : bytes
        Name of owner and model: who does not say it learns nothing, and gets nothing.
    description : bytes
        What the rows are, for `KVCache.attach`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        index: DiskPrefixIndex,
        store: ExtentStore,
        owner_key: bytes,
        description: bytes,
    ) -> None:
        self.path = Path(path)
        self._index = index
        self._store = store
        self._owner_key = owner_key
        owner = Owner(
            index.layout.page_bytes, index.layout.window_bytes, index.root_key, description
        )
        self._greeting = prefix_wire.pack_message(prefix_wire.OWNER, prefix_wire.pack_owner(owner))
        self._clients: dict[int, _Client] = {}
        self._listener = user_socket.listen(self.path)
        # Whoever gets a copy of this one cannot write, nor make it one that can without the file's
        # own permission, which is 0600.
        self._file = os.open(f"/proc/self/fd/{store.fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._pid = os.getpid()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="pagealloc-prefixes", daemon=True)
        self._thread.start()
        _servers.add(self)
        atexit.register(_keep_pages, weakref.ref(self))

    @property
    def n_clients(self) -> int:
        """Connections."""
        return len(self._clients)

    @property
    def n_leases(self) -> int:
        """Prefixes that clients have."""
        return sum(len(client.leases) for client in list(self._clients.values()))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Let go of all clients and of the socket.  A second call does nothing.

        Raises
        ------
        BufferError
            Clients have prefixes; they read pages of this process.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        for _ in range(PATIENCE_STEPS):  # a client may have hung up just now
            if not self.n_leases:
                break
            time.sleep(PATIENCE_STEP_S)
        else:
            raise BufferError(
                f"cannot stop serving {self.path}: {self.n_clients} clients have {self.n_leases} "
                "prefixes; close their sequences, or the processes, first"
            )
        self._is_closed = True
        with suppress(OSError):
            self._waker.send(b"!")
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closed:
            for key, events in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Client):
                    self._attend(key.data, events)
        self._let_go()
        with suppress(OSError):
            self.path.unlink()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # no descriptor is free, say: the client waits, this thread does not spin
            time.sleep(PATIENCE_STEP_S)
            return
        try:
            user_socket.check_peer(connection)
        except OSError:
            connection.close()
            return
        connection.setblocking(False)  # noqa: FBT003  its only argument
        client = _Client(connection)
        self._clients[connection.fileno()] = client
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _attend(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._send(client, b"")
            if events & selectors.EVENT_READ:
                self._read(client)
        except BlockingIOError:
            return
        except (OSError, PageallocError) as error:
            self._refuse(client, str(error))
        except Exception as error:  # noqa: BLE001  on_prefix_event's, say: the others are served
            traceback.print_exception(error)
            self._refuse(client, "the owner could not answer")

    def _read(self, client: _Client) -> None:
        data = client.connection.recv(RECEIVE_BYTES)
        if not data:
            raise WireError("it hung up")
        for message in client.reader.feed(data):
            self._answer(client, message)

    def _answer(self, client: _Client, message: Message) -> None:
        if message.kind == prefix_wire.CLIENT and not client.is_welcome:
            if message.payload != self._owner_key:
                raise WireError(
                    "this owner's rows are of another model or salt: attach with the model= and "
                    "salt= of the cache that serves"
                )
            client.is_welcome = True
            self._welcome(client)
        elif message.kind == prefix_wire.FIND and client.is_welcome:
            self._send(client, self._find(client, message.payload))
        elif message.kind == prefix_wire.RELEASE and client.is_welcome:
            client.leases.pop(int.from_bytes(message.payload, "little"), None)
        else:
            raise WireError(f"message {message.kind} does not belong here")

    def _welcome(self, client: _Client) -> None:
        data = self._greeting
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._file]))
        if client.connection.sendmsg([data], [rights]) != len(data):
            raise WireError("it does not read what it is sent")

    def _find(self, client: _Client, tokens: bytes) -> bytes:
        """Lease the longest prefix in memory, and say where its pages are."""
        if len(client.leases) >= MAX_LEASES:
            raise WireError(f"it has {MAX_LEASES} leases: more than any client needs")
        lease = self._index.find(tokens).lease
        if lease is None:
            return prefix_wire.pack_message(prefix_wire.FOUND, prefix_wire.pack_found(0, 0, []))
        number = client.next_lease
        client.next_lease += 1
        client.leases[number] = lease
        parts, _ = self._index.parts(lease)
        runs = sorted(run for window, spans in parts for run in _runs(window, spans))
        found = prefix_wire.pack_found(number, self._index.n_tokens(lease), runs)
        return prefix_wire.pack_message(prefix_wire.FOUND, found)

    def _send(self, client: _Client, data: bytes) -> None:
        client.unsent += data
        if len(client.unsent) > MAX_UNSENT_BYTES:
            raise WireError("it does not read what it is sent")
        if client.unsent:
            with suppress(BlockingIOError):
                n_sent = client.connection.send(client.unsent)
                del client.unsent[:n_sent]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.connection, events, client)

    def _refuse(self, client: _Client, why: str) -> None:
        """Hang up.  Its leases end before it leaves the list: who counts no client meets none."""
        with suppress(OSError):
            client.connection.send(prefix_wire.pack_message(prefix_wire.REFUSED, why.encode()))
        client.leases.clear()
        self._clients.pop(client.connection.fileno(), None)
        with suppress(KeyError, ValueError):
            self._selector.unregister(client.connection)
        client.connection.close()

    def _let_go(self) -> None:
        """Close all descriptors."""
        for client in list(self._clients.values()):
            client.leases.clear()
            client.connection.close()
        self._clients.clear()
        self._selector.close()
        for each in (self._listener, self._wake, self._waker):
            each.close()
        os.close(self._file)


def _runs(window: Window, spans: list[Span]) -> list[Run]:
    """Return where in the file the pages of spans of a window lie."""
    return [
        Run(start, run.file_offset + start - run.offset, end - start)
        for run in window.runs()
        for span in spans
        if (start := max(run.offset, span.start)) < (end := min(run.offset + run.nbytes, span.end))
    ]


def _keep_pages(reference: weakref.ref[PrefixServer]) -> None:
    """The process ends: what clients have is not to be punched by whatever is closed on the way."""
    server = reference()
    if server is not None and server.n_leases and os.getpid() == server._pid:  # noqa: SLF001
        server._store.keep_pages()  # noqa: SLF001  of one module


def _forget_in_child() -> None:
    """A child that kept the sockets open would hide from clients that the owner died."""
    for server in list(_servers):
        if not server.closed:
            server._let_go()  # noqa: SLF001  of one module
            server._is_closed = True  # noqa: SLF001


os.register_at_fork(after_in_child=_forget_in_child)
