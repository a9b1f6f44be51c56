"""Plots of one run as Vega-Lite specifications, each with its data inside. The page fits them to its width and theme."""

from __future__ import annotations

import math
from typing import NamedTuple

from launch.compare.metric_meaning import monitored_metric
from launch.compare.profiles import ProfiledSteps
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.figure_pieces import (
    COLOR_BY_SERIES,
    HELD_OUT_LOSS,
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
    held_out_rows_of,
    round_to_six_digits,
    tooltip_fields,
    x_values_of_steps,
)
from launch.compare.run_page.loss_figure import loss_figure
from launch.compare.vega_specs import evenly_spread

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


class PageFigures(NamedTuple):
    """The plots of a run's page."""

    head_figures: list[Figure]
    """At the head of the page."""
    folded_figures: list[Figure]


def run_figures(run: RecordedRun, parts_s: dict[str, float], profile: ProfiledSteps | None) -> PageFigures:
    """Make the plots of a run's page, those at its head and those that are folded. Plots without numbers are left out.

    At the head are the training loss (for a run that learns from rewards, the reward), and the held-out metrics. These are
    folded if the run is judged by its held-out loss, because that is in the plot of the loss. All other plots are folded.

    `parts_s`: seconds of each part of a step, such as {"forward": 0.2}. `profile`: None if the run was not profiled.
    """
    # For each step what the x axis of a plot can show: step, tokens and seconds.
    x_values_by_step = x_values_of_steps(run)
    losses = loss_figure(run, x_values_by_step)
    reward_figure = _reward_figure(run, x_values_by_step)
    held_out_figure = _held_out_figure(run, x_values_by_step)
    head: list[Figure | None] = [losses]
    folded = [
        _training_course_figure(run, x_values_by_step),
        _step_time_figure(parts_s),
        _profile_memory_figure(profile),
    ]
    if reward_figure is not None:
        # The loss of such a run is near 0 by construction and tells nothing.
        head = [reward_figure]
        folded.insert(0, losses)
    if monitored_metric(run) == HELD_OUT_LOSS:
        folded.insert(0, held_out_figure)
    else:
        head.append(held_out_figure)
    drawn_head = [figure for figure in head if figure is not None]
    drawn_folded = [figure for figure in folded if figure is not None]
    return PageFigures(head_figures=drawn_head, folded_figures=drawn_folded)


def _held_out_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """The plot of a held-out metric other than the loss, which the reader chooses in a menu; None if there is none.

    `x_values_by_step`: for each step its {"step": 5, "tokens": 2560, "seconds": 4.1}, among which the reader chooses the x
    axis.
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
    mark = {"type": "line", "point": {"size": 45, "filled": True}}
    spec = _chosen_metric_spec(rows, metrics_with_rows, mark, height_px=PLOT_HEIGHT_PX // 2)
    title = "Other held-out metrics" if monitored_metric(run) == HELD_OUT_LOSS else "Held-out metrics"
    return Figure("held-out", title, "Before the first step, and after each evaluation.", spec)


def _reward_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """The plot of a metric of generated answers, in training and held out; None for a run without rewards.

    The reader chooses the metric in a menu, which shows the reward first. If a round takes several steps, each step has the
    numbers of its round. `x_values_by_step`: for each step its {"step": 5, "tokens": 2560, "seconds": 4.1}.
    """
    metrics = _answer_metrics(run)
    if REWARD_METRIC not in metrics:
        return None
    rows: list[Row] = []
    for metric in metrics:
        rows += evenly_spread(_training_metric_rows(run, x_values_by_step, metric), MAX_ANSWER_POINTS)
        held_out_rows = evenly_spread(held_out_rows_of(run, x_values_by_step, f"eval/{metric}"), MAX_ANSWER_POINTS)
        # Under the name that the menu has, and not `eval/...`.
        rows += [{**row, "metric": metric} for row in held_out_rows]
    mark = {"type": "line", "strokeWidth": 2, "point": {"size": 30, "filled": True}}
    spec = _chosen_metric_spec(rows, metrics, mark, height_px=PLOT_HEIGHT_PX)
    spec["encoding"]["color"] = COLOR_BY_SERIES
    caption = "Mean of the answers of a round; held out, of answers to prompts that are not trained on."
    return Figure("reward", "Reward of written answers", f"{caption} {ZOOM_HINT}", spec)


def _chosen_metric_spec(rows: list[Row], metrics: list[str], mark: Spec, *, height_px: int) -> Spec:
    """Build the Vega-Lite plot of one metric over training, which the reader chooses in a menu; the first is shown first.

    `rows`: {"metric": "eval/qa/f1", "value": 0.6, "step": 5, "tokens": 2560, "seconds": 4.1}. `mark`: how the curve looks.
    """
    menu = {
        "name": "shown_metric",
        "value": metrics[0],
        "bind": {"input": "select", "options": metrics, "name": "metric"},
    }
    return {
        "height": height_px,
        "data": {"values": rows},
        "params": [X_AXIS_MENU, menu, ZOOM_PARAMETER],
        # Only the rows of the chosen metric are drawn; the next transform adds `x`, as chosen in the other menu.
        "transform": [{"filter": "datum.metric == shown_metric"}, X_AXIS_TRANSFORM],
        "mark": mark,
        "encoding": {
            "x": X_AXIS,
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "tooltip": [{"field": "metric", "type": "nominal"}, *tooltip_fields("value", "value")],
        },
    }


def _training_metric_rows(run: RecordedRun, x_values_by_step: dict[int, Row], metric: str) -> list[Row]:
    """Data rows of a training metric, such as `reward`: one for each step with a finite value.

    Such as {"series": "training", "step": 5, "tokens": 2560, "seconds": 4.1, "value": 0.6, "metric": "reward"}.
    """
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
    """Choose the metrics of generated answers for the menu: the reward, its components, then others.

    The page holds the numbers of each step for each of them, so there are at most `MAX_ANSWER_METRICS`. Empty for a run
    that generates none.
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

    `x_values_by_step`: for each step its {"step": 5, "tokens": 2560, "seconds": 4.1}, among which the reader chooses the x
    axis.
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
    """Build the Vega-Lite plot of one metric over training, such as `grad_norm`, as one of several low strips.

    `title`: of its y axis; the x axis has none, as all strips share it. `rows`: {"grad_norm": 0.8, "step": 5, "tokens":
    2560, "seconds": 4.1}.
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
    """The plot of where the time of a step goes, as one stacked bar in ms; None if the parts were not timed.

    `parts_s`: seconds of each part, such as {"forward": 0.2, "backward": 0.4}.
    """
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
    """The plot of allocated memory over the profiled steps, a line for each rank; None if the run was not profiled.

    A row of `profile.memory` is {"rank": "0", "ms": 12.5, "GiB": 3.1}, one for each change.
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
