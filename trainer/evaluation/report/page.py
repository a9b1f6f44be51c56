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
"""What draws pictures, of the extra `report`; without them the numbers stand in a table."""
MAX_WORST_ROWS = 20
"""Rows shown of each task, the worst first."""
MOST_LABELS = 40
"""Labels up to which a confusion matrix is drawn."""


def render_page(report: dict[str, Any], tasks: Sequence[Task], found: dict[str, EvaluatedModel]) -> str:
    """The text of the page; what comes from rows is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("trainer.evaluation.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_number
    drawn = all(find_spec(package) is not None for package in PICTURE_PACKAGES)
    parts = []
    for task in tasks:
        rows = found[TUNED].rows[task.name]
        base = {row.where: row.answer for row in found[BASE].rows[task.name]} if BASE in found else {}
        matrix = confusion(rows) if isinstance(task, ClassificationTask) else None
        parts.append(
            {
                "name": task.name,
                "said": report["tasks"][task.name],
                "apart": report.get("against", {}).get("tasks", {}).get(task.name),
                "worst": worst_rows_first(task, rows)[:MAX_WORST_ROWS],
                "score": row_value(task, rows)[0],
                "value": row_value(task, rows)[1],
                "base": base,
                "matrix": matrix,
                "picture": confusion_picture(*matrix) if drawn and matrix and len(matrix[0]) <= MOST_LABELS else None,
            }
        )
    return environment.get_template("page.html.j2").render(report=report, parts=parts)


def worst_rows_first(task: Task, rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Rows from bad to good by the value that `value_of` names."""
    metric, (_, value) = task.metrics_for(rows)[0], row_value(task, rows)
    sign = 1 if metric.ratio is None or metric.greater_is_better else -1
    return sorted(rows, key=lambda row: sign * value(row))


def row_value(task: Task, rows: Sequence[TaskRow]) -> tuple[str, Callable[[TaskRow], float]]:
    """What of the first metric a row has: its name, and the number; of a loss that of one target, as of all rows together."""
    metric = task.metrics_for(rows)[0]
    if metric.ratio is None:
        name = next(iter(rows[0].scores))
        return name, lambda row: float(next(iter(row.scores.values())))
    over, below = metric.ratio
    if below is None:
        return over, lambda row: row.scores[over]
    return metric.name, lambda row: float(metric.from_sums(row.scores[over], row.scores[below] or 1.0))


def confusion_picture(names: list[str], counts: list[list[int]]) -> str:
    """A confusion matrix as an SVG in a data address."""
    import altair as alt
    import vl_convert

    cells = [
        {"true": true, "predicted": said, "rows": counts[i][j]}
        for i, true in enumerate(names)
        for j, said in enumerate(names)
    ]
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("predicted:N", sort=names, title="predicted"), y=alt.Y("true:N", sort=names, title="true")
    )
    heat = base.mark_rect().encode(color=alt.Color("rows:Q", scale=alt.Scale(scheme="blues"), title="rows"))
    most = max(max(row) for row in counts)
    ink = alt.condition(alt.datum.rows > most / 2, alt.value("white"), alt.value("black"))
    chart = (heat + base.mark_text().encode(text="rows:Q", color=ink)).properties(
        width=alt.Step(44), height=alt.Step(32)
    )
    svg = vl_convert.vegalite_to_svg(chart.to_dict())
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def format_number(value: float | None) -> str:
    """A number as people read it; a dash for none."""
    return "-" if value is None else f"{value:.4g}"
