"""Prefixes lent to other processes: what a client sees, keeps, and cannot see."""

import mmap
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prefixes import BLOCK, ORDERS, assert_rows, compute, layout_of, n_cached, publish
from processes import child_of, in_child, wait_for

from pagealloc import ForkedError, WireError
from pagealloc.kv import KVCache, KVLayout, prefix_client, prefix_wire
from pagealloc.kv.prefix_wire import (
    CLIENT,
    FIND,
    OWNER,
    REFUSED,
    RELEASE,
    Owner,
    Run,
    pack_message,
    pack_owner,
    receive,
)
from pagealloc.kv.user_socket import short_path

PROMPTS = [[1] * 16, [1] * 8 + [2] * 8, [3] * 12]


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    return folder / "prefixes"


def owner(order="block", **options):
    cache = KVCache(layout_of(order), salt="a", purge_after_s=0, **options)
    for prompt in PROMPTS:
        publish(cache, prompt)
    return cache


def n_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def attach(path, **options):
    return KVCache.attach(path, salt="a", purge_after_s=0, **options)


class TestAClient:
    @pytest.mark.parametrize("order", ORDERS)
    def test_goes_on_behind_the_owner_s_rows(self, path, order):
        def work():
            with attach(path) as cache:
                more = [*PROMPTS[1], 5, 6, 7, 8, 9]
                with cache.sequence(more) as seq:
                    assert seq.n_cached == 16
                    assert_rows(seq, PROMPTS[1])
                    before_bytes = cache.stats().committed_bytes
                    assert before_bytes == 0
                    compute(seq, more)
                    assert_rows(seq, more)
                    with seq.fork(10) as fork:
                        compute(fork, [*more[:10], 7, 7])
                        assert_rows(fork, [*more[:10], 7, 7])
                    cache.check()
                    seq.rm(9, 10)
                    seq.truncate(4)
                    assert_rows(seq, more[:4])
                    cache.check()

        with owner(order) as cache, cache.serve(path) as server:
            in_child(work)
            wait_for(lambda: not server.n_clients)
            for prompt in PROMPTS:
                with cache.sequence(prompt) as seq:
                    assert_rows(seq, prompt)
            cache.check()

    @pytest.mark.parametrize("order", ORDERS)
    def test_of_quantised_rows(self, path, order):
        tokens = [*range(40)]
        with KVCache(layout_of(order), quantize="recommended", residual_tokens=8) as cache:
            publish(cache, tokens)
            with cache.sequence(tokens) as seq:
                expected = seq.k(0, dtype=np.float32)

            def work():
                with KVCache.attach(path) as client, client.sequence(tokens) as seq:
                    assert seq.n_cached == seq.n_cold == 32
                    np.testing.assert_array_equal(seq.k(0, dtype=np.float32), expected)
                    compute(seq, [*tokens, *range(8)])
                    assert seq.n_cold == 40
                    np.testing.assert_array_equal(seq.k(0, 0, 32, dtype=np.float32), expected)
                    client.check()

            with cache.serve(path):
                in_child(work)

    def test_publishes_on_top(self, path):
        """Its own index keeps what it has of the owner, and the owner keeps it for it."""

        def work():
            with attach(path) as cache:
                more = [*PROMPTS[0], 4, 4, 4, 4]
                assert publish(cache, more) == 20
                assert cache.prefixes.stats().n_blocks == 5
                with cache.sequence(more) as seq:
                    assert seq.n_cached == 20
                    assert_rows(seq, more)
                cache.check()
                assert n_cached(cache, PROMPTS[2]) == 12

        with owner() as cache, cache.serve(path):
            in_child(work)

    def test_keeps_its_own_if_that_is_longer(self, path):
        with owner() as cache, cache.serve(path) as server, attach(path) as client:
            with client.sequence() as seq:
                compute(seq, PROMPTS[0])
                seq.publish(PROMPTS[0])
            assert n_cached(client, PROMPTS[0]) == 16
            assert server.n_leases == 0
            with client.sequence(PROMPTS[1]) as seq:
                assert seq.n_cached == 16
                wait_for(lambda: server.n_leases == 1)
            wait_for(lambda: not server.n_leases)

    def test_finds_what_is_published_later(self, path):
        """The owner's file grows meanwhile."""
        with owner() as cache, cache.serve(path), attach(path) as client:
            assert n_cached(client, [100] * 8) == 0
            held = []
            for number in range(100, 140):
                prompt = [number] * 12
                keep = cache.sequence(prompt)
                compute(keep, prompt)
                keep.publish()
                held.append(keep)
                with client.sequence(prompt) as seq:
                    assert_rows(seq, prompt)
            client.check()

    def test_in_a_child_of_the_client(self, path):
        with owner() as cache, cache.serve(path), attach(path) as client:
            seq = client.sequence(PROMPTS[0])

            def work():
                assert_rows(seq, PROMPTS[0])
                with pytest.raises(ForkedError):
                    client.sequence(PROMPTS[0])
                seq.close()

            in_child(work)
            assert_rows(seq, PROMPTS[0])
            assert n_cached(client, PROMPTS[2]) == 12
            seq.close()


