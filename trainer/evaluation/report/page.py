"""`evaluation.html`: an evaluation in one file that needs no network and runs no script (`page.html.j2`)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from trainer.evaluation.report.record import BASE, TUNED, EvaluatedModel
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.classification import ClassificationTask, confusion

PICTURE_PACKAGES = ("altair", "vl_convert")
"""Packages of the extra `report` that draw the confusion matrix. Without them it is a table of numbers."""
MAX_WORST_ROWS = 20
"""Rows of each task that are shown, the worst first."""
MOST_LABELS = 40
"""A confusion matrix with more labels is not drawn."""


def render_page(report: dict[str, Any], tasks: Sequence[Task], models: dict[str, EvaluatedModel]) -> str:
    """The report's page as HTML, with a part for each task. Texts of rows are escaped.

    `models`: the evaluated models by arm (tuned or base). The keys of `parts` are read by `page.html.j2`.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("trainer.evaluation.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_number
    can_draw = all(find_spec(package) is not None for package in PICTURE_PACKAGES)
    compared_tasks = report.get("against", {}).get("tasks", {})
    parts = []
    for task in tasks:
        rows = models[TUNED].rows[task.name]
        base_answers = {}
        if BASE in models:
            base_answers = {row.where: row.answer for row in models[BASE].rows[task.name]}
        matrix = None
        if isinstance(task, ClassificationTask):
            matrix = confusion(rows)
        picture = None
        if can_draw and matrix and len(matrix[0]) <= MOST_LABELS:
            picture = confusion_picture(*matrix)
        score_name, score_of_row = row_value(task, rows)
        parts.append(
            {
                "name": task.name,
                "said": report["tasks"][task.name],
                "apart": compared_tasks.get(task.name),
                "worst": worst_rows_first(task, rows)[:MAX_WORST_ROWS],
                "score": score_name,
                "value": score_of_row,
                "base": base_answers,
                "matrix": matrix,
                "picture": picture,
            }
        )
    return environment.get_template("page.html.j2").render(report=report, parts=parts)


def worst_rows_first(task: Task, rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The rows of a task from bad to good, by what each contributes to the first metric (`row_value`)."""
    metric = task.metrics_for(rows)[0]
    _, score_of_row = row_value(task, rows)
    small_is_bad = metric.ratio is None or metric.greater_is_better
    sign = 1 if small_is_bad else -1
    return sorted(rows, key=lambda row: sign * score_of_row(row))


def row_value(task: Task, rows: Sequence[TaskRow]) -> tuple[str, Callable[[TaskRow], float]]:
    """What a row contributes to the first metric: its name, and a function that computes it.

    A loss is divided by the targets of the row, so that it compares with the loss over all rows.
    """
    metric = task.metrics_for(rows)[0]
    if metric.ratio is None:
        first_score = next(iter(rows[0].scores))
        return first_score, lambda row: float(next(iter(row.scores.values())))
    numerator, denominator = metric.ratio
    if denominator is None:
        return numerator, lambda row: row.scores[numerator]
    return metric.name, lambda row: float(metric.from_sums(row.scores[numerator], row.scores[denominator] or 1.0))


def confusion_picture(names: list[str], counts: list[list[int]]) -> str:
    """A heat map of a confusion matrix, as a `data:` address of an SVG. `counts`: rows [true label][predicted label]."""
    import altair as alt
    import vl_convert

    cells = []
    for true, row in zip(names, counts, strict=True):
        for predicted, count in zip(names, row, strict=True):
            cells.append({"true": true, "predicted": predicted, "rows": count})
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("predicted:N", sort=names, title="predicted"), y=alt.Y("true:N", sort=names, title="true")
    )
    heat = base.mark_rect().encode(color=alt.Color("rows:Q", scale=alt.Scale(scheme="blues"), title="rows"))
    largest_count = max(max(row) for row in counts)
    # Numbers are white on dark cells.
    text_color = alt.condition(alt.datum.rows > largest_count / 2, alt.value("white"), alt.value("black"))
    chart = (heat + base.mark_text().encode(text="rows:Q", color=text_color)).properties(
        width=alt.Step(44), height=alt.Step(32)
    )
    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def format_number(number: float | None) -> str:
    """A number with four digits; a dash for None."""
    return "-" if number is None else f"{number:.4g}"
