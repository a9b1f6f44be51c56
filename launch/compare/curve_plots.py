"""Plots of a comparison over steps, tokens or seconds: differences from the first point, losses, held-out metrics, course."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from launch.compare.comparison import ComparedPoint, Comparison
from launch.compare.curves import SAME_LOSS_TOLERANCE
from launch.compare.events import notable_steps
from launch.compare.quality import quality_metric_name
from launch.compare.vega_specs import (
    HEIGHT,
    LEGEND_CONFIG,
    SCHEMA,
    WIDTH,
    PagePlot,
    Spec,
    csv_plot_data,
    legend_opacity,
    legend_selections,
    point_encoding,
    point_lookup_transform,
    position_tooltip_fields,
    x_axis_encoding,
    x_axis_menu,
    x_axis_title,
    x_axis_transform,
    zoom_selection,
)

MAX_CURVE_ROWS = 2500
"""Rows of one plot, all points together: a page of 100 points must stay small."""
MAX_STEPS_OF_POINT = 400
"""Steps of one point that are drawn: evenly spread ones, and those that stand out."""
MIN_STEPS_OF_POINT = 20
MAX_HELD_OUT_METRICS = 12
"""Held-out metrics in the menu, the one that decides first."""
MAX_NOTABLE = 40
"""Steps that stood out that are drawn; a plot with more is not readable."""
MAX_POINTS_WITH_NOTABLE = 4
"""Points of a plot up to which steps that stood out are among its rows."""
LEAST_DIFFERENCE = 1e-9
"""Differences below it are drawn at it: an axis of logarithms has no zero."""
COURSE_METRICS = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
CLICK = "Scroll to zoom, drag to move, double-click to go back. A click on a value in the legend shows it alone."


def drawn_steps(point: ComparedPoint, num_points: int) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that a plot draws of a point's first repeat: every n-th, and the steps that stood out.

    Each row also has `seconds`, the time of all steps up to it. `num_points`: how many points share the plot. The more there
    are, the fewer rows of each are drawn, so that the page stays small; of more than four, steps that stood out are not drawn.
    """
    rows = list(point.first_repeat.steps.values())
    max_rows = min(MAX_STEPS_OF_POINT, max(MIN_STEPS_OF_POINT, MAX_CURVE_ROWS // max(1, num_points)))
    stride = max(1, math.ceil(len(rows) / max_rows))
    notable: set[int] = set()
    if num_points <= MAX_POINTS_WITH_NOTABLE:
        notable = {step.step for step in notable_steps(point.first_repeat)[-MAX_NOTABLE:]}
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in rows)
    drawn = []
    for number, (row, seconds) in enumerate(zip(rows, elapsed_s, strict=True)):
        if number % stride == 0 or number == len(rows) - 1 or row["step"] in notable:
            drawn.append({**row, "seconds": seconds})
    return drawn


def _curve_spec(
    comparison: Comparison, points: Sequence[ComparedPoint], data: Spec, y: Spec, tooltip: Spec, *, height: int = HEIGHT
) -> Spec:
    """A Vega-Lite chart with one curve for each of `points`.

    `data`: rows with the number of their point in `points` as `p`, and `step`, `tokens` and `seconds`, one of which the reader
    chooses for the horizontal axis. `y`: the encoding of the value. `tooltip`: what the pointer shows of it.
    """
    return {
        "$schema": SCHEMA,
        "config": LEGEND_CONFIG,
        "width": WIDTH,
        "height": height,
        "title": x_axis_title(),
        "data": data,
        "params": [x_axis_menu()],
        "transform": [point_lookup_transform(comparison, points), x_axis_transform()],
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2, "clip": True, "point": {"size": 26}},
                "params": [*legend_selections(comparison), zoom_selection()],
                "encoding": {
                    "x": x_axis_encoding(),
                    "y": y,
                    "detail": {"field": "point", "type": "nominal"},
                    **point_encoding(comparison, dashed=True),
                    "opacity": legend_opacity(comparison),
                    "tooltip": [*position_tooltip_fields(), tooltip],
                },
            }
        ],
    }


