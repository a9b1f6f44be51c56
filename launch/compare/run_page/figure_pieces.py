"""What the plots of a run's page share: axes, menus, and rows of data with their positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from launch.compare.events import notable_steps
from launch.compare.run_files import RecordedRun
from launch.compare.vega_specs import evenly_spread

Spec = dict[str, Any]
"""A specification in Vega-Lite, or a part of one."""
Row = dict[str, Any]
"""One row of a plot's data."""
MAX_DRAWN_STEPS = 400
"""Steps of a curve that are drawn; of a longer run evenly spread ones, and those that stood out."""
PLOT_HEIGHT_PX = 300
STRIP_HEIGHT_PX = 110
"""Pixels of a plot, and of each of several beneath each other."""
TRAINING_SERIES = "training"
HELD_OUT_SERIES = "held-out"
HELD_OUT_LOSS = "eval/loss"


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot of the page."""

    name: str
    """Id of its element."""
    title: str
    caption: str
    spec: Spec


X_AXIS_MENU: Spec = {
    "name": "over",
    "value": "step",
    "bind": {"input": "select", "options": ["step", "tokens", "seconds"], "name": "over"},
}
"""The menu that chooses what the x axis shows. Its Vega parameter is called `over`."""
X_AXIS_TITLE: Spec = {"expr": "{step: 'step', tokens: 'tokens', seconds: 'seconds of training'}[over]"}
ZOOM_PARAMETER: Spec = {
    "name": "zoom",
    "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.ctrlKey]"},
    "bind": "scales",
}
"""Dragging moves the plot. The wheel alone scrolls the page, which most readers want."""
ZOOM_HINT = "Drag to move, Ctrl and the wheel to zoom, double-click to go back."
X_AXIS_TRANSFORM: Spec = {"calculate": "datum[over]", "as": "x"}


def x_values_of_steps(run: RecordedRun) -> dict[int, Row]:
    """What the x axis of a plot can show of each step of a run: {1: {"step": 1, "tokens": 512, "seconds": 0.8}, ...}.

    The evaluation before the first step is at 0. Seconds are those of training, without evaluations.
    """
    x_values_by_step: dict[int, Row] = {0: {"step": 0, "tokens": 0, "seconds": 0.0}}
    elapsed = accumulate(row.get("step_s") or 0.0 for row in run.steps.values())
    for (step, row), seconds in zip(run.steps.items(), elapsed, strict=True):
        x_values_by_step[step] = {"step": step, "tokens": row.get("tokens"), "seconds": round(seconds, 3)}
    return x_values_by_step


def drawn_steps(run: RecordedRun) -> list[int]:
    """Choose the steps of a run that its plots draw: evenly spread ones, the last, and those that stood out; of a short run, all.

    About `MAX_DRAWN_STEPS` are evenly spread, and at most `MAX_DRAWN_STEPS` stood out, so that the page stays small. A step
    stands out if it has an event, or no update.
    """
    steps = list(run.steps)
    stride = max(1, math.ceil(len(steps) / MAX_DRAWN_STEPS))
    # A run may have thousands of outliers; a page has room for the latest.
    notable = {step.step for step in notable_steps(run)[-MAX_DRAWN_STEPS:]}
    last_index = len(steps) - 1
    return [step for index, step in enumerate(steps) if index % stride == 0 or index == last_index or step in notable]


def round_to_six_digits(value: float) -> float:
    """A number with the six digits that a plot can show, which makes the page half as large."""
    return float(f"{value:.6g}")


X_AXIS: Spec = {
    "field": "x",
    "type": "quantitative",
    "axis": {"title": X_AXIS_TITLE, "tickMinStep": {"expr": "over == 'seconds' ? 0.001 : 1"}},
    "scale": {"zero": False, "nice": False},
}
COLOR_BY_SERIES: Spec = {
    "field": "series",
    "type": "nominal",
    "title": None,
    "scale": {"domain": [TRAINING_SERIES, HELD_OUT_SERIES]},
    "legend": {"symbolOpacity": 1, "symbolType": "stroke", "symbolSize": 300},
}
"""Colour of the two curves. Held-out losses have points as well, for those who see no difference of colours."""


def tooltip_fields(value_field: str, title: str) -> list[Spec]:
    """What the pointer shows of a point of a curve: its step, tokens and seconds, and its value under this title."""
    return [
        {"field": "step", "type": "quantitative"},
        {"field": "tokens", "type": "quantitative", "format": ","},
        {"field": "seconds", "type": "quantitative", "format": ".1f"},
        {"field": value_field, "type": "quantitative", "title": title, "format": ".5~g"},
    ]


def held_out_rows_of(run: RecordedRun, x_values_by_step: dict[int, Row], metric: str) -> list[Row]:
    """Data rows of a held-out metric: one for each evaluation with a finite value; of very many, about `MAX_DRAWN_STEPS`.

    Such as {"series": "held-out", "step": 40, "tokens": 20480, "seconds": 31.5, "value": 2.31, "metric": "eval/loss"}.
    """
    rows = []
    for step, metrics in run.evaluations.items():
        value = metrics.get(metric)
        if value is not None and math.isfinite(value):
            position = x_values_of(x_values_by_step, step)
            rows.append({"series": HELD_OUT_SERIES, **position, "value": round_to_six_digits(value), "metric": metric})
    return evenly_spread(rows, MAX_DRAWN_STEPS)


def x_values_of(x_values_by_step: dict[int, Row], step: int) -> Row:
    """Where a step is on the x axes: its step, tokens and seconds.

    The last two are None for a step without a row in `metrics.jsonl`.
    """
    return x_values_by_step.get(step, {"step": step, "tokens": None, "seconds": None})
