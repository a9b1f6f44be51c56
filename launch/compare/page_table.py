"""The table of a comparison's page: one row a point, with groups of columns, the best cell of each column marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from launch.compare.compared_axes import ComparedAxis
from launch.compare.compared_job import group_points_into_jobs, point_has_diverged
from launch.compare.comparison import ComparedPoint, Comparison
from launch.compare.cost_plots import is_planned_memory_comparable
from launch.compare.curves import format_difference
from launch.compare.metric_meaning import greater_is_better_by_name
from launch.compare.quality import QualityMetric, quality_metric_name, rank_jobs_by_quality
from launch.compare.recommendation import is_memory_difference_shown, is_recommendable, is_speed_difference_shown
from launch.compare.repeats import STEP_PARTS
from trainer.pages.numbers import UNKNOWN, format_duration, format_number, format_percent
from trainer.pages.pieces import PageCell, PageColumn, PageTable, Tone
from trainer.reporting.status import RunState

BestDirection = Literal["", "smallest", "largest"]
"""Which number of a column gets the star that marks the best; empty if none does."""
TONE_BY_STATE: dict[str, Tone] = {
    "diverged": "bad",
    RunState.done: "",
    RunState.failed: "bad",
    RunState.preempted: "warning",
    RunState.running: "note",
}
"""Colour of the cell with a point's state."""
HELD_OUT_GROUP = "held-out data"
MAX_AXIS_COLUMNS = 6
MAX_METRIC_COLUMNS = 5
"""Held-out metrics in the table, the one that decides first; a folded table has the others."""
MAX_FOLDED_CELLS = 1200
"""Cells of the folded table of all held-out metrics: a page of 100 points and 50 tasks must stay small."""


@dataclass(frozen=True, slots=True)
class NumberColumn:
    """The definition of a column of the page's table with a number of each point: how the number is read, and how it looks."""

    heading: str
    group: str
    """The heading over several columns, such as `speed`."""
    read_value: Callable[[ComparedPoint], float | None]
    """The number of a point; None if it is not known."""
    format_value: Callable[[float], str] = format_number
    best: BestDirection = ""
    """Which number gets the star; empty if none does."""
    unit: str = ""
    note: str = ""


class _ColumnWithCells(NamedTuple):
    """A column of the page's table, with its cell for each point."""

    column: PageColumn
    cells: list[PageCell]


def points_table(comparison: Comparison) -> PageTable:
    """Build the main table of a comparison's page: a row for each point, a column for each number that any point has.

    A star marks the best number of a column. A point that failed or diverged has numbers, but none of them is a best one.
    Metrics of the test documents are shown and never marked.
    """
    points = list(comparison.points)
    number_columns = _number_columns(comparison)
    held_out_columns = [number_column for number_column in number_columns if number_column.group == HELD_OUT_GROUP]
    other_columns = [number_column for number_column in number_columns if number_column.group != HELD_OUT_GROUP]
    name_cells = [_name_cell(point) for point in points]
    state_cells = [_state_cell(point) for point in points]
    columns_with_cells = [
        _ColumnWithCells(PageColumn("point"), name_cells),
        # The held-out metrics come right after the name, so that a phone shows the first of them without scrolling.
        *_columns_with_cells(held_out_columns, points),
        *_axis_columns(comparison.axes),
        *_columns_with_cells(other_columns, points),
        _ColumnWithCells(PageColumn("state"), state_cells),
    ]
    columns = [filled.column for filled in columns_with_cells]
    cells_by_column = [filled.cells for filled in columns_with_cells]
    rows = [list(row) for row in zip(*cells_by_column, strict=True)]
    return PageTable(columns, rows, caption="A click on a heading sorts.", id="points")


def _axis_columns(axes: Sequence[ComparedAxis]) -> list[_ColumnWithCells]:
    """The columns that show by which settings the points differ, with the value of each point; at most `MAX_AXIS_COLUMNS`."""
    columns_with_cells = []
    for axis in axes[:MAX_AXIS_COLUMNS]:
        cells = [PageCell(label, sort_value=_label_sort_value(label)) for label in axis.labels]
        columns_with_cells.append(_ColumnWithCells(PageColumn(axis.title, group="settings"), cells))
    return columns_with_cells


