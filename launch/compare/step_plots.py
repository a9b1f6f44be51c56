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
HEIGHT, WIDTH, STRIP_HEIGHT = 320, 860, 110
"""Pixels of a plot; `STRIP_HEIGHT`: of one of several beneath each other."""
WIDEST_NAME = 280
"""Pixels of a run's name, of which the end alone may tell two apart; vega cuts what is longer than 160."""
OVER = ("step", "tokens", "seconds")
COURSE_METRICS = {"grad_norm": "gradient norm", "lr": "learning rate", "tokens_per_s": "tokens/s"}
"""What is drawn below the loss, of rows that have it."""


def curve_rows(run: ComparedRun) -> list[dict[str, Any]]:
    """Steps of a run with what is drawn of them: step, tokens and seconds until then, the loss, and the rest."""
    rows = list(run.point.steps.values())
    seconds = accumulate(row.get("step_s") or 0.0 for row in rows)
    every, named = max(1, -(-len(rows) // MOST_POINTS)), {mark.step for mark in notable_steps(run.point)}
    told = [
        {"run": run.name, "step": row["step"], "tokens": row.get("tokens"), "seconds": at, "loss": row["loss"]}
        | {key: row[key] for key in COURSE_METRICS if isinstance(row.get(key), int | float)}
        for row, at in zip(rows, seconds, strict=True)
    ]
    return [row for n, row in enumerate(told) if n % every == 0 or n == len(told) - 1 or row["step"] in named]


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

    rows = [row for run in runs for row in curve_rows(run) if row["loss"] is not None]
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
    if not (notable_rows := _notable_step_rows(runs)):
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
    found = []
    for run in runs:
        rows = {row["step"]: row for row in curve_rows(run)}
        for mark in notable_steps(run.point):
            at = rows.get(mark.step, {})
            found.append(
                {
                    "run": run.name,
                    "step": mark.step,
                    "tokens": at.get("tokens"),
                    "seconds": at.get("seconds"),
                    "what": mark.text,
                }
            )
    return found


def held_out_chart(runs: list[ComparedRun]) -> Any | None:
    """The chart of each held-out metric over the run, one at a time."""
    import altair as alt

    rows: list[dict[str, Any]] = []
    for run in runs:
        seconds = list(accumulate(row.get("step_s") or 0.0 for row in run.point.steps.values()))
        at = dict(zip(run.point.steps, seconds, strict=True))
        for step, metrics in run.point.evaluations.items():
            place = {"step": step, "tokens": run.point.steps.get(step, {}).get("tokens", 0 if step == 0 else None)}
            place["seconds"] = at.get(step, 0.0 if step == 0 else None)
            rows += [{"run": run.name, **place, "metric": key, "value": value} for key, value in metrics.items()]
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
    """Gradient norm, learning rate and speed beneath each other, moved together."""
    import altair as alt

    rows = [row for run in runs for row in curve_rows(run)]
    known = [key for key in COURSE_METRICS if any(row.get(key) is not None for row in rows)]
    if not known:
        return None
    along = alt.selection_interval(name="along", bind="scales", encodings=["x"])
    charts = [
        alt.Chart(
            alt.Data(values=[row for row in rows if row.get(key) is not None]),
            width=WIDTH,
            height=STRIP_HEIGHT,
        )
        .transform_calculate(x="datum[over]")
        .mark_line(point={"size": 12}, strokeWidth=1.5)
        .encode(
            x=_x_axis(None if key != known[-1] else "steps, tokens or seconds of steps"),
            y=alt.Y(f"{key}:Q", title=COURSE_METRICS[key], scale=alt.Scale(zero=False)),
            color=color(runs),
            tooltip=_tooltip(alt.Tooltip(f"{key}:Q", format=".6g")),
        )
        .add_params(along)
        for key in known
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Automatically deduplicated")  # one selection of all three is meant
        return alt.vconcat(*charts, spacing=6).add_params(_x_choice())
