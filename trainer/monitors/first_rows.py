"""Rows of a run's tasks at their first evaluation, kept in the run directory. Rows that changed since are reported."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from trainer.evaluation.tasks.base import TaskRow
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

FILE = "first-rows.json"


class FirstRows:
    """Keeps the rows of each task's first evaluation, by name of the task."""

    def __init__(self, run_dir: Path | None) -> None:
        """`run_dir`: None where nothing is to be kept, as on all ranks but rank 0."""
        self.path = None if run_dir is None else run_dir / FILE
        self._rows: dict[str, list[TaskRow]] = {}

    def load_rows_of_earlier_start(self, step: int) -> None:
        """In a run that resumes at `step`, read the rows of each task's first evaluation, with which later ones are compared.

        A damaged file counts as none. A run at step 0 begins without any: `remember` writes them as its tasks are evaluated.
        """
        if self.path is None or step == 0:
            return
        try:
            rows_in_file = json.loads(self.path.read_text(encoding="utf-8"))
            rows_by_task = {}
            for name, rows in rows_in_file.items():
                rows_by_task[name] = [TaskRow(**row) for row in rows]
            self._rows = rows_by_task
        except (OSError, ValueError, TypeError, AttributeError):
            self._rows = {}

    def rows_of(self, task_name: str) -> list[TaskRow] | None:
        """The rows of a task at its first evaluation; None if it was not evaluated before."""
        return self._rows.get(task_name)

    def remember(self, task_name: str, rows: list[TaskRow]) -> None:
        """Keep a task's rows as those of its first evaluation, also in the file, for a resumed run. Raises StorageError."""
        self._rows[task_name] = rows
        if self.path is not None:
            rows_by_task = {}
            for name, task_rows in self._rows.items():
                rows_by_task[name] = [asdict(row) for row in task_rows]
            write_text_atomic(self.path, json_text(rows_by_task))
