"""Plots of a comparison as Vega-Lite, each with its data inside. Needs the extra `report`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from launch.compare.comparison import ComparedRun, Comparison
from launch.compare.profiles import read_profile
from launch.compare.step_plots import HEIGHT, WIDEST_NAME, WIDTH, color, course_chart, held_out_chart, loss_chart

BAR = 26
"""Pixels of a run in a bar chart."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of the page."""

    name: str
    """Of its element."""
    title: str
    caption: str
    """What is to be seen, in a sentence."""
    spec: str
    """Vega-Lite as JSON that may stand in a script."""


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """The plots for which there are numbers."""
    begun = [run for run in comparison.runs if run.measured.steps]
    plots = [
        _loss(begun),
        _plot(
            "held-out", "Held-out metrics", "Before the first step, and after each evaluation.", held_out_chart(begun)
        ),
        _plot(
            "course", "Course", "Scroll or drag to zoom into all three; double-click to go back.", course_chart(begun)
        ),
    ]
    if len(begun) != 1:  # of a single run the course shows the speed
        plots.append(_speeds(begun))
    plots += [_memory(begun), _parts(begun), _trade(begun)]
    if len(begun) == 1:
        plots.append(_profile(begun[0]))
    return [plot for plot in plots if plot is not None]


def _plot(name: str, title: str, caption: str, chart: Any) -> Plot | None:
    """A chart as JSON that may stand in a script of the page; None without a chart."""
    if chart is None:
        return None
    # `</script>` or `<!--` in the name of a run would end the script that the JSON stands in.
    spec = json.dumps(chart.to_dict(), allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    return Plot(name, title, caption, spec)


def _loss(runs: list[ComparedRun]) -> Plot | None:
    drawn = loss_chart(runs)
    if drawn is None:
        return None
    chart, caption = drawn
    return _plot("loss", "Loss", caption, chart)


def _profile(run: ComparedRun) -> Plot | None:
    """Allocated GiB over the traced steps, a line for each rank; None if the run was not profiled."""
    import altair as alt

    profile = read_profile(run.point.directory)
    if profile is None or not profile.memory:
        return None
    chart = (
        alt.Chart(alt.Data(values=profile.memory), width=WIDTH, height=HEIGHT // 2)
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X("ms:Q"),
            y=alt.Y("GiB:Q"),
            color=alt.Color("rank:N", title="rank"),
            tooltip=["rank:N", alt.Tooltip("ms:Q", format=".1f"), alt.Tooltip("GiB:Q", format=".4f")],
        )
        .add_params(alt.selection_interval(name="zoom", bind="scales"))
    )
    caption = f"Steps {profile.steps[0]} to {profile.steps[1]}; on a CPU what was allocated since the trace began."
    return _plot("profile", "Memory in the profiled steps", caption, chart)


def _bars(runs: list[ComparedRun], rows: list[dict[str, Any]]) -> Any:
    """Bars beside the runs' names, in their order."""
    import altair as alt

    height = BAR * len(runs)
    return alt.Chart(alt.Data(values=rows), width=WIDTH, height=height).encode(
        y=alt.Y("run:N", sort=[run.name for run in runs], title=None, axis=alt.Axis(labelLimit=WIDEST_NAME))
    )


def _speeds(runs: list[ComparedRun]) -> Plot | None:
    """A bar of tokens/s for each run, with the spread of its repeats; None if no speed is known."""
    import altair as alt

    rows: list[dict[str, Any]] = []
    for run in runs:
        if run.measured.tokens_per_s:
            low, high = run.summary.spread or (run.measured.tokens_per_s, run.measured.tokens_per_s)
            rows.append({"run": run.name, "speed": run.measured.tokens_per_s, "slowest": low, "fastest": high})
    if not rows:
        return None
    base = _bars(runs, rows)
    bars = base.mark_bar(color="#7aa6d8").encode(x=alt.X("speed:Q", title="tokens/s"), tooltip=["run:N", "speed:Q"])
    spread = base.mark_rule(strokeWidth=3).encode(
        x="slowest:Q", x2="fastest:Q", tooltip=["run:N", "slowest:Q", "fastest:Q"]
    )
    return _plot(
        "speed", "Speed", "All ranks together; the dark line is from the slowest to the fastest repeat.", bars + spread
    )


def _memory(runs: list[ComparedRun]) -> Plot | None:
    """Two bars of GiB for each run, planned and measured; None if neither is known of any run."""
    import altair as alt

    rows: list[dict[str, Any]] = []
    for run in runs:
        for what, gib in (("planned", run.measured.planned_gib), ("measured", run.measured.memory_gib)):
            if gib is not None:
                rows.append({"run": run.name, "what": what, "GiB": gib})
    if not rows:
        return None
    chart = (
        _bars(runs, rows)
        .mark_bar()
        .encode(
            x=alt.X("GiB:Q"),
            yOffset=alt.YOffset("what:N", sort=["planned", "measured"]),
            color=alt.Color("what:N", sort=["planned", "measured"], title=None),
            tooltip=["run:N", "what:N", alt.Tooltip("GiB:Q", format=".4f")],
        )
    )
    return _plot(
        "memory",
        "Memory, planned and measured",
        "Of the rank with the largest peak. On a CPU what was measured has the process's libraries in it.",
        chart,
    )


def _parts(runs: list[ComparedRun]) -> Plot | None:
    """A stacked bar for each run: milliseconds of each part of a step; None if no run timed them."""
    import altair as alt

    order = ["data", "forward", "backward", "optimizer", "rest"]
    rows: list[dict[str, Any]] = []
    for run in runs:
        for part, seconds in run.summary.parts_s.items():
            rows.append({"run": run.name, "part": part, "ms": 1000 * seconds, "order": order.index(part)})
    if not rows:
        return None
    chart = (
        _bars(runs, rows)
        .mark_bar()
        .encode(
            x=alt.X("ms:Q", title="ms of a step"),
            color=alt.Color("part:N", sort=order, title=None),
            order="order:Q",
            tooltip=["run:N", "part:N", alt.Tooltip("ms:Q", format=".2f")],
        )
    )
    return _plot("parts", "A step's parts", "Communication is part of where it is waited for.", chart)


def _costs(run: ComparedRun) -> dict[str, float | None]:
    return {
        "seconds of steps": sum(row.get("step_s") or 0.0 for row in run.point.steps.values()),
        "GiB": run.measured.memory_gib,
        "GiB saved": run.measured.checkpoint_gib,
        "dollars a million tokens": run.summary.dollars_per_million,
    }


def _trade(runs: list[ComparedRun]) -> Plot | None:
    """Loss against cost: the held-out loss if every run has one, else that of the last step."""
    import altair as alt

    held_out = all("eval/loss" in run.measured.after for run in runs)
    rows: list[dict[str, Any]] = []
    known: dict[str, None] = {}
    for run in runs:
        loss = run.measured.after["eval/loss"] if held_out else run.measured.loss
        if loss is not None:
            costs = _costs(run)
            rows.append({"run": run.name, "loss": loss, **costs})
            known |= {name: None for name, cost in costs.items() if cost is not None}
    if len(rows) < 2 or not known:
        return None
    choices = [name for name in rows[0] if name in known]
    losses = [row["loss"] for row in rows]
    least = min(losses)
    most = max(losses)
    room = max(0.1 * (most - least), 1e-3 * abs(most))  # differences of rounding are to be seen as none
    against = alt.param(name="against", value=choices[0], bind=alt.binding_select(options=choices, name="against"))
    base = (
        alt.Chart(alt.Data(values=rows), width=WIDTH, height=HEIGHT)
        .transform_calculate(x="datum[against]")
        .transform_filter("isValid(datum.x)")
        .encode(
            x=alt.X("x:Q", title="cost", scale=alt.Scale(zero=False, padding=40)),
            y=alt.Y(
                "loss:Q",
                title="held-out loss" if held_out else "last loss",
                scale=alt.Scale(domain=[least - room, most + room]),
            ),
        )
        .add_params(against)
    )
    points = base.mark_point(filled=True, size=90).encode(color=color(runs), tooltip=["run:N", "loss:Q", "x:Q"])
    return _plot(
        "trade",
        "Quality against cost",
        "Lower is better, left is cheaper; point at a mark to see its name and numbers.",
        points,
    )
