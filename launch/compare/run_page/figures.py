"""Plots of one run as Vega-Lite specifications, each with its data inside. The page fits them to its width and theme."""

from __future__ import annotations

import math
from typing import NamedTuple

from launch.compare.events import notable_steps
from launch.compare.profiles import ProfiledSteps
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.figure_pieces import (
    COLOR_BY_SERIES,
    HELD_OUT_LOSS,
    MAX_DRAWN_STEPS,
    PLOT_HEIGHT_PX,
    STRIP_HEIGHT_PX,
    TRAINING_SERIES,
    X_AXIS,
    X_AXIS_MENU,
    X_AXIS_TRANSFORM,
    ZOOM_HINT,
    ZOOM_PARAMETER,
    Figure,
    Row,
    Spec,
    drawn_steps,
    evenly_spread_rows,
    held_out_rows_of,
    round_to_six_digits,
    tooltip_fields,
    x_values_of,
    x_values_of_steps,
)
from launch.compare.run_page.held_out import BestStep, best_step, monitored_metric
from launch.compare.run_page.smoothing import smoothed, smoothing_weight


class Smoothing(NamedTuple):
    """How many steps the exponential mean of a curve is over."""

    share_of_steps: float
    min_steps: int


SMOOTHING_BY_MENU_ENTRY = {"none": Smoothing(0.0, 0), "some": Smoothing(0.03, 3), "much": Smoothing(0.12, 6)}
"""What the reader can choose."""
AXIS_TITLE_BY_COURSE_METRIC = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
"""Metrics of steps that are drawn beneath each other, and the titles of their axes."""
AXIS_BY_COURSE_METRIC: dict[str, Spec] = {
    "grad_norm": {"format": ".4~g"},
    "lr": {"format": "~e"},
    # An axis makes 1.5e+4 of 15,000 with "," as its format, since it keeps only digits that tell ticks apart.
    "tokens_per_s": {"labelExpr": "format(datum.value, ',')"},
}
"""The `axis` of each of these plots in Vega-Lite: how its labels are written."""
REWARD_METRIC = "reward"
"""Metric of the steps of a run that learns from rewards."""
ANSWER_METRIC_PREFIXES = (
    "rewards/",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
)
"""How the names of further metrics of generated answers begin."""
MAX_ANSWER_METRICS = 8
MAX_ANSWER_POINTS = 200
"""Points of each of these curves: the page has all of them, of which the reader sees one."""


SMOOTHING_MENU: Spec = {
    "name": "smoothing",
    "value": "some",
    "bind": {"input": "select", "options": [*SMOOTHING_BY_MENU_ENTRY], "name": "smoothing"},
}
"""Its Vega parameter `smoothing` is the name of a field of each row, so `datum[smoothing]` is the loss as the reader chose."""
SCALE_MENU: Spec = {
    "name": "scale",
    "value": "linear",
    "bind": {"input": "select", "options": ["linear", "log"], "name": "loss axis"},
}
"""The menu for a logarithmic axis, whose Vega parameter is called `scale`.

Vega cannot change the type of an axis, so `_loss_y_transforms` computes logarithms. The labels of `LOSS_AXIS` undo it.
"""


class PageFigures(NamedTuple):
    """The plots of a run's page."""

    head_figures: list[Figure]
    """At the head of the page."""
    folded_figures: list[Figure]


def run_figures(run: RecordedRun, parts_s: dict[str, float], profile: ProfiledSteps | None) -> PageFigures:
    """The plots of a run's page. Plots without numbers are left out.

    At the head are the training loss, or the reward of a run that learns from rewards, and the plot of the held-out metrics
    unless the monitored one is the held-out loss, which is in the plot of the loss. All others are folded. `parts_s`: seconds of
    each part of a step, by its name. `profile`: None if the run was not profiled.
    """
    x_values_by_step = x_values_of_steps(run)
    loss_figure = _loss_figure(run, x_values_by_step)
    reward_figure = _reward_figure(run, x_values_by_step)
    held_out_figure = _held_out_figure(run, x_values_by_step)
    head: list[Figure | None] = [loss_figure]
    folded = [
        _training_course_figure(run, x_values_by_step),
        _step_time_figure(parts_s),
        _profile_memory_figure(profile),
    ]
    if reward_figure is not None:
        # The loss of such a run is near 0 by construction and tells nothing.
        head = [reward_figure]
        folded.insert(0, loss_figure)
    if monitored_metric(run) == HELD_OUT_LOSS:
        folded.insert(0, held_out_figure)
    else:
        head.append(held_out_figure)
    drawn_head = [figure for figure in head if figure is not None]
    drawn_folded = [figure for figure in folded if figure is not None]
    return PageFigures(head_figures=drawn_head, folded_figures=drawn_folded)


