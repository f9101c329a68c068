"""Profiles by HTTP: who may have them, which there are, and that nothing is left running."""

import os
import signal
import threading
import urllib.error
import urllib.request
from contextlib import closing

import pytest

from pagealloc import PageAllocator
from pagealloc.observe import profile, start_profile_server
from pagealloc.observe.pprof import from_pprof
from pagealloc.observe.pprof_server import ProfilesApp


@pytest.fixture
def server():
    with start_profile_server(token="secret") as server:
        yield server


def ask(url: str, **headers: str) -> tuple[int, str, bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read()


def at(server, name: str, query: str = "token=secret") -> str:
    return server.url.partition("?")[0] + name + "?" + query


def test_heap_since_the_start_and_of_some_seconds(server):
    with PageAllocator() as allocator:
        buffers = [allocator.alloc("4MiB") for _ in range(100)]
        status, kind, body = ask(at(server, "heap"))
        assert (status, kind) == (200, "application/octet-stream")
        assert from_pprof(body).total() == pytest.approx(400 << 20, rel=0.5)
        assert ask(at(server, "heap", "token=secret&seconds=0.01"))[0] == 200
        buffers.clear()


def test_mutex_and_cpu(server):
    names = [value_type.name for value_type in from_pprof(ask(at(server, "mutex"))[2]).value_types]
    assert names == ["contentions", "delay"]
    stop = threading.Event()

    def burn():
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        found = from_pprof(ask(at(server, "profile", "token=secret&seconds=0.3"))[2])
    finally:
        stop.set()
        thread.join()
    assert any(frame.function.endswith("burn") for stack in found.samples for frame in stack)


def test_a_page_to_look_at(server):
    status, kind, body = ask(at(server, "heap", "token=secret&html=1"))
    assert status == 200
    assert kind.startswith("text/html")
    assert b"<!doctype html>" in body


def test_the_token(server):
    for query in ("", "token=", "token=wrong", "token=secret2", "token=%ff"):
        status, _, body = ask(at(server, "heap", query))
        assert status == 401, query
        assert b"token" in body
    assert ask(at(server, "heap", ""), Authorization="Bearer secret")[0] == 200
    assert ask(at(server, "heap", ""), Authorization="Bearer wrong")[0] == 401
    assert ask(at(server, "", ""))[0] == 401, "not even the index"
    assert ask(at(server, ""))[0] == 200


def test_the_host_header(server):
    assert ask(at(server, "heap"), Host="rebound.example")[0] == 403
    assert ask(at(server, "heap"), Host="localhost")[0] == 200


def test_what_there_is_not(server):
    assert ask(at(server, "goroutine"))[0] == 404
    for seconds in ("0", "-1", "nan", "much", "601"):
        status, _, body = ask(at(server, "heap", f"token=secret&seconds={seconds}"))
        assert status == 400, seconds
        assert b"seconds" in body
    request = urllib.request.Request(at(server, "heap"), data=b"", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=30)


def test_a_second_cpu_profile_is_told_so(server):
    with profile("cpu"):
        status, _, body = ask(at(server, "profile", "token=secret&seconds=0.1"))
    assert status == 409
    assert b"stop that profile first" in body


def test_a_random_token_is_printed(capfd):
    with start_profile_server() as first:
        assert first.url in capfd.readouterr().err
    with start_profile_server() as second:
        assert second.url.partition("token=")[2] != first.url.partition("token=")[2]


def test_nothing_is_left_running():
    start_profile_server(token="a").close()
    with profile("heap"), pytest.raises(RuntimeError, match="stop that profile first"):
        start_profile_server(token="a")
    with profile("contention"), pytest.raises(RuntimeError, match="stop that profile first"):
        start_profile_server(token="a")
    with profile("heap"):
        pass  # the refused ones have stopped what they had started
    with start_profile_server(token="a") as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(RuntimeError):
            start_profile_server(token="a")
    with PageAllocator(), start_profile_server(port, token="a"):
        pass


def test_an_empty_token_is_no_token():
    with pytest.raises(ValueError, match="anybody would be let in"):
        ProfilesApp("")
    with pytest.raises(ValueError, match="anybody would be let in"):
        start_profile_server(token="")


def test_a_token_of_any_letters():
    with start_profile_server(token="a+b&c=ü d") as server:
        assert ask(server.url)[0] == 200


def test_head_has_no_body():
    environ = {"REQUEST_METHOD": "HEAD", "PATH_INFO": "/debug/pprof/", "QUERY_STRING": "token=a"}
    with closing(ProfilesApp("a")) as app:
        assert list(app(environ, lambda *_: None)) == []


def test_closing_ends_what_is_being_profiled():
    with closing(ProfilesApp("a")) as app:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/debug/pprof/profile"}
        environ["QUERY_STRING"] = "token=a&seconds=600"
        thread = threading.Thread(target=app, args=(environ, lambda *_: None))
        thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    statuses = []
    app(environ, lambda status, _: statuses.append(status))
    assert statuses == ["409 Conflict"]


def test_a_forked_child_can_close_it(server):
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(30)  # it must not wait for ever
        try:
            server.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ask(at(server, ""))[0] == 200


def test_more_names_and_no_frames():
    with start_profile_server(token="a", hosts=["gpu7.lan"], heap_period=1) as server:
        page = at(server, "heap", "token=a&html=1")
        assert ask(page, Host="gpu7.lan")[0] == 200
        assert ask(page, Host="gpu8.lan")[0] == 403
        with urllib.request.urlopen(page, timeout=30) as answer:
            assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
        with PageAllocator() as allocator:
            buffer = allocator.alloc(1)
            assert from_pprof(ask(at(server, "heap", "token=a"))[2]).total(0) == 1
            buffer.close()
