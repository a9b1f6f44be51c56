"""Plots of what the points of a comparison cost: speed, memory, the parts of a step, and quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.compare.comparison import ComparedPoint, Comparison
from launch.compare.curve_plots import course_plot, difference_plot, held_out_plot, loss_plot
from launch.compare.quality import quality_metric_name
from launch.compare.vega_specs import (
    PLOT_HEIGHT_PX,
    PagePlot,
    Spec,
    chart_frame,
    point_encoding,
    point_lookup_transform,
    visible_axes,
)

X_AXIS_WITH_MARGIN: Spec = {"scale": {"zero": False, "padding": 24}, "axis": {"tickCount": 6}}
PARTS_OF_STEP = ("data", "forward", "backward", "optimizer", "rest")
ROW_HEIGHT = 40
"""Pixels of a point's row in a bar chart: its name stands above its bar, so that a narrow window has room for both."""
AXIS_TITLE_BY_COST = {
    "seconds of steps": "seconds of steps",
    "GiB": "GiB, largest peak of all ranks",
    "GiB saved": "GiB of a checkpoint",
    "dollars a million tokens": "US dollars for a million tokens",
}
"""{entry of the menu of "Quality against cost": title of the x axis if the reader chooses it}."""


def comparison_plots(comparison: Comparison) -> list[PagePlot]:
    """Make the plots of a comparison, in the order of the page; those without numbers are left out."""
    losses = loss_plot(comparison)
    held_out_metrics = held_out_plot(comparison)
    differences = difference_plot(comparison)
    # Strategies are compared by the difference of their losses, so it comes first; other points by their quality.
    compares_strategies = any(point.should_have_loss_of_baseline for point in comparison.points)
    curves = [losses, held_out_metrics, differences]
    if compares_strategies:
        curves = [differences, losses, held_out_metrics]
    begun_points = comparison.begun_points
    costs = [quality_against_cost_plot(comparison), speed_plot(begun_points), memory_plot(begun_points)]
    plots = [*curves, *costs, step_parts_plot(begun_points), course_plot(comparison)]
    return [plot for plot in plots if plot is not None]


def is_planned_memory_comparable(point: ComparedPoint) -> bool:
    """Whether a point's planned memory can stand beside the measured one: both are the tensors of a whole step.

    The plan must have simulated the step: the quick estimate leaves out the logits. The run must have been on a GPU: on a
    CPU the measured resident set has libraries in it.
    """
    is_simulated = (point.measured.planned_by or "").startswith("simulation")
    is_on_gpu = point.first_repeat.record.device not in ("", "cpu")
    return is_simulated and is_on_gpu


def _bar_spec(rows: list[dict[str, Any]], points: Sequence[ComparedPoint], layers: list[Spec]) -> Spec:
    """Build the Vega-Lite chart that all bar plots share: a horizontal bar for each point, with the point's name above it.

    `rows`: the data, each row with the name of its point under `point`. `layers`: the marks that are drawn of them.
    """
    return {
        **chart_frame(ROW_HEIGHT * len(points)),
        "data": {"values": rows},
        "encoding": {
            "y": {
                "field": "point",
                "type": "nominal",
                "sort": [point.name for point in points],
                "title": None,
                "scale": {"paddingInner": 0.55, "paddingOuter": 0.55},
                # Offset and padding put a name above its bar, at its left end, so that names need no room beside the
                # bars.
                "axis": {
                    "labelAlign": "left",
                    "labelPadding": -4,
                    "labelOffset": -17,
                    "labelLimit": 600,
                    "ticks": False,
                    "domain": False,
                    "zindex": 1,
                    "minExtent": 0,
                    "maxExtent": 0,
                },
            }
        },
        "layer": layers,
    }