def difference_plot(comparison: Comparison) -> PagePlot | None:
    """How far each point's loss is from its baseline's, step by step, on a logarithmic axis; None if no losses are comparable."""
    steps_by_point = {point.name: point.first_repeat.steps for point in comparison.points}
    points = [point for point in comparison.points if point.loss_difference is not None]
    rows = []
    for number, point in enumerate(points):
        baseline_steps = steps_by_point[str(point.baseline_name)]
        for row in drawn_steps(point, len(points)):
            baseline_loss = baseline_steps.get(row["step"], {}).get("loss")
            if baseline_loss is not None and row["loss"] is not None:
                relative = abs(row["loss"] - baseline_loss) / (abs(baseline_loss) or 1.0)
                cells = (number, row["step"], row.get("tokens"), row["seconds"], max(relative, LEAST_DIFFERENCE))
                rows.append(cells)
    if not rows:
        return None
    data = csv_plot_data(("p", "step", "tokens", "seconds", "difference"), rows)
    y = {
        "field": "difference",
        "type": "quantitative",
        "title": "relative difference of the loss",
        "scale": {"type": "log", "domainMin": LEAST_DIFFERENCE},
        "axis": {"format": ".0e", "tickCount": 6},
    }
    tooltip = {"field": "difference", "type": "quantitative", "format": ".2e"}
    spec = _curve_spec(comparison, points, data, y, tooltip)
    spec["layer"].append(
        {
            "data": {"values": [{"limit": SAME_LOSS_TOLERANCE}]},
            # Hidden from screen readers, which would read a line without a name; the caption says what it is.
            "mark": {"type": "rule", "strokeDash": [2, 4], "aria": False},
            "encoding": {"y": {"datum": SAME_LOSS_TOLERANCE}},
        }
    )
    baselines = list(dict.fromkeys(str(point.baseline_name) for point in points))
    compared_with = baselines[0] if len(baselines) == 1 else "the first point of the same job, or the first of all"
    return PagePlot(
        name="difference",
        title="Difference from the first point",
        caption=f"Of the loss, from that of {compared_with}. Over the first five steps, below the dotted line counts as the "
        f"same. What lies at {LEAST_DIFFERENCE:g} is at most that far apart.",
        spec=spec,
    )


def loss_plot(comparison: Comparison) -> PagePlot | None:
    """The training losses; None if no step has one."""
    points = comparison.begun_points
    rows = []
    for number, point in enumerate(points):
        for row in drawn_steps(point, len(points)):
            if row["loss"] is not None:
                rows.append((number, row["step"], row.get("tokens"), row["seconds"], row["loss"]))
    if not rows:
        return None
    data = csv_plot_data(("p", "step", "tokens", "seconds", "loss"), rows)
    y = {"field": "loss", "type": "quantitative", "title": "training loss", "scale": {"zero": False}}
    spec = _curve_spec(comparison, points, data, y, {"field": "loss", "type": "quantitative", "format": ".6f"})
    caption = CLICK
    if any(point.is_same_job for point in points):
        caption += " Equal curves lie on each other: the differences above tell them apart."
    notable_rows = _notable_rows(points)
    if 0 < len(notable_rows) <= MAX_NOTABLE:
        spec["layer"].append(_notable_layer(notable_rows))
        caption += " Dotted: steps that stood out; the pointer says what was done."
    return PagePlot("loss", "Training loss", caption, spec)


def _notable_rows(points: Sequence[ComparedPoint]) -> list[dict[str, Any]]:
    """A row for each step that stood out: its position on the three horizontal axes, and what a guard or detector found there."""
    notable_rows = []
    for point in points:
        notables = notable_steps(point.first_repeat)
        if not notables:
            continue
        row_by_step = {row["step"]: row for row in drawn_steps(point, 1)}
        for notable in notables:
            row = row_by_step.get(notable.step, {})
            position = {"step": notable.step, "tokens": row.get("tokens"), "seconds": row.get("seconds")}
            notable_rows.append({"point": point.name, **position, "what": notable.text})
    return notable_rows


def _notable_layer(rows: list[dict[str, Any]]) -> Spec:
    """Dotted vertical lines at the steps that stood out; `rows` come from `_notable_rows`."""
    return {
        "data": {"values": rows},
        "transform": [x_axis_transform()],
        "mark": {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5, "style": "bad"},
        "encoding": {
            "x": {"field": "x", "type": "quantitative"},
            "tooltip": [
                {"field": "point", "type": "nominal"},
                {"field": "step", "type": "quantitative"},
                {"field": "what", "type": "nominal"},
            ],
        },
    }