def _columns_with_cells(
    number_columns: Sequence[NumberColumn], points: Sequence[ComparedPoint]
) -> list[_ColumnWithCells]:
    """Fill columns of numbers with a cell for each point, and leave out those that are unknown for every point."""
    columns_with_cells = []
    for number_column in number_columns:
        values = []
        for point in points:
            # A refused point, or one that failed early, has zeros that mean nothing.
            has_measurements = point.measured.steps > 0
            values.append(number_column.read_value(point) if has_measurements else None)
        if all(value is None for value in values):
            continue
        column = PageColumn(
            number_column.heading,
            group=number_column.group,
            best=number_column.best,
            unit=number_column.unit,
            note=number_column.note,
        )
        cells = [_number_cell(number_column, point, value) for point, value in zip(points, values, strict=True)]
        columns_with_cells.append(_ColumnWithCells(column, cells))
    return columns_with_cells


def _name_cell(point: ComparedPoint) -> PageCell:
    """The cell with a point's name; below it stands `failed`, `diverged` or the like if its numbers do not count."""
    has_numbers_that_do_not_count = point.measured.steps > 0 and not is_recommendable(point)
    note = _state_word(point) if has_numbers_that_do_not_count else ""
    return PageCell(point.name, sort_value=point.name, note=note)


def _label_sort_value(label: str) -> float | str:
    """What the cell of a value on an axis is sorted by: its number, or its text if it is none."""
    try:
        return float(label)
    except ValueError:
        return label


def _number_cell(number_column: NumberColumn, point: ComparedPoint, value: float | None) -> PageCell:
    """The cell of a point in a column of numbers; a dash if its number is not known.

    The page stars the best value that cells are sorted by. So in a column with a star, a point that failed or diverged gets
    none.
    """
    if value is None:
        return PageCell(UNKNOWN, None)
    is_ranked = not number_column.best or is_recommendable(point)
    return PageCell(number_column.format_value(value), _sort_value(value) if is_ranked else None)


def _sort_value(value: float) -> float:
    """The number by which the page sorts a cell, with six digits: the page is smaller."""
    return float(f"{value:.6g}")


def _state_word(point: ComparedPoint) -> str:
    """How a point ended, in a word for its cell: its state, or `diverged`, whatever its run says."""
    return "diverged" if point_has_diverged(point) else point.state


def _state_cell(point: ComparedPoint) -> PageCell:
    """The cell with a point's state; below it stands why it ended if it is not done."""
    state = _state_word(point)
    tone = TONE_BY_STATE.get(state, "warning")  # such as that of a refused point
    reason = point.reason or ""
    return PageCell(state, sort_value=state, tone=tone, note=reason.removeprefix(f"{state}: "))


def _number_columns(comparison: Comparison) -> list[NumberColumn]:
    """Define the numeric columns of the table of points, in order, from held-out metrics to the price.

    A column with a `best` marks its largest or smallest number with a star. Speed and memory have none if no difference is
    shown.
    """
    begun_points = comparison.begun_points  # those that took a step
    # No star if no difference is shown: it would contradict the answer.
    speed_best: BestDirection = "largest" if is_speed_difference_shown(begun_points) else ""
    memory_best: BestDirection = "smallest" if is_memory_difference_shown(begun_points) else ""
    step_best: BestDirection = "smallest" if speed_best else ""  # time and price of a step follow from the speed
    return [
        *_quality_columns(comparison),
        *_speed_columns(comparison, speed_best),
        NumberColumn(
            "measured",
            group="memory",
            read_value=lambda point: point.measured.memory_gib,
            format_value=_three_digits,
            best=memory_best,
            unit="GiB",
        ),
        NumberColumn(
            "planned",
            group="memory",
            read_value=_planned_gib,
            format_value=_three_digits,
            unit="GiB",
            note="Tensors, by simulation.",
        ),
        *_step_columns(step_best),
        *_start_and_save_columns(),
        NumberColumn(
            "per million tokens",
            group="price",
            read_value=_dollars,
            format_value=_three_digits,
            best=step_best,
            unit="$",
        ),
    ]


