"""The page of `pagealloc serve`, and who may read it; a browser looks at it in tests/servers."""

import contextlib
import http.client
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from snapshots import allocator_of, busy_process, histogram_of, snapshot_of

from pagealloc.observe import feed_reader, serve, web
from pagealloc.observe.feed_reader import read_url, source_of
from pagealloc.observe.live import History
from pagealloc.observe.snapshot_json import snapshot_from_json, snapshot_to_json
from pagealloc.observe.web import LivePage, live_json, serve_source


def ask(app, path="/", method="GET"):
    """Ask the app itself; return status, headers and body."""
    seen = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path}
    body = b"".join(app(environ, lambda status, headers: seen.extend((status, dict(headers)))))
    return *seen, body


def ask_server(url, path="/", **headers):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


class Ticking:
    """A process that is read, and how often."""

    def __init__(self):
        self.n_read = 0
        self.error = None

    def __call__(self):
        if self.error is not None:
            raise self.error
        self.n_read += 1
        return snapshot_of(
            allocator_of(n_allocs=10 * self.n_read), time_s=self.n_read, n_minor_faults=self.n_read
        )


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test wants."""
    now_s = [0.0]
    monkeypatch.setattr(web.time, "monotonic", lambda: now_s[0])
    return now_s


def test_the_page_needs_nothing_from_elsewhere():
    status, headers, body = ask(LivePage(Ticking()))
    assert status == "200 OK"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    text = body.decode()
    assert not re.search(r"\b(?:src|href)=(?!\"data:,\")", text)
    assert set(re.findall(r"https?://\S+?(?=[\"'])", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text


def test_the_page_may_load_nothing():
    _, headers, body = ask(LivePage(Ticking()))
    policy = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    for kind in ("script", "style"):
        assert body.decode().count(f"<{kind}>") == policy[f"{kind}-src"].count("'sha256-") == 1


def test_every_answer_says_what_it_is():
    for path in ("/", "/live.json", "/snapshot.json", "/none"):
        _, headers, body = ask(LivePage(Ticking()), path)
        assert headers["Content-Length"] == str(len(body))
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("path", "method", "code"),
    [
        ("/none", "GET", "404"),
        ("/web.html", "GET", "404"),
        ("/", "POST", "405"),
        ("", "HEAD", "200"),
    ],
)
def test_other_requests(path, method, code):
    status, _, _ = ask(LivePage(Ticking()), path, method)
    assert status.startswith(code)


def test_the_process_is_read_once_a_second_however_many_ask(clock):
    process = Ticking()
    page = LivePage(process)
    for _ in range(5):
        for _ in range(10):
            ask(page, "/live.json")
            ask(page, "/snapshot.json")
        clock[0] += 1
    assert process.n_read == 5
    points = json.loads(ask(page, "/live.json")[2])["points"]
    assert [point["allocs_per_s"] for point in points] == [None, *[10] * 5]


@pytest.mark.parametrize("error", [ConnectionRefusedError("it is gone"), ValueError("it is gone")])
def test_a_process_that_ends_leaves_its_last_view(clock, error):
    process = Ticking()
    page = LivePage(process)
    ask(page, "/live.json")
    process.error = error
    clock[0] += 1
    status, _, body = ask(page, "/live.json")
    assert status == "200 OK"
    assert json.loads(body)["trouble"] == "it is gone"
    assert json.loads(body)["time_s"] == 1
    status, _, _ = ask(page, "/snapshot.json")  # whoever wants it now gets no old one
    assert status.startswith("503")
    process.error = None
    clock[0] += 1
    assert json.loads(ask(page, "/live.json")[2])["trouble"] is None


def test_a_process_that_never_answered():
    process = Ticking()
    process.error = ConnectionRefusedError("nobody")
    status, _, body = ask(LivePage(process), "/live.json")
    assert status.startswith("503")
    assert json.loads(body) == {"trouble": "nobody"}


def test_what_the_page_draws():
    history = History()
    for time_s, durations_ns in ((1, [20]), (2, [20, 100, 100])):
        history.add(
            snapshot_of(
                allocator_of(latencies=[histogram_of(durations_ns, "64 B")], live_bytes=7),
                time_s=time_s,
            )
        )
    view = json.loads(live_json(history))
    assert view["allocators"][0]["live_bytes"] == 7
    assert [each["size_class"] for each in view["latencies"]] == ["64 B", "all"]
    assert view["latencies"][0]["p99s_ns"] == [None, pytest.approx(100, rel=0.125)]
    with pytest.raises(ValueError, match="nothing to show"):
        live_json(History())


def test_a_process_serves_itself():
    with busy_process() as snapshot, serve() as server:
        status, body = ask_server(server.url, "/live.json")
        assert status == 200
        view = json.loads(body)
        assert view["pid"] == os.getpid()
        held = snapshot.caches[-1].stats
        assert view["caches"][-1]["needed_bytes"] == held.needed_bytes
        assert view["caches"][-1]["prefixes"]["n_blocks"] == snapshot.caches[-1].prefixes.n_blocks
        assert snapshot_from_json(ask_server(server.url, "/snapshot.json")[1]).pid == os.getpid()
        assert read_url(server.url).pid == read_url(server.url + "/").pid == os.getpid()
        assert source_of(server.url)().pid == os.getpid()
    with pytest.raises(OSError, match="refused"):
        read_url(server.url)
    server.close()


def test_another_name_gets_nothing():
    with serve_source(Ticking(), 0, "127.0.0.1", hosts=["here.example"]) as server:
        for path in ("/", "/live.json", "/snapshot.json"):
            assert ask_server(server.url, path, Host="evil.example")[0] == 403
            assert ask_server(server.url, path, Host="here.example")[0] == 200
            assert ask_server(server.url, path, Host="localhost:1")[0] == 200


def test_ipv6():
    with serve_source(Ticking(), 0, "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert read_url(server.url).pid == 1


# --- whoever answers a URL is not trusted ---


def answering(answer):
    """A server that answers each request as a handler wants it to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    return server


def send(code, body=b"", **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(body)

    return answer


def say_nonsense(handler):
    handler.wfile.write(b"nonsense\r\n\r\n")


GOOD = snapshot_to_json(snapshot_of()).encode()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (send(200, b"<html>"), ValueError, "no snapshot"),
        (send(200, b"x" * 20_000), ValueError, "more than 10000 bytes"),
        (send(200, GOOD[:-1], **{"Content-Length": "9000"}), ValueError, "no snapshot"),
        (send(302, Location="http://127.0.0.1:1/snapshot.json"), OSError, "answers 302"),
        (send(302, Location="file:///etc/passwd"), OSError, "answers 302"),
        (send(404), OSError, "answers 404: no page"),
        (send(503), OSError, "answers 503: the process it shows is gone"),
        (say_nonsense, OSError, "BadStatusLine"),
    ],
)
def test_answers_that_are_none(monkeypatch, answer, error, message):
    monkeypatch.setattr(feed_reader, "MOST_BYTES", 10_000)
    server = answering(answer)
    try:
        with pytest.raises(error, match=message):
            read_url(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_a_good_answer_by_somebody_else():
    server = answering(send(200, GOOD))
    try:
        assert read_url(f"http://127.0.0.1:{server.server_port}/") == snapshot_of()
    finally:
        server.shutdown()
        server.server_close()


def test_a_proxy_is_not_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serve_source(Ticking(), 0, "127.0.0.1") as server:
        assert read_url(server.url).pid == 1


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "file:///etc/passwd", "127.0.0.1"])
def test_only_http(url):
    with pytest.raises(ValueError, match="no http"):
        read_url(url)
