"""Runs tasks and reports their metrics: at each evaluation of a training, or once in `shardtune evaluate` with rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.errors import DataError, ShardtuneError
from strategies.runtime import broadcast_object
from trainer.data.document import RefusedDocument
from trainer.data.report.progress import PreparationProgress
from trainer.evaluation.tasks.base import TaskRow, last_user_turn
from trainer.evaluation.tasks.model_interface import RowsChecked
from trainer.evaluation.tasks.prepared import PreparedTask

if TYPE_CHECKING:
    from trainer.evaluation.generate import GenerationThroughput
    from trainer.evaluation.tasks.model_interface import ModelInterface


PROGRESS_INTERVAL_S = 30.0
"""Seconds between two progress lines of a task that takes long."""


@dataclass(slots=True)
class FinishedTask:
    """A task with the report rows and metrics of the evaluated model."""

    prepared: PreparedTask
    rows: list[TaskRow]
    metrics: dict[str, float]
    seconds: float
    throughput: GenerationThroughput | None = None
    """How fast its answers were generated; None for tasks that generate none."""


class TaskEvaluator:
    """Runs all tasks of an evaluation on one model."""

    def __init__(self, tasks: list[PreparedTask], model: ModelInterface) -> None:
        self.tasks = tasks
        self.model = model
        self.current_task = ""
        """Name of the task that runs at this moment, for progress lines and errors."""

    def report_progress(self, print_line: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Print how far each task is while it asks the model, every `PROGRESS_INTERVAL_S` seconds, from now on.

        `print_line`: prints one line. `clock`: seconds since any moment. Sets `on_batch` of the answer generator.
        """
        printer = _ProgressPrinter(print_line, clock)
        self.model.answer_generator.on_batch = lambda num_finished, num_batches: printer.print_if_due(
            self.current_task, num_finished, num_batches
        )

    def check_rows(self) -> None:
        """Encode and check the rows of every task, so that a bad row ends the run before the model or a judge is asked.

        Rows of `lm_eval` tasks are left out, since the harness encodes them while it asks the model. Prints every 15 s which
        task is checked. No collective; does the same on every rank. Raises DataError for a row that cannot be used, and
        ConfigError for a setting that cannot be met.
        """
        progress = PreparationProgress()
        self.model.checks_only = True
        try:
            with progress.printing():
                for prepared in self.tasks:
                    progress.phase = f"checking {len(prepared.cases):,} rows of {prepared.task.config_key}"
                    if not prepared.task.loads_own_rows:
                        # The task encodes all its rows. Its first request to the model raises RowsChecked (`checks_only`).
                        with suppress(RowsChecked):
                            self._run_task(prepared)
        finally:
            self.model.checks_only = False

    def _run_task(self, prepared: PreparedTask) -> list[TaskRow]:
        """Ask the model about the cases of one task; returns its report rows. All ranks must call.

        An error is raised again with the task's settings (`evaluation.tasks.NAME`) before its text, so that users know which
        task it is about: DataError if the chat template refuses a row, any other ShardtuneError as what it is.
        """
        try:
            return prepared.task.score_cases(prepared.cases, self.model)
        except RefusedDocument as error:  # one row that the chat template cannot write
            raise DataError(f"{prepared.task.config_key}: {error}") from None
        except ShardtuneError as error:  # the same on all ranks
            raise type(error)(f"{prepared.task.config_key}: {error}") from None

    def run_tasks(self, names: Collection[str] | None = None) -> Iterator[FinishedTask]:
        """Run every task on the model as it is now, or only the tasks in `names`, and yield each when it is finished.

        All ranks must exhaust the generator: each task is a collective. Metrics are computed on rank 0 and sent to the others.
        """
        self.model.cached_losses.clear()  # the weights have changed since the last evaluation
        for prepared in self.tasks:
            if names is not None and prepared.task.name not in names:
                continue
            began = time.perf_counter()
            answer_generator = self.model.answer_generator
            self.current_task = prepared.task.name
            answer_generator.throughput = None  # stays None if the task generates nothing
            rows = self._run_task(prepared)
            _set_row_questions(prepared, rows)
            metrics: dict[str, float] = {}
            if self.model.runtime.is_main:
                metrics = prepared.task.compute_metrics(rows)
            metrics = broadcast_object(metrics, self.model.runtime)
            seconds = time.perf_counter() - began
            yield FinishedTask(prepared, rows, metrics, seconds, answer_generator.throughput)


class _ProgressPrinter:
    """Prints how far a task is, every `PROGRESS_INTERVAL_S` seconds. The clock starts anew with the first batch of each task."""

    def __init__(self, print_line: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._print_line = print_line
        self._clock = clock
        self._timed_task = ""
        self._first_batch_at = 0.0
        self._last_line_at = 0.0

    def print_if_due(self, task: str, num_finished: int, num_batches: int) -> None:
        """Print a line if the interval is over and batches are left. The first call of a task only starts the clock."""
        now = self._clock()
        if self._timed_task != task:
            self._timed_task = task
            self._first_batch_at = now
            self._last_line_at = now
        elif now - self._last_line_at >= PROGRESS_INTERVAL_S and num_finished < num_batches:
            self._last_line_at = now
            elapsed_s = now - self._first_batch_at
            self._print_line(f"{task}: {num_finished} of {num_batches} batches, {elapsed_s:.0f} s since the first")


def _set_row_questions(prepared: PreparedTask, rows: list[TaskRow]) -> None:
    """Set `question` of each report row to what the user asked last: the page shows it in place of the whole prompt."""
    cases = prepared.cases
    user_turns = [case.user_turn or last_user_turn(case.document) for case in cases]
    # The same locations in the same order: each row is that of its case. By location alone they could not be told apart if
    # several cases have one, as those of a JSON list on one line do.
    if [row.where for row in rows] == [case.location for case in cases]:
        for row, user_turn in zip(rows, user_turns, strict=True):
            row.question = user_turn
        return
    # The task has left cases out, or has several rows for one.
    user_turn_by_location = {case.location: user_turn for case, user_turn in zip(cases, user_turns, strict=True)}
    for row in rows:
        row.question = user_turn_by_location.get(row.where, "")
