"""Tables of task rows for trackers: the worst rows, and those that changed from right to wrong or back."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.report.comparison import changed_rows, right_or_wrong_score_name
from trainer.evaluation.report.page_rows import MAX_WORST_ROWS, score_by_first_metric, worst_rows_first
from trainer.evaluation.tasks.base import Task, TaskRow, other_answer_by_row_id, shorten_prompt
from trainer.reporting.trackers.base import LoggedTable


def row_tables(task: Task, rows: Sequence[TaskRow], before: Sequence[TaskRow] | None) -> dict[str, LoggedTable]:
    """Tables of one task for trackers such as W&B, by name.

    - "eval/NAME/worst_rows", if there are rows.
    - "eval/NAME/changed_rows", the rows that turned from right to wrong or back, if `before` has the same rows and each row is
      right or wrong.

    `before`: rows that were answered by another model, or earlier in the training; None at the first evaluation.
    """
    name = f"eval/{task.name}"
    tables = {}
    if rows:
        tables[f"{name}/worst_rows"] = worst_rows_table(task, rows, before)
    if before is None or [row.where for row in rows] != [row.where for row in before]:
        return tables  # only the same rows can be compared
    score = right_or_wrong_score_name(task, [*rows, *before])
    if score is None:
        return tables
    changed = changed_rows(rows, before, score)
    cells = []
    for present_state, outcome in (("wrong", "lost"), ("right", "won")):
        for row in changed[outcome]:
            cells.append([present_state, row["where"], row["prompt"], row["answer"], row["other"]])
    tables[f"{name}/changed_rows"] = LoggedTable(["now", "row", "prompt", "answer", "answer before"], cells)
    return tables


def worst_rows_table(task: Task, rows: Sequence[TaskRow], before: Sequence[TaskRow] | None) -> LoggedTable:
    """A table for trackers: the task's `MAX_WORST_ROWS` worst rows, with the earlier answer beside the new one."""
    score = score_by_first_metric(task, rows)
    answers_before = other_answer_by_row_id(rows, before or ())  # by id(), because several rows may share a location
    cells = []
    for row in worst_rows_first(task, rows)[:MAX_WORST_ROWS]:
        answer_before = answers_before.get(id(row), "")
        prompt = shorten_prompt(row.prompt)
        cells.append([row.where, score.of_row(row), prompt, row.answer, answer_before, row.reference, row.note])
    return LoggedTable(["row", score.name, "prompt", "answer", "answer before", "reference", "note"], cells)