class TestLeases:
    def test_leased_blocks_stay(self, path):
        with owner() as cache, cache.serve(path) as server, attach(path) as client:
            seq = client.sequence(PROMPTS[1])
            assert cache.prefixes.clear() == 5
            assert n_cached(cache, PROMPTS[1]) == 16
            assert_rows(seq, PROMPTS[1])
            with pytest.raises(BufferError, match="1 clients have 1 prefixes"):
                server.close()
            with pytest.raises(BufferError, match="prefixes"):
                cache.close()
            assert not cache.closed
            seq.close()
            wait_for(lambda: not server.n_leases)
            assert cache.prefixes.clear() == 4
            assert cache.stats().committed_bytes == 0

    def test_of_forks_and_cut_sequences(self, path):
        with owner() as cache, cache.serve(path) as server, attach(path) as client:
            seq = client.sequence(PROMPTS[1])
            fork = seq.fork(6)
            seq.close()
            cache.prefixes.clear()
            assert_rows(fork, PROMPTS[1][:6])
            assert server.n_leases == 1
            del fork
            client.sequence().close()
            wait_for(lambda: not server.n_leases)

    def test_of_what_the_client_published(self, path):
        with owner() as cache, cache.serve(path) as server, attach(path) as client:
            publish(client, [*PROMPTS[0], 4, 4, 4, 4])
            assert server.n_leases == 1
            assert client.prefixes.clear() == 5
            wait_for(lambda: not server.n_leases)
            cache.check()

    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
    def test_a_client_that_dies(self, path, signum):
        def work():
            cache = attach(path)
            seq = cache.sequence(PROMPTS[0])
            assert seq.n_cached == 16
            time.sleep(60)

        with owner() as cache, cache.serve(path) as server:
            pid = child_of(work)
            wait_for(lambda: server.n_leases == 1)
            assert cache.prefixes.clear() == 5
            os.kill(pid, signum)
            os.waitpid(pid, 0)
            wait_for(lambda: not server.n_clients)
            assert server.n_leases == 0
            assert cache.prefixes.clear() == 4
            assert cache.stats().committed_bytes == 0

    def test_an_owner_that_ends(self, path):
        """Its pages outlive it, however it ends: the kernel keeps them for the client."""
        for how in ("exit", "kill"):
            ready, told = os.pipe()
            may_end, found = os.pipe()

            def own(how=how, told=told, may_end=may_end, found=found):
                os.close(found)  # so that it reads no more once the test has ended
                cache = owner()
                cache.serve(path)
                os.write(told, b"!")
                # Not by the lease, which is counted before the client has heard of it.
                assert os.read(may_end, 1) == b"!"
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                run_exit_handlers(cache)

            pid = child_of(own)
            assert os.read(ready, 1) == b"!"
            client = attach(path)
            seq = client.sequence([*PROMPTS[1], 8, 8])
            assert seq.n_cached == 16
            os.write(found, b"!")
            os.waitpid(pid, 0)
            assert_rows(seq, PROMPTS[1])
            compute(seq, [*PROMPTS[1], 8, 8])
            assert_rows(seq, [*PROMPTS[1], 8, 8])
            assert n_cached(client, PROMPTS[0]) == 0  # there is nobody to ask any more
            publish(client, [6] * 8)
            assert n_cached(client, [6] * 8) == 8
            client.check()
            seq.close()
            client.close()
            for fd in (ready, told, may_end, found):
                os.close(fd)

    def test_an_owner_that_hangs(self, path, monkeypatch):
        monkeypatch.setattr(prefix_client, "TIMEOUT_S", 0.2)
        ready, told = os.pipe()

        def own():
            cache = owner()
            cache.serve(path)
            os.write(told, b"!")
            time.sleep(60)

        pid = child_of(own)
        try:
            assert os.read(ready, 1) == b"!"
            with attach(path) as client:
                seq = client.sequence(PROMPTS[0])
                os.kill(pid, signal.SIGSTOP)
                assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
                assert n_cached(client, PROMPTS[2]) == 0
                assert_rows(seq, PROMPTS[0])
                os.kill(pid, signal.SIGCONT)
                assert_rows(seq, PROMPTS[0])
                seq.close()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)


