"""The dashboard for Grafana and the rules for Prometheus, as the package brings them.

Structure
    ``docs/grafana/build_dashboard.py`` makes grafana.json, with an SDK that nobody needs who only
    wants to print it; prometheus_rules.yml is written by hand.
"""

from importlib.resources import files

__all__ = ["dashboard_json", "rules_yaml"]


def dashboard_json() -> str:
    """Return the dashboard, as Grafana imports it."""
    return _text("grafana.json")


def rules_yaml() -> str:
    """Return the recording rules and alerts, as ``rule_files`` of Prometheus names them."""
    return _text("prometheus_rules.yml")


def _text(name: str) -> str:
    return files("pagealloc.observe").joinpath(name).read_text(encoding="utf-8")
