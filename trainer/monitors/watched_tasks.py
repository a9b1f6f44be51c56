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
        self, task_evaluator: TaskEvaluator, challenges: ChallengeDetectors, *, makes_tables: bool = False
    ) -> None:
        """`makes_tables`: whether it makes tables of rows for the trackers."""
        self.task_evaluator = task_evaluator
        self.challenges = challenges
        self.makes_tables = makes_tables
        self.tables: dict[str, LoggedTable] = {}
        """Worst rows of the last run, and those that changed sides since the first one."""

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Run the tasks: yield (name, value) of each metric. All ranks must call; raises Interrupted on all or none."""
        self.task_evaluator.model.engine = engine
        self.tables = {}
        base = self.challenges.base_rows
        names = None
        if base is not None and base.tasks_of_unchanged_base:
            # The base was asked these just now, and the model is the base still.
            tasks_of_unchanged_base = base.tasks_of_unchanged_base
            base.tasks_of_unchanged_base = []
            for finished in tasks_of_unchanged_base:
                yield from self._metrics_of(finished)
            all_names = [prepared.task.name for prepared in self.task_evaluator.tasks]
            names = [name for name in all_names if name not in base.names]
        for finished in self.task_evaluator.run_tasks(names):
            yield from self._metrics_of(finished)

    def _metrics_of(self, finished_task: FinishedTask) -> Iterator[tuple[str, float]]:
        """Hand a finished task to the detectors; yields its metrics as (`eval/TASK/METRIC`, value)."""
        self.challenges.add_task(finished_task)
        task = finished_task.prepared.task
        if self.makes_tables:
            # To compare with. In the first evaluation of a task there is nothing yet.
            first_rows = self.challenges.first_rows.rows_of(task.name)
            if first_rows is None:
                self.challenges.first_rows.remember(task.name, finished_task.rows)
            self.tables |= row_tables(task, finished_task.rows, first_rows)
        for metric, value in finished_task.metrics.items():
            yield f"eval/{task.name}/{metric}", value