def run_exit_handlers(cache):
    """End as a program does that forgets to close: exit handlers, then objects one by one."""
    import atexit

    atexit._run_exitfuncs()
    del cache


def test_an_owner_whose_callback_fails(path, capfd):
    """It says so, hangs up on who asked, and serves the next one."""
    is_broken = []

    def tell(event):
        if is_broken and event.kind == "hit":
            raise KeyError("of the callback")

    with owner(on_prefix_event=tell) as cache, cache.serve(path):
        is_broken.append(True)
        with attach(path) as client:
            with pytest.raises(WireError, match="could not answer"):
                client.sequence(PROMPTS[0])
            publish(client, PROMPTS[0])
        is_broken.clear()
        with attach(path) as client:
            assert n_cached(client, PROMPTS[0]) == 16
    assert "of the callback" in capfd.readouterr().err


class TestWhoMayAttach:
    @pytest.mark.parametrize("options", [{}, {"salt": "b"}, {"salt": "a", "model": "other"}])
    def test_another_salt_or_model(self, path, options):
        with owner() as cache, cache.serve(path) as server:
            with pytest.raises(WireError, match="another model or salt"):
                KVCache.attach(path, **options)
            wait_for(lambda: not server.n_clients)

    @pytest.mark.parametrize("salt", [7, ["a"]])
    def test_a_salt_that_is_none(self, path, salt):
        with owner() as cache, cache.serve(path), pytest.raises(TypeError, match="str or bytes"):
            KVCache.attach(path, salt=salt)

    def test_rows_of_another_kind(self, path):
        with owner() as cache, cache.serve(path) as server:
            n_open = n_open_files()
            with pytest.raises(WireError, match="of another kind"):
                attach(path, k_type="q8_0", residual_tokens=4)
            wait_for(lambda: not server.n_clients)
            wait_for(lambda: n_open_files() == n_open)

    def test_no_descriptor_without_the_key(self, path):
        with owner() as cache, cache.serve(path), connected(path) as client:
            client.sendall(pack_message(CLIENT, bytes(32)))
            data, ancillary, _, _ = client.recvmsg(4096, 64)
            assert b"another model" in data
            assert not ancillary

    @pytest.mark.parametrize("kind", [FIND, RELEASE, OWNER, 99])
    def test_nothing_before_the_key(self, path, kind):
        with owner() as cache, cache.serve(path) as server, connected(path) as client:
            client.sendall(pack_message(kind, bytes(8)))
            with pytest.raises(WireError, match="does not belong here"):
                receive(client)
            wait_for(lambda: not server.n_clients)

    def test_the_descriptor_is_for_reading(self, path):
        with owner() as cache, cache.serve(path), attach(path) as client:
            fd = client._remote._file
            with pytest.raises(OSError, match=r"Permission denied|not permitted"):
                mmap.mmap(fd, 4096)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            assert not os.get_inheritable(fd)
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
            with pytest.raises(PermissionError):
                os.ftruncate(cache._store.fd, 0)  # sealed

    def test_nothing_of_another_salt_is_in_the_memory(self, path):
        """All of what a client can map, searched for another owner's rows."""
        pattern = np.float16(1234.0).tobytes() * 16
        layout = layout_of()
        with KVCache(layout, salt="a") as cache, KVCache(layout, salt="b") as other:
            for each, value in ((cache, 777.0), (other, 1234.0)):
                with each.sequence([1] * 16) as seq:
                    for _ in range(16):
                        seq.append_token(np.full((2, 2, 2, 64), value, np.float16))
                    seq.publish()
                with each.sequence() as seq:  # and pages that pass from one sequence to another
                    seq.append_token(np.full((2, 2, 2, 64), value, np.float16))
            with (
                cache.serve(path),
                KVCache.attach(path, salt="a") as client,
                client.sequence([1] * 16) as seq,
            ):
                assert seq.n_cached == 16
                data = all_bytes(client._remote._file)
                assert np.float16(777.0).tobytes() * 16 in data
                assert pattern not in data

    def test_another_user(self, path, monkeypatch):
        with owner() as cache, cache.serve(path) as server:
            own = os.geteuid()
            monkeypatch.setattr(prefix_wire.os, "geteuid", lambda: own + 1)
            with pytest.raises(PermissionError, match="runs as user"):
                attach(path)
            wait_for(lambda: not server.n_clients)