def _loss_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """Training and held-out loss in one plot, with the best step marked; None if no drawn step has a training loss.

    `x_values_by_step`: step, tokens and seconds of each step, among which the reader chooses for the x axis.
    """
    training_rows = _training_loss_rows(run, x_values_by_step)
    if not training_rows:
        return None
    held_out_rows = held_out_rows_of(run, x_values_by_step, HELD_OUT_LOSS)
    layers = _training_loss_layers(training_rows, has_held_out=bool(held_out_rows))
    caption = "The pale line is each step's own loss."
    if held_out_rows:
        layers.append(_held_out_loss_layer(held_out_rows))
        caption += " Held-out loss is that of documents the model is not trained on."
    best = best_step(run)
    if best is not None and best.is_better_than_before_training and _has_held_out_loss(run, best.step):
        layers += _best_step_layers(run, best, x_values_by_step)
        caption += f" ★ marks step {best.step}, the best by {monitored_metric(run)}."
    notable_rows = _notable_step_rows(run, x_values_by_step)
    if notable_rows:
        layers.append(_notable_steps_layer(notable_rows))
        caption += " Dotted lines: steps that stood out; the pointer says why."
    spec = {"height": PLOT_HEIGHT_PX, "params": [X_AXIS_MENU, SMOOTHING_MENU, SCALE_MENU], "layer": layers}
    title = "Training and held-out loss" if held_out_rows else "Training loss"
    return Figure("loss", title, f"{caption} {ZOOM_HINT}", spec)


def _training_loss_rows(run: RecordedRun, x_values_by_step: dict[int, Row]) -> list[Row]:
    """A data row for each drawn step with a training loss: its x values, its loss, and its loss by each smoothing.

    Such as {"series": "training", "step": 5, "tokens": 2560, "seconds": 4.1, "loss": 2.3, "none": 2.3, "some": 2.4, "much": 2.5}.
    """
    loss_by_step = {}
    for step, row in run.steps.items():
        if isinstance(row.get("loss"), int | float):  # None if it was not finite
            loss_by_step[step] = float(row["loss"])
    losses_by_smoothing = {}
    for menu_entry, smoothing in SMOOTHING_BY_MENU_ENTRY.items():
        weight = smoothing_weight(smoothing.share_of_steps * len(loss_by_step), smoothing.min_steps)
        losses_by_smoothing[menu_entry] = smoothed(loss_by_step, weight)
    rows = []
    for step in drawn_steps(run):
        if step in loss_by_step:
            row = {"series": TRAINING_SERIES, **x_values_by_step[step], "loss": round_to_six_digits(loss_by_step[step])}
            for menu_entry, smoothed_loss_by_step in losses_by_smoothing.items():
                row[menu_entry] = round_to_six_digits(smoothed_loss_by_step[step])
            rows.append(row)
    return rows


def _loss_y_transforms(loss_expression: str) -> list[Spec]:
    """Vega-Lite transforms that compute `y`, a loss or its logarithm, as the reader chose in the menu of the axis.

    `loss_expression`: that of the loss, such as `datum.value`. `scale` is the parameter of `SCALE_MENU`. A row whose `y` is not
    valid is left out.
    """
    return [
        {"calculate": loss_expression, "as": "v"},
        {"calculate": "scale == 'log' ? (datum.v > 0 ? log(datum.v) / LN10 : null) : datum.v", "as": "y"},
        {"filter": "isValid(datum.y)"},
    ]


LOSS_AXIS: Spec = {
    "field": "y",
    "type": "quantitative",
    "title": "loss",
    "scale": {"zero": False},
    "axis": {"labelExpr": "scale == 'log' ? format(pow(10, datum.value), '.3~g') : format(datum.value, '.4~g')"},
}


