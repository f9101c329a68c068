"""The core benchmark's arithmetic, and its driver with rounds too short to prove anything."""

import json
import shutil

import pytest
from benches import import_bench

import pagealloc

import_bench()
from bench import bench_core, python_side, rows, soak, workers  # noqa: E402
from bench.peers import PEERS, Peer, how_to_install  # noqa: E402

GLIBC = PEERS[0]


# --- ratios and verdicts ---


def test_a_ratio_is_the_median_of_the_rounds_own():
    """A round in which the machine was busy is slow for both."""
    assert rows.median_ratio([10, 100, 12], [20, 200, 8]) == 0.5


def test_the_best_peer_has_the_lowest_median():
    assert rows.best_peer({"a": [1, 50, 50], "b": [20, 20, 20], "c": None}) == "b"
    assert rows.best_peer({"a": None}) is None


@pytest.mark.parametrize(
    ("ours", "peers", "holds"),
    [
        ([5, 5, 5], {"a": [10, 10, 10], "b": [20, 20, 20]}, True),
        ([9, 9, 9], {"a": [10, 10, 10], "b": [20, 20, 20]}, False),
        ([5, 5, 5], {"a": [10, 10, 10], "b": None}, None),
        ([9, 9, 9], {"a": [10, 10, 10], "b": None}, False),
        ([5, 5, 5], {"a": None}, None),
        (None, {"a": [10, 10, 10]}, None),
    ],
)
def test_a_bar_holds_only_against_all_peers(ours, peers, holds):
    row = rows.compare("1", "work", 0.5, ours, peers)
    assert row.holds is holds
    assert row.succeeds is (holds is True)


def test_the_bar_itself_is_reached():
    assert rows.compare("1", "work", 0.5, [5], {"a": [10]}).holds is True
    assert rows.limit_row("6", "faults", 0, 0, "faults").holds is True
    assert rows.limit_row("6", "faults", 0, 1, "faults").holds is False


def test_only_what_is_optional_may_be_missing():
    assert rows.compare("11", "work", 1, [5], {"torch": None}, optional=True).succeeds
    assert not rows.compare("11", "work", 1, [5], {"torch": None}).succeeds


# --- what is shown ---


ROWS = [
    rows.compare("1", "hot 4 KiB", 1.25, [14.0], {"glibc": [76.0], "mimalloc": None}),
    rows.compare("11.object", "alloc", 1.3, [60.0], {"object()": [50.0]}),
    rows.limit_row("6", "page faults", 0, 3, "faults", peers={"glibc": 1234}),
]


def test_the_table_shows_every_figure_and_what_is_missing():
    head, first, second, third = rows.table(ROWS, ("glibc", "mimalloc")).splitlines()
    assert head.split()[:5] == ["bar", "work", "pagealloc", "glibc", "mimalloc"]
    expected = "1 hot 4 KiB 14 ns 76 missing 0.184 ≤ 1.25 not measured"
    assert " ".join(first.split()) == expected
    assert " ".join(second.split()) == "11.object alloc (against object() 50) 60 ns 1.2 ≤ 1.3 holds"
    assert " ".join(third.split()) == "6 page faults 3 faults 1,234 ≤ 0 MISSED"


def test_a_row_that_could_not_be_measured_says_why():
    row = rows.compare("1", "hot", 1, None, {}, note="the allocator refused a block")
    assert "missing" in rows.table([row], ())
    assert rows.table([row], ()).splitlines()[-1] == "1, hot: the allocator refused a block"
    assert rows.markdown_table([row], ()).splitlines()[-1].startswith("- 1, hot: ")


