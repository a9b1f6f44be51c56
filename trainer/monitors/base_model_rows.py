"""The base model's answers to the tasks that measure forgetting, computed once and kept in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from strategies.base import Engine
from strategies.runtime import broadcast_object
from trainer.evaluation.task_evaluator import FinishedTask, TaskEvaluator
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.held_out import HeldOut
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

FILE = "forgetting-base.json"


@dataclass(slots=True)
class BaseTask:
    """A task of the base: its rows, of which scores alone are kept on the disk, and its first metric."""

    rows: list[TaskRow]
    value: float


class BaseRows:
    """Asks the base model, or reads its answers from before the run was interrupted."""

    def __init__(
        self, evaluator: TaskEvaluator, names: list[str], run_dir: Path, print_line: Callable[[str], None]
    ) -> None:
        self.evaluator = evaluator
        self.names = names
        self.path = run_dir / FILE
        self.print_line = print_line
        self.runtime = evaluator.model.runtime
        self.tasks: dict[str, BaseTask] | None = None
        """By name of the task; None where the base cannot be asked any more."""
        self.fresh_tasks: list[FinishedTask] = []
        """Tasks asked of a model that is the base still: the evaluation before the first step takes them."""

    def begin(self, engine: Engine, step: int) -> None:
        """Before the first step of this start. All ranks must call; raises Interrupted on all or none."""
        self.tasks = self._read_kept()
        if self.tasks is not None:
            return
        built = self.evaluator.model.built
        if not built.tuning.keeps_base and step > 0:
            self.print_line(
                f"challenges.forgetting: is not measured, since this run continues from step {step} of one that did not ask the "
                "base, and full tuning keeps none; start a new run.dir"
            )
            return
        self.evaluator.model.engine = engine
        keeps_base = built.tuning.keeps_base
        with built.tuning.reference(built.step_module.model) if keeps_base else nullcontext():
            finished = [*self.evaluator.run_tasks(self.names)]
        # Before the first step of full tuning the model is the base: its answers need not be asked for again.
        self.fresh_tasks = [] if keeps_base else finished
        self.tasks = {task.prepared.task.name: BaseTask(task.rows, _first_metric(task)) for task in finished}
        if self.runtime.is_main:
            tasks = {name: asdict(task) for name, task in self.tasks.items()}
            write_text_atomic(self.path, json_text({"key": self._key(), "tasks": tasks}))

    def _read_kept(self) -> dict[str, BaseTask] | None:
        """The tasks in the file, if they are of the same rows. Rank 0 reads it for all. All ranks must call."""
        tasks = self._read_file() if self.runtime.is_main and self.path.is_file() else None
        return broadcast_object(tasks, self.runtime)

    def _read_file(self) -> dict[str, BaseTask] | None:
        """None if the file is damaged, or of other rows: the base is asked again, if it can be."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["key"] != self._key():
                return None
            tasks = {}
            for name, task in content["tasks"].items():
                tasks[name] = BaseTask([TaskRow(**row) for row in task["rows"]], task["value"])
            return tasks
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _key(self) -> list[list[object]]:
        """Which tasks and cases the rows are of."""
        key: list[list[object]] = []
        for prepared in self.evaluator.tasks:
            task = prepared.task
            if task.name in self.names:
                key.append([task.name, task.kind, len(prepared.cases), *_fingerprint(task)])
        return key


def _fingerprint(task: Task) -> list[str]:
    return [task.dataset.fingerprint] if isinstance(task, HeldOut) and task.dataset is not None else []


def _first_metric(finished: FinishedTask) -> float:
    return finished.metrics[finished.prepared.task.metrics[0].name]
