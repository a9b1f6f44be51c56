"""Tables of task rows for trackers: the worst rows, and those that changed from right to wrong or back."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.report.comparison import changed_rows, right_or_wrong_score
from trainer.evaluation.report.page import MAX_WORST_ROWS, row_value, worst_rows_first
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.reporting.trackers.base import Table


def row_tables(task: Task, rows: Sequence[TaskRow], before: Sequence[TaskRow] | None) -> dict[str, Table]:
    """Tables of one task by name; `before` are the same rows of another model, or of an earlier moment."""
    name = f"eval/{task.name}"
    found = {f"{name}/worst_rows": worst_rows_table(task, rows, before)} if rows else {}
    if before is not None and [row.where for row in rows] == [row.where for row in before]:
        score = right_or_wrong_score(task, [*rows, *before])
        if score is not None:
            sides = changed_rows(rows, before, score)
            found[f"{name}/changed_rows"] = Table(
                ["now", "row", "prompt", "answer", "answer before"],
                [
                    [now, row["where"], row["prompt"], row["answer"], row["other"]]
                    for now, side in (("wrong", "lost"), ("right", "won"))
                    for row in sides[side]
                ],
            )
    return found


def worst_rows_table(task: Task, rows: Sequence[TaskRow], before: Sequence[TaskRow] | None) -> Table:
    """The rows that the page shows, the worst one first."""
    score, value = row_value(task, rows)
    others = {row.where: row.answer for row in before or ()}
    return Table(
        ["row", score, "prompt", "answer", "answer before", "reference", "note"],
        [
            [
                row.where,
                value(row),
                row.prompt,
                row.answer,
                others.get(row.where, ""),
                row.reference,
                row.note,
            ]
            for row in worst_rows_first(task, rows)[:MAX_WORST_ROWS]
        ],
    )