def test_the_report_is_written(tmp_path):
    report = rows.RowsReport(
        "core", "Measured", ROWS, {"cpu": "one"}, bench_core.PEER_NAMES, ["missing: mimalloc"]
    )
    assert not report.holds
    report.write_json(tmp_path / "new" / "core.json")
    found = json.loads((tmp_path / "new" / "core.json").read_text())
    keys = {"bar", "work", "ours", "peers", "unit", "ratio", "to_reach", "holds"}
    assert [set(row) for row in found] == [keys] * len(ROWS)
    assert [row["holds"] for row in found] == [None, True, False]
    assert found[0]["peers"] == {"glibc": 76.0, "mimalloc": None}
    report.write_markdown(tmp_path / "core.md")
    page = (tmp_path / "core.md").read_text()
    assert page.startswith("# Measured\n\nBy `python -m bench core --markdown FILE`;\n")
    assert "| 1 | hot 4 KiB | 14 ns | 76 |  | missing |  |" in page
    assert "- cpu: one" in page
    assert "1 of 3 lines miss their bar." in page
    assert "missing: mimalloc" in page


def test_every_bar_has_its_lines():
    found = [line.bar for line in bench_core.LINES]
    expected = {"1": 8, "2": 6, "3.64KiB": 1, "3.2MiB": 1, "4": 1, "5.small": 2, "5.large": 2}
    expected |= {"6": 1, "7": 1}
    assert {bar: found.count(bar) for bar in found} == expected
    texts = [line.text for line in bench_core.LINES]
    assert len(set(texts)) == len(texts)


def test_what_cannot_be_measured_is_shown_and_fails(capsys):
    def fail():
        raise workers.WorkerError("glibc: died")

    (row,) = rows.guarded("13", "soak", 0.38, fail)
    assert (row.holds, row.note, row.succeeds) == (None, "glibc: died", False)
    assert rows.guarded("1", "hot", 1, lambda: ROWS) == ROWS
    assert "measuring 13: soak" in capsys.readouterr().err


# --- the soak's arithmetic ---


def test_batch_sizes_are_the_same_in_each_third():
    plan = soak.Plan(3600)
    sizes = soak.batch_sizes(plan)
    third = len(sizes) // 3
    assert len(sizes) == 3600
    assert sizes[:third] == sizes[third : 2 * third] == sizes[2 * third :]
    assert all(1 <= size <= soak.MAX_BATCH for size in sizes)
    assert len(set(sizes)) > 10
    assert sizes[:10] == [sizes[0]] * 10  # 10 seconds: 10 pairs of half a second each
    assert soak.batch_sizes(plan) == sizes


def test_drift_is_relative_to_the_others_and_to_the_same_load():
    ours, other = [50, 100, 50, 100, 50, 100], [500, 1000, 500, 1000, 500, 1000]
    assert soak.drift(ours, other) == pytest.approx(0)
    busier = [value * 2 for value in (ours[-2:])]
    assert soak.drift(ours[:4] + busier, [*other[:4], 1000, 2000]) == pytest.approx(0)
    assert soak.drift(ours[:4] + busier, other) == pytest.approx(1)


def test_outliers_do_not_drift():
    ours = [50] * 8 + [50] * 8 + [50] * 7 + [5000]
    assert soak.drift(ours, [500] * 24) == pytest.approx(0)


