"""Keeps the finished tasks of an evaluation on disk, so that a later failure does not lose them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import StorageError
from trainer.evaluation.report.record import VERSION
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from trainer.evaluation.task_evaluator import FinishedTask

UNFINISHED_FILE, ROWS = "evaluation_unfinished.json", "evaluation_unfinished_rows.jsonl"
"""Beside the report of an earlier evaluation, which stays as it was until this one is complete."""


class UnfinishedReport:
    """Metrics and rows of each task, written as soon as a model has answered it; for rank 0 alone."""

    def __init__(self, to: Path, model: dict[str, Any]) -> None:
        """`to`: the report's directory. `model`: what is evaluated, for the file."""
        self.directory, self.model = to, model
        self._models: dict[str, dict[str, Any]] = {}
        """By tuned or base: metrics, number of rows and seconds of each task."""

    def add(self, arm: str, done: FinishedTask) -> None:
        """Write down a task that `arm` (tuned or base) has answered. Errors: StorageError."""
        task = done.prepared.task
        if not self._models:
            self.discard()  # not before: an evaluation that answers nothing leaves what an earlier one has finished
        lines = [json_text({"task": task.name, "arm": arm, **asdict(row)}, ensure_ascii=False) for row in done.rows]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / ROWS).open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise StorageError(
                f"{self.directory / ROWS}: cannot be written ({error}); free space, or give another to="
            ) from error
        tasks = self._models.setdefault(arm, {})
        tasks[task.name] = {"metrics": done.metrics, "num_rows": len(done.rows), "seconds": round(done.seconds, 3)}
        # Not `tasks`, as in a report: nothing may take the part for the whole evaluation.
        report = {"version": VERSION, "unfinished": True, "model": self.model, "finished": self._models}
        write_text_atomic(self.directory / UNFINISHED_FILE, json_text(report, indent=1, ensure_ascii=False) + "\n")

    def names(self) -> list[str]:
        """Tasks that are written down, as `base: facts`."""
        return [f"{arm}: {task}" for arm, tasks in self._models.items() for task in tasks]

    def discard(self) -> None:
        """Remove both files: those of an earlier evaluation, or of this one once its report is written. Errors: StorageError."""
        for name in (UNFINISHED_FILE, ROWS):
            try:
                (self.directory / name).unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{self.directory / name}: cannot be removed ({error}); give another to=") from error
