"""Where each percent came from: the arithmetic, what is said of a step, and the pictures."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("gguf", reason="needs the extra 'demo'")

from pagealloc import page_size_bytes
from pagealloc.demo import attribution as rooms
from pagealloc.demo import attribution_steps
from pagealloc.demo.attribution import (
    FIGURES,
    Attribution,
    StepRun,
    TakenStep,
    attribute,
    share_of_same_tokens,
)
from pagealloc.demo.attribution_allocations import (
    AllocationJob,
    AllocationResult,
    time_allocations,
)
from pagealloc.demo.attribution_chart import CHARTS, draw_waterfalls
from pagealloc.demo.attribution_json import attribution_json
from pagealloc.demo.attribution_markdown import summary_table
from pagealloc.demo.attribution_progress import PlainProgress, RichProgress
from pagealloc.demo.attribution_steps import HUGE_PAGES, STEPS, Unavailable, why_no_huge_pages
from pagealloc.demo.job import SideJob, SideResult
from pagealloc.demo.weights import LlamaShape

MINUS = "\u2212"
SHAPE = LlamaShape(
    name="tiny",
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    hidden_dim=256,
    ffn_dim=512,
    vocab_tokens=260,
    max_tokens=512,
    norm_epsilon=1e-5,
    rope_base=10_000.0,
    rope_dim=64,
    rope_scale=1.0,
    weights_bytes=1 << 20,
)
WORK = SideJob("baseline", "f16", "tiny.gguf", 512, [1], [[2], [3]], [0], 4, 0.0, 0)
NO_HUGE_PAGES = Unavailable("the kernel has none", "make some")


def run_of(kv_bytes, n_startup, n_first, p99_ns, token_ids=((1, 2, 3, 4), (5, 6, 7, 8))):
    side = SideResult(
        kv_bytes=kv_bytes,
        page_table_bytes=4096,
        huge_bytes=0,
        peak_rss_bytes=1 << 20,
        faults_startup=n_startup,
        faults_first_inference=n_first,
        startup_s=0.1,
        first_token_s=[0.1],
        prompt_tokens_computed=10,
        decode_tokens_per_s=1.0,
        token_ids=[list(ids) for ids in token_ids],
    )
    return StepRun(side, AllocationResult(8192, 100, p99_ns / 2, p99_ns, p99_ns * 2))


OTHER_TOKENS = ((1, 2, 9, 4), (5, 6, 7, 8))
ROUNDS = (
    (run_of(1000 << 20, 900, 100, 4000.0), run_of(1010 << 20, 920, 110, 4400.0)),
    (run_of(300 << 20, 2, 300, 2000.0), run_of(301 << 20, 4, 280, 2100.0)),
    (run_of(200 << 20, 2, 250, 2100.0, OTHER_TOKENS),) * 2,
    (run_of(100 << 20, 2, 240, 1900.0, OTHER_TOKENS),) * 2,
    (run_of(100 << 20, 2, 260, 1500.0, OTHER_TOKENS),) * 2,
    (run_of(20 << 20, 2, 130, 1400.0, OTHER_TOKENS),) * 2,
)
ALL_TAKEN = Attribution(
    tuple(TakenStep(step, runs) for step, runs in zip(STEPS, ROUNDS, strict=True))
)
WITHOUT_HUGE_PAGES = Attribution(
    tuple(
        TakenStep(taken.step, (), NO_HUGE_PAGES) if taken.step.key == HUGE_PAGES else taken
        for taken in ALL_TAKEN.steps
    )
)


# --- arithmetic ---


@pytest.mark.parametrize("attribution", [ALL_TAKEN, WITHOUT_HUGE_PAGES])
@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.key)
def test_percent_points_add_up_to_the_total(attribution, figure):
    points = attribution.percent_points(figure.key)
    assert len(points) == len(attribution.taken)
    assert points[0] == 0
    assert sum(points) == pytest.approx(attribution.total_percent(figure.key))


def test_points_are_in_percent_of_the_first_step():
    first, paged = (median_of(ROUNDS[i], "kv_bytes") for i in (0, 1))
    expected = 100 * (paged - first) / first
    assert ALL_TAKEN.percent_points("kv_bytes")[1] == pytest.approx(expected)
    assert ALL_TAKEN.total_percent("kv_bytes") == pytest.approx(100 * (20 / 1005 - 1))


def median_of(runs, figure):
    return sum(getattr(run.side, figure) for run in runs) / len(runs)


@pytest.mark.parametrize("index", range(len(STEPS)))
def test_faults_of_both_phases_add_up_to_all(index):
    parts = ("n_faults_startup", "n_faults_first_inference")
    values = [ALL_TAKEN.steps[index].value(key) for key in parts]
    assert sum(values) == ALL_TAKEN.steps[index].value("n_faults")
    points = [ALL_TAKEN.percent_points(key)[index] for key in parts]
    assert sum(points) == pytest.approx(ALL_TAKEN.percent_points("n_faults")[index])


def test_what_follows_an_unavailable_step_is_compared_with_what_was_before_it():
    with_it, without = ALL_TAKEN, WITHOUT_HUGE_PAGES
    assert [each.step.key for each in without.taken] == [
        step.key for step in STEPS if step.key != HUGE_PAGES
    ]
    last = without.percent_points("n_faults")[-1]
    assert last == pytest.approx(sum(with_it.percent_points("n_faults")[-2:]))


def test_tokens_are_the_same_until_the_first_that_is_another():
    assert share_of_same_tokens([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1
    assert share_of_same_tokens([[1, 2, 3, 4]], [[1, 9, 3, 4]]) == 0.25
    assert share_of_same_tokens([[1, 2], [3, 4]], [[1], [3, 4]]) == 0.75
    assert share_of_same_tokens([[1, 2]], [[]]) == 0


def test_other_tokens_are_a_failure_only_if_rows_were_not_rounded():
    assert not ALL_TAKEN.has_failed
    steps = list(ALL_TAKEN.steps)
    steps[1] = replace(steps[1], runs=(run_of(1, 1, 1, 1.0, OTHER_TOKENS),))
    assert Attribution(tuple(steps)).has_failed


# --- what runs ---


def test_each_step_changes_one_thing():
    changes = [
        [name for name in ("side", "kv", "backing", "shares_prompt")
         if getattr(before, name) != getattr(step, name)]
        for before, step in pairwise(STEPS)
    ]  # fmt: skip
    assert changes == [["side"], ["kv"], ["kv"], ["backing"], ["shares_prompt"]]
    assert [step.kv for step in STEPS] == ["f16", "f16", "q8_0", "q4_0", "q4_0", "q4_0"]


def test_every_step_gets_the_same_work():
    same = ("model_path", "n_ctx", "system_ids", "question_ids", "max_new_tokens", "seed")
    for job in (step.side_job(WORK) for step in STEPS):
        assert [getattr(job, name) for name in same] == [getattr(WORK, name) for name in same]
    blocks = [step.allocation_job(SHAPE, 10, 0) for step in STEPS]
    assert len({(job.n_batches, job.seed, job.block_tokens) for job in blocks}) == 1
    assert blocks[0].backing is None
    assert blocks[0].block_bytes == blocks[1].block_bytes >= 16 * SHAPE.kv_token_bytes


def test_rounds_are_interleaved(monkeypatch):
    order = []

    def child(_module, text, _on_event, _title):
        order.append(AllocationJob.from_json(text).seed)
        return vars(ROUNDS[0][0].allocations)

    monkeypatch.setattr(rooms, "run_child", child)
    monkeypatch.setattr(rooms, "run_side_process", lambda _job, _watcher: ROUNDS[0][0].side)
    taken = attribute(WORK, SHAPE, PlainProgress(2), n_rounds=2, n_batches=1)
    assert order == [1] * len(STEPS) + [2] * len(STEPS)
    assert [len(each.runs) for each in taken.steps] == [2] * len(STEPS)


def test_a_machine_without_huge_pages_takes_the_other_steps(monkeypatch):
    jobs = []

    def side(job, _watcher):
        jobs.append(job)
        return ROUNDS[0][0].side

    monkeypatch.setattr(rooms, "run_child", lambda *_: vars(ROUNDS[0][0].allocations))
    monkeypatch.setattr(rooms, "run_side_process", side)
    taken = attribute(
        WORK, SHAPE, PlainProgress(1), n_rounds=1, n_batches=1, no_huge_pages=NO_HUGE_PAGES
    )
    assert len(jobs) == len(STEPS) - 1
    assert all(job.backing == "base" for job in jobs if job.side == "pagealloc")
    left_out = next(each for each in taken.steps if each.step.key == HUGE_PAGES)
    assert (left_out.runs, left_out.unavailable) == ((), NO_HUGE_PAGES)


@pytest.mark.parametrize("shares_prompt", [False, True])
@pytest.mark.parametrize("backing", [None, "base", "auto"])
def test_allocations_are_counted_and_timed(backing, shares_prompt):
    job = AllocationJob(backing, 2 * page_size_bytes(), 16, shares_prompt, n_batches=10, seed=3)
    result = time_allocations(job)
    assert 0 < result.p50_ns <= result.p99_ns
    assert result.malloc_p99_ns > 0
    if backing is None:
        assert result.malloc_p99_ns == result.p99_ns
    assert result.n_allocations % (4 if shares_prompt else 20) == 0
    everything = time_allocations(replace(job, shares_prompt=False)).n_allocations
    assert result.n_allocations < everything if shares_prompt else everything


def test_the_trial_of_huge_pages_says_what_would_help(monkeypatch):
    """Whatever this machine has; then on one whose kernel makes none."""
    found = why_no_huge_pages()
    assert found is None or (found.reason and found.command)

    class Window:
        def __init__(self, *_):
            pass

        __enter__ = __init__
        __exit__ = commit = lambda *_: None

        def huge_bytes(self):
            return 0

    Window.__enter__ = lambda self: self
    monkeypatch.setattr(attribution_steps, "Window", Window)
    found = why_no_huge_pages()
    assert "MADV_COLLAPSE" in found.reason
    assert "shmem_enabled" in found.command


def test_progress_goes_to_standard_error(capsys, monkeypatch):
    pytest.importorskip("rich", reason="needs the extra 'demo'")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    for kind in (PlainProgress, RichProgress):
        with kind(3) as progress:
            progress.step_started(2, STEPS[1])
            progress.side_started("pagealloc")
            progress.phase_started("first inference", 10)
            progress.token_chosen(0, 1)
            progress.advanced(10)
            progress.side_finished("pagealloc")
        said = capsys.readouterr()
        assert said.out == ""
        assert "+ paged" in said.err


# --- what is written ---


def leaves(value, key=""):
    """Yield every number with the key it stands under; a list's items stand under the list's."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


