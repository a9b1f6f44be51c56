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
    PLOT_HEIGHT_PX,
    PagePlot,
    Spec,
    chart_frame,
    csv_plot_data,
    evenly_spread,
    legend_opacity,
    legend_selections,
    point_encoding,
    point_lookup_transform,
    position_tooltip_fields,
    visible_axes,
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
MAX_NOTABLE_STEPS = 40
"""Steps that stood out that are drawn; a plot with more is not readable."""
MAX_POINTS_WITH_NOTABLE = 4
"""Points of a plot up to which steps that stood out are among its rows."""
MIN_DRAWN_DIFFERENCE = 1e-9
"""Differences below it are drawn at it: an axis of logarithms has no zero."""
X_AXIS_COLUMNS = ("point_index", "step", "tokens", "seconds")
"""First columns of the data of curves: the index of the point among the drawn ones, and the position on each x axis."""
COURSE_METRICS = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}


ZOOM_AND_CLICK_HINT = (
    "Scroll to zoom, drag to move, double-click to go back. A click on a value in the legend shows it alone."
)


def thinned_step_rows(point: ComparedPoint, num_points: int) -> list[dict[str, Any]]:
    """Choose which steps of a point's first repeat a plot draws, and return their rows of `metrics.jsonl`.

    Drawn are every n-th row and the last one: the more points share the plot (`num_points`), the fewer rows of each, so
    that the page stays small. A plot of at most `MAX_POINTS_WITH_NOTABLE` points also has the steps that stood out:
    those with an event or without an update.

    Each row also gets `seconds`, the time of all steps up to it.
    """
    rows = list(point.first_repeat.steps.values())
    max_rows = min(MAX_STEPS_OF_POINT, max(MIN_STEPS_OF_POINT, MAX_CURVE_ROWS // max(1, num_points)))
    stride = max(1, math.ceil(len(rows) / max_rows))
    steps_that_stood_out: set[int] = set()
    if num_points <= MAX_POINTS_WITH_NOTABLE:
        steps_that_stood_out = {step.step for step in notable_steps(point.first_repeat)[-MAX_NOTABLE_STEPS:]}
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in rows)
    drawn_rows = []
    for index, (row, seconds) in enumerate(zip(rows, elapsed_s, strict=True)):
        is_last = index == len(rows) - 1
        if index % stride == 0 or is_last or row["step"] in steps_that_stood_out:
            drawn_rows.append({**row, "seconds": seconds})
    return drawn_rows


def _curve_spec(
    comparison: Comparison,
    points: Sequence[ComparedPoint],
    data: Spec,
    y_encoding: Spec,
    *,
    y_format: str,
    height: int = PLOT_HEIGHT_PX,
) -> Spec:
    """Build the Vega-Lite chart that all plots over training share: a curve for each of `points`, and a menu for the x axis.

    `data`: rows with `point_index` (position in `points`), `step`, `tokens` and `seconds`; the reader chooses one of the last
        three as x axis.
    `y_encoding`: the field that is drawn, with its axis and scale.
    `y_format`: how the pointer shows a number of this field, such as `.2e`.
    `height`: in pixels.
    """
    axes = visible_axes(comparison)  # by which points are told apart
    y_tooltip = {"field": y_encoding["field"], "type": "quantitative", "format": y_format}
    return {
        **chart_frame(height),
        "title": x_axis_title(),
        "data": data,
        "params": [x_axis_menu()],
        # Adds to each row `point`, the name of its point, and `x`, the counter that the reader chose.
        "transform": [point_lookup_transform(axes, [point.name for point in points]), x_axis_transform()],
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2, "clip": True, "point": {"size": 26}},
                "params": [*legend_selections(len(axes)), zoom_selection()],
                "encoding": {
                    "x": x_axis_encoding(),
                    "y": y_encoding,
                    # One curve for each point, also where points share a colour.
                    "detail": {"field": "point", "type": "nominal"},
                    **point_encoding(axes, marks_are_lines=True),
                    "opacity": legend_opacity(len(axes)),
                    "tooltip": [*position_tooltip_fields(), y_tooltip],
                },
            }
        ],
    }


def difference_plot(comparison: Comparison) -> PagePlot | None:
    """The plot that shows whether points compute the same: how far each one's loss is from its baseline's, on a logarithmic axis.

    A point is one combination of settings. Its baseline is the point that its loss is compared with: an earlier one that
    trains the same job with another strategy, else the first. None if no losses are comparable.
    """
    points = [point for point in comparison.points if point.loss_difference is not None]
    rows = _difference_rows(comparison, points)
    if not rows:
        return None
    y_encoding = {
        "field": "difference",
        "type": "quantitative",
        "title": "relative difference of the loss",
        "scale": {"type": "log", "domainMin": MIN_DRAWN_DIFFERENCE},
        "axis": {"format": ".0e", "tickCount": 6},
    }
    data = csv_plot_data((*X_AXIS_COLUMNS, "difference"), rows)
    spec = _curve_spec(comparison, points, data, y_encoding, y_format=".2e")
    spec["layer"].append(_same_loss_limit_layer())
    baseline_names = list(dict.fromkeys(str(point.baseline_name) for point in points))
    compared_with = "the first point of the same job, or the first of all"
    if len(baseline_names) == 1:
        compared_with = baseline_names[0]
    return PagePlot(
        name="difference",
        title="Difference from the first point",
        caption=f"Of the loss, from that of {compared_with}. Over the first five steps, below the dotted line counts as the "
        f"same. What lies at {MIN_DRAWN_DIFFERENCE:g} is at most that far apart.",
        spec=spec,
    )