def _training_loss_layers(rows: list[Row], *, has_held_out: bool) -> list[Spec]:
    """Vega-Lite layers of the training loss: a pale line of each step's loss, the smoothed line over it, points for the pointer.

    `rows`: those of `_training_loss_rows`. `has_held_out`: whether the held-out loss is drawn in another colour.
    """
    # A single curve needs no legend.
    color = COLOR_BY_SERIES if has_held_out else {**COLOR_BY_SERIES, "legend": None}
    line_encoding = {"x": X_AXIS, "y": LOSS_AXIS, "color": color}
    smoothed_transforms = [X_AXIS_TRANSFORM, *_loss_y_transforms("datum[smoothing]")]
    return [
        {
            "data": {"values": rows},
            "params": [ZOOM_PARAMETER],
            "transform": [X_AXIS_TRANSFORM, *_loss_y_transforms("datum.loss")],
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35},
            "encoding": line_encoding,
        },
        {
            "data": {"values": rows},
            "transform": smoothed_transforms,
            "mark": {"type": "line", "strokeWidth": 2.2},
            "encoding": line_encoding,
        },
        {
            # Not seen: a line alone has no points that the pointer could find.
            "data": {"values": rows},
            "transform": smoothed_transforms,
            "mark": {"type": "point", "opacity": 0, "size": 60},
            "encoding": {"x": X_AXIS, "y": LOSS_AXIS, "tooltip": tooltip_fields("loss", "training loss")},
        },
    ]


def _held_out_loss_layer(rows: list[Row]) -> Spec:
    """The Vega-Lite layer of the held-out loss: a line with points. A row has the loss as `value`, and its x values."""
    tooltip = tooltip_fields("value", "held-out loss")
    return {
        "data": {"values": rows},
        "transform": [X_AXIS_TRANSFORM, *_loss_y_transforms("datum.value")],
        "mark": {"type": "line", "strokeWidth": 2.2, "point": {"size": 55, "filled": True}},
        "encoding": {"x": X_AXIS, "y": LOSS_AXIS, "color": COLOR_BY_SERIES, "tooltip": tooltip},
    }


def _has_held_out_loss(run: RecordedRun, step: int) -> bool:
    """Whether the evaluation of a step has a finite held-out loss."""
    loss = run.evaluations[step].get(HELD_OUT_LOSS)
    return loss is not None and math.isfinite(loss)


def _best_step_layers(run: RecordedRun, best: BestStep, x_values_by_step: dict[int, Row]) -> list[Spec]:
    """Vega-Lite layers that mark the best step: a ring at the height of its held-out loss, and a label beside it.

    `x_values_by_step`: step, tokens and seconds of each step. The evaluation of the best step must have a held-out loss.
    """
    loss = run.evaluations[best.step][HELD_OUT_LOSS]
    shared: Spec = {
        "data": {"values": [{**x_values_of(x_values_by_step, best.step), "value": round_to_six_digits(loss)}]},
        "transform": [X_AXIS_TRANSFORM, *_loss_y_transforms("datum.value")],
        "encoding": {"x": X_AXIS, "y": LOSS_AXIS},
    }
    ring = {"type": "point", "size": 190, "strokeWidth": 2, "filled": False, "style": "best"}
    # The label takes about a fifth of the width.
    is_near_right_edge = best.step > 0.8 * max(run.steps, default=best.step)
    label = {
        "type": "text",
        "text": f"★ best: step {best.step}",
        "dy": -14,
        "fontSize": 13,
        "fontWeight": 600,
        "style": "ink",
        # The text ends at the step where it would not fit to the right of it.
        "align": "right" if is_near_right_edge else "left",
        "strokeWidth": 0,
    }
    return [{**shared, "mark": ring}, {**shared, "mark": label}]


def _notable_step_rows(run: RecordedRun, x_values_by_step: dict[int, Row]) -> list[Row]:
    """A data row for each of the latest steps at which a guard or detector found something: its x values, and what it found."""
    rows = []
    for notable in notable_steps(run)[-MAX_DRAWN_STEPS:]:
        rows.append({**x_values_of(x_values_by_step, notable.step), "what": notable.text[:200]})
    return rows


