"""Reads and checks the rows of all tasks before a model is loaded."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from strategies.errors import ConfigError
from trainer.data.config import DataConfig, LearnConfig
from trainer.data.document import Document
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation, PreparedData, keep_or_first_date
from trainer.data.sources import find_inputs, make_row_readers
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.data.tokens.clock import TemplateDate
from trainer.data.tokens.encode import Encoder
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import Task, TaskCase, last_user_turn
from trainer.evaluation.tasks.held_out import HeldOutLossTask
from trainer.evaluation.tasks.model_interface import SHOWN_CHARACTERS
from trainer.evaluation.tasks.registry import build_tasks
from trainer.evaluation.tasks.source import no_rows_error, read_cases
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.registry import build_objective, data_spec_of, objective_family

DataResult = TypeVar("DataResult")


@dataclass(slots=True)
class PreparedTask:
    """A task with its rows."""

    task: Task
    cases: list[TaskCase]


@dataclass(frozen=True, slots=True)
class TaskContext:
    """The settings of a run that decide how the rows of its tasks are read."""

    data: DataConfig
    data_spec: DataSpec
    writes_answers: bool
    """Whether the run's objective trains a model that writes answers."""
    is_language_model: bool
    """Whether the run's loss is that of a language model."""
    date: TemplateDate | None = None
    """The date that the run's chat template writes for today; None takes it from the clock."""

    @classmethod
    def from_settings(
        cls, data: DataConfig, objective: ObjectiveConfig, date: TemplateDate | None = None
    ) -> TaskContext:
        """The context of these settings."""
        writes_answers = objective_family(objective).generates_answers
        is_language_model = build_objective(objective).perplexity
        return cls(data, data_spec_of(objective), writes_answers, is_language_model, date)

    def build_encoder(self, tokenizer: Any) -> Encoder:
        """Make the encoder that turns prompts and answers of tasks into tokens, as the run's training data was.

        Which turns the run learns from does not matter here, so `learn` keeps its defaults. A chat template that writes today's
        date writes that of the run, so that an evaluation months later has the same prompts.
        """
        data_spec = self.data_spec
        if self.is_language_model and not self.writes_answers:
            # An objective such as `pretrain` encodes plain texts alone; tasks also need prompts with answers.
            data_spec = DataSpec()
        settings = DataConfig(
            learn=LearnConfig(), control_tokens=self.data.control_tokens, max_length=self.data.max_length
        )
        encoder = data_spec.encoder(tokenizer, settings)
        encoder.fix_date(self.date)
        return encoder


def check_tasks(tasks: Mapping[str, TaskConfig], context: TaskContext, *, held_out: bool, trained: bool = True) -> None:
    """Read the rows of every task that has a file, before a model is loaded, so that bad rows end a run at once.

    `tasks`: `evaluation.tasks` by name. `held_out`: whether the run has evaluation documents. `trained`: whether it has
    training data. Needs no tokenizer, and no GPU.

    Raises ConfigError if a task fits neither the objective nor the data, DataError for bad rows.
    """
    for task in build_tasks(tasks):
        _check_objective(task, context)
        if task.compares_split_documents:
            _check_membership_has_untrained_rows(task, context, held_out=held_out)
        _check_rows_are_readable(task, context, held_out=held_out, trained=trained)


def _check_membership_has_untrained_rows(task: Task, context: TaskContext, *, held_out: bool) -> None:
    """Check that a membership task, which guesses whether rows were trained on, also has rows that were not.

    They are the rows of `options.others`, which are read here, else the run's evaluation documents. Raises ConfigError if there
    are neither, DataError for bad rows.
    """
    if task.path_of_untrained_rows is not None:
        read_cases(task.untrained_task, remote=context.data.remote)
    elif not held_out:
        raise ConfigError(
            f"{task.config_key}.options.others: not set, and there are no evaluation documents; name a file of rows that were "
            "not trained on"
        )