def _same_loss_limit_layer() -> Spec:
    """The Vega-Lite layer with a dotted line at the difference below which losses count as the same."""
    return {
        "data": {"values": [{"limit": SAME_LOSS_TOLERANCE}]},
        # Hidden from screen readers, which would read a line without a name; the caption says what it is.
        "mark": {"type": "rule", "strokeDash": [2, 4], "aria": False},
        "encoding": {"y": {"datum": SAME_LOSS_TOLERANCE}},
    }


def _difference_rows(comparison: Comparison, points: Sequence[ComparedPoint]) -> list[tuple[Any, ...]]:
    """Data rows of the difference plot: (point index, step, tokens, seconds, relative difference from the baseline's loss).

    Steps without a finite loss in both runs have no row. A difference below `MIN_DRAWN_DIFFERENCE` becomes that, since a
    logarithmic axis has no zero.
    """
    steps_by_name = {point.name: point.first_repeat.steps for point in comparison.points}
    rows = []
    for point_index, point in enumerate(points):
        baseline_steps = steps_by_name[str(point.baseline_name)]
        for step_metrics in thinned_step_rows(point, len(points)):
            loss = step_metrics["loss"]
            baseline_loss = baseline_steps.get(step_metrics["step"], {}).get("loss")
            if baseline_loss is not None and loss is not None:
                difference = abs(loss - baseline_loss) / (abs(baseline_loss) or 1.0)  # absolute if the baseline's is 0
                rows.append((*_x_axis_cells(point_index, step_metrics), max(difference, MIN_DRAWN_DIFFERENCE)))
    return rows


def _x_axis_cells(point_index: int, step_metrics: dict[str, Any]) -> tuple[Any, ...]:
    """The cells of `X_AXIS_COLUMNS` (point, step, tokens, seconds) for one of the `thinned_step_rows` of a point."""
    return (point_index, step_metrics["step"], step_metrics.get("tokens"), step_metrics["seconds"])


def loss_plot(comparison: Comparison) -> PagePlot | None:
    """The plot of the training losses over steps, tokens or seconds; None if no point has a finite loss.

    Steps that stood out are marked by dotted lines, if there are at most `MAX_NOTABLE_STEPS` of them.
    """
    points = comparison.begun_points  # those that took a step
    rows = []
    for point_index, point in enumerate(points):
        for step_metrics in thinned_step_rows(point, len(points)):
            if step_metrics["loss"] is not None:
                rows.append((*_x_axis_cells(point_index, step_metrics), step_metrics["loss"]))
    if not rows:
        return None
    data = csv_plot_data((*X_AXIS_COLUMNS, "loss"), rows)
    y_encoding = {"field": "loss", "type": "quantitative", "title": "training loss", "scale": {"zero": False}}
    spec = _curve_spec(comparison, points, data, y_encoding, y_format=".6f")
    caption = ZOOM_AND_CLICK_HINT
    if any(point.should_have_loss_of_baseline for point in points):  # only then is there the plot of differences above
        caption += " Equal curves lie on each other: the differences above tell them apart."
    notable_rows = _notable_step_rows(points)
    if 0 < len(notable_rows) <= MAX_NOTABLE_STEPS:
        spec["layer"].append(_notable_steps_layer(notable_rows))
        caption += " Dotted: steps that stood out; the pointer says what was done."
    return PagePlot(name="loss", title="Training loss", caption=caption, spec=spec)


def _notable_step_rows(points: Sequence[ComparedPoint]) -> list[dict[str, Any]]:
    """Data rows for marking the steps that stood out: point, step, tokens, seconds, and what stood out."""
    rows = []
    for point in points:
        notables = notable_steps(point.first_repeat)
        if not notables:
            continue
        # As if the point were alone in the plot, so that the rows of its steps that stood out are among them.
        drawn_row_by_step = {row["step"]: row for row in thinned_step_rows(point, num_points=1)}
        for notable in notables:
            drawn_row = drawn_row_by_step.get(notable.step, {})
            rows.append(
                {
                    "point": point.name,
                    "step": notable.step,
                    "tokens": drawn_row.get("tokens"),
                    "seconds": drawn_row.get("seconds"),
                    "what": notable.text,
                }
            )
    return rows


