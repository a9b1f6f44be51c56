"""Answers of a run's first evaluation and of its newest one to the same prompts, kept in the run directory for its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

FILE = "answers.json"
MAX_ROWS = 6
"""Answers of a task, or of the held-out documents, that are kept: the first ones."""
MAX_CHARACTERS = 2000
"""Characters of a prompt, whose end is kept, and of an answer, whose beginning is."""
GENERATED = "evaluation.generate"
"""Where the answers of a run's own evaluation documents stand, beside its tasks."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """One answer that the model wrote."""

    prompt: str
    answer: str
    reference: str

    def cut(self) -> KeptAnswer:
        """The answer as it is kept, with long texts cut."""
        return KeptAnswer(self.prompt[-MAX_CHARACTERS:], self.answer[:MAX_CHARACTERS], self.reference[:MAX_CHARACTERS])


class KeptAnswers:
    """Keeps the answers of the first evaluation and of the newest one in `answers.json`: `first` and `last`, by task."""

    def __init__(self, run_dir: Path | None) -> None:
        """`run_dir`: None where nothing is to be kept, as on all ranks but rank 0."""
        self.path = None if run_dir is None else run_dir / FILE
        self._pending: dict[str, list[dict[str, Any]]] = {}
        """Answers of the evaluation that runs, by task, each as {"prompt": ..., "answer": ..., "reference": ...}."""

    def add(self, task: str, answers: Sequence[KeptAnswer]) -> None:
        """Take answers of the evaluation that runs."""
        self._pending[task] = [asdict(answer.cut()) for answer in answers[:MAX_ROWS]]

    def write_pending_answers(self, step: int) -> None:
        """Write the answers of the evaluation that has ended into `answers.json`, so that the run's page shows how they changed.

        The file has two sets, each {"step": 40, "tasks": {task: answers}}: `first`, of the run's first evaluation, and `last`,
        which this replaces. A reader compares them. Raises StorageError if that fails; the answers are not written later then.
        """
        answers_by_task = self._pending
        self._pending = {}
        if self.path is None or not answers_by_task:
            return
        newest_set = {"step": step, "tasks": answers_by_task}
        sets = read_kept_answers(self.path.parent)
        # A run that starts anew in its directory, without a checkpoint, is evaluated at step 0 again.
        if not sets or step == 0:
            sets = {"first": newest_set}
        write_text_atomic(self.path, json_text({**sets, "last": newest_set}, ensure_ascii=False))


def read_kept_answers(run_dir: Path) -> dict[str, Any]:
    """Read the answers that a run has kept, {"first": {"step": 0, "tasks": ...}, "last": ...}; {} if it has none."""
    try:
        content = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("first"), dict) else {}