def _check_rows_are_readable(task: Task, context: TaskContext, *, held_out: bool, trained: bool) -> None:
    """Check that one task has rows, and read those that stand in a file; what is read is thrown away. The first case that fits:

    - The task loads its rows by itself, as lm_eval does: they are loaded.
    - It has no path and needs training documents: ConfigError without training data.
    - It has no path: the rows that shardtune ships are read, else ConfigError without evaluation documents.
    - It computes losses of a file: the file is opened as training data would be.
    - It has a path: its rows are read.

    Documents of the run are not read here: they are checked when the run's data is prepared. `held_out`: whether there are
    evaluation documents. `trained`: whether there is training data. Raises ConfigError, or DataError with file and line.
    """
    if task.loads_own_rows:
        read_cases(task)
    # Without a path, a task takes documents of this split of the run's data.
    elif task.config.path is None and task.split != "evaluation":
        if not trained:
            raise ConfigError(
                f"{task.config_key}.path: not set; {task.kind} asks training rows: name their file, or evaluate a run"
            )
    elif task.config.path is None:
        if task.shipped_rows is not None:
            read_cases(task)
        elif not held_out:
            raise no_rows_error(task)
    elif isinstance(task, HeldOutLossTask):

        def open_readers(data: DataConfig) -> object:
            return make_row_readers(find_inputs(data), preferred=context.data_spec.formats)

        _read_as_training_data(task, open_readers, context)
    else:
        read_cases(task, remote=context.data.remote)


def keys_of_tasks_on_run_documents(tasks: Mapping[str, TaskConfig]) -> list[str]:
    """The settings (`evaluation.tasks.NAME`) of the tasks that need the run's data, because they have no file of their own."""
    return [task.config_key for task in build_tasks(tasks) if task.uses_run_documents]


def prepare_tasks(
    tasks: Mapping[str, TaskConfig],
    context: TaskContext,
    run_data: PreparedData | None,
    tokenizer: Any,
    stop: Callable[[], bool] = lambda: False,
) -> list[PreparedTask]:
    """Read the rows of all tasks into cases, ready to be asked, once the tokenizer and the run's data are there. No collective.

    A case is one row of a task before the model is asked. `tasks`: `evaluation.tasks` by name. `run_data`: the run's training
    and evaluation documents; None if no task needs them. `stop`: asked now and then whether to end early.

    Raises ConfigError if a task does not fit the objective or the data, DataError with file and line for bad rows, Preempted if
    `stop` says so.
    """
    prepared = []
    for task in build_tasks(tasks):
        _check_objective(task, context)
        # It reads tokens; of each sequence it needs only the location, and what was asked.
        if isinstance(task, HeldOutLossTask):
            data = _open_loss_task_data(task, context, run_data, tokenizer, stop)
            task.dataset = data.dataset
            cases = _sequence_cases(data)[: task.config.max_rows]
        else:
            cases = _read_task_cases(task, run_data, remote=context.data.remote)
        prepared.append(PreparedTask(task, cases))
    return prepared


class _LossTaskData(NamedTuple):
    """The documents of a task that computes losses."""

    dataset: TokenDataset
    """As tokens."""
    directory: Path
    """The prepared data that has the documents themselves."""


def _open_loss_task_data(
    task: HeldOutLossTask,
    context: TaskContext,
    run_data: PreparedData | None,
    tokenizer: Any,
    stop: Callable[[], bool],
) -> _LossTaskData:
    """Get the documents whose loss a task measures, as tokens and as texts.

    - The task has a path: its file is tokenised, or taken from the cache, as training data would be.
    - Else: the run's evaluation documents, which are tokenised already. Raises ConfigError if there are none.
    """
    if task.config.path is not None:
        # For a chat template that writes today's date: the run's date, or that of the first preparation into the cache.
        choose_date = keep_or_first_date(context.date)

        def prepare_data(data: DataConfig) -> PreparedData:
            preparation = Preparation(data, tokenizer, context.data_spec, seed=0, stop=stop, choose_date=choose_date)
            return preparation.open_or_prepare()

        own_data = _read_as_training_data(task, prepare_data, context)
        return _LossTaskData(own_data.train, own_data.directory)
    if run_data is None or run_data.evaluation is None or len(run_data.evaluation) == 0:
        raise no_rows_error(task)
    return _LossTaskData(run_data.evaluation, run_data.directory)


