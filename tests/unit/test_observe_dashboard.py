import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from promql import filled_in, metrics_of

from pagealloc.cli.main import SUBCOMMANDS
from pagealloc.observe.dashboard import dashboard_json, rules_yaml
from pagealloc.observe.readings import readings
from pagealloc.observe.snapshot import take_snapshot

GRAFANA = Path(__file__).resolve().parents[2] / "docs/grafana"

HISTOGRAM = "mem_page_aligned_alloc_latency_seconds"
BUILT_IN = {"ALERTS"}  # by Prometheus itself
UNITS = {"Bps", "bytes", "ops", "percentunit", "s", "short"}

BOARD = json.loads(dashboard_json())
ROWS = [panel for panel in BOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load(rules_yaml())["groups"] for rule in group["rules"]]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


def named(panel) -> str:
    return f"{panel['id']} {panel['title']}"


def exprs(panel) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def board_exprs() -> list[str]:
    annotations = [each["expr"] for each in BOARD["annotations"]["list"]]
    return [expr for panel in PANELS for expr in exprs(panel)] + annotations


def offered() -> set[str]:
    """Return what there is to read: the process's figures, as Prometheus names them."""
    metrics = {
        metric.name + ("_total" if metric.kind == "counter" else "")
        for metric in readings(take_snapshot())
    }
    return metrics | {f"{HISTOGRAM}_{part}" for part in ("bucket", "sum", "count")}


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        ("up", {"up"}),
        ('sum by (job, le) (rate(a_total{job=~"$job", b!="c{d"}[$__rate_interval]))', {"a_total"}),
        ("a / on (job) group_left (b) (c > 0) >= 1e-9", {"a", "c"}),
        ("l:a:rate5m > 14.4 and l:a:rate1h offset 5m > 0x1F", {"l:a:rate5m", "l:a:rate1h"}),
        ('max({__name__="x"} or vector(0)) unless scalar(y)', {"y"}),
        ("histogram_quantile(0.99, a_bucket)", {"a_bucket"}),
    ],
)
def test_the_metrics_of_an_expression(expr, names):
    assert metrics_of(expr) == names


def test_every_metric_that_is_read_is_there():
    there = offered() | RECORDED.keys() | BUILT_IN
    read = {name for expr in board_exprs() for name in metrics_of(expr)}
    read |= {name for rule in RULES for name in metrics_of(rule["expr"])}
    assert len(read) > 30
    assert read - there == set()
    variables = [each["query"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
    assert {re.match(r"label_values\((\w+)", query)[1] for query in variables} <= there


def test_the_dashboard_shows_what_was_asked_for():
    shown = {name for expr in board_exprs() for name in metrics_of(expr)}
    shown |= {name for name in shown & RECORDED.keys() for name in metrics_of(RECORDED[name])}
    asked = {
        f"{HISTOGRAM}_bucket",
        "pagealloc_process_page_faults_total",
        "pagealloc_kv_held_bytes",
        "pagealloc_kv_needed_bytes",
        "pagealloc_prefix_hit_tokens_total",
        "pagealloc_purged_bytes_total",
        "job:pagealloc_error_budget:remaining_ratio30d",
    }
    assert asked <= shown


def test_a_recorded_name_is_read_somewhere():
    everything = [*board_exprs(), *(rule["expr"] for rule in RULES)]
    read = {name for expr in everything for name in metrics_of(expr)}
    assert RECORDED.keys() - read == set()
    for name in RECORDED:
        assert re.fullmatch(r"[a-z_]+:[a-z0-9_]+:[a-z0-9_]+", name)  # level:metric:operations


@pytest.mark.parametrize("panel", PANELS, ids=named)
def test_a_panel_says_what_it_means(panel):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit in UNITS
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert len(panel["description"]) > 50
    assert exprs(panel)
    for target in panel["targets"]:
        assert target["legendFormat"]
        # A label in a legend that the sum took away is an empty legend.
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert re.search(rf"by \([^)]*\b{label}\b|^job:", target["expr"])


def test_each_expression_asks_for_what_is_selected():
    for expr in board_exprs():
        for selector in re.findall(r"\{[^}]*\}", expr):
            assert 'job=~"$job"' in selector
        names = metrics_of(expr)
        assert expr.count("{") >= len(names) or names == {
            "pagealloc:alloc_latency_p99_bound:seconds"
        }
        assert "$" not in filled_in(expr)


def test_panels_lie_in_rows_side_by_side():
    assert [row["title"] for row in ROWS] == [
        "Overview",
        "Latency",
        "Memory",
        "Faults and purges",
        "KV cache",
        "Error budget",
    ]
    assert [panel["id"] for panel in BOARD["panels"]] == [*range(1, len(BOARD["panels"]) + 1)]
    taken = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    lowest = max(y for _, y in taken)
    assert taken == {(x, y) for x in range(24) for y in range(lowest + 1)}


def test_the_datasource_is_a_choice():
    variables = {each["name"]: each for each in BOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "size_class"]
    assert variables["datasource"]["query"] == "prometheus"
    for panel in PANELS:
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_colours_change_where_alerts_begin():
    panels = {panel["title"]: panel for panel in PANELS}
    bound = RECORDED["pagealloc:alloc_latency_p99_bound:seconds"]
    for title, where in (
        ("P99 latency", re.fullmatch(r"vector\((.+)\)", bound)[1]),
        ("Refused", ALERTS["PageallocAllocationsFail"]["expr"].split("> ")[1]),
        ("Budget used", ALERTS["PageallocBudgetNear"]["expr"].split("> ")[1]),
        ("Error budget left", ALERTS["PageallocErrorBudgetNearlySpent"]["expr"].split("< ")[1]),
    ):
        steps = panels[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert steps[0]["value"] is None
        assert float(where) in [step["value"] for step in steps[1:]]


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_an_alert_says_what_to_do(name):
    alert = ALERTS[name]
    assert alert["for"]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert "{{ $" in alert["annotations"]["summary"]
    assert "`pagealloc doctor`" in alert["annotations"]["description"]


def test_commands_that_are_named_exist():
    texts = rules_yaml() + dashboard_json()
    named = set(re.findall(r"`pagealloc (\w+)", texts))
    assert {"dashboard", "doctor", "info"} <= named
    assert named <= set(SUBCOMMANDS)


def test_the_package_has_what_the_generator_makes(monkeypatch):
    pytest.importorskip("grafana_foundation_sdk")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(GRAFANA))
    try:
        made = importlib.import_module("build_dashboard").text()
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == GRAFANA:
                del sys.modules[name]
    assert dashboard_json() == made, "run: python docs/grafana/build_dashboard.py"
