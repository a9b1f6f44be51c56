"""Plots of a comparison as Vega-Lite, each with its data inside. Needs the extra `report`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from launch.compare.comparison import ComparedRun, Comparison
from launch.compare.profiles import read_profile
from launch.compare.step_plots import HEIGHT, WIDEST_NAME, WIDTH, course_chart, held_out_chart, loss_chart, run_color

BAR_HEIGHT = 26
"""Height of a run's bar, in pixels."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of the page, which a browser draws with Vega."""

    name: str
    """Id of its HTML element, and stem of its image file."""
    title: str
    caption: str
    """A sentence on what the plot shows."""
    spec: str
    """Vega-Lite specification with the data inside, as JSON that may stand in a script element."""


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """The plots of a comparison, in the order of the page; those for which no run has numbers are left out."""
    begun = comparison.begun_runs
    plots = [
        _loss_plot(begun),
        _plot_from_chart(
            held_out_chart(begun),
            name="held-out",
            title="Held-out metrics",
            caption="Before the first step, and after each evaluation.",
        ),
        _plot_from_chart(
            course_chart(begun),
            name="course",
            title="Course",
            caption="Scroll or drag to zoom into all three; double-click to go back.",
        ),
    ]
    if len(begun) != 1:  # of a single run the course shows the speed
        plots.append(_speed_plot(begun))
    plots += [_memory_plot(begun), _step_parts_plot(begun), _loss_against_cost_plot(begun)]
    if len(begun) == 1:
        plots.append(_profile_plot(begun[0]))
    return [plot for plot in plots if plot is not None]


def _plot_from_chart(chart: Any, *, name: str, title: str, caption: str) -> Plot | None:
    """An Altair chart as a plot of the page; None without a chart."""
    if chart is None:
        return None
    # `</script>` or `<!--` in the name of a run would end the script that the JSON stands in.
    spec = json.dumps(chart.to_dict(), allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    return Plot(name, title, caption, spec)


def _loss_plot(runs: list[ComparedRun]) -> Plot | None:
    """The loss curves of all runs over steps, tokens or seconds; None if no step has a finite loss."""
    chart_and_caption = loss_chart(runs)
    if chart_and_caption is None:
        return None
    chart, caption = chart_and_caption
    return _plot_from_chart(chart, name="loss", title="Loss", caption=caption)


def _profile_plot(run: ComparedRun) -> Plot | None:
    """Allocated GiB over the traced steps, a line for each rank; None if the run was not profiled."""
    import altair as alt

    profile = read_profile(run.first_repeat.directory)
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
    first_step, last_step = profile.steps
    return _plot_from_chart(
        chart,
        name="profile",
        title="Memory in the profiled steps",
        caption=f"Steps {first_step} to {last_step}; on a CPU what was allocated since the trace began.",
    )


def _bar_chart(runs: list[ComparedRun], rows: list[dict[str, Any]]) -> Any:
    """A chart of `rows` with a horizontal bar for each run, beside its name; the caller adds what the bars measure."""
    import altair as alt

    height = BAR_HEIGHT * len(runs)
    return alt.Chart(alt.Data(values=rows), width=WIDTH, height=height).encode(
        y=alt.Y("run:N", sort=[run.name for run in runs], title=None, axis=alt.Axis(labelLimit=WIDEST_NAME))
    )


def _speed_plot(runs: list[ComparedRun]) -> Plot | None:
    """A bar of tokens/s for each run, with the spread of its repeats; None if no speed is known."""
    import altair as alt

    rows: list[dict[str, Any]] = []
    for run in runs:
        speed = run.measured.tokens_per_s
        if speed:
            slowest, fastest = run.summary.spread or (speed, speed)
            rows.append({"run": run.name, "speed": speed, "slowest": slowest, "fastest": fastest})
    if not rows:
        return None
    base = _bar_chart(runs, rows)
    bars = base.mark_bar(color="#7aa6d8").encode(x=alt.X("speed:Q", title="tokens/s"), tooltip=["run:N", "speed:Q"])
    spread = base.mark_rule(strokeWidth=3).encode(
        x="slowest:Q", x2="fastest:Q", tooltip=["run:N", "slowest:Q", "fastest:Q"]
    )
    return _plot_from_chart(
        bars + spread,
        name="speed",
        title="Speed",
        caption="All ranks together; the dark line is from the slowest to the fastest repeat.",
    )


def _memory_plot(runs: list[ComparedRun]) -> Plot | None:
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
        _bar_chart(runs, rows)
        .mark_bar()
        .encode(
            x=alt.X("GiB:Q"),
            yOffset=alt.YOffset("what:N", sort=["planned", "measured"]),
            color=alt.Color("what:N", sort=["planned", "measured"], title=None),
            tooltip=["run:N", "what:N", alt.Tooltip("GiB:Q", format=".4f")],
        )
    )
    return _plot_from_chart(
        chart,
        name="memory",
        title="Memory, planned and measured",
        caption="Of the rank with the largest peak. On a CPU what was measured has the process's libraries in it.",
    )


