"""Plots of one run as Vega-Lite specifications, each with its data inside. The page fits them to its width and theme."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from launch.compare.events import notable_steps
from launch.compare.profiles import ProfiledSteps
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.held_out import BestStep, best_step, monitored_metric
from launch.compare.run_page.smoothing import smoothed, smoothing_weight

Spec = dict[str, Any]
"""A specification in Vega-Lite, or a part of one."""
Row = dict[str, Any]
"""One row of a plot's data."""
MAX_POINTS = 400
"""Steps of a curve that are drawn; of a longer run evenly spread ones, and those that stood out."""
SMOOTHINGS = {"none": (0.0, 0), "some": (0.03, 3), "much": (0.12, 6)}
"""What the reader can choose: the share of the run's steps that the exponential mean is over, and the steps at least."""
HEIGHT = 300
STRIP_HEIGHT = 110
"""Pixels of a plot, and of each of several beneath each other."""
COURSE = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
"""Metrics of steps that are drawn beneath each other, and the titles of their axes."""
COURSE_LABELS: dict[str, Spec] = {
    "grad_norm": {"format": ".4~g"},
    "lr": {"format": "~e"},
    # An axis makes 1.5e+4 of 15,000 with "," as its format, since it keeps only digits that tell ticks apart.
    "tokens_per_s": {"labelExpr": "format(datum.value, ',')"},
}
"""How the labels of those axes are written."""
REWARD = "reward"
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
TRAINING = "training"
HELD_OUT = "held-out"
HELD_OUT_LOSS = "eval/loss"


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot of the page."""

    name: str
    """Id of its element."""
    title: str
    caption: str
    spec: Spec


X_MENU: Spec = {
    "name": "over",
    "value": "step",
    "bind": {"input": "select", "options": ["step", "tokens", "seconds"], "name": "over"},
}
"""The menu that chooses what the x axis shows."""
SMOOTHING_MENU: Spec = {
    "name": "smoothing",
    "value": "some",
    "bind": {"input": "select", "options": [*SMOOTHINGS], "name": "smoothing"},
}
SCALE_MENU: Spec = {
    "name": "scale",
    "value": "linear",
    "bind": {"input": "select", "options": ["linear", "log"], "name": "loss axis"},
}
"""Vega cannot change the type of an axis, so `_loss_y` computes logarithms, and the labels of `LOSS_AXIS` turn them back."""
X_TITLE: Spec = {"expr": "{step: 'step', tokens: 'tokens', seconds: 'seconds of training'}[over]"}
ZOOM: Spec = {
    "name": "zoom",
    "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.ctrlKey]"},
    "bind": "scales",
}
"""Dragging moves the plot. The wheel alone scrolls the page, which most readers want."""
ZOOM_HINT = "Drag to move, Ctrl and the wheel to zoom, double-click to go back."
CHOSEN_X: Spec = {"calculate": "datum[over]", "as": "x"}


def figures(
    run: RecordedRun, parts_s: dict[str, float], profile: ProfiledSteps | None
) -> tuple[list[Figure], list[Figure]]:
    """(plots at the head of the page, plots that are folded); plots without numbers are left out.

    `parts_s`: seconds of each part of a step, by its name. `profile`: None if the run was not profiled.
    """
    positions = step_positions(run)
    loss = _loss_figure(run, positions)
    main = [loss]
    folded = [_course_figure(run, positions), _parts_figure(parts_s), _profile_figure(profile)]
    metrics = _metrics_figure(run, positions)
    rewards = _reward_figure(run, positions)
    if rewards is not None:
        # The loss of such a run is near 0 by construction and tells nothing.
        main = [rewards]
        folded.insert(0, loss)
    # The plot that has the monitored metric is at the head of the page.
    if monitored_metric(run) == HELD_OUT_LOSS:
        folded.insert(0, metrics)
    else:
        main.append(metrics)
    return _known(main), _known(folded)


def _known(candidates: list[Figure | None]) -> list[Figure]:
    return [figure for figure in candidates if figure is not None]


def step_positions(run: RecordedRun) -> dict[int, Row]:
    """Step, tokens and seconds of training at each step of a run; the evaluation before the first step is at 0."""
    positions: dict[int, Row] = {0: {"step": 0, "tokens": 0, "seconds": 0.0}}
    elapsed = accumulate(row.get("step_s") or 0.0 for row in run.steps.values())
    for (step, row), seconds in zip(run.steps.items(), elapsed, strict=True):
        positions[step] = {"step": step, "tokens": row.get("tokens"), "seconds": round(seconds, 3)}
    return positions


def drawn_steps(run: RecordedRun) -> list[int]:
    """The steps that are drawn: all of a short run; of a long one evenly spread ones, the last, and those that stood out."""
    steps = list(run.steps)
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    # A run may have thousands of outliers; a page has room for the latest.
    notable = {step.step for step in notable_steps(run)[-MAX_POINTS:]}
    last = len(steps) - 1
    return [step for index, step in enumerate(steps) if index % stride == 0 or index == last or step in notable]


def _rounded(value: float) -> float:
    """A number with the six digits that a plot can show: the page is half as large."""
    return float(f"{value:.6g}")


def _loss_figure(run: RecordedRun, positions: dict[int, Row]) -> Figure | None:
    """Training and held-out loss in one plot, with the best step marked; None if no step has a finite loss."""
    losses = {}
    for step, row in run.steps.items():
        if isinstance(row.get("loss"), int | float):
            losses[step] = float(row["loss"])
    if not losses:
        return None
    curves = {}
    for name, (share, min_steps) in SMOOTHINGS.items():
        curves[name] = smoothed(losses, smoothing_weight(share * len(losses), min_steps))
    rows = []
    for step in drawn_steps(run):
        if step in losses:
            values = {name: _rounded(curve[step]) for name, curve in curves.items()}
            rows.append({"series": TRAINING, **positions[step], "loss": _rounded(losses[step]), **values})
    held_out_rows = _held_out_rows(run, positions, HELD_OUT_LOSS)
    caption = "The pale line is each step's own loss."
    if held_out_rows:
        caption += " Held-out loss is that of documents the model is not trained on."
    layers = _training_layers(rows, has_held_out=bool(held_out_rows)) + _held_out_layers(held_out_rows)
    best = best_step(run)
    if best is not None and best.beats_beginning and _has_held_out_loss(run, best.step):
        layers += _best_layers(run, best, positions)
        caption += f" ★ marks step {best.step}, the best by {monitored_metric(run)}."
    notable_rows = _notable_rows(run, positions)
    if notable_rows:
        layers.append(_notable_layer(notable_rows))
        caption += " Dotted lines: steps that stood out; the pointer says why."
    spec = {"height": HEIGHT, "params": [X_MENU, SMOOTHING_MENU, SCALE_MENU], "layer": layers}
    title = "Training and held-out loss" if held_out_rows else "Training loss"
    return Figure("loss", title, f"{caption} {ZOOM_HINT}", spec)


def _loss_y(field: str) -> list[Spec]:
    """Transforms that compute `y`, the loss or its logarithm, of a field that may itself be an expression."""
    return [
        {"calculate": field, "as": "v"},
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
X_AXIS: Spec = {
    "field": "x",
    "type": "quantitative",
    "axis": {"title": X_TITLE, "tickMinStep": {"expr": "over == 'seconds' ? 0.001 : 1"}},
    "scale": {"zero": False, "nice": False},
}
SERIES: Spec = {
    "field": "series",
    "type": "nominal",
    "title": None,
    "scale": {"domain": [TRAINING, HELD_OUT]},
    "legend": {"symbolOpacity": 1, "symbolType": "stroke", "symbolSize": 300},
}
"""Colour of the two curves. Held-out losses have points as well, for those who see no difference of colours."""


def _tooltip(value: str, title: str) -> list[Spec]:
    return [
        {"field": "step", "type": "quantitative"},
        {"field": "tokens", "type": "quantitative", "format": ","},
        {"field": "seconds", "type": "quantitative", "format": ".1f"},
        {"field": value, "type": "quantitative", "title": title, "format": ".5~g"},
    ]


def _training_layers(rows: list[Row], *, has_held_out: bool) -> list[Spec]:
    """Each step's loss, pale, and the smoothed line over it."""
    # A single curve needs no legend.
    series = SERIES if has_held_out else {**SERIES, "legend": None}
    encoding = {"x": X_AXIS, "y": LOSS_AXIS, "color": series}
    return [
        {
            "data": {"values": rows},
            "params": [ZOOM],
            "transform": [CHOSEN_X, *_loss_y("datum.loss")],
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35},
            "encoding": encoding,
        },
        {
            "data": {"values": rows},
            "transform": [CHOSEN_X, *_loss_y("datum[smoothing]")],
            "mark": {"type": "line", "strokeWidth": 2.2},
            "encoding": encoding,
        },
        {
            "data": {"values": rows},
            "transform": [CHOSEN_X, *_loss_y("datum[smoothing]")],
            "mark": {"type": "point", "opacity": 0, "size": 60},
            "encoding": {"x": X_AXIS, "y": LOSS_AXIS, "tooltip": _tooltip("loss", "training loss")},
        },
    ]