def speed_plot(points: Sequence[ComparedPoint]) -> PagePlot | None:
    """The plot of tokens/s: a bar for each point, with a line for its range; None if no speed is known.

    The range goes from the slowest to the fastest repeat. For a single run it is the middle half of the steps. A point is one
    combination of settings; `points`: those that took a step.
    """
    rows: list[dict[str, Any]] = []
    has_repeats = False
    for point in points:
        if point.measured.tokens_per_s is not None:
            slowest, fastest = point.summary.spread or point.measured.tokens_per_s_quartiles or (None, None)
            has_repeats |= point.summary.spread is not None
            rows.append(
                {"point": point.name, "speed": point.measured.tokens_per_s, "slowest": slowest, "fastest": fastest}
            )
    if not rows:
        return None
    x_encoding = {
        "field": "speed",
        "type": "quantitative",
        "title": "tokens/s, all ranks together",
        "axis": {"tickCount": 6},
    }
    bar_layer = {
        "mark": "bar",
        "encoding": {"x": x_encoding, "tooltip": _bar_tooltip(("speed", "slowest", "fastest"), ",.1f")},
    }
    range_layer = {
        "transform": [{"filter": "isValid(datum.slowest)"}],
        "mark": {"type": "rule", "strokeWidth": 3, "style": "ink"},
        "encoding": {"x": {"field": "slowest", "type": "quantitative"}, "x2": {"field": "fastest"}},
    }
    line_meaning = "the middle half of the steps: each point ran once"
    if has_repeats:
        line_meaning = "from the slowest to the fastest repeat"
    caption = f"Median tokens/s. The dark line is {line_meaning}."
    return PagePlot("speed", "Speed", caption, _bar_spec(rows, points, [bar_layer, range_layer]))


def _bar_tooltip(fields: Sequence[str], number_format: str) -> list[Spec]:
    """What the pointer shows of a bar: the name of its point, then the numbers in these fields of its data row."""
    numbers = [{"field": field, "type": "quantitative", "format": number_format} for field in fields]
    return [{"field": "point", "type": "nominal"}, *numbers]


def memory_plot(points: Sequence[ComparedPoint]) -> PagePlot | None:
    """The plot of memory in GiB: a bar for each point, with a tick for the planned memory if the two are comparable.

    A point is one combination of settings; `points`: those that took a step. None if no memory is known.
    """
    rows: list[dict[str, Any]] = []
    for point in points:
        if point.measured.memory_gib is not None:
            planned_gib = point.measured.planned_gib if is_planned_memory_comparable(point) else None
            rows.append({"point": point.name, "GiB": point.measured.memory_gib, "planned": planned_gib})
    if not rows:
        return None
    x_encoding = {"field": "GiB", "type": "quantitative", "title": "GiB", "axis": {"tickCount": 6}}
    layers: list[Spec] = [
        {"mark": "bar", "encoding": {"x": x_encoding, "tooltip": _bar_tooltip(("GiB", "planned"), ".4f")}}
    ]
    caption = "Largest peak of all ranks."
    if any(point.first_repeat.record.device == "cpu" for point in points):
        caption += " On a CPU this is the process with its libraries, so that a plan of tensors is not shown beside it."
    if any(row["planned"] is not None for row in rows):
        layers.append(
            {
                "transform": [{"filter": "isValid(datum.planned)"}],
                "mark": {"type": "tick", "thickness": 3, "style": "ink"},
                "encoding": {"x": {"field": "planned", "type": "quantitative"}},
            }
        )
        caption += " The dark tick is what the simulation planned."
    return PagePlot("memory", "Memory", caption, _bar_spec(rows, points, layers))


def step_parts_plot(points: Sequence[ComparedPoint]) -> PagePlot | None:
    """The plot of where the time of a step goes: a stacked bar for each point, in ms; None if no run timed the parts."""
    rows: list[dict[str, Any]] = []
    for point in points:
        for part, seconds in point.summary.parts_s.items():
            rows.append(
                {"point": point.name, "part": part, "ms": round(1000 * seconds, 3), "order": PARTS_OF_STEP.index(part)}
            )
    if not rows:
        return None
    encoding = {
        "x": {"field": "ms", "type": "quantitative", "title": "ms of a step", "axis": {"tickCount": 6}},
        "color": {"field": "part", "type": "nominal", "sort": list(PARTS_OF_STEP), "title": None},
        "order": {"field": "order", "type": "quantitative"},
        "tooltip": [
            {"field": "point", "type": "nominal"},
            {"field": "part", "type": "nominal"},
            {"field": "ms", "type": "quantitative", "format": ".2f"},
        ],
    }
    caption = "Medians over the steps. Communication is part of where it is waited for."
    return PagePlot(
        "parts", "A step's parts", caption, _bar_spec(rows, points, [{"mark": "bar", "encoding": encoding}])
    )


