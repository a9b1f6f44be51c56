"""The tables of `evaluation.html`: all tasks by their main metric, and all metrics of one task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trainer.evaluation.report.change_scale import Change, ChangeScale
from trainer.evaluation.report.intervals import BETTER, DIFFERS, NO_DIFFERENCE, TOO_FEW_CASES, WORSE
from trainer.evaluation.report.record import DifferenceRecord, MetricRecord, TaskComparison, TaskRecord
from trainer.pages.numbers import UNKNOWN, format_number, format_signed
from trainer.pages.pieces import PageCell, PageColumn, PageTable, Tone

_CAPTION_OF_BARS = (
    "Bars are on one scale: the change in percent of the larger of both values, with its interval. Right of the middle is "
    "better."
)
TONE_BY_VERDICT: dict[str, Tone] = {
    BETTER: "good",
    WORSE: "bad",
    DIFFERS: "note",
    TOO_FEW_CASES: "warning",
    NO_DIFFERENCE: "",
}
"""How a verdict is tinted, in the order in which verdicts are shown."""


class MainMetric(NamedTuple):
    """The metric that stands for a task: its first one."""

    name: str
    record: MetricRecord
    difference: DifferenceRecord | None
    """Its difference from the other model; None if it is not compared."""


def main_metric(task_record: TaskRecord, comparison: TaskComparison | None) -> MainMetric:
    """The metric that stands for a task, its first one. `comparison`: of the task with the other model; None without one."""
    name, record = next(iter(task_record["metrics"].items()))
    return MainMetric(name, record, None if comparison is None else comparison["metrics"].get(name))


def overview_table(
    task_records: Mapping[str, TaskRecord],
    comparisons: Mapping[str, TaskComparison],
    anchor_by_task: Mapping[str, str],
    other_label: str,
) -> PageTable:
    """The table of all tasks, each by its first metric; with a comparison, also its difference from the other model.

    `task_records`: by task, what `evaluation.json` says of it. `comparisons`: the same for tasks that were compared with the
    other model. `anchor_by_task`: where the name of each task leads, such as "task-0" for its section. `other_label`: the
    heading of the other model's column, "base" or "other"; "" if nothing was compared.
    """
    if not other_label:
        return _overview_without_comparison(task_records, anchor_by_task)
    metric_by_task = {name: main_metric(record, comparisons.get(name)) for name, record in task_records.items()}
    scale = ChangeScale.over(Change.of_metric(metric.record, metric.difference) for metric in metric_by_task.values())
    columns = [
        PageColumn("task"),
        PageColumn("verdict"),  # beside the name, where a phone shows it without scrolling
        PageColumn("metric"),
        PageColumn(other_label),
        PageColumn("tuned" if other_label == "base" else "this model"),
        PageColumn("difference"),
        PageColumn("95 % interval", scale=scale.labels),
        PageColumn("better is"),
        PageColumn("rows"),
    ]
    rows = []
    for task, metric in metric_by_task.items():
        # The two values, their difference, and its interval with a bar.
        cells = _comparison_cells(metric.record, metric.difference, scale)
        rows.append(
            [
                PageCell(task, task, href=f"#{anchor_by_task[task]}"),
                _verdict_cell(metric.difference),
                PageCell(metric.name, metric.name),
                cells.other_value,
                cells.value,
                cells.difference,
                cells.interval,
                _better_direction_cell(metric.record),
                _num_rows_cell(task_records[task]),
            ]
        )
    return PageTable(columns, rows, f"Every task by its first metric. {_CAPTION_OF_BARS}", id="all-tasks")


def _overview_without_comparison(
    task_records: Mapping[str, TaskRecord], anchor_by_task: Mapping[str, str]
) -> PageTable:
    """The table of all tasks if no other model was evaluated: the first metric of each, with its own interval.

    `task_records`: by task, what `evaluation.json` says of it. `anchor_by_task`: where the name of each task leads.
    """
    columns = [PageColumn(title) for title in ("task", "metric", "value", "95 % interval", "better is", "rows")]
    rows = []
    for task, task_record in task_records.items():
        name, metric, _ = main_metric(task_record, None)
        rows.append(
            [
                PageCell(task, task, href=f"#{anchor_by_task[task]}"),
                PageCell(name, name),
                PageCell(format_number(metric["value"]), metric["value"]),
                PageCell(_interval_text(metric) or "\N{EN DASH}", metric.get("low")),
                _better_direction_cell(metric),
                _num_rows_cell(task_record),
            ]
        )
    return PageTable(columns, rows, "Every task by its first metric.", id="all-tasks")


def metrics_table(task_record: TaskRecord, comparison: TaskComparison | None, other_label: str) -> PageTable:
    """The table of all metrics of one task, with what each means; with a comparison, also its difference from the other model.

    `comparison`: of the task with the other model; None without one. `other_label`: the heading of that model's column.
    """
    if comparison is None:
        rows = [[_metric_cell(name, metric), _value_cell(metric)] for name, metric in task_record["metrics"].items()]
        return PageTable([PageColumn("metric"), PageColumn("value")], rows)
    differences = comparison["metrics"]
    # All bars of the table have one scale, so that changes of different metrics can be compared by eye.
    scale = ChangeScale.over(
        Change.of_metric(metric, differences.get(name)) for name, metric in task_record["metrics"].items()
    )
    columns = [
        PageColumn("metric"),
        PageColumn("verdict"),
        PageColumn("value"),
        PageColumn(other_label),
        PageColumn("difference"),
        PageColumn("its 95 % interval", scale=scale.labels),
        PageColumn("p"),
    ]
    rows = []
    for name, metric in task_record["metrics"].items():
        difference = differences.get(name)
        cells = _comparison_cells(metric, difference, scale)
        p_value = None if difference is None else difference["p"]
        rows.append(
            [
                _metric_cell(name, metric),
                _verdict_cell(difference),
                _value_cell(metric),
                cells.other_value,
                cells.difference,
                cells.interval,
                PageCell(format_number(p_value, 2), p_value),
            ]
        )
    return PageTable(columns, rows, _CAPTION_OF_BARS)


class _ComparisonCells(NamedTuple):
    """The cells of a metric that was compared with another model."""

    other_value: PageCell
    value: PageCell
    """This model's."""
    difference: PageCell
    interval: PageCell
    """Of the difference, with a bar."""