def _held_out_layers(rows: list[Row]) -> list[Spec]:
    if not rows:
        return []
    return [
        {
            "data": {"values": rows},
            "transform": [CHOSEN_X, *_loss_y("datum.value")],
            "mark": {"type": "line", "strokeWidth": 2.2, "point": {"size": 55, "filled": True}},
            "encoding": {"x": X_AXIS, "y": LOSS_AXIS, "color": SERIES, "tooltip": _tooltip("value", "held-out loss")},
        }
    ]


def _held_out_rows(run: RecordedRun, positions: dict[int, Row], metric: str) -> list[Row]:
    """A row for each evaluation with a finite value of a metric."""
    rows = []
    for step, metrics in run.evaluations.items():
        value = metrics.get(metric)
        if value is not None and math.isfinite(value):
            position = positions.get(step, {"step": step, "tokens": None, "seconds": None})
            rows.append({"series": HELD_OUT, **position, "value": _rounded(value), "metric": metric})
    return _thinned(rows)


def _thinned(rows: list[Row], max_rows: int = MAX_POINTS) -> list[Row]:
    """About `max_rows` of the rows, evenly spread, and always the last one."""
    stride = max(1, math.ceil(len(rows) / max_rows))
    last = len(rows) - 1
    return [row for index, row in enumerate(rows) if index % stride == 0 or index == last]


