"""Plots of a comparison over steps, tokens or seconds: differences from the first point, losses, held-out metrics, course."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from launch.compare.comparison import ComparedRun, Comparison
from launch.compare.curves import SAME_LOSS_TOLERANCE
from launch.compare.events import notable_steps
from launch.compare.quality import watched_metric_name
from launch.compare.vega_specs import (
    HEIGHT,
    LEGEND_CONFIG,
    SCHEMA,
    WIDTH,
    PagePlot,
    Spec,
    chosen_opacity,
    csv_data,
    legend_selection,
    name_lookup,
    over_axis,
    over_menu,
    over_title,
    over_transform,
    point_encoding,
    position_tooltip,
    zoom,
)

MAX_CURVE_ROWS = 2500
"""Rows of one plot, all points together: a page of 100 points must stay small."""
MAX_STEPS_OF_POINT = 400
"""Steps of one point that are drawn: evenly spread ones, and those that stand out."""
MIN_STEPS_OF_POINT = 20
MAX_HELD_OUT_METRICS = 12
"""Held-out metrics in the menu, the watched one first."""
MAX_NOTABLE = 40
"""Steps that stood out that are drawn; a plot with more is not readable."""
LEAST_DIFFERENCE = 1e-9
"""Differences below it are drawn at it: an axis of logarithms has no zero."""
COURSE_METRICS = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
CLICK = "Scroll to zoom, drag to move, double-click to go back. A click on a value in the legend shows it alone."


def drawn_steps(run: ComparedRun, count: int) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that a plot of curves draws of a run: every n-th, and the steps that stood out.

    Each has `seconds`, the time of all steps up to it. `count`: how many runs share the plot; the more, the fewer rows of each,
    so that the page stays small.
    """
    rows = list(run.first_repeat.steps.values())
    most = min(MAX_STEPS_OF_POINT, max(MIN_STEPS_OF_POINT, MAX_CURVE_ROWS // max(1, count)))
    stride = max(1, math.ceil(len(rows) / most))
    notable = {step.step for step in notable_steps(run.first_repeat)[-MAX_NOTABLE:]} if count <= 4 else set()
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in rows)
    drawn = []
    for number, (row, seconds) in enumerate(zip(rows, elapsed_s, strict=True)):
        if number % stride == 0 or number == len(rows) - 1 or row["step"] in notable:
            drawn.append({**row, "seconds": seconds})
    return drawn


def _curve_spec(
    comparison: Comparison, runs: Sequence[ComparedRun], data: Spec, y: Spec, tooltip: Spec, *, height: int = HEIGHT
) -> Spec:
    """A Vega-Lite chart with one curve for each of `runs`.

    `data`: rows with the run's number as `p`, and `step`, `tokens` and `seconds`, of which the reader chooses the horizontal
    axis. `y`: the encoding of the value. `tooltip`: what the pointer shows of it.
    """
    return {
        "$schema": SCHEMA,
        "config": LEGEND_CONFIG,
        "width": WIDTH,
        "height": height,
        "title": over_title(),
        "data": data,
        "params": [over_menu()],
        "transform": [name_lookup(comparison, runs), over_transform()],
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 2, "clip": True, "point": {"size": 26}},
                "params": [*legend_selection(comparison), zoom()],
                "encoding": {
                    "x": over_axis(),
                    "y": y,
                    "detail": {"field": "point", "type": "nominal"},
                    **point_encoding(comparison, dashed=True),
                    "opacity": chosen_opacity(comparison),
                    "tooltip": [*position_tooltip(), tooltip],
                },
            }
        ],
    }


def difference_plot(comparison: Comparison) -> PagePlot | None:
    """How far each point's loss is from that of the point it is compared with, on an axis of logarithms; None without any."""
    losses = {run.name: run.first_repeat.steps for run in comparison.runs}
    runs = [run for run in comparison.runs if run.loss_difference is not None]
    rows = []
    for number, run in enumerate(runs):
        baseline = losses[str(run.against)]
        for row in drawn_steps(run, len(runs)):
            reference = baseline.get(row["step"], {}).get("loss")
            if reference is not None and row["loss"] is not None:
                relative = abs(row["loss"] - reference) / (abs(reference) or 1.0)
                cells = (number, row["step"], row.get("tokens"), row["seconds"], max(relative, LEAST_DIFFERENCE))
                rows.append(cells)
    if not rows:
        return None
    data = csv_data(("p", "step", "tokens", "seconds", "difference"), rows)
    y = {
        "field": "difference",
        "type": "quantitative",
        "title": "relative difference of the loss",
        "scale": {"type": "log", "domainMin": LEAST_DIFFERENCE},
        "axis": {"format": ".0e", "tickCount": 6},
    }
    tooltip = {"field": "difference", "type": "quantitative", "format": ".2e"}
    spec = _curve_spec(comparison, runs, data, y, tooltip)
    spec["layer"].append(
        {
            "data": {"values": [{"limit": SAME_LOSS_TOLERANCE}]},
            # Hidden from screen readers, which would read a line without a name; the caption says what it is.
            "mark": {"type": "rule", "strokeDash": [2, 4], "aria": False},
            "encoding": {"y": {"datum": SAME_LOSS_TOLERANCE}},
        }
    )
    baselines = list(dict.fromkeys(str(run.against) for run in runs))
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
    runs = comparison.begun_runs
    rows = []
    for number, run in enumerate(runs):
        for row in drawn_steps(run, len(runs)):
            if row["loss"] is not None:
                rows.append((number, row["step"], row.get("tokens"), row["seconds"], row["loss"]))
    if not rows:
        return None
    data = csv_data(("p", "step", "tokens", "seconds", "loss"), rows)
    y = {"field": "loss", "type": "quantitative", "title": "training loss", "scale": {"zero": False}}
    spec = _curve_spec(comparison, runs, data, y, {"field": "loss", "type": "quantitative", "format": ".6f"})
    caption = CLICK
    if any(run.is_same_job for run in runs):
        caption += " Equal curves lie on each other: the differences above tell them apart."
    notable_rows = _notable_rows(runs)
    if 0 < len(notable_rows) <= MAX_NOTABLE:
        spec["layer"].append(_notable_layer(notable_rows))
        caption += " Dotted: steps that stood out; the pointer says what was done."
    return PagePlot("loss", "Training loss", caption, spec)