def _notable_steps_layer(rows: list[dict[str, Any]]) -> Spec:
    """The Vega-Lite layer that marks steps that stood out by dotted vertical lines; the pointer shows `what` stood out.

    `rows`: {"point": "ddp", "step": 40, "tokens": 20480, "seconds": 31.5, "what": "grad_norm 9.5 (...); ..."}.
    """
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
    """The plot of a held-out metric over training, which the reader chooses in a menu; None if nothing was evaluated."""
    points = comparison.begun_points  # those that took a step
    metrics = _held_out_menu_metrics(points)
    if not metrics:
        return None
    rows: list[tuple[Any, ...]] = []
    # All points and metrics share the page's number of rows.
    max_evaluations = max(2, MAX_CURVE_ROWS // max(1, len(points) * len(metrics)))
    for point_index, point in enumerate(points):
        rows += _held_out_rows(point_index, point, metrics, max_evaluations)
    data = csv_plot_data((*X_AXIS_COLUMNS, "metric", "value"), rows, text_columns=("metric",))
    y_encoding = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    spec = _curve_spec(comparison, points, data, y_encoding, y_format=".6g")
    # First, so that the other transforms compute for the chosen metric alone.
    spec["transform"].insert(0, {"filter": "datum.metric === metric"})
    spec["params"].append(_metric_menu(metrics))
    return PagePlot("held-out", "Held-out metrics", "Before the first step, and after each evaluation.", spec)


def _metric_menu(metrics: list[str]) -> Spec:
    """The menu below a plot in which the reader chooses what is drawn.

    It sets the Vega parameter `metric`, at first to `metrics[0]`.
    """
    return {"name": "metric", "value": metrics[0], "bind": {"input": "select", "options": metrics, "name": "metric "}}


def _held_out_menu_metrics(points: Sequence[ComparedPoint]) -> list[str]:
    """Choose the held-out metrics for the menu of the plot: first that of quality, then those that most points have.

    At most `MAX_HELD_OUT_METRICS`; empty if nothing was evaluated.
    """
    num_points_by_metric: dict[str, int] = {}
    for point in points:
        for metric in {**point.measured.metrics_before_training, **point.measured.metrics_at_end}:
            num_points_by_metric[metric] = num_points_by_metric.get(metric, 0) + 1
    decisive_metric = quality_metric_name(points)
    metrics = sorted(
        num_points_by_metric, key=lambda metric: (metric != decisive_metric, -num_points_by_metric[metric])
    )
    return metrics[:MAX_HELD_OUT_METRICS]


def _held_out_rows(
    point_index: int, point: ComparedPoint, metrics: Sequence[str], max_evaluations: int
) -> list[tuple[Any, ...]]:
    """Data rows of the held-out metrics of one point: (point index, step, tokens, seconds, metric, value).

    Such as (0, 40, 20480, 31.5, "eval/loss", 2.31). At most about `max_evaluations` evaluations are drawn: every n-th and
    the last. Step 0 is the evaluation before training.
    """
    steps = point.first_repeat.steps
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in steps.values())
    seconds_by_step = {0: 0.0, **dict(zip(steps, elapsed_s, strict=True))}
    rows = []
    for step, values in evenly_spread(list(point.first_repeat.evaluations.items()), max_evaluations):
        # Before the first step nothing was trained, and there is no row of a step.
        tokens = 0 if step == 0 else steps.get(step, {}).get("tokens")
        for metric in metrics:
            if metric in values:
                rows.append((point_index, step, tokens, seconds_by_step.get(step), metric, values[metric]))
    return rows


def course_plot(comparison: Comparison) -> PagePlot | None:
    """The plot of gradient norm, learning rate or speed over training, one of which the reader chooses.

    None if no step has any of them.
    """
    points = comparison.begun_points  # those that took a step
    rows = []
    known_metrics: set[str] = set()
    for point_index, point in enumerate(points):
        for step_metrics in thinned_step_rows(point, len(points)):
            values = {metric: _number_or_none(step_metrics.get(metric)) for metric in COURSE_METRICS}
            known_metrics |= {metric for metric, value in values.items() if value is not None}
            rows.append((*_x_axis_cells(point_index, step_metrics), *values.values()))
    if not known_metrics:
        return None
    data = csv_plot_data((*X_AXIS_COLUMNS, *COURSE_METRICS.values()), rows)
    y_encoding = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    spec = _curve_spec(comparison, points, data, y_encoding, y_format=".6g", height=240)
    # The titles are columns of the data. The menu's parameter `metric` is one of them: it becomes the field `value` of the curve.
    spec["transform"] += [{"calculate": "datum[metric]", "as": "value"}, {"filter": "isValid(datum.value)"}]
    titles = [title for metric, title in COURSE_METRICS.items() if metric in known_metrics]
    spec["params"].append(_metric_menu(titles))
    return PagePlot(
        name="course",
        title="Gradient norm, learning rate and speed",
        caption="Choose one in the menu below the plot.",
        spec=spec,
    )


def _number_or_none(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None