def _read_task_cases(task: Task, run_data: PreparedData | None, *, remote: bool) -> list[TaskCase]:
    """Read the cases of a task that computes no losses, from its file or from documents of the run.

    A membership task guesses which rows were trained on. Its cases are those rows first, then rows that were not; `fields` of a
    case become {"member": True} or {"member": False}, and the columns are dropped.

    `run_data`: the run's training and evaluation documents; None if no task needs them. `remote`: whether paths may be
    addresses.
    """
    documents = None
    if run_data is not None and not task.loads_own_rows:
        dataset = run_data.evaluation if task.split == "evaluation" else run_data.train
        documents = _documents_of_split(dataset, task, run_data.directory)
    cases = read_cases(task, documents, remote=remote)
    if not task.compares_split_documents:
        return cases
    evaluation_documents = None
    if run_data is not None:
        evaluation_documents = _documents_of_split(run_data.evaluation, task, run_data.directory)
    # The same kind of task, whose path is `options.others`.
    untrained_cases = read_cases(task.untrained_task, evaluation_documents, remote=remote)
    for case in cases:
        case.fields = {"member": True}
    for case in untrained_cases:
        case.fields = {"member": False}
    return [*cases, *untrained_cases]


def _check_objective(task: Task, context: TaskContext) -> None:
    """Refuse a task that computes losses of a language model, such as `bits_per_byte`, if the run has another loss.

    Raises ConfigError.
    """
    if isinstance(task, HeldOutLossTask) and not context.is_language_model:
        raise ConfigError(
            f"{task.config_key}.kind={task.kind}: is of language models, and the objective's loss is another one; eval/loss and "
            "eval/accuracy are there without a task"
        )


def _read_as_training_data(task: Task, read: Callable[[DataConfig], DataResult], context: TaskContext) -> DataResult:
    """Call `read` with settings that make it read the task's file as the run reads its training data.

    Returns what `read` returns. Path, format and columns are the task's. Settings that say how a row is read, cleaned and
    stored are the run's. Those that say how several sources are mixed, split and drawn keep their defaults, since the task has
    one file.

    A ConfigError of `read` is raised again with the names of the task's settings: `evaluation.tasks.NAME.path` in place of
    `data.path`.
    """
    data = context.data
    own_data = DataConfig(
        path=task.config.path,
        format=task.config.format,
        columns=task.config.columns,
        remote=data.remote,
        cleaning=data.cleaning,
        learn=data.learn,
        max_length=data.max_length,
        control_tokens=data.control_tokens,
        over_length=data.over_length,
        layout=data.layout,
        cache_dir=data.cache_dir,
        verify=data.verify,
        workers=data.workers,
    )
    try:
        return read(own_data)
    # Users have not set `data.path`: they know the task's own settings.
    except ConfigError as error:
        raise ConfigError([_with_task_keys(problem, task) for problem in error.problems]) from None


def _with_task_keys(problem: str, task: Task) -> str:
    """An error message about `data` settings with the names of the task's: `data.path` -> `evaluation.tasks.NAME.path`."""
    for name in ("path", "format", "columns"):
        problem = problem.replace(f"data.{name}", f"{task.config_key}.{name}")
    return problem


def _documents_of_split(dataset: TokenDataset | None, task: Task, directory: Path) -> list[Document]:
    """The texts of one split of the run's data, each document once and in the order of the data, for a task without a file.

    `dataset`: the split as tokens; None, which gives [], if the run has none. `directory`: the run's prepared data, which has
    the documents themselves. A task with `options.sample` gets that many documents at random, the same in every evaluation
    (`options.seed`).
    """
    if dataset is None:
        return []
    table = DocumentTable(directory)
    # A long document may be several sequences.
    document_numbers = list(dict.fromkeys(dataset.documents.tolist()))
    if task.samples_documents:
        sample_size = int(task.option_values["sample"])
        if len(document_numbers) > sample_size:
            rng = random.Random(int(task.option_values["seed"]))
            document_numbers = sorted(rng.sample(document_numbers, sample_size))
    return [table.document(int(number)) for number in document_numbers]


def _sequence_cases(data: _LossTaskData) -> list[TaskCase]:
    """Make a case for each sequence of a data set: the report names its document by it, and shows what the user asked."""
    table = DocumentTable(data.directory)
    cases = []
    # The number of its document, for each sequence.
    for number in data.dataset.documents.tolist():
        document = table.document(int(number))
        # Not the document itself: a data set may have a million of them, and the report needs only what was asked.
        cases.append(TaskCase(document.location, user_turn=last_user_turn(document)[:SHOWN_CHARACTERS]))
    return cases
