"""``pagealloc demo --engine llama``, on the random model."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = [
        *("--quick", "--engine", "llama", "--conversations", "2", "--max-new-tokens", "8"),
        *("--json", str(folder / "demo.json"), "--png", str(folder / "demo.png")),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pagealloc", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "demo.json").read_text()), folder / "demo.png"


def test_the_sides_give_the_same_tokens(run):
    printed, figures, _ = run
    assert figures["tokens_identical"] is True
    assert "are identical in all answers" in printed
    sides = figures["sides"]
    assert sides["stock"]["token_ids"] == sides["f16"]["token_ids"]
    assert len(sides["f16"]["token_ids"]) == 4


def test_what_is_held(run):
    _, figures, _ = run
    stock, plain, packed = (figures["sides"][side] for side in ("stock", "f16", "K8/V4"))
    assert packed["held_bytes"] < 0.6 * plain["held_bytes"] < 0.5 * stock["held_bytes"]
    assert plain["kv_made_bytes"] < stock["kv_made_bytes"] / 4
    assert plain["kv_used_bytes"] < stock["kv_used_bytes"]
    assert plain["faults_at_creation"] < stock["faults_at_creation"] / 4


def test_what_is_timed(run):
    printed, figures, _ = run
    for side in figures["sides"].values():
        assert len(side["save_s"]) == 4
        assert len(side["load_s"]) == len(side["first_token_s"]) == 2
        assert all(seconds > 0 for seconds in (*side["save_s"], *side["load_s"]))
    assert "load of a known prompt, median" in printed
    quality = figures["sides"]["K8/V4"]["quality"]
    assert quality["mean_kl"] > 0
    assert quality["perplexity"] != quality["float16_perplexity"]


def test_a_picture(run):
    assert run[2].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "Hi"], "no --prompt"),
        (["--temperature", "1"], "no --temperature"),
        (["--kv", "f16"], "no --temperature, no --kv"),
    ],
)
def test_what_it_does_not_do(capsys, arguments, message):
    assert main(["demo", "--quick", "--engine", "llama", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