def _costs_by_title(point: ComparedPoint) -> dict[str, float | None]:
    """What a point costs, by the titles in the menu of the plot, such as {"seconds of steps": 812.0, "GiB": 3.1}.

    `GiB` is the peak of memory, `GiB saved` the size of a checkpoint. None if a cost is not known.
    """
    return {
        "seconds of steps": sum(row.get("step_s") or 0.0 for row in point.first_repeat.steps.values()),
        "GiB": point.measured.memory_gib,
        "GiB saved": point.measured.checkpoint_gib,
        "dollars a million tokens": point.summary.dollars_per_million,
    }


def quality_against_cost_plot(comparison: Comparison) -> PagePlot | None:
    """The plot that shows what better quality costs: a mark for each point, over a cost that the reader chooses in a menu.

    Quality is the held-out metric by which quality is judged, if every point has it, else the last training loss. None if
    fewer than two points have a quality, or no cost is known.
    """
    points = comparison.begun_points  # those that took a step
    metric = quality_metric_name(points)
    is_held_out = metric is not None and all(metric in point.measured.metrics_at_end for point in points)
    rows: list[dict[str, Any]] = []
    known_costs: set[str] = set()
    drawn_points: list[ComparedPoint] = []
    for point in points:
        quality = point.measured.metrics_at_end[str(metric)] if is_held_out else point.measured.loss
        if quality is not None:
            costs = _costs_by_title(point)
            rows.append({"point_index": len(drawn_points), "quality": quality, **costs})
            drawn_points.append(point)
            known_costs |= {title for title, cost in costs.items() if cost is not None}
    if len(rows) < 2 or not known_costs:
        return None
    quality_title = str(metric) if is_held_out else "last training loss"
    cost_titles = [title for title in AXIS_TITLE_BY_COST if title in known_costs]
    spec = _quality_against_cost_spec(comparison, drawn_points, rows, quality_title, cost_titles)
    caption = "Left is cheaper. Point at a mark to see its name and numbers."
    return PagePlot("trade", "Quality against cost", caption, spec)


def _quality_against_cost_spec(
    comparison: Comparison,
    points: Sequence[ComparedPoint],
    rows: list[dict[str, Any]],
    quality_title: str,
    cost_titles: list[str],
) -> Spec:
    """Build the Vega-Lite chart of quality against cost: a mark for each row, and a menu of costs for the horizontal axis.

    `rows`: {"point_index": position in `points`, "quality": 2.31, cost title: cost ...}. `cost_titles`: the entries of the
    menu.
    """
    axes = visible_axes(comparison)  # by which points are told apart
    qualities = [row["quality"] for row in rows]
    # At least a thousandth: values that differ by rounding alone are drawn at the same height.
    margin = max(0.1 * (max(qualities) - min(qualities)), 1e-3 * abs(max(qualities)))
    domain = [min(qualities) - margin, max(qualities) + margin]
    # The title below the plot is that of the chosen cost: an axis title of Vega-Lite cannot change.
    axis_title = " : ".join(f"against === '{title}' ? '{AXIS_TITLE_BY_COST[title]}'" for title in cost_titles)
    menu = {"input": "select", "options": cost_titles, "name": "against "}
    return {
        **chart_frame(PLOT_HEIGHT_PX),
        "title": {
            "text": {"expr": f"{axis_title} : ''"},
            "orient": "bottom",
            "anchor": "middle",
            "fontSize": 12,
            "offset": 6,
        },
        "data": {"values": rows},
        "params": [{"name": "against", "value": cost_titles[0], "bind": menu}],
        "transform": [
            point_lookup_transform(axes, [point.name for point in points]),
            # `against` is the parameter of the menu: the title of the chosen cost, which is a field of the row.
            {"calculate": "datum[against]", "as": "x"},
            {"filter": "isValid(datum.x)"},
        ],
        "mark": {"type": "point", "filled": True, "size": 130, "opacity": 0.85},
        "encoding": {
            "x": {"field": "x", "type": "quantitative", "title": None, **X_AXIS_WITH_MARGIN},
            "y": {"field": "quality", "type": "quantitative", "title": quality_title, "scale": {"domain": domain}},
            **point_encoding(axes, marks_are_lines=False),
            "tooltip": [
                {"field": "point", "type": "nominal"},
                {"field": "quality", "type": "quantitative", "format": ".6g", "title": quality_title},
                {"field": "x", "type": "quantitative", "format": ".6g", "title": "cost"},
            ],
        },
    }