def _has_held_out_loss(run: RecordedRun, step: int) -> bool:
    """Whether the evaluation of a step has a finite held-out loss."""
    loss = run.evaluations[step].get(HELD_OUT_LOSS)
    return loss is not None and math.isfinite(loss)


def _best_layers(run: RecordedRun, best: BestStep, positions: dict[int, Row]) -> list[Spec]:
    """A ring at the best step, at the height of its held-out loss, with a label beside it."""
    loss = run.evaluations[best.step][HELD_OUT_LOSS]
    position = positions.get(best.step, {"step": best.step, "tokens": None, "seconds": None})
    is_near_the_end = best.step > 0.8 * max(run.steps, default=best.step)  # its label would not fit on the right
    base: Spec = {
        "data": {"values": [{**position, "value": _rounded(loss)}]},
        "transform": [CHOSEN_X, *_loss_y("datum.value")],
    }
    encoding: Spec = {"x": X_AXIS, "y": LOSS_AXIS}
    label = {
        "type": "text",
        "text": f"★ best: step {best.step}",
        "dy": -14,
        "fontSize": 13,
        "fontWeight": 600,
        "style": "ink",
    }
    label |= {"align": "right" if is_near_the_end else "left", "strokeWidth": 0}
    ring = {"type": "point", "size": 190, "strokeWidth": 2, "filled": False, "style": "best"}
    return [{**base, "mark": ring, "encoding": encoding}, {**base, "mark": label, "encoding": encoding}]


def _notable_rows(run: RecordedRun, positions: dict[int, Row]) -> list[Row]:
    rows = []
    for notable in notable_steps(run)[-MAX_POINTS:]:
        position = positions.get(notable.step, {"step": notable.step, "tokens": None, "seconds": None})
        rows.append({**position, "what": notable.text[:200]})
    return rows


def _notable_layer(rows: list[Row]) -> Spec:
    tooltip = [{"field": "step", "type": "quantitative"}, {"field": "what", "type": "nominal"}]
    return {
        "data": {"values": rows},
        "transform": [CHOSEN_X],
        "mark": {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5, "style": "bad"},
        "encoding": {"x": X_AXIS, "tooltip": tooltip},
    }


def _metrics_figure(run: RecordedRun, positions: dict[int, Row]) -> Figure | None:
    """A held-out metric, chosen by the reader in a menu; None if there is none beside the loss."""
    names: dict[str, None] = {monitored_metric(run): None}  # first, so that the menu shows it first
    for metrics in run.evaluations.values():
        names |= dict.fromkeys(metrics)
    names.pop(HELD_OUT_LOSS, None)
    rows: list[Row] = []
    for name in names:
        rows += _held_out_rows(run, positions, name)
    if not rows:
        return None
    metrics_with_rows = list(dict.fromkeys(row["metric"] for row in rows))
    bind = {"input": "select", "options": metrics_with_rows, "name": "metric"}
    menu = {"name": "metric", "value": metrics_with_rows[0], "bind": bind}
    spec = {
        "height": HEIGHT // 2,
        "data": {"values": rows},
        "params": [X_MENU, menu, ZOOM],
        "transform": [{"filter": "datum.metric == metric"}, CHOSEN_X],
        "mark": {"type": "line", "point": {"size": 45, "filled": True}},
        "encoding": {
            "x": X_AXIS,
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "tooltip": [{"field": "metric", "type": "nominal"}, *_tooltip("value", "value")],
        },
    }
    title = "Other held-out metrics" if monitored_metric(run) == HELD_OUT_LOSS else "Held-out metrics"
    return Figure("held-out", title, "Before the first step, and after each evaluation.", spec)


