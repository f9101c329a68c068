"""Who may ask a server that tells what this process does."""

import errno
import os
import socket
import urllib.error
import urllib.request
from wsgiref.util import setup_testing_defaults

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.observe.host_check import HostCheck
from pagealloc.observe.http_server import serve_in_thread


def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def ask(app, host):
    environ = {}
    setup_testing_defaults(environ)
    environ.pop("HTTP_HOST")
    if host is not None:
        environ["HTTP_HOST"] = host
    status = []
    body = b"".join(app(environ, lambda line, _headers: status.append(line)))
    return int(status[0].split()[0]), body


LOOPBACK = ["localhost", "LOCALHOST:9100", "localhost.", "127.0.0.1:9100", "[::1]", "[0:0::1]:80"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_answered(host):
    assert ask(HostCheck(hello), host) == (200, b"hello")


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:9100",
        "localhost.evil.example",
        "localhost:9100, evil.example",
        "localhost@evil.example",
        "evil.example:80:localhost",
        "127.0.0.1.evil.example",
        "192.0.2.7",
        "[::2]",
        "[localhost",
        "localhost:port",
        "localhost\n",
        " localhost",
    ],
)
def test_others_are_refused(host):
    status, body = ask(HostCheck(hello), host)
    assert status == 403
    assert b"hello" not in body
    assert b"localhost" in body


def test_the_address_it_listens_at_and_names_that_are_given():
    app = HostCheck(hello, ["192.0.2.7", "Metrics.Example"])
    assert ask(app, "192.0.2.7:9100")[0] == 200
    assert ask(app, "metrics.example")[0] == 200
    assert ask(app, "192.0.2.8")[0] == 403


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::"])
def test_who_listens_everywhere_answers_to_every_address_and_to_no_name(everywhere):
    app = HostCheck(hello, [everywhere])
    assert ask(app, "192.0.2.8:1")[0] == 200
    assert ask(app, "[2001:db8::1]:1")[0] == 200
    assert ask(app, "evil.example")[0] == 403


@given(host=st.text(max_size=40) | st.from_regex(r"[\[\]:.a-z0-9]{0,20}", fullmatch=True))
def test_whatever_is_asked_gets_an_answer(host):
    status, _ = ask(HostCheck(hello, ["0.0.0.0"]), host)
    assert status in (200, 403)


def get(port, host, address="127.0.0.1"):
    request = urllib.request.Request(f"http://{address}:{port}/", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("addr", ["127.0.0.1", "::1"])
def test_the_server(addr):
    try:
        server, thread = serve_in_thread(hello, 0, addr)
    except OSError:
        if addr == "127.0.0.1":
            raise
        pytest.skip("this machine has no IPv6")
    try:
        address = f"[{addr}]" if ":" in addr else addr
        port = server.server_port
        assert get(port, f"localhost:{port}", address) == 200
        assert get(port, f"{address}:{port}", address) == 200
        assert get(port, "evil.example", address) == 403
    finally:
        server.shutdown()
        server.server_close()
    thread.join(30)
    assert not thread.is_alive()


def test_two_host_headers_are_refused():
    server, _ = serve_in_thread(hello, 0)
    try:
        with socket.create_connection(("127.0.0.1", server.server_port), 30) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
            assert b" 403 " in connection.recv(100)
    finally:
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken():
    server, _ = serve_in_thread(hello, 0)
    try:
        with pytest.raises(OSError, match=f"port {server.server_port}: .*in use") as caught:
            serve_in_thread(hello, server.server_port)
        assert caught.value.errno == errno.EADDRINUSE
    finally:
        server.shutdown()
        server.server_close()


def test_an_address_that_is_not_this_machine_s():
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1, port 0: "):
        serve_in_thread(hello, 0, "192.0.2.1")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(port):
    with pytest.raises(ValueError, match=f"port={port}: .* to 65535 are possible"):
        serve_in_thread(hello, port)


def test_a_forked_child_keeps_no_port():
    server, _ = serve_in_thread(hello, 0)
    port = server.server_port
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # lives until the parent has looked
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        server.shutdown()
        server.server_close()
        again, _ = serve_in_thread(hello, port)
        again.shutdown()
        again.server_close()
        with socket.socket() as probe:  # SO_REUSEADDR tells nothing of a socket that listens
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    finally:
        os.close(writer)
        os.waitpid(pid, 0)
        os.close(reader)