def _comparison_cells(
    metric: MetricRecord, difference: DifferenceRecord | None, scale: ChangeScale
) -> _ComparisonCells:
    """The cells of one metric in a table of a comparison; without a `difference`, only this model's value is known.

    `scale`: that of the bars in the table.
    """
    value = PageCell(format_number(metric["value"]), metric["value"])
    if difference is None:
        unknown = PageCell(UNKNOWN)
        return _ComparisonCells(unknown, value, unknown, unknown)
    other_value = difference["value"]
    change = difference["difference"]
    return _ComparisonCells(
        other_value=PageCell(format_number(other_value), other_value),
        value=value,
        difference=PageCell(format_signed(change), change),
        interval=PageCell(
            "",
            change,
            note=f"{format_signed(difference['low'])} to {format_signed(difference['high'])}",
            interval=scale.bar(Change.of_metric(metric, difference), TONE_BY_VERDICT.get(difference["verdict"], "")),
        ),
    )


def _verdict_cell(difference: DifferenceRecord | None) -> PageCell:
    """The cell with the verdict on a metric; "not compared" if `difference` is None."""
    if difference is None:
        return PageCell("not compared", "not compared")
    return PageCell(difference["verdict"], difference["verdict"], tone=TONE_BY_VERDICT.get(difference["verdict"], ""))


def _value_cell(metric: MetricRecord) -> PageCell:
    """The cell with the value of a metric, and its interval below if it has one."""
    return PageCell(format_number(metric["value"]), metric["value"], note=_interval_text(metric))


def _interval_text(metric: MetricRecord) -> str:
    """The interval of a value, "0.41 to 0.57"; "" without one. It has no bar: values of different metrics share no scale."""
    if metric.get("low") is None:
        return ""
    return f"{format_number(metric['low'])} to {format_number(metric['high'])}"


def _metric_cell(name: str, metric: MetricRecord) -> PageCell:
    """The cell with the name of a metric; below it what it means, its better direction and its signature."""
    note_parts = [
        metric["says"],
        f"{_better_direction(metric['greater_is_better'])} is better",
        metric.get("signature", ""),
    ]
    return PageCell(name, name, note="; ".join(filter(None, note_parts)))


def _better_direction_cell(metric: MetricRecord) -> PageCell:
    direction = _better_direction(metric["greater_is_better"])
    return PageCell(direction, direction)


def _better_direction(greater_is_better: bool | None) -> str:
    """Which values of a metric are better, in a word: "higher", "lower" or "neither"."""
    if greater_is_better is None:
        return "neither"
    return "higher" if greater_is_better else "lower"


def _num_rows_cell(task_record: TaskRecord) -> PageCell:
    return PageCell(format_number(task_record["num_rows"]), task_record["num_rows"])
