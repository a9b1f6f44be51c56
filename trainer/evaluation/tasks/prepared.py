"""Tasks with their rows, read and checked before there is a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strategies.errors import ConfigError
from trainer.data.config import DataConfig, LearnConfig
from trainer.data.inputs import inputs_of, readers_of
from trainer.data.prepare import Preparation, Prepared
from trainer.data.reading import Reading
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import Case, Task
from trainer.evaluation.tasks.held_out import HeldOut
from trainer.evaluation.tasks.registry import build
from trainer.evaluation.tasks.source import read_cases
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.registry import build_objective, family_of, reading_of


@dataclass(slots=True)
class Ready:
    """A task and its rows."""

    task: Task
    cases: list[Case]


@dataclass(frozen=True, slots=True)
class Around:
    """What of a run its tasks are read with."""

    data: DataConfig
    reading: Reading
    writes: bool
    """Whether its objective is one of models that write answers."""
    language: bool
    """Whether its loss is that of a language model."""

    @classmethod
    def of(cls, data: DataConfig, objective: ObjectiveConfig) -> Around:
        """That of these settings."""
        family, loss = family_of(objective), build_objective(objective)
        return cls(data, reading_of(objective), family.writes_answers, loss.perplexity)

    def encoder(self, tokenizer: Any) -> Encoder:
        """What makes tokens of documents as the run does, whichever turns it learns."""
        reading = self.reading if self.writes or not self.language else Reading()
        plain = DataConfig(
            learn=LearnConfig(), control_tokens=self.data.control_tokens, max_length=self.data.max_length
        )
        return reading.encoder(tokenizer, plain)


def check(tasks: Mapping[str, TaskConfig], around: Around, *, held_out: bool) -> None:
    """Read the rows of every task that has a file, without a tokenizer. Errors: ConfigError, DataError."""
    for task in build(tasks):
        _check_objective(task, around)
        if task.config.path is None:
            if not held_out:
                read_cases(task, None)
        elif isinstance(task, HeldOut):
            _own(task, lambda data: readers_of(inputs_of(data), meant=around.reading.formats), around)
        else:
            read_cases(task, None, remote=around.data.remote)


def prepare(
    tasks: Mapping[str, TaskConfig],
    around: Around,
    held_out: Prepared | None,
    tokenizer: Any,
    stop: Callable[[], bool] = lambda: False,
) -> list[Ready]:
    """The tasks with their rows; no collective. Errors: ConfigError, DataError with file and line, Preempted."""
    found = []
    for task in build(tasks):
        _check_objective(task, around)
        evaluation = None if held_out is None else held_out.evaluation
        if isinstance(task, HeldOut):
            if task.config.path is not None:
                made = _own(
                    task,
                    lambda data: Preparation(data, tokenizer, around.reading, seed=0, stop=stop).open_or_make(),
                    around,
                )
                task.dataset, directory = made.train, made.directory
            else:
                read_cases(task, None if held_out is None else _documents(evaluation, held_out.directory)[:1])
                assert held_out is not None
                task.dataset, directory = evaluation, held_out.directory
            found.append(Ready(task, _cases(task.dataset, directory)[: task.config.max_rows]))
        else:
            documents = None if held_out is None else _documents(evaluation, held_out.directory)
            found.append(Ready(task, read_cases(task, documents, remote=around.data.remote)))
    return found


def _check_objective(task: Task, around: Around) -> None:
    if isinstance(task, HeldOut) and not around.language:
        raise ConfigError(
            f"{task.key}.kind={task.kind}: is of language models, and the objective's loss is another one; eval/loss and "
            "eval/accuracy are there without a task"
        )


def _own(task: Task, use: Callable[[DataConfig], Any], around: Around) -> Any:
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
        return use(alone)
    except ConfigError as error:
        raise ConfigError([_named(problem, task) for problem in error.problems]) from None


def _named(text: str, task: Task) -> str:
    for name in ("path", "format", "columns"):
        text = text.replace(f"data.{name}", f"{task.key}.{name}")
    return text


def _documents(dataset: TokenDataset | None, directory: Any) -> list[Any]:
    if dataset is None or dataset.documents is None:
        return []
    table = DocumentTable(directory)
    return [table.document(int(number)) for number in dict.fromkeys(dataset.documents.tolist())]


def _cases(dataset: TokenDataset | None, directory: Any) -> list[Case]:
    """A case for each sequence of a data set."""
    assert dataset is not None and dataset.documents is not None
    table = DocumentTable(directory)
    return [Case(table.document(int(number)).where) for number in dataset.documents.tolist()]