def test_the_soak_is_judged_and_drawn(tmp_path):
    windows = {
        name: [
            {"start_s": second, "p99": p99, "bins_per_octave": 6, "bins": {"30": 100, "40": 1}}
            for second in range(6)
        ]
        for name, p99 in ((workers.OURS, 60), (soak.OTHER, 200))
    }
    total = {workers.OURS: {"p99": 60, "n": 606}, soak.OTHER: {"p99": 200, "n": 606}}
    result = {"windows": windows, "total": total}
    p99, drifted = soak.judge(result, soak.Plan(6))
    assert (p99.ratio, p99.holds) == (0.3, True)
    assert (drifted.ours, drifted.holds) == (pytest.approx(0), True)
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    soak.write_picture(result, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


# --- peers ---


def test_a_missing_peer_is_told_apart():
    nobody = Peer("nobody", "libnobody.so.7", "libnobody7")
    assert not nobody.is_installed()
    assert GLIBC.is_installed()
    assert how_to_install([nobody]) == (
        "missing: nobody; install the Debian packages with: apt-get install libnobody7"
    )


# --- the driver ---


@pytest.fixture(scope="module")
def drivers():
    if shutil.which("gcc") is None:
        pytest.skip("the driver needs gcc")
    with workers.compile_drivers() as compiled:
        yield compiled


@pytest.fixture(scope="module", params=[workers.OURS, *(peer.name for peer in PEERS)])
def worker(request, drivers):
    if request.param == workers.OURS:
        if drivers.library is None:
            pytest.skip("this pagealloc has no C API")
        started = workers.Worker.of_ours(drivers)
    else:
        peer = next(peer for peer in PEERS if peer.name == request.param)
        if not peer.is_installed():
            pytest.skip(how_to_install([peer]))
        started = workers.Worker.of_peer(peer, drivers)
        assert peer.soname.partition(".so")[0] in started.ask("identity")["library"]
    yield started
    started.close()


@pytest.mark.parametrize(
    "numbers",
    [
        ("hot", 65536, 0, 1000),
        ("hot", 2 << 20, 2 << 20, 1000),
        ("random", 65536, 0, 1000),
        ("kv", 65536, 0, 1000),
        ("cross", 65536, 0, 1000),
    ],
    ids=["hot", "hot-aligned", "random", "kv", "cross"],
)
def test_a_work(worker, numbers):
    answer = worker.ask(*numbers)
    assert answer["ns"] > 0
    assert answer["n"] > 0


def test_kv_churn_faults_no_more_once_all_was_touched(worker):
    if worker.name != workers.OURS:
        pytest.skip("a promise of pagealloc's")
    # On a machine that is busy otherwise a thread may stand still until what it has is purged.
    assert min(worker.ask("kv", 4096, 1, 1000)["faults"] for _ in range(3)) == 0


def test_every_sample_is_kept(worker):
    answer = worker.ask("kv_latency", 65536, 2)
    assert answer["n"] == 2 * 16384
    assert 0 < answer["p50"] <= answer["p99"] <= answer["p999"] <= answer["max"]


def test_a_soak_adds_up(worker):
    parts = [worker.ask("soak_window", 65536, n_requests, 2_000_000) for n_requests in (1, 32)]
    assert worker.ask("soak_total")["n"] == sum(part["n"] for part in parts)
    for part, n_requests in zip(parts, (1, 32), strict=True):
        assert part["n"] % (n_requests * 20) == 0
        assert sum(part["bins"].values()) == part["n"]


def test_a_refusal_is_told_and_survived(worker):
    for work in ("hot", "random", "kv", "cross", "kv_latency"):
        with pytest.raises(workers.WorkerError, match="refused a block"):
            worker.ask(work, 1 << 60, 0, 1000)
    with pytest.raises(workers.WorkerError, match="no such work"):
        worker.ask("nothing")
    assert worker.ask("hot", 65536, 0, 1000)["n"] > 0


def test_a_dead_worker_is_told(drivers):
    started = workers.Worker.of_peer(GLIBC, drivers)
    started.process.kill()
    started.process.wait()
    with pytest.raises(workers.WorkerError, match="glibc: died, code -9"):
        started.ask("hot", 65536, 0, 1000)
    started.close()


def test_python_side():
    found = python_side.rows(python_side.Effort(2, 64))
    assert {row.bar for row in found} == {"11.object", "11.numpy", "11.torch", "11.batch"}
    for row in found:
        if row.bar in ("11.object", "11.numpy"):
            assert row.ours is not None
            assert row.ours > 0
        if row.bar == "11.batch":
            has_batches = hasattr(pagealloc.PageAllocator, "alloc_many")
            assert (row.ours is not None) == has_batches
