"""Panels: how the dashboard's panels look, each kind decided once."""

from collections.abc import Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    GraphGradientMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

STAT_HEIGHT = 4
GRAPH_HEIGHT = 9
WIDE = 12

AnyPanel = stat.Panel | timeseries.Panel | bargauge.Panel | heatmap.Panel


class Query(NamedTuple):
    """One PromQL expression of a panel, and what its series are called."""

    expr: str
    legend: str
    colour: str | None = None
    is_dashed: bool = False


class Limits(NamedTuple):
    """Where a value turns yellow, then red; with `is_low_bad`, below them."""

    yellow: float
    red: float
    is_low_bad: bool = False

    def thresholds(self) -> Builder:
        """Return them as Grafana's thresholds, lowest first."""
        steps = [(None, "green"), (self.yellow, "yellow"), (self.red, "red")]
        if self.is_low_bad:
            steps = [(None, "red"), (self.red, "yellow"), (self.yellow, "green")]
        return (
            dashboards.ThresholdsConfig()
            .mode(ThresholdsMode.ABSOLUTE)
            .steps([Threshold(value=value, color=color) for value, color in steps])
        )


def number(
    title: str, query: Query, unit: str, description: str, *, limits: Limits | None = None
) -> AnyPanel:
    """Return a panel of one number, its history behind it."""
    panel = (
        stat.Panel()
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .height(STAT_HEIGHT)
        .span(3)
    )
    return _coloured(_described(panel, title, [query], unit, description), limits)


def graph(
    title: str,
    queries: Sequence[Query],
    unit: str,
    description: str,
    *,
    width: int,
    limits: Limits | None = None,
    is_log: bool = False,
    is_stacked: bool = False,
    most: float | None = None,
) -> AnyPanel:
    """Return a panel of lines over time, `width` of 24 columns wide; `most` is the axis's end."""
    panel = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(30 if is_stacked else 8)
        .gradient_mode(GraphGradientMode.OPACITY)
        .show_points(VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.TABLE)
            .placement(LegendPlacement.RIGHT if width >= WIDE else LegendPlacement.BOTTOM)
            .calcs(["mean", "max", "lastNotNull"])
        )
        .tooltip(
            common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
        )
        .height(GRAPH_HEIGHT)
        .span(width)
    )
    if is_log:
        panel.scale_distribution(
            common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10)
        )
    else:
        panel.axis_soft_min(0)
    if is_stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if most is not None:
        panel.min(0).max(most)
    if limits is not None:
        panel.thresholds(limits.thresholds()).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        )
    for query in queries:
        if look := _look(query):
            panel.override_by_name(query.legend, look)
    return _described(panel, title, queries, unit, description)


def bars(
    title: str,
    queries: Sequence[Query],
    unit: str,
    description: str,
    *,
    width: int,
    limits: Limits,
    most: float | None = None,
) -> AnyPanel:
    """Return a panel of horizontal bars, one a series, as they are now."""
    panel = (
        bargauge.Panel()
        .display_mode(BarGaugeDisplayMode.GRADIENT)
        .orientation(VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .min(0)
        .height(GRAPH_HEIGHT)
        .span(width)
    )
    if most is not None:
        panel.max(most)
    return _coloured(_described(panel, title, queries, unit, description), limits)


def heat(title: str, query: Query, unit: str, description: str, *, width: int) -> AnyPanel:
    """Return a panel of a histogram's buckets over time; `unit` is that of the buckets' edges."""
    panel = (
        heatmap.Panel()
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Turbo")
            .exponent(0.5)
            .steps(64)
        )
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_values(heatmap.CellValues().unit("short").decimals(0))
        .filter_values(heatmap.FilterValueRange().le(1e-9))  # a bucket without samples is blank
        .mode(TooltipDisplayMode.SINGLE)
        .show_y_histogram()
        .show_legend()
        .height(GRAPH_HEIGHT)
        .span(width)
    )
    _described(panel, title, [], unit, description)
    return panel.with_target(_target(0, query).format(PromQueryFormat.HEATMAP))


def linked(panel: AnyPanel, title: str, url: str) -> AnyPanel:
    """Let a panel point to a page on the web."""
    link = dashboards.DashboardLink(title).type(DashboardLinkType.LINK).url(url).target_blank(True)
    return panel.links([link])


def _described(
    panel: AnyPanel, title: str, queries: Sequence[Query], unit: str, description: str
) -> AnyPanel:
    panel.title(title).description(description).unit(unit).datasource(DATASOURCE)
    panel.no_value("no data")
    for place, query in enumerate(queries):
        panel.with_target(_target(place, query))
    return panel


def _look(query: Query) -> list[DynamicConfigValue]:
    """Return what a line has of its own."""
    look = []
    if query.colour is not None:
        look.append(DynamicConfigValue("color", {"mode": "fixed", "fixedColor": query.colour}))
    if query.is_dashed:
        look.append(DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}))
    return look


def _target(place: int, query: Query) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(query.expr)
        .legend_format(query.legend)
        .ref_id(chr(ord("A") + place))
        .datasource(DATASOURCE)
        .range()
    )


def _coloured(panel: AnyPanel, limits: Limits | None) -> AnyPanel:
    """Colour what stands for one value by where it lies."""
    if limits is None:
        return panel.color_scheme(
            dashboards.FieldColor().mode(FieldColorModeId.FIXED).fixed_color("blue")
        )
    return panel.thresholds(limits.thresholds()).color_scheme(
        dashboards.FieldColor().mode(FieldColorModeId.THRESHOLDS)
    )
