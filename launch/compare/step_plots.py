"""Plots over steps: training losses, held-out metrics, and events of the run. Needs the extra `report`."""

from __future__ import annotations

import math
import warnings
from itertools import accumulate
from typing import Any

from launch.compare.comparison import ComparedRun
from launch.compare.events import notable_steps

DEFAULT_SCHEME_COLORS = 10
"""Colours in Vega's default scheme."""
MAX_CURVE_POINTS = 400
"""Steps of one curve that are drawn; of a longer run evenly spread ones, and those that stand out."""
HEIGHT = 320
WIDTH = 860
"""Size of a plot in pixels."""
STRIP_HEIGHT = 110
"""Height in pixels of each of several plots below each other."""
WIDEST_NAME = 280
"""Pixels of a run's name. Vega cuts names at 160 by default, and two runs may differ in the end of their names alone."""
X_CHOICES = ("step", "tokens", "seconds")
"""What the reader can choose for the x axis of every curve."""
COURSE_METRICS = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
"""Metrics that are drawn below the loss, and their titles; only those that the rows have."""


def curve_rows(run: ComparedRun) -> list[dict[str, Any]]:
    """The points of a run's curves, one for each drawn step: step, tokens and seconds until then, loss and course metrics.

    Of a run with more than `MAX_CURVE_POINTS` steps: evenly spread ones, the last, and those that stood out.
    """
    rows = list(run.first_repeat.steps.values())
    notable = {step.step for step in notable_steps(run.first_repeat)}
    stride = max(1, math.ceil(len(rows) / MAX_CURVE_POINTS))
    last = len(rows) - 1
    elapsed_s = 0.0
    curve_points = []
    for number, row in enumerate(rows):
        elapsed_s += row.get("step_s") or 0.0
        if number % stride != 0 and number != last and row["step"] not in notable:
            continue
        curve_point = {
            "run": run.name,
            "step": row["step"],
            "tokens": row.get("tokens"),
            "seconds": elapsed_s,
            "loss": row["loss"],
        }
        for metric in COURSE_METRICS:
            if isinstance(row.get(metric), int | float):
                curve_point[metric] = row[metric]
        curve_points.append(curve_point)
    return curve_points


def _curves(runs: list[ComparedRun]) -> list[dict[str, Any]]:
    """The curve points of all runs, one run after the other: Vega tells them apart by `run`."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows += curve_rows(run)
    return rows


def run_color(runs: list[ComparedRun]) -> Any:
    """The colour encoding of all charts: a colour for each run, with a legend if there are several.

    Up to 20 runs have different colours.
    """
    import altair as alt

    options: dict[str, Any] = {"legend": None}
    if len(runs) > 1:
        options["legend"] = alt.Legend(labelLimit=WIDEST_NAME)
    if len(runs) > DEFAULT_SCHEME_COLORS:
        options["scale"] = alt.Scale(scheme="tableau20")
    return alt.Color("run:N", sort=[run.name for run in runs], title=None, **options)


def _x_choice() -> Any:
    """The menu by which the reader chooses what the x axis shows: steps, tokens or seconds."""
    import altair as alt

    return alt.param(name="over", value=X_CHOICES[0], bind=alt.binding_select(options=list(X_CHOICES), name="over"))


def _x_axis(title: str | None = "steps, tokens or seconds of steps") -> Any:
    """The x axis of a chart whose `x` is calculated from the reader's choice."""
    import altair as alt

    # Steps and tokens are whole: no ticks between them.
    axis = alt.Axis(tickMinStep=alt.ExprRef("over == 'seconds' ? 0.001 : 1"))  # type: ignore[arg-type]
    return alt.X("x:Q", title=title, scale=alt.Scale(zero=False), axis=axis)


def _tooltip(*more: Any) -> list[Any]:
    """The fields shown when the pointer is on a point of a curve: run, step, tokens and seconds, then `more`."""
    import altair as alt

    return ["run:N", "step:Q", "tokens:Q", alt.Tooltip("seconds:Q", format=".1f"), *more]


def loss_chart(runs: list[ComparedRun]) -> tuple[Any, str] | None:
    """(chart of the loss curves, with a dashed line at each step that stood out; its caption). None without any loss."""
    import altair as alt

    rows = [row for row in _curves(runs) if row["loss"] is not None]
    if not rows:
        return None
    # A click on a run in the legend fades the others.
    chosen_run = alt.selection_point(name="chosen", fields=["run"], bind="legend")
    curves = (
        alt.Chart(alt.Data(values=rows), width=WIDTH, height=HEIGHT)
        .transform_calculate(x="datum[over]")
        .mark_line(point={"size": 18})
        .encode(
            x=_x_axis(),
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
            color=run_color(runs),
            opacity=alt.condition(chosen_run, alt.value(1), alt.value(0.12)),
            tooltip=_tooltip(alt.Tooltip("loss:Q", format=".6f")),
        )
        .add_params(_x_choice(), chosen_run, alt.selection_interval(name="zoom", bind="scales"))
    )
    caption = "Scroll to zoom, drag to move, double-click to go back"
    caption += "; a click in the legend shows one run alone." if len(runs) > 1 else "."
    notable_rows = _notable_step_rows(runs)
    if not notable_rows:
        return curves, caption
    dashed_lines = (
        alt.Chart(alt.Data(values=notable_rows))
        .transform_calculate(x="datum[over]")
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
        .encode(x="x:Q", color=alt.value("#c0392b"), tooltip=["run:N", "step:Q", "what:N"])
    )
    return curves + dashed_lines, f"{caption} Dashed: steps that stood out; the pointer says what was done."


