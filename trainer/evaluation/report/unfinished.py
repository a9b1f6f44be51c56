"""Keeps the finished tasks of an evaluation on disk, so that a later failure does not lose them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import StorageError
from trainer.evaluation.report.record import REPORT_VERSION
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from trainer.evaluation.task_evaluator import FinishedTask

UNFINISHED_FILE = "evaluation_unfinished.json"
UNFINISHED_ROWS_FILE = "evaluation_unfinished_rows.jsonl"
"""Files next to the report. The report of an earlier evaluation is not touched until this one is complete."""


class UnfinishedReport:
    """Writes metrics and rows of each task as soon as a model has answered it. Only on rank 0."""

    def __init__(self, directory: Path, model: dict[str, Any]) -> None:
        """`directory`: where the report will be. `model`: what is evaluated, for the file."""
        self.directory = directory
        self.model = model
        self._finished: dict[str, dict[str, Any]] = {}
        """By arm (which model: tuned or base) and task: {"base": {"facts": {"metrics": ..., "num_rows": 50, "seconds": 3.2}}}."""

    def add_finished_task(self, arm: str, finished: FinishedTask) -> None:
        """Save a task as soon as all its rows are answered: its rows, and the unfinished report with its metrics.

        The first call also removes the files of an earlier evaluation. `arm`: which model has answered, "tuned" or "base".
        Raises StorageError if one of the files cannot be written.
        """
        task = finished.prepared.task
        if not self._finished:
            # Not earlier: if this evaluation finishes no task, the files of an earlier one stay.
            self.discard()
        lines = []
        for row in finished.rows:
            lines.append(json_text({"task": task.name, "arm": arm, **asdict(row)}, ensure_ascii=False))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / UNFINISHED_ROWS_FILE).open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise StorageError(
                f"{self.directory / UNFINISHED_ROWS_FILE}: cannot be written ({error}); free space, or give another to="
            ) from error
        tasks = self._finished.setdefault(arm, {})
        tasks[task.name] = {
            "metrics": finished.metrics,
            "num_rows": len(finished.rows),
            "seconds": round(finished.seconds, 3),
        }
        # The key is not `tasks`, as in a report, so that nothing reads this part as a complete evaluation.
        report = {"version": REPORT_VERSION, "unfinished": True, "model": self.model, "finished": self._finished}
        write_text_atomic(self.directory / UNFINISHED_FILE, json_text(report, indent=1, ensure_ascii=False) + "\n")

    def finished_task_names(self) -> list[str]:
        """The tasks whose rows are written, with the arm that answered: ["base: facts", "tuned: facts"]."""
        names = []
        for arm, tasks in self._finished.items():
            names += [f"{arm}: {task}" for task in tasks]
        return names

    def discard(self) -> None:
        """Remove both files, of an earlier evaluation or of this one once its report is written. Raises StorageError."""
        for name in (UNFINISHED_FILE, UNFINISHED_ROWS_FILE):
            try:
                (self.directory / name).unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{self.directory / name}: cannot be removed ({error}); give another to=") from error
