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
from trainer.evaluation.tasks.base import TaskRow
from trainer.evaluation.tasks.model_interface import FirstRequest
from trainer.evaluation.tasks.prepared import PreparedTask

if TYPE_CHECKING:
    from trainer.evaluation.generate import GenerationThroughput
    from trainer.evaluation.tasks.model_interface import ModelInterface


SIGN_OF_LIFE_S = 30.0
"""Seconds between two lines of a task that takes long."""


@dataclass(slots=True)
class FinishedTask:
    """A task after the model was asked."""

    prepared: PreparedTask
    rows: list[TaskRow]
    metrics: dict[str, float]
    seconds: float
    throughput: GenerationThroughput | None = None
    """How its answers were written, by tasks that need some."""


class TaskEvaluator:
    """Asks the model every task."""

    def __init__(self, tasks: list[PreparedTask], asking: ModelInterface) -> None:
        self.tasks, self.model = tasks, asking
        self.current_task = ""
        """Name of the task that the model is asked at this moment."""

    def report_progress(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Have `say` hear of a task that takes long, every half minute of it."""
        task, began, last = "", 0.0, 0.0

        def heard(done: int, turns: int) -> None:
            nonlocal task, began, last
            now = clock()
            if task != self.current_task:
                task, began, last = self.current_task, now, now
            elif now - last >= SIGN_OF_LIFE_S and done < turns:
                last = now
                say(f"{task}: {done} of {turns} batches, {now - began:.0f} s since the first")

        self.model.writer.on_batch = heard

    def check_rows(self) -> None:
        """Encode and check the rows of every task, so that a bad row ends the run before the model or a judge is asked.

        No collective; the same on all ranks. Errors: those of `each`. Rows of lm_eval are left out: the harness encodes them
        while it asks. Rank 0 tells every 15 s which task is checked.
        """
        progress = PreparationProgress()
        self.model.checks_only = True
        try:
            with progress.printing():
                for ready in self.tasks:
                    progress.phase = f"checking {len(ready.cases):,} rows of {ready.task.key}"
                    if not ready.task.loads_own_rows:
                        with suppress(FirstRequest):
                            self._run(ready)
        finally:
            self.model.checks_only = False

    def _run(self, ready: PreparedTask) -> list[TaskRow]:
        """The rows of one task, with its key before what went wrong. Errors: DataError, ConfigError, those of servers."""
        try:
            return ready.task.run(ready.cases, self.model)
        except RefusedDocument as error:  # one row that the chat template cannot write
            raise DataError(f"{ready.task.key}: {error}") from None
        except ShardtuneError as error:  # the same on all ranks
            raise type(error)(f"{ready.task.key}: {error}") from None

    def run_tasks(self, names: Collection[str] | None = None) -> Iterator[FinishedTask]:
        """Every task with its rows, or those of these names. All ranks must exhaust it."""
        self.model.cached_losses.clear()
        for ready in self.tasks:
            if names is not None and ready.task.name not in names:
                continue
            began, writer = time.perf_counter(), self.model.writer
            self.current_task = ready.task.name
            writer.throughput = None
            rows = self._run(ready)
            values = ready.task.compute_metrics(rows) if self.model.runtime.is_main else {}
            values = broadcast_object(values, self.model.runtime)
            yield FinishedTask(ready, rows, values, time.perf_counter() - began, writer.throughput)
