"""A small HTTP server in a thread, for a WSGI app that tells what this process does.

Purpose
    Metrics and profiles of a process that serves nothing else by HTTP.
Locking
    A thread a connection; the app sees to its own.
"""

from __future__ import annotations

import os
import socket
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING
from weakref import WeakSet
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from pagealloc.observe.host_check import HostCheck

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import WSGIApplication

__all__ = ["serve_in_thread"]

IDLE_TIMEOUT_S = 30
POLL_S = 0.1
"""How long ``server.shutdown()`` waits at most; a look costs microseconds."""
MOST_PORT = (1 << 16) - 1

_servers: WeakSet[WSGIServer] = WeakSet()


def _let_go_of_ports() -> None:
    """Close, in a child, what is the parent's: the port is taken as long as anybody has it."""
    for server in tuple(_servers):
        server.socket.close()


os.register_at_fork(after_in_child=_let_go_of_ports)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # an open connection does not keep the process

    def server_bind(self) -> None:
        """Bind, without the look-up of a name that http.server makes: DNS may take its time."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = IDLE_TIMEOUT_S  # who says nothing does not keep a thread

    def log_message(self, *_args: object) -> None:
        """Say nothing: stderr is the program's."""


def serve_in_thread(
    app: WSGIApplication, port: int, addr: str = "127.0.0.1", *, hosts: Iterable[str] = ()
) -> tuple[WSGIServer, Thread]:
    """Serve a WSGI app in a daemon thread.

    Parameters
    ----------
    app : WSGI application
        Called from several threads at the same time.
    port : int
        0: any that is free, see ``server.server_port``.
    addr : str
        Where to listen, an IPv4 or IPv6 address or a name of one; this machine alone by default.
    hosts : iterable of str
        Names by which clients may ask besides `addr` and those of loopback, see `HostCheck`.

    Returns
    -------
    server, thread
        ``server.shutdown()`` ends the thread, ``server.server_close()`` then frees the port.

    Raises
    ------
    OSError
        The port is taken, or `addr` is not of this machine.
    ValueError
        `port` is not between 0 and 65,535.

    Notes
    -----
    A child of ``os.fork()`` has no such thread, and lets go of the port: it serves nothing until it
    calls this again.
    """
    if not 0 <= port <= MOST_PORT:
        raise ValueError(f"port={port}: 0, which is any that is free, to {MOST_PORT} are possible")
    try:
        server = _listen(port, addr)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot listen at {addr}, port {port}: {error.strerror}"
        ) from error
    _servers.add(server)
    server.set_app(HostCheck(app, [addr, *hosts]))
    thread = Thread(target=server.serve_forever, args=(POLL_S,), name="pagealloc-http", daemon=True)
    thread.start()
    return server, thread


def _listen(port: int, addr: str) -> _Server:
    family, *_, address = socket.getaddrinfo(
        addr, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]

    class Server(_Server):
        address_family = family

    return Server((str(address[0]), port), _Handler)
