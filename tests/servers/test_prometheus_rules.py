"""Rules and expressions, as Prometheus itself understands them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import yaml
from programs import program
from promql import filled_in

from pagealloc.observe.dashboard import dashboard_json, rules_yaml

SERIES = Path(__file__).with_name("prometheus_rules_test.yml")


def promtool(*args: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program("promtool"), *args], cwd=folder, capture_output=True, text=True, timeout=120
    )


def check_rules(folder: Path, text: str) -> subprocess.CompletedProcess:
    (folder / "prometheus_rules.yml").write_text(text)
    return promtool("check", "rules", "--lint-fatal", "prometheus_rules.yml", folder=folder)


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
    board = json.loads(dashboard_json())
    exprs = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())] + [
        each["expr"] for each in board["annotations"]["list"]
    ]
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
