"""Reads and checks the rows of all tasks before a model is loaded."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from strategies.errors import ConfigError
from trainer.data.config import DataConfig, LearnConfig
from trainer.data.objective_spec import Reading
from trainer.data.prepare import Preparation, Prepared, keep_or_first_date
from trainer.data.sources import inputs_of, readers_of
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.data.tokens.clock import TemplateDate
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import Case, Task
from trainer.evaluation.tasks.held_out import HeldOut
from trainer.evaluation.tasks.registry import build_tasks
from trainer.evaluation.tasks.source import read_cases
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.registry import build_objective, family_of, reading_of

DataResult = TypeVar("DataResult")


@dataclass(slots=True)
class PreparedTask:
    """A task and its rows."""

    task: Task
    cases: list[Case]


@dataclass(frozen=True, slots=True)
class TaskContext:
    """The settings of a run that decide how the rows of its tasks are read."""

    data: DataConfig
    reading: Reading
    writes_answers: bool
    """Whether its objective is one of models that write answers."""
    is_language_model: bool
    """Whether its loss is that of a language model."""
    date: TemplateDate | None = None
    """The date that the run's chat template writes for today; None takes it from the clock."""

    @classmethod
    def from_settings(
        cls, data: DataConfig, objective: ObjectiveConfig, date: TemplateDate | None = None
    ) -> TaskContext:
        """The context of these settings."""
        writes_answers = family_of(objective).generates_answers
        is_language_model = build_objective(objective).perplexity
        return cls(data, reading_of(objective), writes_answers, is_language_model, date)

    def encoder(self, tokenizer: Any) -> Encoder:
        """What makes tokens of documents as the run does, whichever turns it learns."""
        reading = self.reading if self.writes_answers or not self.is_language_model else Reading()
        plain = DataConfig(
            learn=LearnConfig(), control_tokens=self.data.control_tokens, max_length=self.data.max_length
        )
        encoder = reading.encoder(tokenizer, settings)
        encoder.fix_date(self.date)
        return encoder


def check_tasks(tasks: Mapping[str, TaskConfig], around: TaskContext, *, held_out: bool, trained: bool = True) -> None:
    """Read the rows of every task that has a file, without a tokenizer; `trained`: there is training data besides.

    `held_out`: there are evaluation documents. `trained`: there is training data. Errors: ConfigError, DataError.
    """
    for task in build_tasks(tasks):
        _check_objective(task, around)
        if task.split == "both" and task.option_values["others"] is not None:
            read_cases(task.outside, None, remote=around.data.remote)  # type: ignore[attr-defined]
        elif task.split == "both" and not held_out:
            raise ConfigError(
                f"{task.key}.path: not set; {task.kind} asks training rows: name their file, or evaluate a run"
            )
        if task.loads_own_rows:
            read_cases(task, None)
        elif task.config.path is None and task.split != "evaluation":
            if not trained:
                raise ConfigError(
                    f"{task.key}.path: not set; {task.kind} asks training rows: name their file, or evaluate a run"
                )
        elif task.config.path is None:
            if not held_out or task.shipped_rows is not None:
                read_cases(task, None)
        elif isinstance(task, HeldOut):
            _read_as_training_data(
                task, lambda data: readers_of(inputs_of(data), preferred=around.reading.formats), around
            )
        else:
            read_cases(task, None, remote=around.data.remote)


def tasks_on_run_documents(tasks: Mapping[str, TaskConfig]) -> list[str]:
    """The settings of the tasks that ask documents of the run, since they name no file; empty where none does."""
    keys = []
    for task in build_tasks(tasks):
        has_file = task.config.path is not None or task.shipped_rows is not None
        draws_others = task.split == "both" and task.option_values["others"] is None
        if not task.loads_own_rows and (not has_file or draws_others):
            keys.append(task.key)
    return keys