def _notable_steps_layer(rows: list[Row]) -> Spec:
    """The Vega-Lite layer of dotted vertical lines at the steps of `_notable_step_rows` (`rows`)."""
    tooltip = [{"field": "step", "type": "quantitative"}, {"field": "what", "type": "nominal"}]
    return {
        "data": {"values": rows},
        "transform": [X_AXIS_TRANSFORM],
        "mark": {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5, "style": "bad"},
        "encoding": {"x": X_AXIS, "tooltip": tooltip},
    }


def _held_out_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """The plot of the held-out metrics other than the loss, of which the reader chooses one in a menu; None if there is none.

    `x_values_by_step`: step, tokens and seconds of each step, among which the reader chooses for the x axis.
    """
    metrics: dict[str, None] = {monitored_metric(run): None}  # first, so that the menu shows it first
    for values in run.evaluations.values():
        metrics |= dict.fromkeys(values)
    metrics.pop(HELD_OUT_LOSS, None)
    rows: list[Row] = []
    for metric in metrics:
        rows += held_out_rows_of(run, x_values_by_step, metric)
    if not rows:
        return None
    metrics_with_rows = list(dict.fromkeys(row["metric"] for row in rows))
    bind = {"input": "select", "options": metrics_with_rows, "name": "metric"}
    menu = {"name": "metric", "value": metrics_with_rows[0], "bind": bind}
    spec = {
        "height": PLOT_HEIGHT_PX // 2,
        "data": {"values": rows},
        "params": [X_AXIS_MENU, menu, ZOOM_PARAMETER],
        "transform": [{"filter": "datum.metric == metric"}, X_AXIS_TRANSFORM],
        "mark": {"type": "line", "point": {"size": 45, "filled": True}},
        "encoding": {
            "x": X_AXIS,
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "tooltip": [{"field": "metric", "type": "nominal"}, *tooltip_fields("value", "value")],
        },
    }
    title = "Other held-out metrics" if monitored_metric(run) == HELD_OUT_LOSS else "Held-out metrics"
    return Figure("held-out", title, "Before the first step, and after each evaluation.", spec)


def _reward_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """The plot of the metrics of generated answers, in training and held out; None for a run without rewards.

    The reader chooses one metric in a menu, which shows the reward first. If a round takes several steps, each step has the
    numbers of its round. `x_values_by_step`: step, tokens and seconds of each step.
    """
    metrics = _answer_metrics(run)
    if REWARD_METRIC not in metrics:
        return None
    rows: list[Row] = []
    for metric in metrics:
        rows += evenly_spread_rows(_training_metric_rows(run, x_values_by_step, metric), MAX_ANSWER_POINTS)
        held_out_rows = evenly_spread_rows(held_out_rows_of(run, x_values_by_step, f"eval/{metric}"), MAX_ANSWER_POINTS)
        # Under the name that the menu has, and not `eval/...`.
        rows += [{**row, "metric": metric} for row in held_out_rows]
    bind = {"input": "select", "options": metrics, "name": "metric"}
    menu = {"name": "shown_metric", "value": metrics[0], "bind": bind}
    spec = {
        "height": PLOT_HEIGHT_PX,
        "data": {"values": rows},
        "params": [X_AXIS_MENU, menu, ZOOM_PARAMETER],
        "transform": [{"filter": "datum.metric == shown_metric"}, X_AXIS_TRANSFORM],
        "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 30, "filled": True}},
        "encoding": {
            "x": X_AXIS,
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": COLOR_BY_SERIES,
            "tooltip": [{"field": "metric", "type": "nominal"}, *tooltip_fields("value", "value")],
        },
    }
    caption = "Mean of the answers of a round; held out, of answers to prompts that are not trained on."
    return Figure("reward", "Reward of written answers", f"{caption} {ZOOM_HINT}", spec)


def _training_metric_rows(run: RecordedRun, x_values_by_step: dict[int, Row], metric: str) -> list[Row]:
    """A data row for each training step with a finite value of a metric."""
    rows = []
    for step, step_row in run.steps.items():
        value = step_row.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            rows.append(
                {
                    "series": TRAINING_SERIES,
                    **x_values_by_step[step],
                    "value": round_to_six_digits(value),
                    "metric": metric,
                }
            )
    return rows


