"""The plot of a run's training and held-out loss: smoothed as the reader chooses, with the best step and outliers marked."""

from __future__ import annotations

import math
from typing import NamedTuple

from launch.compare.events import notable_steps
from launch.compare.metric_meaning import monitored_metric
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.figure_pieces import (
    COLOR_BY_SERIES,
    HELD_OUT_LOSS,
    MAX_DRAWN_STEPS,
    PLOT_HEIGHT_PX,
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
    x_values_of,
)
from launch.compare.run_page.held_out import BestStep, best_step
from launch.compare.run_page.smoothing import smoothed, smoothing_weight


class Smoothing(NamedTuple):
    """How many steps the exponential mean of a curve is over."""

    share_of_steps: float
    min_steps: int


SMOOTHING_BY_MENU_ENTRY = {"none": Smoothing(0.0, 0), "some": Smoothing(0.03, 3), "much": Smoothing(0.12, 6)}
"""What the reader can choose."""


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


def loss_figure(run: RecordedRun, x_values_by_step: dict[int, Row]) -> Figure | None:
    """The plot of training and held-out loss, with the best step and steps that stood out marked; None without a training loss.

    `x_values_by_step`: for each step its {"step": 5, "tokens": 2560, "seconds": 4.1}, among which the reader chooses the x
    axis.
    """
    training_rows = _training_loss_rows(run, x_values_by_step)
    if not training_rows:
        return None
    held_out_rows = held_out_rows_of(run, x_values_by_step, HELD_OUT_LOSS)
    parts = [_FigurePart(_training_loss_layers(training_rows, has_held_out=bool(held_out_rows)), "")]
    if held_out_rows:
        caption = " Held-out loss is that of documents the model is not trained on."
        parts.append(_FigurePart([_held_out_loss_layer(held_out_rows)], caption))
    parts += [_best_step_part(run, x_values_by_step), _notable_steps_part(run, x_values_by_step)]
    layers: list[Spec] = []
    for part in parts:
        layers += part.layers
    spec = {"height": PLOT_HEIGHT_PX, "params": [X_AXIS_MENU, SMOOTHING_MENU, SCALE_MENU], "layer": layers}
    title = "Training and held-out loss" if held_out_rows else "Training loss"
    captions = "".join(part.caption for part in parts)
    return Figure("loss", title, f"The pale line is each step's own loss.{captions} {ZOOM_HINT}", spec)


class _FigurePart(NamedTuple):
    """Vega-Lite layers of a plot, and the sentence of the caption that explains them; both are empty for nothing to draw."""

    layers: list[Spec]
    caption: str


def _best_step_part(run: RecordedRun, x_values_by_step: dict[int, Row]) -> _FigurePart:
    """The part of the plot that marks the best step, by the metric that decides the best checkpoint.

    Empty if no step is better than the model before training, or the best one has no held-out loss.
    """
    best = best_step(run)
    if best is None or not best.is_better_than_before_training or not _has_held_out_loss(run, best.step):
        return _FigurePart([], "")
    caption = f" ★ marks step {best.step}, the best by {monitored_metric(run)}."
    return _FigurePart(_best_step_layers(run, best, x_values_by_step), caption)


def _notable_steps_part(run: RecordedRun, x_values_by_step: dict[int, Row]) -> _FigurePart:
    """The part of the plot that marks the latest steps that stood out; empty if there are none.

    `x_values_by_step`: for each step its {"step": 5, "tokens": 2560, "seconds": 4.1}.
    """
    rows = []
    for notable in notable_steps(run)[-MAX_DRAWN_STEPS:]:
        rows.append({**x_values_of(x_values_by_step, notable.step), "what": notable.text[:200]})
    if not rows:
        return _FigurePart([], "")
    caption = " Dotted lines: steps that stood out; the pointer says why."
    return _FigurePart([_notable_steps_layer(rows)], caption)


def _training_loss_rows(run: RecordedRun, x_values_by_step: dict[int, Row]) -> list[Row]:
    """Data rows of the training loss: one for each drawn step, with its x values, its loss, and its loss by each smoothing.

    Such as {"series": "training", "step": 5, "tokens": 2560, "seconds": 4.1, "loss": 2.3, "none": 2.3, "some": 2.4, "much":
    2.5}.
    """
    loss_by_step = {}
    for step, row in run.steps.items():
        if isinstance(row.get("loss"), int | float):  # None if it was not finite
            loss_by_step[step] = float(row["loss"])
    losses_by_smoothing = {}
    for menu_entry, smoothing in SMOOTHING_BY_MENU_ENTRY.items():
        # The longer the run, the more steps a mean is over, so that curves look alike.
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
    """Vega-Lite transforms that add `y` to each row: a loss, or its logarithm if the reader chose that in the menu of the axis.

    `loss_expression`: reads the loss, such as `datum.value`. `scale` is the parameter of `SCALE_MENU`. A row whose `y` is
    not valid, such as the logarithm of 0, is left out.
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

    `rows`: {"step": 5, ..., "loss": 2.3, "none": 2.3, "some": 2.4, "much": 2.5}, by the names in the menu of smoothings.
    `has_held_out`: whether the held-out loss is drawn in another colour.
    """
    # A single curve needs no legend.
    color = COLOR_BY_SERIES if has_held_out else {**COLOR_BY_SERIES, "legend": None}
    line_encoding = {"x": X_AXIS, "y": LOSS_AXIS, "color": color}
    # `smoothing` is the parameter of the menu, the name of the field with the loss as the reader chose.
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
    """The Vega-Lite layer of the held-out loss, a line with points.

    `rows`: {"step": 40, ..., "value": 2.31} for each evaluation.
    """
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

    `x_values_by_step`: for each step its {"step": 5, "tokens": 2560, "seconds": 4.1}. The evaluation of the best step must
    have a held-out loss.
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


def _notable_steps_layer(rows: list[Row]) -> Spec:
    """The Vega-Lite layer that marks steps that stood out by dotted vertical lines; the pointer shows `what` stood out."""
    tooltip = [{"field": "step", "type": "quantitative"}, {"field": "what", "type": "nominal"}]
    return {
        "data": {"values": rows},
        "transform": [X_AXIS_TRANSFORM],
        "mark": {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5, "style": "bad"},
        "encoding": {"x": X_AXIS, "tooltip": tooltip},
    }
