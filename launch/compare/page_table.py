"""The table of a comparison's page: one row a point, with groups of columns, the best cell of each column marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.compare.comparison import ComparedPoint, Comparison
from launch.compare.cost_plots import has_same_meaning
from launch.compare.curves import format_difference
from launch.compare.metric_meaning import greater_is_better_by_name
from launch.compare.quality import (
    QualityMetric,
    group_points_into_jobs,
    point_has_diverged,
    quality_metric_name,
    rank_jobs_by_quality,
)
from launch.compare.recommendation import is_memory_shown, is_recommendable, is_speed_shown
from launch.compare.repeats import STEP_PARTS
from trainer.pages.numbers import UNKNOWN, duration, number, percent
from trainer.pages.pieces import PageCell, PageColumn, PageTable, Tone
from trainer.reporting.status import State

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
    show: Callable[[float], str] = number
    best: Best = ""
    unit: str = ""
    note: str = ""


def points_table(comparison: Comparison) -> PageTable:
    """The table of all points. Columns that are unknown for every point are left out.

    A point that failed or diverged has numbers, but none of them is a best one. Metrics of the test documents are shown and
    never marked.
    """
    points = list(comparison.points)
    columns = [PageColumn("point")]
    rows = [[_name_cell(point)] for point in points]
    measures = _measures(comparison)
    # The held-out metrics come right after the name, so that a phone shows the first of them without scrolling.
    _add_measures([measure for measure in measures if measure.group == HELD_OUT_GROUP], points, columns, rows)
    for axis in comparison.axes[:MAX_AXIS_COLUMNS]:
        columns.append(PageColumn(axis.title, group="settings"))
        for row, label in zip(rows, axis.labels, strict=True):
            row.append(PageCell(label, _label_sort_value(label)))
    _add_measures([measure for measure in measures if measure.group != HELD_OUT_GROUP], points, columns, rows)
    columns.append(PageColumn("state"))
    for row, point in zip(rows, points, strict=True):
        row.append(_state_cell(point))
    return PageTable(columns, rows, caption="A click on a heading sorts.", id="points")


def _add_measures(
    measures: Sequence[MeasureColumn],
    points: Sequence[ComparedPoint],
    columns: list[PageColumn],
    rows: list[list[PageCell]],
) -> None:
    """Add the columns of these measures to the table, but those that are unknown for every point."""
    for measure in measures:
        values = [measure.value(point) if point.measured.steps else None for point in points]
        if all(value is None for value in values):
            continue
        columns.append(PageColumn(measure.heading, measure.group, measure.best, measure.unit, measure.note))
        for row, point, value in zip(rows, points, values, strict=True):
            row.append(_cell(measure, point, value))


def _name_cell(point: ComparedPoint) -> PageCell:
    note = "" if is_recommendable(point) or not point.measured.steps else _state(point)[0]
    return PageCell(point.name, point.name, note=note)


def _label_sort_value(label: str) -> float | str:
    try:
        return float(label)
    except ValueError:
        return label


def _cell(measure: MeasureColumn, point: ComparedPoint, value: float | None) -> PageCell:
    """The cell of a number. In a column with a best cell, a point that cannot be recommended gets no value to sort by."""
    if value is None:
        return PageCell(UNKNOWN, None)
    is_ranked = not measure.best or is_recommendable(point)
    return PageCell(measure.show(value), float(f"{value:.6g}") if is_ranked else None)


def _state(point: ComparedPoint) -> tuple[str, Tone]:
    """(state in a word, colour of its cell) of a point; a diverged one counts as `point_has_diverged`, whatever its run says."""
    if point_has_diverged(point):
        return "diverged", "bad"
    tones: dict[str, Tone] = {State.done: "", State.failed: "bad", State.preempted: "warning", State.running: "note"}
    return point.state, tones.get(point.state, "warning")


def _state_cell(point: ComparedPoint) -> PageCell:
    """How a point ended, and why if it is not done."""
    state, tone = _state(point)
    reason = point.reason or ""
    return PageCell(state, state, tone=tone, note=reason.removeprefix(f"{state}: "))


def _measures(comparison: Comparison) -> list[MeasureColumn]:
    """The numeric columns of the table of points, in order, from held-out metrics to the price.

    A column with a `best` marks its largest or smallest number with a star.
    """
    begun_points = comparison.begun_points
    has_repeats = any(point.summary.repeats > 1 for point in begun_points)
    # No star if no difference is shown: it would contradict the answer.
    speed_best: Best = "largest" if is_speed_shown(begun_points) else ""
    memory_best: Best = "smallest" if is_memory_shown(begun_points) else ""
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
            "MFU", "speed", _comparable_mfu(comparison), percent, speed_best, note="Share of the device's peak."
        ),
        MeasureColumn("measured", "memory", lambda point: point.measured.memory_gib, _three_digits, memory_best, "GiB"),
        MeasureColumn("planned", "memory", _planned_gib, _three_digits, unit="GiB", note="Tensors, by simulation."),
        MeasureColumn("step", "a step", lambda point: point.measured.step_s, duration, step_best),
        *(_part_measure(part) for part in (*STEP_PARTS, "rest")),
        MeasureColumn("exchanged", "a step", _exchanged_gib, _three_digits, "smallest", "GiB"),
        MeasureColumn(
            "exposed", "a step", lambda point: point.measured.exposed_s, duration, note="Waited for the exchange."
        ),
        MeasureColumn(
            "start", "once", _start_s, duration, note="Until the first step, without the evaluation before it."
        ),
        MeasureColumn("save", "once", lambda point: point.measured.checkpoint_s, duration),
        MeasureColumn("saved", "once", lambda point: point.measured.checkpoint_gib, _three_digits, "smallest", "GiB"),
        MeasureColumn("per million tokens", "price", _dollars, _three_digits, step_best, "$"),
    ]


def _supervised_per_s(point: ComparedPoint) -> float | None:
    # A model that learns labels has no supervised tokens: its rate of 0 is no measurement.
    return point.measured.supervised_tokens_per_s or None


def _planned_gib(point: ComparedPoint) -> float | None:
    return point.measured.planned_gib if has_same_meaning(point) else None


def _exchanged_gib(point: ComparedPoint) -> float | None:
    return point.measured.exchanged_gib or None


def _dollars(point: ComparedPoint) -> float | None:
    return point.summary.dollars_per_million


def _three_digits(value: float) -> str:
    return number(value, digits=3)


def _slowest(point: ComparedPoint) -> float | None:
    return point.summary.spread[0] if point.summary.spread else None


def _fastest(point: ComparedPoint) -> float | None:
    return point.summary.spread[1] if point.summary.spread else None


def _start_s(point: ComparedPoint) -> float | None:
    if point.measured.start_s is None:
        return None
    return point.measured.start_s - (point.measured.evaluation_before_s or 0)


def _part_measure(part: str) -> MeasureColumn:
    return MeasureColumn(part, "a step", lambda point: point.summary.parts_s.get(part), duration)


def _comparable_mfu(comparison: Comparison) -> Callable[[ComparedPoint], float | None]:
    """A function that reads the MFU of a point. It returns None for all points if they have different peaks."""
    if not comparison.has_comparable_mfu:
        return lambda point: None
    return lambda point: point.measured.mfu


def _quality_measures(comparison: Comparison) -> list[MeasureColumn]:
    """The columns about quality: held-out metrics, metrics of the test documents, then the training loss."""
    names = held_out_names(comparison)
    measures = []
    judged_names = [name for name in names if name.startswith(("eval/", "forgetting"))]
    for name in judged_names[:MAX_METRIC_COLUMNS]:
        best = _best_direction(comparison, name)
        measures.append(
            MeasureColumn(name, HELD_OUT_GROUP, _metric_reader(name), best=best, note="At the last evaluation.")
        )
    for name in [name for name in names if name.startswith("test/")][:MAX_METRIC_COLUMNS]:
        note = "Of the test documents. Not marked: who chooses by them cannot measure the choice with them."
        measures.append(MeasureColumn(name, "test data", _metric_reader(name), note=note))
    measures.append(MeasureColumn("last loss", "training", lambda point: point.measured.loss))
    if len(comparison.points) > 1:
        note = "Largest relative difference over the first five steps, from the point that the verdict names."
        measures.append(MeasureColumn("difference", "training", _early_difference, format_difference, note=note))
    return measures


def _early_difference(point: ComparedPoint) -> float | None:
    return None if point.loss_difference is None else point.loss_difference.largest_early


def _metric_reader(name: str) -> Callable[[ComparedPoint], float | None]:
    return lambda point: point.measured.after.get(name)


def _best_direction(comparison: Comparison, name: str) -> Best:
    """Which cell of a held-out metric gets the star, the largest or the smallest; none if chance may explain the differences."""
    ranked = comparison.conclusion.ranked
    if name == "eval/perplexity":
        name = "eval/loss"  # perplexity is its exponential, and only of the loss are sums per micro-batch kept
    if ranked is None or ranked.metric.name != name:
        greater_is_better = greater_is_better_by_name(name)
        jobs = group_points_into_jobs(comparison.begun_points)
        if greater_is_better is None or len(jobs) < 2:
            return ""
        ranked = rank_jobs_by_quality(jobs, QualityMetric(name, greater_is_better))
    if ranked is None or not ranked.significantly_worse:
        return ""
    return "largest" if ranked.metric.greater_is_better else "smallest"


def held_out_names(comparison: Comparison) -> list[str]:
    """Names of the held-out metrics that any point has at its end, each once; the one that decides comes first."""
    decisive_metric = quality_metric_name(comparison.begun_points)
    names: dict[str, None] = {}
    for point in comparison.begun_points:
        names |= dict.fromkeys(point.measured.after)
    return sorted(names, key=lambda name: name != decisive_metric)


def held_out_table(comparison: Comparison) -> PageTable | None:
    """All held-out metrics before and after training, with as many columns as fit; None if the main table has them all."""
    points: Sequence[ComparedPoint] = comparison.begun_points
    names = held_out_names(comparison)
    if not names:
        return None
    max_metrics = max(1, MAX_FOLDED_CELLS // (2 * max(1, len(points))))  # a metric takes two cells of a point
    columns = [PageColumn("point")]
    rows = [[PageCell(point.name, point.name)] for point in points]
    for name in names[:max_metrics]:
        columns += [PageColumn("before", group=name), PageColumn("after", group=name)]
        for row, point in zip(rows, points, strict=True):
            row += [_plain_cell(point.measured.before.get(name)), _plain_cell(point.measured.after.get(name))]
    left_out = len(names) - max_metrics
    caption = f"{left_out} more metrics are in compare.csv." if left_out > 0 else ""
    return PageTable(columns, rows, caption=caption, id="held-out-metrics")


def _plain_cell(value: float | None) -> PageCell:
    return PageCell(number(value), None if value is None else float(f"{value:.6g}"))
