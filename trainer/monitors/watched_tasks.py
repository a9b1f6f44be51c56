"""An evaluator that runs a run's tasks, and hands each finished one to the detectors."""

from __future__ import annotations

from collections.abc import Iterator

from strategies.base import Engine
from trainer.evaluation.report.tables import row_tables
from trainer.evaluation.task_evaluator import FinishedTask, TaskEvaluator
from trainer.monitors.detectors import ChallengeDetectors
from trainer.reporting.trackers.base import LoggedTable


class WatchedTasks:
    """An evaluator that runs a run's tasks, and hands each finished one to the detectors."""

    def __init__(
        self, task_evaluator: TaskEvaluator, detectors: ChallengeDetectors, *, makes_tables: bool = False
    ) -> None:
        """`makes_tables`: whether it makes tables of rows for the trackers."""
        self.task_evaluator = task_evaluator
        self.detectors = detectors
        self.makes_tables = makes_tables
        self.tables: dict[str, LoggedTable] = {}
        """Worst rows of the last run, and those that changed sides since the first one."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Run the tasks of an evaluation with the weights of `engine`, and yield each metric, such as ("eval/qa/accuracy", 0.7).

        All ranks must call. Raises Interrupted on all ranks or none.
        """
        self.task_evaluator.model.engine = engine
        self.tables = {}
        base_results = self.detectors.base_results
        task_names = None  # of the tasks to run: all
        if base_results is not None and base_results.tasks_of_unchanged_base:
            # These tasks were run just now, before the first step, on the same weights: they are not run again.
            tasks_of_unchanged_base = base_results.tasks_of_unchanged_base
            base_results.tasks_of_unchanged_base = []
            for finished_task in tasks_of_unchanged_base:
                yield from self._record_and_yield_metrics(finished_task)
            all_names = [prepared.task.name for prepared in self.task_evaluator.tasks]
            task_names = [name for name in all_names if name not in base_results.names]
        for finished_task in self.task_evaluator.run_tasks(task_names):
            yield from self._record_and_yield_metrics(finished_task)

    def _record_and_yield_metrics(self, finished_task: FinishedTask) -> Iterator[tuple[str, float]]:
        """Hand a finished task to the detectors and make its tables; then yield its metrics as (`eval/TASK/METRIC`, value)."""
        self.detectors.record_finished_task(finished_task)
        if self.makes_tables:
            self._make_tables(finished_task)
        for metric, value in finished_task.metrics.items():
            yield f"eval/{finished_task.prepared.task.name}/{metric}", value

    def _make_tables(self, finished_task: FinishedTask) -> None:
        """Make the tables of a task for trackers (`logging.tables`): its worst rows, and those that changed sides.

        Such a row is right now and was wrong at the task's first evaluation, or the other way round. The rows of the first
        evaluation are remembered.
        """
        task = finished_task.prepared.task
        first_rows = self.detectors.first_rows.rows_of(task.name)
        if first_rows is None:  # this is the first evaluation of the task: there is nothing to compare with
            self.detectors.first_rows.remember(task.name, finished_task.rows)
        self.tables |= row_tables(task, finished_task.rows, first_rows)
