"""Plots over steps: training losses, held-out metrics, and events of the run. Needs the extra `report`."""

from __future__ import annotations

import warnings
from itertools import accumulate
from typing import Any

from launch.compare.comparison import ComparedRun
from launch.compare.events import notable_steps

USUAL_COLORS = 10
"""Colours of the usual scheme."""
MOST_POINTS = 400
"""Steps of one curve that are drawn; of a longer run evenly spread ones, and those that stand out."""
HEIGHT = 320
WIDTH = 860
"""Pixels of a plot."""
STRIP_HEIGHT = 110
"""Pixels of one of several plots beneath each other."""
WIDEST_NAME = 280
"""Pixels of a run's name. Vega cuts names at 160 by default, and two runs may differ in the end of their names alone."""
OVER = ("step", "tokens", "seconds")
COURSE_METRICS = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
"""What is drawn below the loss, of rows that have it."""


def curve_rows(run: ComparedRun) -> list[dict[str, Any]]:
    """Steps of a run with what is drawn of them: step, tokens and seconds until then, the loss, and the rest.

    Of a long run: evenly spread steps, the last one, and those that stood out.
    """
    rows = list(run.point.steps.values())
    notable = {step.step for step in notable_steps(run.point)}
    stride = max(1, -(-len(rows) // MOST_POINTS))  # rounded up
    last = len(rows) - 1
    elapsed_s = 0.0
    drawn = []
    for number, row in enumerate(rows):
        elapsed_s += row.get("step_s") or 0.0
        if number % stride != 0 and number != last and row["step"] not in notable:
            continue
        point = {
            "run": run.name,
            "step": row["step"],
            "tokens": row.get("tokens"),
            "seconds": elapsed_s,
            "loss": row["loss"],
        }
        point |= {key: row[key] for key in COURSE_METRICS if isinstance(row.get(key), int | float)}
        drawn.append(point)
    return drawn


def _curves(runs: list[ComparedRun]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows += curve_rows(run)
    return rows


def color(runs: list[ComparedRun]) -> Any:
    """A colour for each run, in their order; named where there are several. Of 20 runs no two share one."""
    import altair as alt

    several: dict[str, Any] = {"legend": alt.Legend(labelLimit=WIDEST_NAME) if len(runs) > 1 else None}
    if len(runs) > USUAL_COLORS:
        several["scale"] = alt.Scale(scheme="tableau20")
    return alt.Color("run:N", sort=[run.name for run in runs], title=None, **several)


def _x_choice() -> Any:
    import altair as alt

    return alt.param(name="over", value=OVER[0], bind=alt.binding_select(options=list(OVER), name="over"))


def _x_axis(title: str | None = "steps, tokens or seconds of steps") -> Any:
    import altair as alt

    axis = alt.Axis(tickMinStep=alt.ExprRef("over == 'seconds' ? 0.001 : 1"))  # type: ignore[arg-type]
    return alt.X("x:Q", title=title, scale=alt.Scale(zero=False), axis=axis)


def _tooltip(*more: Any) -> list[Any]:
    import altair as alt

    return ["run:N", "step:Q", "tokens:Q", alt.Tooltip("seconds:Q", format=".1f"), *more]


def loss_chart(runs: list[ComparedRun]) -> tuple[Any, str] | None:
    """(the chart of the losses, with a line where a step stood out; what is to be seen), None without a loss."""
    import altair as alt

    rows = [row for row in _curves(runs) if row["loss"] is not None]
    if not rows:
        return None
    chosen_run = alt.selection_point(name="chosen", fields=["run"], bind="legend")
    lines = (
        alt.Chart(alt.Data(values=rows), width=WIDTH, height=HEIGHT)
        .transform_calculate(x="datum[over]")
        .mark_line(point={"size": 18})
        .encode(
            x=_x_axis(),
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
            color=color(runs),
            opacity=alt.condition(chosen_run, alt.value(1), alt.value(0.12)),
            tooltip=_tooltip(alt.Tooltip("loss:Q", format=".6f")),
        )
        .add_params(_x_choice(), chosen_run, alt.selection_interval(name="zoom", bind="scales"))
    )
    caption = "Scroll to zoom, drag to move, double-click to go back"
    caption += "; a click in the legend shows one run alone." if len(runs) > 1 else "."
    notable_rows = _notable_step_rows(runs)
    if not notable_rows:
        return lines, caption
    rules = (
        alt.Chart(alt.Data(values=notable_rows))
        .transform_calculate(x="datum[over]")
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
        .encode(x="x:Q", color=alt.value("#c0392b"), tooltip=["run:N", "step:Q", "what:N"])
    )
    return lines + rules, f"{caption} Dashed: steps that stood out; the pointer says what was done."


def _notable_step_rows(runs: list[ComparedRun]) -> list[dict[str, Any]]:
    """Steps that stand out, placed as the curves are."""
    notable_rows = []
    for run in runs:
        row_by_step = {row["step"]: row for row in curve_rows(run)}
        for notable in notable_steps(run.point):
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
    """A row for each held-out metric of each evaluation, with the tokens and seconds until then."""
    elapsed_s = accumulate(row.get("step_s") or 0.0 for row in run.point.steps.values())
    # The evaluation before the first step is at 0.
    place_by_step: dict[int, dict[str, Any]] = {0: {"tokens": 0, "seconds": 0.0}}
    for (step, row), seconds in zip(run.point.steps.items(), elapsed_s, strict=True):
        place_by_step[step] = {"tokens": row.get("tokens"), "seconds": seconds}
    rows: list[dict[str, Any]] = []
    for step, metrics in run.point.evaluations.items():
        place = {"step": step, **place_by_step.get(step, {"tokens": None, "seconds": None})}
        rows += [{"run": run.name, **place, "metric": metric, "value": value} for metric, value in metrics.items()]
    return rows


def held_out_chart(runs: list[ComparedRun]) -> Any | None:
    """The chart of each held-out metric over the run, one at a time."""
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
            color=color(runs),
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
        if known := [row for row in rows if row.get(metric) is not None]:
            rows_by_metric[metric] = known
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
                color=color(runs),
                tooltip=_tooltip(alt.Tooltip(f"{metric}:Q", format=".6g")),
            )
            .add_params(shared_zoom)
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Automatically deduplicated")  # one selection of all three is meant
        return alt.vconcat(*charts, spacing=6).add_params(_x_choice())