def all_bytes(fd):
    """What a sparse file holds."""
    data, position = bytearray(), 0
    while True:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            return data
        end = os.lseek(fd, position, os.SEEK_HOLE)
        data += os.pread(fd, end - position, position)
        position = end


def connected(path):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    with short_path(path) as (_, short):
        client.connect(short)
    return client


class TestAnOwnerThatIsNone:
    """A client refuses it, and keeps none of its descriptors."""

    @pytest.mark.parametrize(
        ("kind", "payload", "fds", "match"),
        [
            (OWNER, pack_owner(Owner(4096, 4096, bytes(16), b"{}")), 1, "could shrink"),
            (OWNER, pack_owner(Owner(4096, 4096, bytes(16), b"{}")), 2, "could shrink"),
            (OWNER, pack_owner(Owner(4096, 4096, bytes(16), b"{}")), 0, "no owner"),
            (OWNER, b"short", 1, "too short"),
            (OWNER, bytes(40), 1, "version 0"),
            (FIND, b"", 1, "no owner"),
            (REFUSED, b"not you", 1, "not you"),
        ],
    )
    def test_it(self, path, kind, payload, fds, match):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            with short_path(path) as (_, short):
                listener.bind(short)
            listener.listen()
            with os.fdopen(os.memfd_create("pages", os.MFD_ALLOW_SEALING)) as file:
                thread = threading.Thread(
                    target=greet,
                    args=(listener, pack_message(kind, payload), [file.fileno()] * fds),
                )
                thread.start()
                n_open = n_open_files()
                with pytest.raises(WireError, match=match):
                    attach(path)
                thread.join()
                assert n_open_files() == n_open


def greet(listener, data, fds):
    connection, _ = listener.accept()
    with connection:
        socket.send_fds(connection, [data], fds) if fds else connection.sendall(data)
        connection.recv(4096)


