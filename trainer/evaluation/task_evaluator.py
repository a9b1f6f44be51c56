"""Tasks with what came of them: in training at each evaluation, in `shardtune evaluate` once, with the rows kept."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.errors import ShardtuneError
from strategies.runtime import broadcast_object
from trainer.evaluation.tasks.base import TaskRow
from trainer.evaluation.tasks.prepared import Ready

if TYPE_CHECKING:
    from trainer.evaluation.tasks.asking import Asking
    from trainer.evaluation.writing import Pace


@dataclass(slots=True)
class Done:
    """A task after the model was asked."""

    ready: Ready
    rows: list[TaskRow]
    values: dict[str, float]
    seconds: float
    pace: Pace | None = None
    """How its answers were written, by tasks that need some."""


class TaskEvaluator:
    """Asks the model every task."""

    def __init__(self, tasks: list[Ready], asking: Asking) -> None:
        self.tasks, self.asking = tasks, asking
        self.under_way = ""
        """Name of the task that the model is asked at this moment."""

    def each(self, names: Collection[str] | None = None) -> Iterator[Done]:
        """Every task with its rows, or those of these names. All ranks must exhaust it."""
        self.asking.seen.clear()
        for ready in self.tasks:
            if names is not None and ready.task.name not in names:
                continue
            began, writer = time.perf_counter(), self.asking.writer
            self.under_way = ready.task.name
            writer.pace = None
            try:
                rows = ready.task.run(ready.cases, self.asking)
            except ShardtuneError as error:  # the same on all ranks
                raise type(error)(f"{ready.task.key}: {error}") from None
            values = ready.task.values(rows) if self.asking.runtime.is_main else {}
            values = broadcast_object(values, self.asking.runtime)
            yield Done(ready, rows, values, time.perf_counter() - began, writer.pace)