def _step_parts_plot(runs: list[ComparedRun]) -> Plot | None:
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
        _bar_chart(runs, rows)
        .mark_bar()
        .encode(
            x=alt.X("ms:Q", title="ms of a step"),
            color=alt.Color("part:N", sort=order, title=None),
            order="order:Q",
            tooltip=["run:N", "part:N", alt.Tooltip("ms:Q", format=".2f")],
        )
    )
    return _plot_from_chart(
        chart, name="parts", title="A step's parts", caption="Communication is part of where it is waited for."
    )


def _costs(run: ComparedRun) -> dict[str, float | None]:
    """What a run cost, by the name of the cost that a reader can choose for the axis; None if it is not known."""
    return {
        "seconds of steps": sum(row.get("step_s") or 0.0 for row in run.first_repeat.steps.values()),
        "GiB": run.measured.memory_gib,
        "GiB saved": run.measured.checkpoint_gib,
        "dollars a million tokens": run.summary.dollars_per_million,
    }


def _loss_against_cost_plot(runs: list[ComparedRun]) -> Plot | None:
    """A mark for each run: its loss against a cost that the reader chooses. None for fewer than two runs.

    The loss is the held-out one if every run has it, else that of the last step.
    """
    import altair as alt

    held_out = all("eval/loss" in run.measured.after for run in runs)
    rows: list[dict[str, Any]] = []
    known_costs: set[str] = set()
    for run in runs:
        loss = run.measured.after["eval/loss"] if held_out else run.measured.loss
        if loss is not None:
            costs = _costs(run)
            rows.append({"run": run.name, "loss": loss, **costs})
            known_costs |= {name for name, cost in costs.items() if cost is not None}
    if len(rows) < 2 or not known_costs:
        return None
    cost_choices = [name for name in rows[0] if name in known_costs]
    chosen_cost = alt.param(
        name="against", value=cost_choices[0], bind=alt.binding_select(options=cost_choices, name="against")
    )

    losses = [row["loss"] for row in rows]
    lowest_loss = min(losses)
    highest_loss = max(losses)
    # At least a thousandth of the loss: losses that differ by rounding alone are drawn at the same height.
    margin = max(0.1 * (highest_loss - lowest_loss), 1e-3 * abs(highest_loss))
    base = (
        alt.Chart(alt.Data(values=rows), width=WIDTH, height=HEIGHT)
        .transform_calculate(x="datum[against]")
        .transform_filter("isValid(datum.x)")
        .encode(
            x=alt.X("x:Q", title="cost", scale=alt.Scale(zero=False, padding=40)),
            y=alt.Y(
                "loss:Q",
                title="held-out loss" if held_out else "last loss",
                scale=alt.Scale(domain=[lowest_loss - margin, highest_loss + margin]),
            ),
        )
        .add_params(chosen_cost)
    )
    marks = base.mark_point(filled=True, size=90).encode(color=run_color(runs), tooltip=["run:N", "loss:Q", "x:Q"])
    return _plot_from_chart(
        marks,
        name="trade",
        title="Quality against cost",
        caption="Lower is better, left is cheaper; point at a mark to see its name and numbers.",
    )
