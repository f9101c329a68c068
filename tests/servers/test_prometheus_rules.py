"""Rules and expressions, as Prometheus itself understands them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import yaml
from programs import program
from promql import filled_in

from pagealloc import PageAllocator
from pagealloc.kv import KVCache, KVLayout
from pagealloc.observe.dashboard import dashboard_json, rules_yaml
from pagealloc.observe.readings import readings
from pagealloc.observe.snapshot import take_snapshot

SERIES = Path(__file__).with_name("prometheus_rules_test.yml")
LATENCY = "mem_page_aligned_alloc_latency_seconds"


def promtool(*args: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program("promtool"), *args], cwd=folder, capture_output=True, text=True, timeout=120
    )


def check_rules(folder: Path, text: str) -> subprocess.CompletedProcess:
    (folder / "prometheus_rules.yml").write_text(text)
    return promtool("check", "rules", "--lint-fatal", "prometheus_rules.yml", folder=folder)


def board_exprs() -> list[str]:
    board = json.loads(dashboard_json())
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return panels + [each["expr"] for each in board["annotations"]["list"]]


def series(name: str, labels: dict[str, str], values: str) -> dict[str, str]:
    shown = {"job": "llm", "instance": "a", **labels}
    matchers = ", ".join(f'{label}="{value}"' for label, value in shown.items())
    return {"series": f"{name}{{{matchers}}}", "values": values}


def every_series() -> list[dict[str, str]]:
    """Return a series for all that a process can tell, with the labels it has."""
    layout = KVLayout(n_layers=1, n_kv_heads=1, head_dim=32, max_tokens=64)
    with PageAllocator(budget_bytes="64MiB"), KVCache(layout, budget_bytes="64MiB"):
        metrics = readings(take_snapshot())
    found = []
    for metric in metrics:
        # What this kernel does not tell, another one does: of each allocator, as for now.
        all_labels = [sample.labels for sample in metric.samples] or [{"allocator": "0"}]
        is_counter = metric.kind == "counter"
        name = metric.name + ("_total" if is_counter else "")
        found += [
            series(name, labels, "0+60x60" if is_counter else "7x60") for labels in all_labels
        ]
    group = {"size_class": "4 KiB", "numa_node": "0"}
    found.append(series(f"{LATENCY}_count", group, "0+60x60"))
    for le, values in (("1.28e-07", "0+50x60"), ("2.56e-07", "0+60x60"), ("+Inf", "0+60x60")):
        found.append(series(f"{LATENCY}_bucket", {**group, "le": le}, values))
    return found


def test_the_rules_are_rules(tmp_path):
    checked = check_rules(tmp_path, rules_yaml())
    assert checked.returncode == 0, checked.stdout + checked.stderr
    n_rules = sum(len(group["rules"]) for group in yaml.safe_load(rules_yaml())["groups"])
    assert f"{n_rules} rules found" in checked.stdout


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    (tmp_path / "prometheus_rules.yml").write_text(rules_yaml())
    shutil.copy(SERIES, tmp_path)
    tested = promtool("test", "rules", SERIES.name, folder=tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_looser_alert_is_noticed(tmp_path):
    rules = rules_yaml()
    loose = re.sub(r"(committed_bytes:ratio) > 0\.9$", r"\1 > 0.99", rules, flags=re.MULTILINE)
    assert loose != rules
    (tmp_path / "prometheus_rules.yml").write_text(loose)
    shutil.copy(SERIES, tmp_path)
    assert promtool("test", "rules", SERIES.name, folder=tmp_path).returncode != 0


def test_each_alert_fires_in_the_test_series():
    alerts = set(re.findall(r"- alert: (\w+)", rules_yaml()))
    fired = set(re.findall(r'alertname="(\w+)", alertstate="firing"', SERIES.read_text()))
    assert alerts == fired


def test_prometheus_understands_each_expression_of_the_dashboard(tmp_path):
    exprs = board_exprs()
    assert len(exprs) > 40
    rules = [
        {"record": f"panel:expr:n{number}", "expr": filled_in(expr)}
        for number, expr in enumerate(exprs)
    ]
    groups = {"groups": [{"name": "dashboard", "rules": rules}]}
    checked = check_rules(tmp_path, yaml.safe_dump(groups))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_expression_that_is_none_is_noticed(tmp_path):
    groups = {"groups": [{"name": "g", "rules": [{"record": "a:b:c", "expr": "sum by (x"}]}]}
    assert check_rules(tmp_path, yaml.safe_dump(groups)).returncode != 0


def test_no_panel_stays_empty(tmp_path):
    checks = [
        {
            "expr": f"count({filled_in(expr)}) > bool 0",
            "eval_time": "30m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for expr in board_exprs()
    ]
    test = {"interval": "1m", "input_series": every_series(), "promql_expr_test": checks}
    (tmp_path / "prometheus_rules.yml").write_text(rules_yaml())
    (tmp_path / "panels_test.yml").write_text(
        yaml.safe_dump({"rule_files": ["prometheus_rules.yml"], "tests": [test]})
    )
    tested = promtool("test", "rules", "panels_test.yml", folder=tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr
