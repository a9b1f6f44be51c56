"""The table of a comparison's page: one row a point, with groups of columns, the best cell of each column marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from launch.compare.comparison import ComparedPoint, Comparison
from launch.compare.cost_plots import is_planned_memory_comparable
from launch.compare.curves import format_difference
from launch.compare.metric_meaning import greater_is_better_by_name
from launch.compare.quality import (
    QualityMetric,
    group_points_into_jobs,
    point_has_diverged,
    quality_metric_name,
    rank_jobs_by_quality,
)
from launch.compare.recommendation import is_memory_difference_shown, is_recommendable, is_speed_difference_shown
from launch.compare.repeats import STEP_PARTS
from trainer.pages.numbers import UNKNOWN, format_duration, format_number, format_percent
from trainer.pages.pieces import PageCell, PageColumn, PageTable, Tone
from trainer.reporting.status import RunState

Best = Literal["", "smallest", "largest"]
HELD_OUT_GROUP = "held-out data"
MAX_AXIS_COLUMNS = 6
MAX_METRIC_COLUMNS = 5
"""Held-out metrics in the table, the one that decides first; a folded table has the others."""
MAX_FOLDED_CELLS = 1200
"""Cells of the folded table of all held-out metrics: a page of 100 points and 50 tasks must stay small."""


@dataclass(frozen=True, slots=True)
class MeasureColumn:
    """A column of numbers: how the number of a point is read, and how it looks."""

    heading: str
    group: str
    value: Callable[[ComparedPoint], float | None]
    show: Callable[[float], str] = format_number
    best: Best = ""
    unit: str = ""
    note: str = ""


class _FilledColumn(NamedTuple):
    """A column of the page's table, with its cell for each point."""

    column: PageColumn
    cells: list[PageCell]


def points_table(comparison: Comparison) -> PageTable:
    """The table of all points. Columns that are unknown for every point are left out.

    A point that failed or diverged has numbers, but none of them is a best one. Metrics of the test documents are shown and
    never marked.
    """
    points = list(comparison.points)
    measures = _measures(comparison)
    held_out_measures = [measure for measure in measures if measure.group == HELD_OUT_GROUP]
    other_measures = [measure for measure in measures if measure.group != HELD_OUT_GROUP]
    name_cells = [_name_cell(point) for point in points]
    state_cells = [_state_cell(point) for point in points]
    filled_columns = [
        _FilledColumn(PageColumn("point"), name_cells),
        # The held-out metrics come right after the name, so that a phone shows the first of them without scrolling.
        *_measure_columns(held_out_measures, points),
        *_axis_columns(comparison),
        *_measure_columns(other_measures, points),
        _FilledColumn(PageColumn("state"), state_cells),
    ]
    columns = [filled.column for filled in filled_columns]
    cells_by_column = [filled.cells for filled in filled_columns]
    rows = [list(row) for row in zip(*cells_by_column, strict=True)]
    return PageTable(columns, rows, caption="A click on a heading sorts.", id="points")


def _axis_columns(comparison: Comparison) -> list[_FilledColumn]:
    """A column with the value of each point for each of the first `MAX_AXIS_COLUMNS` axes (settings in which points differ)."""
    filled_columns = []
    for axis in comparison.axes[:MAX_AXIS_COLUMNS]:
        cells = [PageCell(label, _label_sort_value(label)) for label in axis.labels]
        filled_columns.append(_FilledColumn(PageColumn(axis.title, group="settings"), cells))
    return filled_columns


def _measure_columns(measures: Sequence[MeasureColumn], points: Sequence[ComparedPoint]) -> list[_FilledColumn]:
    """The columns of these measures, without those that are unknown for every point."""
    filled_columns = []
    for measure in measures:
        values = [measure.value(point) if point.measured.steps else None for point in points]
        if all(value is None for value in values):
            continue
        column = PageColumn(measure.heading, measure.group, measure.best, measure.unit, measure.note)
        cells = [_measure_cell(measure, point, value) for point, value in zip(points, values, strict=True)]
        filled_columns.append(_FilledColumn(column, cells))
    return filled_columns


def _name_cell(point: ComparedPoint) -> PageCell:
    """The cell with a point's name; below the name stands its state if its numbers do not count."""
    has_numbers_that_do_not_count = point.measured.steps > 0 and not is_recommendable(point)
    note = _state_and_tone(point)[0] if has_numbers_that_do_not_count else ""
    return PageCell(point.name, point.name, note=note)


def _label_sort_value(label: str) -> float | str:
    """What the cell of a value on an axis is sorted by: its number, or its text if it is none."""
    try:
        return float(label)
    except ValueError:
        return label


def _measure_cell(measure: MeasureColumn, point: ComparedPoint, value: float | None) -> PageCell:
    """The cell of a number; a dash if it is not known.

    In a column that marks its best cell, a point that cannot be recommended gets no value to sort by: it is never the best.
    """
    if value is None:
        return PageCell(UNKNOWN, None)
    is_ranked = not measure.best or is_recommendable(point)
    return PageCell(measure.show(value), _sort_value(value) if is_ranked else None)


def _sort_value(value: float) -> float:
    """The number by which the page sorts a cell, with six digits: the page is smaller."""
    return float(f"{value:.6g}")


def _state_and_tone(point: ComparedPoint) -> tuple[str, Tone]:
    """(state in a word, colour of its cell) of a point; a diverged one counts as `diverged`, whatever its run says."""
    if point_has_diverged(point):
        return "diverged", "bad"
    tones: dict[str, Tone] = {
        RunState.done: "",
        RunState.failed: "bad",
        RunState.preempted: "warning",
        RunState.running: "note",
    }
    return point.state, tones.get(point.state, "warning")


def _state_cell(point: ComparedPoint) -> PageCell:
    """The cell with a point's state; below it stands why it ended if it is not done."""
    state, tone = _state_and_tone(point)
    reason = point.reason or ""
    return PageCell(state, state, tone=tone, note=reason.removeprefix(f"{state}: "))


def _measures(comparison: Comparison) -> list[MeasureColumn]:
    """The numeric columns of the table of points, in order, from held-out metrics to the price.

    A column with a `best` marks its largest or smallest number with a star.
    """
    begun_points = comparison.begun_points
    has_repeats = any(point.summary.repeats > 1 for point in begun_points)
    # No star if no difference is shown: it would contradict the answer.
    speed_best: Best = "largest" if is_speed_difference_shown(begun_points) else ""
    memory_best: Best = "smallest" if is_memory_difference_shown(begun_points) else ""
    step_best: Best = "smallest" if speed_best else ""
    measures = _quality_measures(comparison)
    measures.append(
        MeasureColumn(
            "tokens/s",
            "speed",
            lambda point: point.measured.tokens_per_s,
            _three_digits,
            speed_best,
            note="All ranks together, median.",
        )
    )
    if has_repeats:
        measures.append(MeasureColumn("slowest", "speed", _slowest, _three_digits, note="Of the repeats."))
        measures.append(MeasureColumn("fastest", "speed", _fastest, _three_digits, note="Of the repeats."))
    return [
        *measures,
        MeasureColumn(
            "supervised/s", "speed", _supervised_per_s, _three_digits, speed_best, note="Supervised tokens a second."
        ),
        MeasureColumn(
            "MFU", "speed", _mfu_reader(comparison), format_percent, speed_best, note="Share of the device's peak."
        ),
        MeasureColumn("measured", "memory", lambda point: point.measured.memory_gib, _three_digits, memory_best, "GiB"),
        MeasureColumn("planned", "memory", _planned_gib, _three_digits, unit="GiB", note="Tensors, by simulation."),
        MeasureColumn("step", "a step", lambda point: point.measured.step_s, format_duration, step_best),
        *(_part_measure(part) for part in (*STEP_PARTS, "rest")),
        MeasureColumn("exchanged", "a step", _exchanged_gib, _three_digits, "smallest", "GiB"),
        MeasureColumn(
            "exposed",
            "a step",
            lambda point: point.measured.exposed_s,
            format_duration,
            note="Waited for the exchange.",
        ),
        MeasureColumn(
            "start",
            "once",
            _start_without_evaluation_s,
            format_duration,
            note="Until the first step, without the evaluation before it.",
        ),
        MeasureColumn("save", "once", lambda point: point.measured.checkpoint_s, format_duration),
        MeasureColumn("saved", "once", lambda point: point.measured.checkpoint_gib, _three_digits, "smallest", "GiB"),
        MeasureColumn("per million tokens", "price", _dollars, _three_digits, step_best, "$"),
    ]


def _supervised_per_s(point: ComparedPoint) -> float | None:
    # A model that learns labels has no supervised tokens: its rate of 0 is no measurement.
    return point.measured.supervised_tokens_per_s or None


def _planned_gib(point: ComparedPoint) -> float | None:
    return point.measured.planned_gib if is_planned_memory_comparable(point) else None


def _exchanged_gib(point: ComparedPoint) -> float | None:
    return point.measured.exchanged_gib or None


def _dollars(point: ComparedPoint) -> float | None:
    return point.summary.dollars_per_million


def _three_digits(value: float) -> str:
    return format_number(value, digits=3)


def _slowest(point: ComparedPoint) -> float | None:
    return point.summary.spread[0] if point.summary.spread else None


def _fastest(point: ComparedPoint) -> float | None:
    return point.summary.spread[1] if point.summary.spread else None


def _start_without_evaluation_s(point: ComparedPoint) -> float | None:
    """Seconds from the start of a run to its first step, without the evaluation before that step; None if not known."""
    if point.measured.start_s is None:
        return None
    return point.measured.start_s - (point.measured.evaluation_before_s or 0)


def _part_measure(part: str) -> MeasureColumn:
    return MeasureColumn(part, "a step", lambda point: point.summary.parts_s.get(part), format_duration)


def _mfu_reader(comparison: Comparison) -> Callable[[ComparedPoint], float | None]:
    """A function that returns the MFU of a point. It returns None for every point if the points have different peaks."""
    if not comparison.has_comparable_mfu:
        return lambda point: None
    return lambda point: point.measured.mfu


def _quality_measures(comparison: Comparison) -> list[MeasureColumn]:
    """The columns about quality: held-out metrics, metrics of the test documents, training loss, and its difference.

    There is no difference for a single point, which has no baseline.
    """
    metrics = held_out_names(comparison)
    columns = []
    judged_metrics = [metric for metric in metrics if metric.startswith(("eval/", "forgetting"))]
    for metric in judged_metrics[:MAX_METRIC_COLUMNS]:
        best = _best_direction(comparison, metric)
        columns.append(
            MeasureColumn(metric, HELD_OUT_GROUP, _metric_reader(metric), best=best, note="At the last evaluation.")
        )
    test_metrics = [metric for metric in metrics if metric.startswith("test/")]
    for metric in test_metrics[:MAX_METRIC_COLUMNS]:
        note = "Of the test documents. Not marked: who chooses by them cannot measure the choice with them."
        columns.append(MeasureColumn(metric, "test data", _metric_reader(metric), note=note))
    columns.append(MeasureColumn("last loss", "training", lambda point: point.measured.loss))
    if len(comparison.points) > 1:
        note = "Largest relative difference over the first five steps, from the point that the verdict names."
        columns.append(MeasureColumn("difference", "training", _largest_early_difference, format_difference, note=note))
    return columns


def _largest_early_difference(point: ComparedPoint) -> float | None:
    return None if point.loss_difference is None else point.loss_difference.largest_early


def _metric_reader(metric: str) -> Callable[[ComparedPoint], float | None]:
    """A function that returns a held-out metric of a point at its last evaluation; None if the point does not have it."""
    return lambda point: point.measured.after.get(metric)


def _best_direction(comparison: Comparison, metric: str) -> Best:
    """Which cell of a held-out metric gets the star, the largest or the smallest.

    None does if the name does not say which is better, if fewer than two jobs can be compared, or if no difference is
    significant.
    """
    if metric == "eval/perplexity":
        metric = "eval/loss"  # perplexity is its exponential, and only of the loss are sums per micro-batch kept
    ranked = comparison.conclusion.ranked
    is_ranked_already = ranked is not None and ranked.metric.name == metric
    if not is_ranked_already:
        greater_is_better = greater_is_better_by_name(metric)
        jobs = group_points_into_jobs(comparison.begun_points)
        if greater_is_better is None or len(jobs) < 2:
            return ""
        ranked = rank_jobs_by_quality(jobs, QualityMetric(metric, greater_is_better))
    if ranked is None or not ranked.significantly_worse:
        return ""
    return "largest" if ranked.metric.greater_is_better else "smallest"


def held_out_names(comparison: Comparison) -> list[str]:
    """Names of the held-out metrics that any point has at its end, each once; that by which quality is judged comes first."""
    decisive_metric = quality_metric_name(comparison.begun_points)
    names: dict[str, None] = {}  # a dict as an ordered set
    for point in comparison.begun_points:
        names |= dict.fromkeys(point.measured.after)
    return sorted(names, key=lambda name: name != decisive_metric)


def held_out_table(comparison: Comparison) -> PageTable | None:
    """The held-out metrics of each point before and after training; None if no point has any.

    At most `MAX_FOLDED_CELLS` cells: if more metrics would not fit, the caption says how many are left out.
    """
    points: Sequence[ComparedPoint] = comparison.begun_points
    metrics = held_out_names(comparison)
    if not metrics:
        return None
    num_cells_of_metric = 2 * max(1, len(points))  # before and after, for each point
    max_metrics = max(1, MAX_FOLDED_CELLS // num_cells_of_metric)
    columns = [PageColumn("point")]
    rows = [[PageCell(point.name, point.name)] for point in points]
    for metric in metrics[:max_metrics]:
        columns += [PageColumn("before", group=metric), PageColumn("after", group=metric)]
        for row, point in zip(rows, points, strict=True):
            row.append(_held_out_cell(point.measured.before.get(metric)))
            row.append(_held_out_cell(point.measured.after.get(metric)))
    num_left_out = len(metrics) - max_metrics
    caption = f"{num_left_out} more metrics are in compare.csv." if num_left_out > 0 else ""
    return PageTable(columns, rows, caption=caption, id="held-out-metrics")


def _held_out_cell(value: float | None) -> PageCell:
    return PageCell(format_number(value), None if value is None else _sort_value(value))