def held_out_plot(comparison: Comparison) -> PagePlot | None:
    """A held-out metric over training, chosen by the reader in a menu; None if nothing was evaluated."""
    points = comparison.begun_points
    names = _held_out_names(comparison)
    if not names:
        return None
    rows = []
    max_evaluations = max(2, MAX_CURVE_ROWS // max(1, len(points) * len(names)))
    for number, point in enumerate(points):
        rows += _held_out_rows(number, point, names, max_evaluations)
    data = csv_plot_data(("p", "step", "tokens", "seconds", "metric", "value"), rows, text_columns=("metric",))
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    spec = _curve_spec(comparison, points, data, y, {"field": "value", "type": "quantitative", "format": ".6g"})
    spec["transform"].insert(0, {"filter": "datum.metric === metric"})
    menu = {"name": "metric", "value": names[0], "bind": {"input": "select", "options": names, "name": "metric "}}
    spec["params"].append(menu)
    return PagePlot("held-out", "Held-out metrics", "Before the first step, and after each evaluation.", spec)


def _held_out_names(comparison: Comparison) -> list[str]:
    """The metrics of the menu: the one that decides first, then those that most points have; at most `MAX_HELD_OUT_METRICS`."""
    num_points_by_metric: dict[str, int] = {}
    for point in comparison.begun_points:
        for name in {**point.measured.before, **point.measured.after}:
            num_points_by_metric[name] = num_points_by_metric.get(name, 0) + 1
    decisive_metric = quality_metric_name(comparison.begun_points)
    ordered = sorted(num_points_by_metric, key=lambda name: (name != decisive_metric, -num_points_by_metric[name]))
    return ordered[:MAX_HELD_OUT_METRICS]


def _held_out_rows(
    number: int, point: ComparedPoint, names: Sequence[str], max_evaluations: int
) -> list[tuple[Any, ...]]:
    """Data rows (point number, step, tokens, seconds, metric, value) of the held-out metrics `names` of a point.

    Of more than about `max_evaluations` evaluations, evenly spread ones are drawn, the first and the last among them.
    """
    steps = point.first_repeat.steps
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in steps.values())
    seconds_by_step = {0: 0.0, **dict(zip(steps, elapsed_s, strict=True))}
    evaluations = list(point.first_repeat.evaluations.items())
    stride = max(1, math.ceil(len(evaluations) / max_evaluations))
    rows = []
    for index, (step, metrics) in enumerate(evaluations):
        is_last = index == len(evaluations) - 1
        if index % stride and not is_last:
            continue
        tokens = 0 if step == 0 else steps.get(step, {}).get("tokens")
        for name in names:
            if name in metrics:
                rows.append((number, step, tokens, seconds_by_step.get(step), name, metrics[name]))
    return rows


def course_plot(comparison: Comparison) -> PagePlot | None:
    """Gradient norm, learning rate or speed over training, chosen by the reader in a menu; None if no row has any of them."""
    points = comparison.begun_points
    rows = []
    known_metrics: set[str] = set()
    for number, point in enumerate(points):
        for row in drawn_steps(point, len(points)):
            values = []
            for metric in COURSE_METRICS:
                value = row.get(metric)
                is_number = isinstance(value, int | float)
                values.append(value if is_number else None)
                if is_number:
                    known_metrics.add(metric)
            rows.append((number, row["step"], row.get("tokens"), row["seconds"], *values))
    if not known_metrics:
        return None
    titles = [title for metric, title in COURSE_METRICS.items() if metric in known_metrics]
    data = csv_plot_data(("p", "step", "tokens", "seconds", *COURSE_METRICS.values()), rows)
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    spec = _curve_spec(
        comparison, points, data, y, {"field": "value", "type": "quantitative", "format": ".6g"}, height=240
    )
    spec["transform"] += [{"calculate": "datum[metric]", "as": "value"}, {"filter": "isValid(datum.value)"}]
    menu = {"name": "metric", "value": titles[0], "bind": {"input": "select", "options": titles, "name": "metric "}}
    spec["params"].append(menu)
    return PagePlot("course", "Gradient norm, learning rate and speed", "Choose one in the menu below the plot.", spec)