class TestTheSocket:
    def test_at_a_long_path(self, path):
        long = path.parent / ("folder" * 30)
        long.mkdir(mode=0o700)
        with owner() as cache:
            with cache.serve(long / "prefixes"), attach(long / "prefixes") as client:
                assert n_cached(client, PROMPTS[0]) == 16
            assert not list(long.iterdir())
            with pytest.raises(OSError, match="too long"):
                cache.serve(long / ("name" * 30))

    def test_in_a_folder_of_one_s_own(self, path):
        path.parent.chmod(0o755)
        with owner() as cache:
            with pytest.raises(PermissionError, match="chmod 700"):
                cache.serve(path)
            with cache.serve(path.parent / "new" / "prefixes") as server:
                assert stat.S_IMODE(server.path.parent.stat().st_mode) == 0o700
                assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
            assert not server.path.exists()

    def test_two_owners(self, path):
        with owner() as cache, owner() as other, cache.serve(path):
            with pytest.raises(FileExistsError, match="another process serves"):
                other.serve(path)
            with pytest.raises(ValueError, match="already"):
                cache.serve(path)

    def test_what_a_dead_owner_left(self, path):
        with (
            short_path(path) as (_, short),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead,
        ):
            dead.bind(short)
        with owner() as cache, cache.serve(path), attach(path) as client:
            assert n_cached(client, PROMPTS[0]) == 16

    def test_no_socket(self, path):
        path.write_text("something else")
        with owner() as cache, pytest.raises(FileExistsError, match="no socket"):
            cache.serve(path)
        assert path.read_text() == "something else"
        with pytest.raises(OSError, match="refused"):
            attach(path)

    def test_served_again(self, path):
        with owner() as cache:
            for _ in range(3):
                with cache.serve(path), attach(path) as client:
                    assert n_cached(client, PROMPTS[0]) == 16

    def test_in_a_child(self, path):
        with owner() as cache, cache.serve(path) as server:

            def work():
                assert server.closed
                with pytest.raises(ForkedError):
                    cache.serve(path.with_name("other"))

            in_child(work)
            with attach(path) as client:
                assert n_cached(client, PROMPTS[0]) == 16


class TestLies:
    """An owner that says what it cannot mean; the client refuses, and goes on by itself."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda _: [],
            lambda runs: runs[:-1],
            lambda runs: [run._replace(offset=run.offset + 1) for run in runs],
            lambda runs: [run._replace(nbytes=0) for run in runs],
            lambda runs: [run._replace(nbytes=run.nbytes - 4) for run in runs],
            lambda runs: [run._replace(file_offset=1 << 62) for run in runs],
            lambda runs: [run._replace(offset=1 << 40) for run in runs],
            lambda runs: [*runs, *runs],
        ],
    )
    @pytest.mark.parametrize("order", ORDERS)
    def test_of_pages(self, path, monkeypatch, change, order):
        with owner(order) as cache, cache.serve(path) as server, attach(path) as client:
            pack = prefix_wire.pack_found
            monkeypatch.setattr(
                prefix_wire, "pack_found",
                lambda lease, n_tokens, runs: pack(lease, n_tokens, change(runs)),
            )  # fmt: skip
            with pytest.raises(WireError):
                client.sequence(PROMPTS[0])
            monkeypatch.undo()
            client.check()
            assert client.stats().committed_bytes == 0
            publish(client, PROMPTS[0])
            client.check()
            client.close()
            wait_for(lambda: not server.n_clients)

    @pytest.mark.parametrize("n_tokens", [BLOCK - 1, 4 * BLOCK + 1, 20, 1 << 40])
    def test_of_tokens(self, path, monkeypatch, n_tokens):
        with owner() as cache, cache.serve(path) as server, attach(path) as client:
            pack = prefix_wire.pack_found
            monkeypatch.setattr(
                prefix_wire, "pack_found", lambda lease, _, runs: pack(lease, n_tokens, runs)
            )
            with pytest.raises(WireError):
                client.sequence(PROMPTS[0])
            monkeypatch.undo()
            client.check()
            client.close()
            wait_for(lambda: not server.n_clients)

    def test_a_run_is_a_tuple_of_numbers(self):
        assert Run(1, 2, 3) < Run(2, 0, 0)


def test_a_real_shape_is_mapped_not_copied(path):
    layout = KVLayout(30, 3, 64, 8192, order="block")
    tokens = [*range(1000)]
    with KVCache(layout) as cache:
        with cache.sequence(tokens) as seq:
            rows = np.ones((1000, 3, 64), np.float16)
            for layer in range(30):
                seq.append(layer, rows, rows)
            seq.publish()
        with cache.serve(path), KVCache.attach(path) as client, client.sequence(tokens) as seq:
            assert seq.n_cached == 992
            assert client.stats().committed_bytes == 0
            assert float(seq.k_blocks(29).min()) == 1.0