def _speed_columns(comparison: Comparison, best: BestDirection) -> list[NumberColumn]:
    """Define the columns of speeds, of all ranks together.

    If a point was repeated, two of them show its slowest and fastest repeat.

    `best`: which of these numbers gets the star.
    """
    speed_column = partial(NumberColumn, group="speed", format_value=_three_digits)
    number_columns = [
        speed_column(
            "tokens/s",
            read_value=lambda point: point.measured.tokens_per_s,
            best=best,
            note="All ranks together, median.",
        )
    ]
    if any(point.summary.repeats > 1 for point in comparison.begun_points):
        number_columns += [
            speed_column("slowest", read_value=_slowest, note="Of the repeats."),
            speed_column("fastest", read_value=_fastest, note="Of the repeats."),
        ]
    return [
        *number_columns,
        speed_column("supervised/s", read_value=_supervised_per_s, best=best, note="Supervised tokens a second."),
        speed_column(
            "MFU",
            read_value=_mfu_reader(is_comparable=comparison.has_comparable_mfu),
            format_value=format_percent,
            best=best,
            note="Share of the device's peak.",
        ),
    ]


def _step_columns(best: BestDirection) -> list[NumberColumn]:
    """Define the columns of one step: its time, the time of its parts, and what the ranks exchange in it.

    Exposed communication is time in which a rank only waits for others. The size of the exchange is counted and not
    measured, so its smallest value always gets the star. `best`: which time of a step gets the star.
    """
    duration_column = partial(NumberColumn, group="a step", format_value=format_duration)
    return [
        duration_column("step", read_value=lambda point: point.measured.step_s, best=best),
        *(_step_part_column(part) for part in (*STEP_PARTS, "rest")),
        NumberColumn(
            "exchanged",
            group="a step",
            read_value=_exchanged_gib,
            format_value=_three_digits,
            best="smallest",
            unit="GiB",
        ),
        duration_column("exposed", read_value=lambda point: point.measured.exposed_s, note="Waited for the exchange."),
    ]


