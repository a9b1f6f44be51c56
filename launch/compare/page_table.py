"""The table of a comparison's page: one row a point, with groups of columns, the best cell of each column marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.compare.comparison import ComparedRun, Comparison
from launch.compare.conclusion import is_memory_shown, is_sound, is_speed_shown
from launch.compare.cost_plots import has_same_meaning
from launch.compare.curves import rounded
from launch.compare.quality import WatchedMetric, direction_of, diverged, jobs_of, rank, watched_metric_name
from launch.compare.repeats import STEP_PARTS
from trainer.pages.numbers import UNKNOWN, duration, number, percent
from trainer.pages.pieces import PageCell, PageColumn, PageTable, Tone
from trainer.reporting.status import State

Best = Literal["", "smallest", "largest"]
HELD_OUT_GROUP = "held-out data"
MAX_AXIS_COLUMNS = 6
MAX_METRIC_COLUMNS = 5
"""Held-out metrics in the table, the watched one first; a folded table has the others."""
MAX_FOLDED_CELLS = 1200
"""Cells of the folded table of all held-out metrics: a page of 100 points and 50 tasks must stay small."""


@dataclass(frozen=True, slots=True)
class MeasureOfPoint:
    """A number of each point, and how its column looks."""

    heading: str
    group: str
    value: Callable[[ComparedRun], float | None]
    show: Callable[[float], str] = number
    best: Best = ""
    unit: str = ""
    note: str = ""


def points_table(comparison: Comparison) -> PageTable:
    """The table of all points. Columns that are unknown for every point are left out.

    A point that failed or diverged has numbers, but none of them is a best one. Metrics of the test documents are shown and
    never marked.
    """
    runs = list(comparison.runs)
    columns = [PageColumn("point")]
    rows = [[_name_cell(run)] for run in runs]
    measures = _measures(comparison)
    # The held-out metrics stand beside the name, where a phone shows the first of them without scrolling.
    _add_measures([measure for measure in measures if measure.group == HELD_OUT_GROUP], runs, columns, rows)
    for axis in comparison.axes[:MAX_AXIS_COLUMNS]:
        columns.append(PageColumn(axis.title, group="settings"))
        for row, label in zip(rows, axis.labels, strict=True):
            row.append(PageCell(label, _label_sort_value(label)))
    _add_measures([measure for measure in measures if measure.group != HELD_OUT_GROUP], runs, columns, rows)
    columns.append(PageColumn("state"))
    for row, run in zip(rows, runs, strict=True):
        row.append(_state_cell(run))
    return PageTable(columns, rows, caption="A click on a heading sorts.", id="points")


def _add_measures(
    measures: Sequence[MeasureOfPoint],
    runs: Sequence[ComparedRun],
    columns: list[PageColumn],
    rows: list[list[PageCell]],
) -> None:
    """Add the columns of these measures to the table, but those that are unknown for every point."""
    for measure in measures:
        values = [measure.value(run) if run.measured.steps else None for run in runs]
        if all(value is None for value in values):
            continue
        columns.append(PageColumn(measure.heading, measure.group, measure.best, measure.unit, measure.note))
        for row, run, value in zip(rows, runs, values, strict=True):
            row.append(_cell(measure, run, value))


def _name_cell(run: ComparedRun) -> PageCell:
    note = "" if is_sound(run) or not run.measured.steps else _state(run)[0]
    return PageCell(run.name, run.name, note=note)


def _label_sort_value(label: str) -> float | str:
    try:
        return float(label)
    except ValueError:
        return label


def _cell(measure: MeasureOfPoint, run: ComparedRun, value: float | None) -> PageCell:
    """The cell of a number. In a column with a best cell, a point that cannot be recommended has none to be sorted by."""
    if value is None:
        return PageCell(UNKNOWN, None)
    is_ranked = not measure.best or is_sound(run)
    return PageCell(measure.show(value), float(f"{value:.6g}") if is_ranked else None)


def _state(run: ComparedRun) -> tuple[str, Tone]:
    """(state in a word, tone) of a point."""
    if diverged(run):
        return "diverged", "bad"
    tones: dict[str, Tone] = {State.done: "", State.failed: "bad", State.preempted: "warning", State.running: "note"}
    return run.repeated.state, tones.get(run.repeated.state, "warning")


def _state_cell(run: ComparedRun) -> PageCell:
    """How a point ended, and why if it is not done."""
    state, tone = _state(run)
    reason = run.repeated.reason or ""
    return PageCell(state, state, tone=tone, note=reason.removeprefix(f"{state}: "))


def _measures(comparison: Comparison) -> list[MeasureOfPoint]:
    """The numeric columns of the table of points, in its order, from held-out metrics to the price.

    A measure says how a number is read from a run and written in a cell, and whether the largest or smallest one gets a star.
    """
    begun = comparison.begun_runs
    repeated = any(run.summary.repeats > 1 for run in begun)
    # A star where no difference is shown would say what the answer does not.
    speed_best: Best = "largest" if is_speed_shown(begun) else ""
    memory_best: Best = "smallest" if is_memory_shown(begun) else ""
    step_best: Best = "smallest" if speed_best else ""
    measures = _quality_measures(comparison)
    measures.append(
        MeasureOfPoint(
            "tokens/s", "speed", _tokens_per_s, _three_digits, speed_best, note="All ranks together, median."
        )
    )
    if repeated:
        measures.append(MeasureOfPoint("slowest", "speed", _slowest, _three_digits, note="Of the repeats."))
        measures.append(MeasureOfPoint("fastest", "speed", _fastest, _three_digits, note="Of the repeats."))
    return [
        *measures,
        MeasureOfPoint(
            "supervised/s", "speed", _supervised_per_s, _three_digits, speed_best, note="Supervised tokens a second."
        ),
        MeasureOfPoint(
            "MFU", "speed", _comparable_mfu(comparison), percent, speed_best, note="Share of the device's peak."
        ),
        MeasureOfPoint("measured", "memory", lambda run: run.measured.memory_gib, _three_digits, memory_best, "GiB"),
        MeasureOfPoint("planned", "memory", _planned_gib, _three_digits, unit="GiB", note="Tensors, by simulation."),
        MeasureOfPoint("step", "a step", lambda run: run.measured.step_s, duration, step_best),
        *(_part_measure(part) for part in (*STEP_PARTS, "rest")),
        MeasureOfPoint("exchanged", "a step", _exchanged_gib, _three_digits, "smallest", "GiB"),
        MeasureOfPoint(
            "exposed", "a step", lambda run: run.measured.exposed_s, duration, note="Waited for the exchange."
        ),
        MeasureOfPoint(
            "start", "once", _start_s, duration, note="Until the first step, without the evaluation before it."
        ),
        MeasureOfPoint("save", "once", lambda run: run.measured.checkpoint_s, duration),
        MeasureOfPoint("saved", "once", lambda run: run.measured.checkpoint_gib, _three_digits, "smallest", "GiB"),
        MeasureOfPoint("per million tokens", "price", _dollars, _three_digits, step_best, "$"),
    ]


def _tokens_per_s(run: ComparedRun) -> float | None:
    return run.measured.tokens_per_s


def _supervised_per_s(run: ComparedRun) -> float | None:
    # A model that learns labels has no supervised tokens: its rate of 0 is no measurement.
    return run.measured.supervised_tokens_per_s or None


def _planned_gib(run: ComparedRun) -> float | None:
    return run.measured.planned_gib if has_same_meaning(run) else None


def _exchanged_gib(run: ComparedRun) -> float | None:
    return run.measured.exchanged_gib or None


def _dollars(run: ComparedRun) -> float | None:
    return run.summary.dollars_per_million


def _three_digits(value: float) -> str:
    return number(value, digits=3)


def _slowest(run: ComparedRun) -> float | None:
    return run.summary.spread[0] if run.summary.spread else None


def _fastest(run: ComparedRun) -> float | None:
    return run.summary.spread[1] if run.summary.spread else None


def _start_s(run: ComparedRun) -> float | None:
    if run.measured.start_s is None:
        return None
    return run.measured.start_s - (run.measured.evaluation_before_s or 0)


def _part_measure(part: str) -> MeasureOfPoint:
    return MeasureOfPoint(part, "a step", lambda run: run.summary.parts_s.get(part), duration)


def _comparable_mfu(comparison: Comparison) -> Callable[[ComparedRun], float | None]:
    """The MFU of a point; None for all if the points have different peaks."""
    if not comparison.has_comparable_mfu:
        return lambda run: None
    return lambda run: run.measured.mfu


def _quality_measures(comparison: Comparison) -> list[MeasureOfPoint]:
    """The columns about quality: held-out metrics, metrics of the test documents, then the training loss and its difference."""
    names = held_out_names(comparison)
    measures = []
    judged_names = [name for name in names if name.startswith(("eval/", "forgetting"))]
    for name in judged_names[:MAX_METRIC_COLUMNS]:
        best = _best_direction(comparison, name)
        measures.append(
            MeasureOfPoint(name, HELD_OUT_GROUP, _metric_reader(name), best=best, note="At the last evaluation.")
        )
    for name in [name for name in names if name.startswith("test/")][:MAX_METRIC_COLUMNS]:
        note = "Of the test documents. Not marked: who chooses by them cannot measure the choice with them."
        measures.append(MeasureOfPoint(name, "test data", _metric_reader(name), note=note))
    measures.append(MeasureOfPoint("last loss", "training", lambda run: run.measured.loss))
    if len(comparison.runs) > 1:
        note = "Largest relative difference over the first five steps, from the point that the verdict names."
        measures.append(MeasureOfPoint("difference", "training", _early_difference, rounded, note=note))
    return measures


def _early_difference(run: ComparedRun) -> float | None:
    return None if run.loss_difference is None else run.loss_difference.early


def _metric_reader(name: str) -> Callable[[ComparedRun], float | None]:
    return lambda run: run.measured.after.get(name)


def _best_direction(comparison: Comparison, name: str) -> Best:
    """Which cell of a held-out metric gets the star, the largest or the smallest; none if chance may explain the differences."""
    ranked = comparison.conclusion.ranked
    if name == "eval/perplexity":
        name = "eval/loss"  # of which it is the exponential, and whose documents are kept
    if ranked is None or ranked.metric.name != name:
        larger = direction_of(name)
        jobs = jobs_of(comparison.begun_runs)
        if larger is None or len(jobs) < 2:
            return ""
        ranked = rank(jobs, WatchedMetric(name, larger))
    if ranked is None or not ranked.shown_worse:
        return ""
    return "largest" if ranked.metric.greater_is_better else "smallest"


def held_out_names(comparison: Comparison) -> list[str]:
    """Held-out metrics that any point has at its end, the watched one first, each once."""
    watched = watched_metric_name(comparison.begun_runs)
    names: dict[str, None] = {}
    for run in comparison.begun_runs:
        names |= dict.fromkeys(run.measured.after)
    return sorted(names, key=lambda name: name != watched)


def held_out_table(comparison: Comparison) -> PageTable | None:
    """All held-out metrics before and after training, with as many columns as fit; None if the main table has them all."""
    runs: Sequence[ComparedRun] = comparison.begun_runs
    names = held_out_names(comparison)
    if not names:
        return None
    most = max(1, MAX_FOLDED_CELLS // (2 * max(1, len(runs))))
    columns = [PageColumn("point")]
    rows = [[PageCell(run.name, run.name)] for run in runs]
    for name in names[:most]:
        columns += [PageColumn("before", group=name), PageColumn("after", group=name)]
        for row, run in zip(rows, runs, strict=True):
            row += [_plain_cell(run.measured.before.get(name)), _plain_cell(run.measured.after.get(name))]
    left_out = len(names) - most
    caption = f"{left_out} more metrics are in compare.csv." if left_out > 0 else ""
    return PageTable(columns, rows, caption=caption, id="held-out-metrics")


def _plain_cell(value: float | None) -> PageCell:
    return PageCell(number(value), None if value is None else float(f"{value:.6g}"))
