"""Tasks as an evaluator: in training at each evaluation, in `shardtune evaluate` once, with the rows kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.errors import ShardtuneError
from strategies.runtime import broadcast_object
from trainer.evaluation.tasks.base import Row
from trainer.evaluation.tasks.prepared import Ready

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.evaluation.tasks.asking import Asking
    from trainer.evaluation.writing import Pace


@dataclass(slots=True)
class Done:
    """A task after the model was asked."""

    ready: Ready
    rows: list[Row]
    values: dict[str, float]
    seconds: float
    pace: Pace | None = None
    """How its answers were written, by tasks that need some."""


class TaskEvaluator:
    """Yields `eval/NAME/METRIC` of every task."""

    def __init__(self, tasks: list[Ready], asking: Asking) -> None:
        self.tasks, self.asking = tasks, asking

    def run(self, engine: Engine) -> Iterator[tuple[str, float]]:
        """Yield (name, value), equal on all ranks. All ranks must call; raises Interrupted on all or none."""
        self.asking.engine = engine
        for done in self.each():
            for metric, value in done.values.items():
                yield f"eval/{done.ready.task.name}/{metric}", value

    def each(self) -> Iterator[Done]:
        """Every task with its rows. All ranks must exhaust it."""
        self.asking.seen.clear()
        for ready in self.tasks:
            began, writer = time.perf_counter(), self.asking.writer
            writer.pace = None
            try:
                rows = ready.task.run(ready.cases, self.asking)
            except ShardtuneError as error:  # the same on all ranks
                raise type(error)(f"{ready.task.key}: {error}") from None
            values = ready.task.values(rows) if self.asking.runtime.is_main else {}
            values = broadcast_object(values, self.asking.runtime)
            yield Done(ready, rows, values, time.perf_counter() - began, writer.pace)
