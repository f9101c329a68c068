"""Bytes that no owner and no client of prefixes would send: an error, and others are served."""

import random
import socket
import time

import pytest
from prefixes import layout_of, n_cached, publish
from processes import wait_for

from pagealloc import WireError
from pagealloc.kv import KVCache, prefix_wire
from pagealloc.kv.prefix_hash import owner_key
from pagealloc.kv.prefix_wire import Owner, Reader, Run
from pagealloc.kv.user_socket import short_path

PAGE_BYTES = 65536
WINDOW_BYTES, FILE_BYTES = 64 * PAGE_BYTES, 1024 * PAGE_BYTES


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def changed(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                number = rng.choice([0, 1, 4095, 4096, 65536, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
                data[at : at + 8] = number.to_bytes(8, "little")
            case 2:
                del data[at : at + rng.randrange(1, 16)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 16))
    return bytes(data)


def test_answers(rng, duration_s):
    """What passes the checks is whole pages, in order, inside window and file."""
    runs = [Run(0, 0, PAGE_BYTES), Run(2 * PAGE_BYTES, 9 * PAGE_BYTES, 3 * PAGE_BYTES)]
    payload = prefix_wire.pack_found(7, 32, runs)
    greeting = prefix_wire.pack_owner(Owner(PAGE_BYTES, WINDOW_BYTES, bytes(16), b"{}"))
    n_refused = n_passed = 0
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        try:
            _, _, found = prefix_wire.unpack_found(
                changed(rng, payload), PAGE_BYTES, WINDOW_BYTES, FILE_BYTES
            )
            end = 0
            for run in found:
                assert run.offset >= end
                assert run.nbytes > 0
                assert all(number % PAGE_BYTES == 0 for number in run)
                end = run.offset + run.nbytes
                assert end <= WINDOW_BYTES
                assert run.file_offset + run.nbytes <= FILE_BYTES
            n_passed += 1
        except WireError:
            n_refused += 1
        try:
            prefix_wire.unpack_owner(changed(rng, greeting))
        except WireError:
            n_refused += 1
    assert n_refused
    assert n_passed


def test_pieces_of_messages(rng, duration_s):
    stream = b"".join(
        prefix_wire.pack_message(rng.randrange(9), rng.randbytes(rng.randrange(40)))
        for _ in range(20)
    )
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        data, reader = changed(rng, stream) if rng.randrange(3) else stream, Reader()
        found = []
        try:
            while data:
                n_bytes = rng.randrange(1, 50)
                found += reader.feed(data[:n_bytes])
                data = data[n_bytes:]
        except WireError:
            continue
        joined = b"".join(prefix_wire.pack_message(each.kind, each.payload) for each in found)
        assert len(joined) <= len(stream) + 100


def test_an_owner_that_is_sent_anything(rng, duration_s, tmp_path):
    """It hangs up on who sent it, and serves the others."""
    tmp_path.chmod(0o700)
    path = tmp_path / "prefixes"
    prompt = [1] * 16
    with KVCache(layout_of(), purge_after_s=0) as cache:
        publish(cache, prompt)
        tokens = b"\x01\0\0\0" * 16
        whole = b"".join(
            prefix_wire.pack_message(kind, payload)
            for kind, payload in (
                (prefix_wire.CLIENT, owner_key(None, None)),
                (prefix_wire.FIND, tokens),
                (prefix_wire.RELEASE, (1).to_bytes(8, "little")),
                (prefix_wire.FIND, tokens[:-2]),
            )
        )
        with cache.serve(path) as server:
            with KVCache.attach(path, purge_after_s=0) as client:
                end_s = time.monotonic() + duration_s
                while time.monotonic() < end_s:
                    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                        with short_path(path) as (_, short):
                            other.connect(short)
                        other.sendall(changed(rng, whole) if rng.randrange(8) else whole)
                        other.settimeout(0.05)
                        try:
                            while rng.randrange(4) and other.recv(4096):
                                pass
                        except (TimeoutError, ConnectionResetError):
                            pass
                    assert n_cached(client, prompt) == 16
            wait_for(lambda: not server.n_clients)
        cache.check()
        cache.prefixes.clear()
        assert cache.stats().committed_bytes == 0