def _notable_step_rows(runs: list[ComparedRun]) -> list[dict[str, Any]]:
    """A row for each step that stood out: its step, tokens and seconds, and what a guard or detector found there."""
    notable_rows = []
    for run in runs:
        row_by_step = {row["step"]: row for row in curve_rows(run)}
        for notable in notable_steps(run.first_repeat):
            row = row_by_step.get(notable.step, {})
            notable_rows.append(
                {
                    "run": run.name,
                    "step": notable.step,
                    "tokens": row.get("tokens"),
                    "seconds": row.get("seconds"),
                    "what": notable.text,
                }
            )
    return notable_rows


def _evaluation_rows(run: ComparedRun) -> list[dict[str, Any]]:
    """A row for each held-out metric of each evaluation of a run, with the tokens and seconds of training until then."""
    steps = run.first_repeat.steps
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in steps.values())
    # The evaluation before the first step is at 0.
    position_by_step: dict[int, dict[str, Any]] = {0: {"tokens": 0, "seconds": 0.0}}
    for (step, row), seconds in zip(steps.items(), elapsed_s, strict=True):
        position_by_step[step] = {"tokens": row.get("tokens"), "seconds": seconds}
    unknown = {"tokens": None, "seconds": None}

    rows: list[dict[str, Any]] = []
    for step, metrics in run.first_repeat.evaluations.items():
        position = {"step": step, **position_by_step.get(step, unknown)}
        for metric, value in metrics.items():
            rows.append({"run": run.name, **position, "metric": metric, "value": value})
    return rows


def held_out_chart(runs: list[ComparedRun]) -> Any | None:
    """A chart of one held-out metric over the run, which the reader chooses; None if no run was evaluated."""
    import altair as alt

    rows: list[dict[str, Any]] = []
    for run in runs:
        rows += _evaluation_rows(run)
    if not rows:
        return None
    names = list(dict.fromkeys(row["metric"] for row in rows))
    metric = alt.param(name="metric", value=names[0], bind=alt.binding_select(options=names, name="metric"))
    return (
        alt.Chart(alt.Data(values=rows), width=WIDTH, height=HEIGHT // 2)
        .transform_filter("datum.metric == metric")
        .transform_calculate(x="datum[over]")
        .mark_line(point={"size": 40})
        .encode(
            x=_x_axis(),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=run_color(runs),
            tooltip=_tooltip("metric:N", alt.Tooltip("value:Q", format=".6g")),
        )
        .add_params(_x_choice(), metric, alt.selection_interval(name="zoom", bind="scales"))
    )


def course_chart(runs: list[ComparedRun]) -> Any | None:
    """Gradient norm, learning rate and speed beneath each other, moved together; None if no row has any of them."""
    import altair as alt

    rows = _curves(runs)
    rows_by_metric = {}
    for metric in COURSE_METRICS:
        rows_with_metric = [row for row in rows if row.get(metric) is not None]
        if rows_with_metric:
            rows_by_metric[metric] = rows_with_metric
    if not rows_by_metric:
        return None
    shared_zoom = alt.selection_interval(name="along", bind="scales", encodings=["x"])
    charts = []
    last_metric = list(rows_by_metric)[-1]
    for metric, metric_rows in rows_by_metric.items():
        x_axis = _x_axis() if metric == last_metric else _x_axis(None)  # only the lowest chart names the shared axis
        charts.append(
            alt.Chart(alt.Data(values=metric_rows), width=WIDTH, height=STRIP_HEIGHT)
            .transform_calculate(x="datum[over]")
            .mark_line(point={"size": 12}, strokeWidth=1.5)
            .encode(
                x=x_axis,
                y=alt.Y(f"{metric}:Q", title=COURSE_METRICS[metric], scale=alt.Scale(zero=False)),
                color=run_color(runs),
                tooltip=_tooltip(alt.Tooltip(f"{metric}:Q", format=".6g")),
            )
            .add_params(shared_zoom)
        )
    with warnings.catch_warnings():
        # Altair warns that the charts share a selection, and that is what is wanted here.
        warnings.filterwarnings("ignore", "Automatically deduplicated")
        return alt.vconcat(*charts, spacing=6).add_params(_x_choice())