def _notable_rows(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """A row for each step that stood out: its position on the three horizontal axes, and what a guard or detector found there."""
    notable_rows = []
    for run in runs:
        notables = notable_steps(run.first_repeat)
        if not notables:
            continue
        row_by_step = {row["step"]: row for row in drawn_steps(run, 1)}
        for notable in notables:
            row = row_by_step.get(notable.step, {})
            position = {"step": notable.step, "tokens": row.get("tokens"), "seconds": row.get("seconds")}
            notable_rows.append({"point": run.name, **position, "what": notable.text})
    return notable_rows


def _notable_layer(rows: list[dict[str, Any]]) -> Spec:
    """Dotted vertical lines at the steps that stood out; `rows` come from `_notable_rows`."""
    return {
        "data": {"values": rows},
        "transform": [over_transform()],
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
    """One held-out metric over the run, which the reader chooses, the watched one first; None if nothing was evaluated."""
    runs = comparison.begun_runs
    names = _held_out_names(comparison)
    if not names:
        return None
    rows = []
    evaluations_of_point = max(2, MAX_CURVE_ROWS // max(1, len(runs) * len(names)))
    for number, run in enumerate(runs):
        rows += _held_out_rows(number, run, names, evaluations_of_point)
    data = csv_data(("p", "step", "tokens", "seconds", "metric", "value"), rows, text_columns=("metric",))
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    spec = _curve_spec(comparison, runs, data, y, {"field": "value", "type": "quantitative", "format": ".6g"})
    spec["transform"].insert(0, {"filter": "datum.metric === metric"})
    menu = {"name": "metric", "value": names[0], "bind": {"input": "select", "options": names, "name": "metric "}}
    spec["params"].append(menu)
    return PagePlot("held-out", "Held-out metrics", "Before the first step, and after each evaluation.", spec)


def _held_out_names(comparison: Comparison) -> list[str]:
    """The metrics of the menu, the watched one first, then those that most points have."""
    names: dict[str, int] = {}
    for run in comparison.begun_runs:
        for name in {**run.measured.before, **run.measured.after}:
            names[name] = names.get(name, 0) + 1
    watched = watched_metric_name(comparison.begun_runs)
    ordered = sorted(names, key=lambda name: (name != watched, -names[name]))
    return ordered[:MAX_HELD_OUT_METRICS]


def _held_out_rows(number: int, run: ComparedRun, names: Sequence[str], most: int) -> list[tuple[Any, ...]]:
    """Data rows (run number, step, tokens, seconds, metric, value) of the held-out metrics `names` of a run.

    At most about `most` evaluations are drawn, the first and the last among them.
    """
    steps = run.first_repeat.steps
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in steps.values())
    seconds_by_step = {0: 0.0, **dict(zip(steps, elapsed_s, strict=True))}
    evaluations = list(run.first_repeat.evaluations.items())
    stride = max(1, math.ceil(len(evaluations) / most))
    rows = []
    for index, (step, metrics) in enumerate(evaluations):
        if index % stride and index != len(evaluations) - 1:
            continue
        tokens = 0 if step == 0 else steps.get(step, {}).get("tokens")
        for name in names:
            if name in metrics:
                rows.append((number, step, tokens, seconds_by_step.get(step), name, metrics[name]))
    return rows


def course_plot(comparison: Comparison) -> PagePlot | None:
    """Gradient norm, learning rate or speed over the run, which the reader chooses; None if no row has any of them."""
    runs = comparison.begun_runs
    rows = []
    known: set[str] = set()
    for number, run in enumerate(runs):
        for row in drawn_steps(run, len(runs)):
            values = []
            for metric in COURSE_METRICS:
                value = row.get(metric)
                values.append(value if isinstance(value, int | float) else None)
                known |= {metric} if isinstance(value, int | float) else set()
            rows.append((number, row["step"], row.get("tokens"), row["seconds"], *values))
    if not known:
        return None
    titles = [title for metric, title in COURSE_METRICS.items() if metric in known]
    data = csv_data(("p", "step", "tokens", "seconds", *COURSE_METRICS.values()), rows)
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    spec = _curve_spec(
        comparison, runs, data, y, {"field": "value", "type": "quantitative", "format": ".6g"}, height=240
    )
    spec["transform"] += [{"calculate": "datum[metric]", "as": "value"}, {"filter": "isValid(datum.value)"}]
    menu = {"name": "metric", "value": titles[0], "bind": {"input": "select", "options": titles, "name": "metric "}}
    spec["params"].append(menu)
    return PagePlot("course", "Gradient norm, learning rate and speed", "Choose one in the menu below the plot.", spec)