@pytest.mark.parametrize("attribution", [ALL_TAKEN, WITHOUT_HUGE_PAGES])
def test_json_has_the_unit_of_each_number_in_its_key(attribution):
    told = json.loads(json.dumps(attribution_json(attribution)))
    assert (told["schema"], told["schema_version"]) == ("pagealloc-report", 1)
    numbers = list(leaves(told))
    assert len(numbers) > 100
    unit = re.compile(r"^(n_.*|.*_(bytes|ns|percent|percent_points)|schema_version)$")
    assert [key for key, _ in numbers if not unit.match(key)] == []


def test_json_adds_up_and_says_what_is_missing():
    told = attribution_json(WITHOUT_HUGE_PAGES)
    taken = [step for step in told["steps"] if step["unavailable"] is None]
    left_out = [step for step in told["steps"] if step["unavailable"] is not None]
    for name, total in told["total"].items():
        points = [step["of_reference"][f"{name}_points"] for step in taken]
        assert sum(points) == pytest.approx(total)
    assert [(step["key"], step["unavailable"]) for step in left_out] == [
        (HUGE_PAGES, {"reason": "the kernel has none", "command": "make some"})
    ]
    assert "medians" not in left_out[0]
    assert told["reference_claim"] == {
        "kv_percent": -57.3, "faults_percent": -57.5, "alloc_p99_percent": -62.0
    }  # fmt: skip


def test_table_has_a_line_a_step():
    lines = summary_table(WITHOUT_HUGE_PAGES).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:8]] == [f"| {step.title}" for step in STEPS]
    assert f"{MINUS}98.0 %" in lines[-2]
    assert f"{MINUS}57.3 %" in lines[-1]
    assert "not available here" in lines[6]
    assert "75 %" in lines[4]


@pytest.mark.parametrize("attribution", [ALL_TAKEN, WITHOUT_HUGE_PAGES])
def test_pictures_are_drawn(attribution, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'demo'")
    paths = draw_waterfalls(attribution, tmp_path, "what was run")
    assert [path.name for path in paths] == [name for name, *_ in CHARTS.values()]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
