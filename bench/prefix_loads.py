"""Works of the prefix benchmark, each in a process of its own.

``python -m bench.prefix_loads WORK PATH`` prints the nanoseconds that the work took.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pagealloc.kv import KVCache, KVLayout
from pagealloc.kv.user_socket import short_path

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PREFIX_TOKENS", "answering", "cache_of_prefix"]

PREFIX_TOKENS = 1000
N_EXCHANGES, ASKED_BYTES = 2, 4000


def prefix_ids() -> list[int]:
    """Return the token ids of the prefix."""
    return list(range(PREFIX_TOKENS))


def cache_of_prefix() -> KVCache:
    """Return a cache in which a prefix of SmolLM2's shape is published."""
    layout = KVLayout(30, 3, 64, 8192, order="block")
    rows = np.random.default_rng(0).normal(size=(PREFIX_TOKENS, 3, 64)).astype(np.float16)
    cache = KVCache(layout)
    with cache.sequence(prefix_ids()) as seq:
        for layer in range(layout.n_layers):
            seq.append(layer, rows, rows)
        seq.publish()
    return cache


def read(path: Path) -> object:
    """Read the file's bytes."""
    return path.read_bytes()


def load(path: Path) -> object:
    """Open the file as a cache, and have a sequence begin with the prefix."""
    return begin(KVCache.load(path))


def attach(path: Path) -> object:
    """Attach to who serves there, and have a sequence begin with the prefix."""
    return begin(KVCache.attach(path))


def exchange(path: Path) -> object:
    """Send and receive as often as attaching does, with who answers at once."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        with short_path(path) as (_, short):
            connection.connect(short)
        for _ in range(N_EXCHANGES):
            connection.sendall(bytes(ASKED_BYTES))
            connection.recv(ASKED_BYTES)
    return None


@contextmanager
def answering(path: Path) -> Iterator[None]:
    """Have a thread answer whoever exchanges at a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with short_path(path) as (_, short):
            listener.bind(short)
        listener.listen()
        threading.Thread(target=_answer, args=(listener,), daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)  # else accept() waits on


def _answer(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(ASKED_BYTES):
                    connection.sendall(data)


def begin(cache: KVCache) -> object:
    seq = cache.sequence(prefix_ids())
    if seq.n_cached < PREFIX_TOKENS - cache.layout.block_tokens:
        raise RuntimeError(f"only {seq.n_cached} tokens were found")
    return seq


def main() -> None:
    works = {"read": read, "load": load, "attach": attach, "exchange": exchange}
    work, path = works[sys.argv[1]], Path(sys.argv[2])
    start_ns = time.perf_counter_ns()
    kept = work(path)
    print(time.perf_counter_ns() - start_ns)
    del kept


if __name__ == "__main__":
    main()