def _answer_metrics(run: RecordedRun) -> list[str]:
    """The metrics of generated answers that any step has: the reward, its components, then others; `MAX_ANSWER_METRICS` at most.

    The page has the numbers of each step for each of them, so there must not be many.
    """
    metrics: dict[str, None] = {}  # a dict as an ordered set
    for row in run.steps.values():
        metrics |= dict.fromkeys(
            name for name in row if name == REWARD_METRIC or name.startswith(ANSWER_METRIC_PREFIXES)
        )
    ordered = sorted(metrics, key=lambda name: (name != REWARD_METRIC, not name.startswith("rewards/"), name))
    return ordered[:MAX_ANSWER_METRICS]


def _training_course_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """The plots of gradient norm, learning rate and speed beneath each other; None if no step has any of them.

    `x_values_by_step`: step, tokens and seconds of each step, among which the reader chooses for the x axis.
    """
    strips: list[Spec] = []
    steps = drawn_steps(run)
    for metric, title in AXIS_TITLE_BY_COURSE_METRIC.items():
        rows = []
        for step in steps:
            value = run.steps[step].get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                rows.append({**x_values_by_step[step], metric: round_to_six_digits(value)})
        if rows:
            strips.append(_training_course_strip(metric, title, rows))
    if not strips:
        return None
    strips[-1]["encoding"]["x"] = X_AXIS  # only the lowest one names the axis that all share
    spec = {"params": [X_AXIS_MENU], "vconcat": strips, "spacing": 8}
    return Figure("course", "Gradients, learning rate, speed", ZOOM_HINT, spec)


def _training_course_strip(metric: str, title: str, rows: list[Row]) -> Spec:
    """The Vega-Lite plot of one metric, such as `grad_norm`, as a strip without a title of its x axis. `title`: of its y axis.

    `rows`: the metric and the x values of each step: {"grad_norm": 0.8, "step": 5, "tokens": 2560, "seconds": 4.1}.
    """
    return {
        "height": STRIP_HEIGHT_PX,
        "data": {"values": rows},
        "params": [ZOOM_PARAMETER | {"name": "along"}],
        "transform": [X_AXIS_TRANSFORM],
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {
            "x": {**X_AXIS, "axis": {**X_AXIS["axis"], "title": None}},
            "y": {
                "field": metric,
                "type": "quantitative",
                "title": title,
                "axis": AXIS_BY_COURSE_METRIC[metric],
                "scale": {"zero": False},
            },
            "tooltip": tooltip_fields(metric, title),
        },
    }


def _step_time_figure(parts_s: dict[str, float]) -> Figure | None:
    """One bar of the parts of a step, in milliseconds; None if they were not timed. `parts_s`: seconds by name of a part."""
    if not parts_s:
        return None
    rows = []
    for index, (part, seconds) in enumerate(parts_s.items()):
        rows.append({"part": part, "ms": round_to_six_digits(1000 * seconds), "order": index})
    spec = {
        "height": 46,  # pixels: a single bar
        "data": {"values": rows},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "ms", "type": "quantitative", "title": "milliseconds of a step"},
            "color": {"field": "part", "type": "nominal", "sort": list(parts_s), "title": None},
            "order": {"field": "order"},
            "tooltip": [{"field": "part", "type": "nominal"}, {"field": "ms", "type": "quantitative", "format": ".2f"}],
        },
    }
    return Figure("parts", "Parts of a step", "Medians. Communication is part of where it is waited for.", spec)


def _profile_memory_figure(profile: ProfiledSteps | None) -> Figure | None:
    """The plot of allocated memory over the traced steps, a line for each rank; None if the run was not profiled.

    A row of `profile.memory` is {"rank": "0", "ms": 12.5, "GiB": 3.1}.
    """
    if profile is None or not profile.memory:
        return None
    spec = {
        "height": PLOT_HEIGHT_PX // 2,
        "data": {"values": profile.memory},
        "mark": {"type": "line", "interpolate": "step-after"},
        "encoding": {
            "x": {"field": "ms", "type": "quantitative", "title": "milliseconds"},
            "y": {"field": "GiB", "type": "quantitative", "title": "GiB"},
            "color": {"field": "rank", "type": "nominal", "title": "rank"},
        },
    }
    first_step, last_step = profile.steps
    caption = f"Steps {first_step} to {last_step}; on a CPU what was allocated since the trace began."
    return Figure("profile-memory", "Memory in the profiled steps", caption, spec)
