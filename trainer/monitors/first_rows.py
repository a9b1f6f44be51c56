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
    """Rows by name of the task."""

    def __init__(self, run_dir: Path | None) -> None:
        """`run_dir`: None where nothing is to be kept, as on all ranks but rank 0."""
        self.path = None if run_dir is None else run_dir / FILE
        self._rows: dict[str, list[TaskRow]] = {}

    def begin(self, step: int) -> None:
        """Before the first step of this start: read what was kept, unless the run begins anew. A damaged file counts as none."""
        if self.path is None or step == 0:
            return
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8")).items()
            self._rows = {name: [TaskRow(**row) for row in rows] for name, rows in kept}
        except (OSError, ValueError, TypeError, AttributeError):
            self._rows = {}

    def before(self, name: str, rows: list[TaskRow]) -> list[TaskRow] | None:
        """The first rows of a task; None where these are they, which are kept then. Raises StorageError."""
        found = self._rows.get(name)
        if found is None:
            self._rows[name] = rows
            if self.path is not None:
                kept = {each: [asdict(row) for row in some] for each, some in self._rows.items()}
                write_text_atomic(self.path, json_text(kept))
        return found