def _start_and_save_columns() -> list[NumberColumn]:
    """Define the columns of what happens once in a run, under the heading `once`: the start, and saving a checkpoint.

    Their times get no star, because a single measurement says little.
    """
    duration_column = partial(NumberColumn, group="once", format_value=format_duration)
    return [
        duration_column(
            "start",
            read_value=lambda point: point.measured.start_without_evaluation_s,
            note="Until the first step, without the evaluation before it.",
        ),
        duration_column("save", read_value=lambda point: point.measured.checkpoint_s),
        NumberColumn(
            "saved",
            group="once",
            read_value=lambda point: point.measured.checkpoint_gib,
            format_value=_three_digits,
            best="smallest",
            unit="GiB",
        ),
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
    return point.summary.spread.low if point.summary.spread else None


def _fastest(point: ComparedPoint) -> float | None:
    return point.summary.spread.high if point.summary.spread else None


def _step_part_column(part: str) -> NumberColumn:
    """The column of a part of a step, such as `forward`."""
    return NumberColumn(
        part,
        group="a step",
        read_value=lambda point: point.summary.parts_s.get(part),
        format_value=format_duration,
    )


def _mfu_reader(*, is_comparable: bool) -> Callable[[ComparedPoint], float | None]:
    """A function that reads the MFU of a point; None for every point if MFUs are not comparable, as shares of different peaks."""
    if not is_comparable:
        return lambda point: None
    return lambda point: point.measured.mfu


def _quality_columns(comparison: Comparison) -> list[NumberColumn]:
    """Define the columns about quality: held-out metrics, metrics of the test documents, training loss, and its difference.

    Of many metrics only the first few, because the table must fit on a screen: the metric that decides is the first, and a
    folded table has the others. The difference is from the baseline, so there is none for a single point.
    """
    metrics = evaluated_metric_names(comparison.begun_points)
    number_columns = []
    held_out_metrics = [metric for metric in metrics if metric.startswith(("eval/", "forgetting"))]
    for metric in held_out_metrics[:MAX_METRIC_COLUMNS]:
        number_columns.append(
            NumberColumn(
                metric,
                group=HELD_OUT_GROUP,
                read_value=_metric_reader(metric),
                best=_best_direction(comparison, metric),
                note="At the last evaluation.",
            )
        )
    test_metrics = [metric for metric in metrics if metric.startswith("test/")]
    for metric in test_metrics[:MAX_METRIC_COLUMNS]:
        note = "Of the test documents. Not marked: who chooses by them cannot measure the choice with them."
        number_columns.append(NumberColumn(metric, group="test data", read_value=_metric_reader(metric), note=note))
    number_columns.append(NumberColumn("last loss", group="training", read_value=lambda point: point.measured.loss))
    if len(comparison.points) > 1:
        number_columns.append(
            NumberColumn(
                "difference",
                group="training",
                read_value=_first_steps_difference,
                format_value=format_difference,
                # The verdict is the sentence on each point, which the page has in a folded section.
                note="Largest relative difference over the first five steps, from the point that the verdict names.",
            )
        )
    return number_columns


def _first_steps_difference(point: ComparedPoint) -> float | None:
    return None if point.loss_difference is None else point.loss_difference.first_steps_difference


def _metric_reader(metric: str) -> Callable[[ComparedPoint], float | None]:
    """A function that returns a held-out metric of a point at its last evaluation; None if the point does not have it."""
    return lambda point: point.measured.metrics_at_end.get(metric)


def _best_direction(comparison: Comparison, metric: str) -> BestDirection:
    """Which cell of a held-out metric gets the star: the largest, the smallest, or none (an empty text).

    None does if the name does not say which is better, if fewer than two jobs can be compared, or if no difference is
    significant. A job is all points that train the same: they differ in strategy and seed alone.
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


def evaluated_metric_names(points: Sequence[ComparedPoint]) -> list[str]:
    """The metrics that any point has at its last evaluation, of held-out and test documents, the decisive one first.

    The decisive one is that by which quality is judged.
    """
    decisive_metric = quality_metric_name(points)
    names: dict[str, None] = {}  # a dict as an ordered set
    for point in points:
        names |= dict.fromkeys(point.measured.metrics_at_end)
    return sorted(names, key=lambda name: name != decisive_metric)


def held_out_table(points: Sequence[ComparedPoint]) -> PageTable | None:
    """Build the folded table of a comparison's page: every held-out metric of each point before and after training.

    None if no point has any. At most `MAX_FOLDED_CELLS` cells, so that the page stays small: the caption says how many
    metrics are left out.
    """
    metrics = evaluated_metric_names(points)
    if not metrics:
        return None
    num_cells_of_metric = 2 * max(1, len(points))  # before and after, for each point
    max_metrics = max(1, MAX_FOLDED_CELLS // num_cells_of_metric)
    columns = [PageColumn("point")]
    rows = [[PageCell(point.name, point.name)] for point in points]
    for metric in metrics[:max_metrics]:
        columns += [PageColumn("before", group=metric), PageColumn("after", group=metric)]
        for row, point in zip(rows, points, strict=True):
            row.append(_held_out_cell(point.measured.metrics_before_training.get(metric)))
            row.append(_held_out_cell(point.measured.metrics_at_end.get(metric)))
    num_left_out = len(metrics) - max_metrics
    caption = f"{num_left_out} more metrics are in compare.csv." if num_left_out > 0 else ""
    return PageTable(columns, rows, caption=caption, id="held-out-metrics")


def _held_out_cell(value: float | None) -> PageCell:
    return PageCell(format_number(value), None if value is None else _sort_value(value))
