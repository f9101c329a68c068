"""`pagealloc report` from end to end on the tiny model, and what it says when it cannot run."""

import json
import sys

import pytest

from pagealloc import page_size_bytes
from pagealloc.cli.main import main

pytest.importorskip("gguf", reason="needs the extra 'demo'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="needs the extra 'demo'")

from pagealloc.demo import attribution, attribution_session, comparison, session
from pagealloc.demo.attribution_steps import HUGE_PAGES, STEPS, Unavailable
from pagealloc.demo.conversations import SYSTEM_PROMPT
from pagealloc.demo.errors import ModelNotFoundError
from pagealloc.demo.model_file import find_model_file

SMALL = ("--rounds", "1", "--conversations", "2", "--n-ctx", "2048", "--max-new-tokens", "2")
PICTURES = ("kv-memory.png", "page-faults.png", "allocation-p99.png")

RESULT = {
    "kv_bytes": 10, "page_table_bytes": 0, "huge_bytes": 0, "peak_rss_bytes": 100,
    "faults_startup": 5, "faults_first_inference": 5, "startup_s": 0.1, "first_token_s": [0.1],
    "prompt_tokens_computed": 10, "decode_tokens_per_s": 1.0,
}  # fmt: skip
"""What a side's process says, but for the tokens."""


def report(folder, *arguments):
    return main(["report", "-o", str(folder), *SMALL, *arguments])


def check_files(folder):
    """What must hold of every report; returns report.json."""
    for name in PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text()
    for name in (*PICTURES, *(step.title for step in STEPS), "order matters"):
        assert name in text
    told = json.loads((folder / "report.json").read_text())
    assert [step["key"] for step in told["steps"]] == [step.key for step in STEPS]
    by_key = {step["key"]: step for step in told["steps"]}
    reference, paged = by_key["preallocated"], by_key["paged"]
    n_ctx_tokens = told["settings"]["n_ctx_tokens"]
    kv_bytes = told["model"]["kv_token_bytes"] * n_ctx_tokens * 2
    assert reference["medians"]["kv_bytes"] >= kv_bytes
    assert paged["same_tokens_percent"] == 100
    if page_size_bytes() <= 16384:  # the tiny model's KV blocks fill no larger page
        assert paged["medians"]["kv_bytes"] < reference["medians"]["kv_bytes"]
        assert told["total"]["kv_percent"] < -57.3
    shared = by_key["prefix_sharing"]
    assert shared["n_prompt_tokens_computed"] < reference["n_prompt_tokens_computed"]
    return told


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    assert report(folder, "--quick") == 0
    return folder


def test_quick_run_writes_all_files(quick):
    told = check_files(quick)
    assert told["machine"]["n_cpus"] >= 1
    assert told["settings"]["n_rounds"] == 1
    assert told["command"] == (
        "pagealloc report --quick --seed 0 --rounds 1 --conversations 2 --n-ctx 2048 "
        "--max-new-tokens 2"
    )
    assert told["command"] in (quick / "report.md").read_text()


@pytest.fixture
def stub(monkeypatch):
    """Have every process answer at once with figures that are nobody's; return the jobs."""
    jobs = []

    def child(module, text, _on_event, _title):
        jobs.append(json.loads(text))
        if module.endswith("allocations"):
            return dict.fromkeys(
                ("block_bytes", "n_allocations", "p50_ns", "p99_ns", "malloc_p99_ns"), 1000
            )
        answers = [[1, 2] for _ in jobs[-1]["question_ids"]]
        if jobs[-1]["side"] == "pagealloc" and jobs[-1]["kv"] in rounded:
            answers[0] = [1, 3]
        return RESULT | {"token_ids": answers}

    rounded = {"q8_0", "q4_0"}
    for room in (attribution, comparison):
        monkeypatch.setattr(room, "run_child", child)
    return jobs, rounded


def test_json_is_all_that_is_printed(stub, tmp_path, capsys):
    assert report(tmp_path, "--quick", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "report.json").read_text())
    assert "round 1 of 1: + paged" in said.err


def test_other_tokens_in_float16_are_an_exit_code(stub, tmp_path, capsys):
    _, rounded = stub
    rounded.add("f16")
    assert report(tmp_path, "--quick") == 3
    assert "a bug" in (tmp_path / "report.md").read_text()


def test_a_step_that_cannot_be_taken_is_said_and_not_faked(stub, tmp_path, monkeypatch, capsys):
    jobs, _ = stub
    missing = Unavailable("the kernel has none", "make-some")
    monkeypatch.setattr(attribution_session, "why_no_huge_pages", lambda: missing)
    assert report(tmp_path, "--quick") == 0
    assert "| + huge pages | not available here |" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "not available here**: the kernel has none. To change that: `make-some`" in text
    told = json.loads((tmp_path / "report.json").read_text())
    (step,) = [step for step in told["steps"] if step["key"] == HUGE_PAGES]
    assert step["unavailable"] == {"reason": "the kernel has none", "command": "make-some"}
    assert "medians" not in step
    assert all(job["backing"] != "auto" for job in jobs if job.get("side") == "pagealloc")


def test_nothing_huge_is_said_where_no_window_was_large_enough(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(attribution_session, "why_no_huge_pages", lambda: None)
    assert report(tmp_path, "--quick") == 0
    assert "so none was made" in (tmp_path / "report.md").read_text()


def test_smollm2(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "system_prompt", lambda _options: SYSTEM_PROMPT[:1500])
    try:
        find_model_file()
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    assert report(tmp_path) == 0
    told = check_files(tmp_path)
    by_key = {step["key"]: step for step in told["steps"]}
    assert by_key["q4_0"]["medians"]["kv_bytes"] < by_key["q8_0"]["medians"]["kv_bytes"]
    huge = by_key[HUGE_PAGES]
    assert huge["unavailable"] or huge["huge_bytes"] > 0
    assert told["total"]["faults_percent"] < 0


@pytest.mark.parametrize("extra", ["gguf", "tokenizers", "matplotlib.figure"])
def test_a_missing_extra_is_one_line_before_anything_runs(monkeypatch, tmp_path, capsys, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    if extra.startswith("matplotlib"):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report(tmp_path, "--quick") == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "pip install 'pagealloc[demo]'" in line


def test_a_folder_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert report(tmp_path / "taken", "--quick") == 1
    assert "taken" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rounds", "--conversations", "--n-ctx"])
def test_impossible_options_are_usage_errors(option):
    with pytest.raises(SystemExit) as left:
        main(["report", option, "0"])
    assert left.value.code == 2
