"""Debian's Prometheus scrapes a process under load, and knows what the process knows itself.

The exact P99 is that of all samples of the run, each allocation of the loaded allocator, as the
process reads it from its own log-linear buckets, which are an eighth wide.  Prometheus has buckets
of a factor of two, of these samples and a few hundredths of a percent more: those of short-lived
allocators.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from programs import IS_REQUIRED, program

pytest.importorskip("prometheus_client")

LOAD = Path(__file__).resolve().parent.parent / "support/metrics_load.py"
LOAD_S = 120 if IS_REQUIRED else 15
PATIENCE_S = 60
LATENCY = "mem_page_aligned_alloc_latency_seconds"

# This machine's own: no proxy.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url):
    with OPENER.open(url, timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def wait_until(condition, what):
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, f"waited in vain: {what}"
        time.sleep(0.2)


class Loaded:
    """The process under load."""

    def __init__(self, process):
        self.process = process
        self.port = self._line()["port"]
        self.url = f"http://127.0.0.1:{self.port}/metrics"

    def end_load(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self):
        line = self.process.stdout.readline()
        assert line, "the process under load ended"
        return json.loads(line)


@contextmanager
def loaded():
    with Popen([sys.executable, str(LOAD)], stdin=PIPE, stdout=PIPE, text=True) as process:
        try:
            yield Loaded(process)
            process.stdin.close()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


class Server:
    """A Prometheus, asked over its HTTP API."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def is_ready(self):
        try:
            return "Ready" in get(f"{self.url}/-/ready")
        except OSError:
            return False

    def query(self, promql):
        """Return the values of an instant query, one a series."""
        asked = urllib.parse.urlencode({"query": promql})
        answer = json.loads(get(f"{self.url}/api/v1/query?{asked}"))
        assert answer["status"] == "success"
        return [float(each["value"][1]) for each in answer["data"]["result"]]

    def value(self, promql):
        """Return the value of a query with one series; NaN if there is none yet."""
        found = self.query(promql)
        assert len(found) <= 1, promql
        return found[0] if found else float("nan")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def prometheus(folder, target_port):
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: pagealloc\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{target_port}']}}]\n"
    )
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with (
        log.open("w") as output,
        Popen(command, stdout=output, stderr=output) as process,
    ):
        try:
            server = Server(port)
            wait_until(
                lambda: server.is_ready() or process.poll() is not None, "Prometheus is ready"
            )
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            process.terminate()


def test_prometheus_knows_what_the_process_knows(tmp_path):
    promtool = program("promtool")
    program("prometheus")
    with loaded() as process, prometheus(tmp_path, process.port) as server:
        wait_until(lambda: server.value("up") == 1, "a first scrape")
        time.sleep(LOAD_S)
        text = get(process.url)
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
        )
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
        own = process.end_load()

        # What was scraped last is the end of the load.
        def is_level():
            return all(server.value(series) == value for series, value in own["counted"].items())

        wait_until(is_level, f"a scrape that says {own['counted']}")
        p99_s = server.value(f"histogram_quantile(0.99, sum by (le) ({LATENCY}_bucket))")
        n_samples = server.value(f"sum({LATENCY}_count)")
        n_scrapes = server.value("count_over_time(up[1h])")
        print(
            f"\nP99 {p99_s * 1e9:.0f} ns by Prometheus, {own['p99_ns']:.0f} ns exact; "
            f"{n_samples:.0f} and {own['n_samples']} samples; {n_scrapes:.0f} scrapes, longest "
            f"{server.value('max_over_time(scrape_duration_seconds[1h])') * 1e3:.0f} ms"
        )
        # Those that are closed by now are in it, too.
        assert own["n_samples"] < n_samples <= own["n_samples"] * 1.01
        assert 0.5 <= p99_s * 1e9 / own["p99_ns"] <= 2

        assert n_scrapes >= LOAD_S * 0.9
        assert server.value("min_over_time(up[1h])") == 1
        # No counter fell, though allocators came and went.
        for counter in (f"{LATENCY}_count", f"{LATENCY}_bucket", "pagealloc_allocs_total"):
            assert set(server.query(f"resets({counter}[1h])")) == {0}