def prepare_tasks(
    tasks: Mapping[str, TaskConfig],
    context: TaskContext,
    held_out: Prepared | None,
    tokenizer: Any,
    stop: Callable[[], bool] = lambda: False,
) -> list[PreparedTask]:
    """The tasks with their rows; no collective. Errors: ConfigError, DataError with file and line, Preempted."""
    found = []
    for task in build_tasks(tasks):
        _check_objective(task, around)
        evaluation = None if held_out is None else held_out.evaluation
        if isinstance(task, HeldOut):
            if task.config.path is not None:
                made = _read_as_training_data(
                    task,
                    lambda data: Preparation(
                        data, tokenizer, around.reading, seed=0, stop=stop, choose_date=keep_or_first_date(around.date)
                    ).open_or_make(),
                    around,
                )
                task.dataset, directory = made.train, made.directory
            else:
                read_cases(task, None if held_out is None else _run_documents(evaluation, task, held_out)[:1])
                assert held_out is not None
                task.dataset, directory = evaluation, held_out.directory
            found.append(PreparedTask(task, _sequence_cases(task.dataset, directory)[: task.config.max_rows]))
        else:
            found.append(PreparedTask(task, _read_task_cases(task, held_out, remote=around.data.remote)))
    return found


def _read_task_cases(task: Task, held_out: Prepared | None, *, remote: bool) -> list[Case]:
    """The rows of a task out of its file, or of documents of the run; of both kinds those trained on first."""
    own = (
        None
        if held_out is None or task.loads_own_rows
        else _run_documents(held_out.train if task.split != "evaluation" else held_out.evaluation, task, held_out)
    )
    cases = read_cases(task, own, remote=remote)
    if task.split != "both":
        return cases
    outside = task.outside  # type: ignore[attr-defined]
    others = None if held_out is None else _run_documents(held_out.evaluation, task, held_out)
    beside = read_cases(outside, others, remote=remote)
    for member, some in ((True, cases), (False, beside)):
        for case in some:
            case.fields = {"member": member}
    return [*cases, *beside]


def _check_objective(task: Task, around: TaskContext) -> None:
    if isinstance(task, HeldOut) and not around.is_language_model:
        raise ConfigError(
            f"{task.key}.kind={task.kind}: is of language models, and the objective's loss is another one; eval/loss and "
            "eval/accuracy are there without a task"
        )


def _read_as_training_data(task: Task, use: Callable[[DataConfig], Any], around: TaskContext) -> Any:
    """Read a file as training data of its own, with messages that name the task's settings."""
    data, config = around.data, task.config
    alone = DataConfig(
        path=config.path,
        format=config.format,
        columns=config.columns,
        **{
            name: getattr(data, name)
            for name in (
                *("remote", "cleaning", "learn", "max_length", "control_tokens", "over_length", "layout"),
                *("cache_dir", "verify", "workers"),
            )
        },
    )
    try:
        return read(own_data)
    except ConfigError as error:
        raise ConfigError([_with_task_keys(problem, task) for problem in error.problems]) from None


def _with_task_keys(text: str, task: Task) -> str:
    for name in ("path", "format", "columns"):
        problem = problem.replace(f"data.{name}", f"{task.key}.{name}")
    return problem


def _run_documents(dataset: TokenDataset | None, task: Task, made: Prepared) -> list[Any]:
    """The documents of a split, each once; of tasks that draw some, these, in the order of the data."""
    if dataset is None:
        return []
    table, numbers = DocumentTable(made.directory), list(dict.fromkeys(dataset.documents.tolist()))
    if task.samples_documents and len(numbers) > (most := int(task.option_values["sample"])):
        numbers = sorted(random.Random(int(task.option_values["seed"])).sample(numbers, most))
    return [table.document(int(number)) for number in numbers]


def _sequence_cases(dataset: TokenDataset | None, directory: Any) -> list[Case]:
    """A case for each sequence of a data set."""
    assert dataset is not None
    table = DocumentTable(directory)
    return [Case(table.document(int(number)).where) for number in dataset.documents.tolist()]
