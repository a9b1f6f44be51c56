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
class Base:
    """A task of the base: its rows, of which scores alone are kept on the disk, and its first metric."""

    rows: list[TaskRow]
    value: float


class BaseRows:
    """Asks the base, or reads what it said before the run was interrupted."""

    def __init__(self, evaluator: TaskEvaluator, names: list[str], run_dir: Path, say: Callable[[str], None]) -> None:
        self.evaluator, self.names, self.path, self.say = evaluator, names, run_dir / FILE, say
        self.runtime = evaluator.model.runtime
        self.found: dict[str, Base] | None = None
        """By name of the task; None where the base cannot be asked any more."""
        self.fresh: list[FinishedTask] = []
        """What was asked of a model that is the base still, for the evaluation before the first step."""

    def begin(self, engine: Engine, step: int) -> None:
        """Before the first step of this start. All ranks must call; raises Interrupted on all or none."""
        self.found = self._kept()
        if self.found is not None:
            return
        built = self.evaluator.model.built
        if not built.tuning.keeps_base and step > 0:
            self.say(
                f"challenges.forgetting: is not measured, since this run continues from step {step} of one that did not ask the "
                "base, and full tuning keeps none; start a new run.dir"
            )
            return
        self.evaluator.model.engine = engine
        keeps = built.tuning.keeps_base
        with built.tuning.reference(built.step_module.model) if keeps else nullcontext():
            done = [*self.evaluator.run_tasks(self.names)]
        self.fresh = [] if keeps else done
        self.found = {each.prepared.task.name: Base(each.rows, _first(each)) for each in done}
        if self.runtime.is_main:
            kept = {name: asdict(base) for name, base in self.found.items()}
            write_text_atomic(self.path, json_text({"key": self._key(), "tasks": kept}))

    def _kept(self) -> dict[str, Base] | None:
        """What the file says, where it is of the same rows; rank 0's word. All ranks must call."""
        found = None
        if self.runtime.is_main and self.path.is_file():
            try:
                raw = json.loads(self.path.read_text(encoding="utf-8"))
                if raw["key"] == self._key():
                    tasks = raw["tasks"].items()
                    found = {
                        name: Base([TaskRow(**row) for row in each["rows"]], each["value"]) for name, each in tasks
                    }
            except (OSError, ValueError, KeyError, TypeError):
                found = None  # asked again, where it can be
        return broadcast_object(found, self.runtime)

    def _key(self) -> list[list[object]]:
        """What the rows are of."""
        ready = [each for each in self.evaluator.tasks if each.task.name in self.names]
        return [[each.task.name, each.task.kind, len(each.cases), *_fingerprint(each.task)] for each in ready]


def _fingerprint(task: Task) -> list[str]:
    return [task.dataset.fingerprint] if isinstance(task, HeldOut) and task.dataset is not None else []


def _first(done: FinishedTask) -> float:
    return done.metrics[done.prepared.task.metrics[0].name]
