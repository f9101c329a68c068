"""Prompts over restarts and between processes; llama-cpp-python's server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
from llama_models import PROMPT, complete

pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.llama import PageCache, attach


class TestFiles:
    @pytest.mark.parametrize("quantize", [False, True])
    def test_a_restart(self, make, tmp_path, quantize):
        with PageCache("8MiB", path=tmp_path, quantize=quantize) as cache:
            llm = make()
            attach(llm, cache)
            expected = complete(llm, PROMPT)
        with PageCache("8MiB", path=tmp_path, quantize=quantize) as cache:
            llm = make()
            attach(llm, cache)
            text = complete(llm, PROMPT)
            assert cache.stats().n_hit_tokens >= 80
            assert quantize or text == expected

    def test_at_exit(self, tiny_path, tmp_path):
        script = (
            "import sys, llama_cpp\n"
            "from pagealloc.llama import PageCache, attach\n"
            "llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, verbose=False)\n"
            "attach(llm, PageCache('8MiB', path=sys.argv[2]))\n"
            "llm.create_completion('x' * 100, max_tokens=1)\n"
        )
        subprocess.run([sys.executable, "-c", script, tiny_path, tmp_path], check=True, timeout=60)
        assert [path.suffix for path in tmp_path.iterdir()] == [".kv"]

    def test_a_file_of_another_type_is_not_used(self, make, tmp_path):
        for quantize in (False, True):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                with PageCache("8MiB", path=tmp_path, quantize=quantize) as cache:
                    llm = make()
                    attach(llm, cache)
                    complete(llm, PROMPT)
                    assert cache.stats().n_hits == 0
            assert ["saved prompts are not used" in str(each.message) for each in told] == (
                [True] * quantize
            )

    def test_a_damaged_file_is_not_used(self, make, tmp_path):
        with PageCache("8MiB", path=tmp_path) as cache:
            llm = make()
            attach(llm, cache)
            expected = complete(llm, PROMPT)
        path = next(tmp_path.iterdir())
        path.write_bytes(path.read_bytes()[:100])
        with PageCache("8MiB", path=tmp_path) as cache:
            llm = make()
            with pytest.warns(RuntimeWarning, match="saved prompts are not used"):
                attach(llm, cache)
            assert complete(llm, PROMPT) == expected

    def test_saving_wants_a_path(self):
        with PageCache("8MiB") as cache, pytest.raises(ValueError, match="path="):
            cache.save()


OTHER = """
import sys, warnings, llama_cpp
from llama_models import complete
from pagealloc.llama import PageCache, attach
warnings.simplefilter("error")
role, model, folder, prompt = sys.argv[1:]
llm = llama_cpp.Llama(model, n_ctx=512, n_batch=64, verbose=False, n_threads=2)
if role == "own":
    cache = PageCache("8MiB")
    cache.serve(folder)
else:
    cache = PageCache.attach(folder, "8MiB")
attach(llm, cache)
while True:
    text = complete(llm, prompt)
    print(cache.stats().n_hit_tokens, text.encode().hex(), flush=True)
    if not sys.stdin.readline():
        break
"""


class Process:
    """Another process with a model and a cache, told when to complete its prompt."""

    def __init__(self, role, model, folder, prompt):
        support = str(Path(sys.modules["llama_models"].__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, role, model, folder, prompt],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": support, "PYTHONSAFEPATH": "1"},
        )

    def answer(self):
        n_hit_tokens, text = self.process.stdout.readline().split(" ")
        return int(n_hit_tokens), bytes.fromhex(text).decode()

    def again(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start(tiny_path, tmp_path):
    started = []

    def start_process(role, prompt=PROMPT):
        process = Process(role, tiny_path, str(tmp_path / "sockets"), prompt)
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.close()


class TestProcesses:
    def test_one_computes_and_the_other_restores(self, make, start):
        expected = complete(make(), PROMPT)
        owner = start("own")
        assert owner.answer() == (0, expected)
        client = start("attach")
        n_hit_tokens, text = client.answer()
        assert text == expected
        assert n_hit_tokens >= 80
        client.kill()
        assert owner.again()[1] == expected
        client = start("attach")
        assert client.answer() == (n_hit_tokens, expected)
        owner.kill()
        assert client.again()[1] == expected
        assert client.process.poll() is None

    def test_an_owner_that_comes_later(self, make, start, tmp_path):
        expected = complete(make(), PROMPT)
        with PageCache.attach(tmp_path / "sockets", "8MiB") as cache:
            llm = make()
            attach(llm, cache)
            owner = start("own")
            assert owner.answer() == (0, expected)
            assert complete(llm, PROMPT) == expected
            assert cache.stats().n_hit_tokens >= 80
            llm.reset()
            del llm


class TestServer:
    @pytest.fixture
    def server(self, tiny_path, tmp_path):
        pytest.importorskip("uvicorn", reason="needs llama-cpp-python[server]")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-W", "ignore", "-m", "pagealloc.llama.server"),
            *("--model", tiny_path, "--port", str(port), "--n_ctx", "512"),
            *("--cache_size", str(8 << 20), "--verbose", "false"),
        ]
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PAGEALLOC_LLAMA_PATH": str(tmp_path)},
        )
        yield process, f"http://127.0.0.1:{port}/v1/"
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stderr.close()

    def test_completions_are_cached(self, server, tmp_path):
        process, url = server
        request = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.0, "seed": 1}
        expected = ask(process, url + "completions", request)
        assert ask(process, url + "completions", request | {"prompt": "another"})
        assert ask(process, url + "completions", request) == expected
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert re.search("<PageCache of [1-9]", process.stderr.read())
        assert [path.suffix for path in tmp_path.iterdir()] == [".kv"]


def ask(process, url, request, timeout_s=60.0):
    """Post a request, once the server is there."""
    end_s = time.monotonic() + timeout_s
    post = urllib.request.Request(
        url, json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(post, timeout=timeout_s) as answer:
                return json.load(answer)["choices"][0]["text"]
        except (ConnectionError, urllib.error.URLError):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end_s
            time.sleep(0.1)
