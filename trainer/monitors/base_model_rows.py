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
from trainer.evaluation.tasks.held_out import HeldOutLossTask
from trainer.monitors.config import CHAT_ANSWERS_TASK, CHAT_TASK
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

FILE = "forgetting-base.json"


@dataclass(slots=True)
class BaseTask:
    """A task as the base model answered it: its rows, and the value of its first metric."""

    rows: list[TaskRow]
    value: float


class BaseModelResults:
    """The base model's results in the tasks that measure forgetting: asked for once, then read back by a resumed run."""

    def __init__(
        self, evaluator: TaskEvaluator, names: list[str], run_dir: Path, print_line: Callable[[str], None]
    ) -> None:
        """`evaluator`: runs tasks with the model of its engine. `names`: of the tasks that measure forgetting.

        `run_dir`: where the results are kept in a file.
        """
        self.evaluator = evaluator
        self.names = names
        """Tasks that the base was or is asked; fewer after an earlier start that asked fewer."""
        self.path = run_dir / FILE
        self.print_line = print_line
        self.runtime = evaluator.model.runtime
        self.tasks: dict[str, BaseTask] | None = None
        """By name of the task; None where the base cannot be asked any more."""
        self.tasks_of_unchanged_base: list[FinishedTask] = []
        """Tasks asked of a model that is the base still: the evaluation before the first step takes them."""

    def read_or_measure_base(self, engine: Engine, step: int) -> None:
        """Get the base model's answers to the tasks that measure forgetting, at a start of the run, into `tasks`.

        `step`: of the checkpoint that this start continues from; 0 for a new run. The cases, in their order:
        - An earlier start kept the answers in its file: they are read.
        - Full tuning continues from a later step: it has changed the base, so that `tasks` stays None, and forgetting is not
          measured.
        - Else the base runs the tasks now, with an adapter switched off if there is one; the answers are written to the file.
        Full tuning at step 0 also sets `tasks_of_unchanged_base`. All ranks must call; raises Interrupted on all or none.
        `engine` becomes that of `evaluator`, which the run's evaluations share.
        """
        self.tasks = self._base_tasks_of_earlier_start()
        if self.tasks is not None:
            # A run of an earlier version did not ask the base the questions of a chat, and goes on without them.
            self.names = [name for name in self.names if name in self.tasks]
            return
        keeps_base = self.evaluator.model.built.tuning.keeps_base
        if not keeps_base and step > 0:
            self.print_line(
                f"challenges.forgetting: is not measured, since this run continues from step {step} of one that did not ask the "
                "base, and full tuning keeps none; start a new run.dir"
            )
            return

        self._measure_base(engine)

    def _measure_base(self, engine: Engine) -> None:
        """Let the base model run the tasks that measure forgetting, and keep its results in `tasks` and in the file.

        `engine`: of the model before its first step, or of one whose adapter can be switched off. All ranks must call.
        """
        built = self.evaluator.model.built
        keeps_base = built.tuning.keeps_base
        self.evaluator.model.engine = engine
        without_adapter = built.tuning.reference(built.step_module.model) if keeps_base else nullcontext()
        with without_adapter:
            finished_tasks = [*self.evaluator.run_tasks(self.names)]
        # Before the first step of full tuning the model is the base: its answers need not be asked for again.
        self.tasks_of_unchanged_base = [] if keeps_base else finished_tasks
        self.tasks = {}
        for finished_task in finished_tasks:
            task = finished_task.prepared.task
            main_metric = task.metrics[0]  # a task names first the metric that stands for it
            self.tasks[task.name] = BaseTask(finished_task.rows, finished_task.metrics[main_metric.name])
        if self.runtime.is_main:  # for a resumed run
            task_records = {name: asdict(task) for name, task in self.tasks.items()}
            write_text_atomic(self.path, json_text({"key": self._results_key(), "tasks": task_records}))

    def _base_tasks_of_earlier_start(self) -> dict[str, BaseTask] | None:
        """The base's results that an earlier start kept, read by rank 0 for all ranks; None if there are none. A collective."""
        tasks = None
        if self.runtime.is_main and self.path.is_file():
            tasks = self._read_base_tasks()
        return broadcast_object(tasks, self.runtime)

    def _read_base_tasks(self) -> dict[str, BaseTask] | None:
        """Read the base model's results that an earlier start wrote; None if the file is damaged, or of other rows or settings.

        The base is then asked again, if it can be. A file without the chat tasks, of an earlier version, is accepted.
        """
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            own_key = self._results_key()  # one list a task, which begins with its name
            key_without_chat = [entry for entry in own_key if entry[0] not in (CHAT_TASK, CHAT_ANSWERS_TASK)]
            if record["key"] not in (own_key, key_without_chat):
                return None
            tasks = {}
            for name, task in record["tasks"].items():
                tasks[name] = BaseTask([TaskRow(**row) for row in task["rows"]], task["value"])
            return tasks
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _results_key(self) -> list[list[object]]:
        """What the kept results are of, one list a task, such as ["general", "loss", 64, "<fingerprint of its data>"].

        That is name, kind, number of cases, and the fingerprint of a task that computes losses. Other tasks or cases have
        another key, so that their results are not taken for these.
        """
        key: list[list[object]] = []
        for prepared in self.evaluator.tasks:
            task = prepared.task
            if task.name in self.names:
                key.append([task.name, task.kind, len(prepared.cases), *_loss_task_fingerprint(task)])
        return key


def _loss_task_fingerprint(task: Task) -> list[str]:
    """What identifies the data of a task that computes losses: [its fingerprint]; empty for any other task."""
    if isinstance(task, HeldOutLossTask) and task.dataset is not None:
        return [task.dataset.fingerprint]
    return []