def _reward_figure(run: RecordedRun, positions: dict[int, Row]) -> Figure | None:
    """A metric of generated answers, in training and held out, chosen by the reader in a menu; None for runs without rewards.

    The reward is shown first. If a round takes several steps, each step has the numbers of its round.
    """
    names = _answer_metric_names(run)
    if REWARD not in names:
        return None
    rows: list[Row] = []
    for name in names:
        training_rows = []
        for step, row in run.steps.items():
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                training_rows.append({"series": TRAINING, **positions[step], "value": _rounded(value), "metric": name})
        held_out_rows = _held_out_rows(run, positions, f"eval/{name}")
        rows += _thinned(training_rows, MAX_ANSWER_POINTS)
        rows += [{**row, "metric": name} for row in _thinned(held_out_rows, MAX_ANSWER_POINTS)]
    menu = {"name": "of", "value": names[0], "bind": {"input": "select", "options": names, "name": "metric"}}
    spec = {
        "height": HEIGHT,
        "data": {"values": rows},
        "params": [X_MENU, menu, ZOOM],
        "transform": [{"filter": "datum.metric == of"}, CHOSEN_X],
        "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 30, "filled": True}},
        "encoding": {
            "x": X_AXIS,
            "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": SERIES,
            "tooltip": [{"field": "metric", "type": "nominal"}, *_tooltip("value", "value")],
        },
    }
    caption = "Mean of the answers of a round; held out, of answers to prompts that are not trained on."
    return Figure("reward", "Reward of written answers", f"{caption} {ZOOM_HINT}", spec)


def _answer_metric_names(run: RecordedRun) -> list[str]:
    """The metrics of generated answers that any step has: the reward, its components, then others; `MAX_ANSWER_METRICS` at most.

    The page has the numbers of each step for each of them, so there must not be many.
    """
    names: dict[str, None] = {}
    for row in run.steps.values():
        names |= dict.fromkeys(name for name in row if name == REWARD or name.startswith(ANSWER_METRIC_PREFIXES))
    ordered = sorted(names, key=lambda name: (name != REWARD, not name.startswith("rewards/"), name))
    return ordered[:MAX_ANSWER_METRICS]


def _course_figure(run: RecordedRun, positions: dict[int, Row]) -> Figure | None:
    """Gradient norm, learning rate and speed beneath each other; None if no row has any of them."""
    strips: list[Spec] = []
    steps = drawn_steps(run)
    for metric, title in COURSE.items():
        rows = []
        for step in steps:
            value = run.steps[step].get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                rows.append({**positions[step], metric: _rounded(value)})
        if rows:
            strips.append(_course_strip(metric, title, rows))
    if not strips:
        return None
    strips[-1]["encoding"]["x"] = X_AXIS  # only the lowest one names the axis that all share
    spec = {"params": [X_MENU], "vconcat": strips, "spacing": 8}
    return Figure("course", "Gradients, learning rate, speed", ZOOM_HINT, spec)


def _course_strip(metric: str, title: str, rows: list[Row]) -> Spec:
    """The plot of one metric of `COURSE`, without a title of its horizontal axis."""
    return {
        "height": STRIP_HEIGHT,
        "data": {"values": rows},
        "params": [ZOOM | {"name": "along"}],
        "transform": [CHOSEN_X],
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {
            "x": {**X_AXIS, "axis": {**X_AXIS["axis"], "title": None}},
            "y": {
                "field": metric,
                "type": "quantitative",
                "title": title,
                "axis": COURSE_LABELS[metric],
                "scale": {"zero": False},
            },
            "tooltip": _tooltip(metric, title),
        },
    }


def _parts_figure(parts_s: dict[str, float]) -> Figure | None:
    """One bar of the parts of a step; None if they were not timed."""
    if not parts_s:
        return None
    order = list(parts_s)
    rows = []
    for index, (part, seconds) in enumerate(parts_s.items()):
        rows.append({"part": part, "ms": _rounded(1000 * seconds), "order": index})
    spec = {
        "height": 46,
        "data": {"values": rows},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "ms", "type": "quantitative", "title": "milliseconds of a step"},
            "color": {"field": "part", "type": "nominal", "sort": order, "title": None},
            "order": {"field": "order"},
            "tooltip": [{"field": "part", "type": "nominal"}, {"field": "ms", "type": "quantitative", "format": ".2f"}],
        },
    }
    return Figure("parts", "Parts of a step", "Medians. Communication is part of where it is waited for.", spec)


def _profile_figure(profile: ProfiledSteps | None) -> Figure | None:
    """Allocated memory over the traced steps, a line for each rank; None if the run was not profiled."""
    if profile is None or not profile.memory:
        return None
    spec = {
        "height": HEIGHT // 2,
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
