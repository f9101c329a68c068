"""Write the Grafana dashboard that ``pagealloc dashboard`` prints.

Purpose
    ``python docs/grafana/build_dashboard.py`` writes ``pagealloc/observe/grafana.json``, with
    grafana-foundation-sdk of the dependency group `test`.  A test holds that the file is what this
    makes.
Structure
    ::

        expressions (PromQL) -> rows (what is shown) -> panels (how it looks) -> build_dashboard
"""

import json
from pathlib import Path
from typing import Any

from expressions import LATENCY
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from panels import DATASOURCE
from rows import ROWS

OUTPUT = Path(__file__).resolve().parents[2] / "pagealloc/observe/grafana.json"

# What Grafana reads of an annotation by Prometheus, and the SDK has no names for.
ANNOTATION_TEXTS = {
    "tagKeys": "severity,job,instance",
    "textFormat": "",
    "titleFormat": "{{alertname}}",
}


def build() -> Dashboard:
    """Return the dashboard; ids go by place."""
    board = (
        dashboards.Dashboard("pagealloc")
        .uid("pagealloc")
        .description(
            "Memory and KV cache of programs on pagealloc: latency, physical against needed bytes, "
            "faults, hit rates and the error budget. Each panel's (i) says what it means and what "
            "to do."
        )
        .tags(["allocator", "kv-cache", "llm", "pagealloc"])
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .editable()
    )
    for variable in variables():
        board.with_variable(variable)
    board.annotation(firing_alerts())
    last = 0
    for title, panels in ROWS:
        last += 1
        board.with_row(dashboards.Row(title).id(last))
        for panel in panels():
            last += 1
            board.with_panel(panel.id(last))
    return board.build()


def variables() -> list[Any]:
    """Return what can be chosen at the top of the dashboard."""
    datasource = dashboards.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    return [
        datasource,
        choice("job", "Job", "label_values(pagealloc_allocs_total, job)"),
        choice(
            "instance", "Instance", 'label_values(pagealloc_allocs_total{job=~"$job"}, instance)'
        ),
        choice(
            "size_class",
            "Size class",
            f'label_values({LATENCY}_count{{job=~"$job", instance=~"$instance"}}, size_class)',
        ),
    ]


def choice(name: str, label: str, query: str) -> dashboards.QueryVariable:
    """Return a variable with the values of a label, all of them at first."""
    return (
        dashboards.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def firing_alerts() -> dashboards.AnnotationQuery:
    """Return the marks that alerts of prometheus_rules.yml leave in every graph."""
    return (
        dashboards.AnnotationQuery()
        .name("Alerts")
        .datasource(DATASOURCE)
        .icon_color("red")
        .expr('ALERTS{alertname=~"Pagealloc.+", alertstate="firing", job=~"$job"}')
    )


def text() -> str:
    """Return the dashboard as JSON; the same at every call."""
    board = json.loads(json.dumps(build(), cls=JSONEncoder))
    for annotation in board["annotations"]["list"]:
        annotation.update(ANNOTATION_TEXTS)
    return json.dumps(board, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file."""
    OUTPUT.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
