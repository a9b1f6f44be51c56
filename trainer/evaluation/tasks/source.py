"""Reads the rows of a task, from a file in the formats of `prepare` or from the run's evaluation documents. Needs no model.

Every row must be usable. A task that silently left rows out would measure something else from one day to the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document, RejectedRow, SourceRow
from trainer.data.fields import RowError, UnreadableValue, value_at
from trainer.data.format_recognition import recognise_format
from trainer.data.formats import RowReader
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths, is_hub_path
from trainer.evaluation.tasks.base import Task, TaskCase

MAX_LISTED_ROWS = 5
"""Most bad rows that an error lists."""


def read_cases(
    task: Task, evaluation_documents: list[Document] | None = None, *, remote: bool = False
) -> list[TaskCase]:
    """Read the rows of a task as cases, each checked by its kind, at most `max_rows`. Needs no model.

    They come from the first of these that exists:
    - what the kind of task loads by itself (as lm-evaluation-harness does); these are not checked,
    - the files in the task's `path`. `remote`: whether it may be a URL,
    - the rows that shardtune ships for this kind,
    - `evaluation_documents` of the run.

    Raises DataError with file and line for rows that cannot be used, or if there are no rows; ConfigError for a bad path, or
    if there is nothing to read.
    """
    if task.loads_own_rows:
        return task.load_cases()
    path = task.config.path
    if path is not None:
        cases = list(_read_file_cases(task, may_be_url=remote))
    elif task.shipped_rows is not None:
        cases = _read_shipped_cases(task.shipped_rows)
    elif evaluation_documents:
        cases = [TaskCase(document.location, document) for document in evaluation_documents]
    else:
        raise no_rows_error(task)
    cases = cases[: task.config.max_rows]
    if not cases:
        raise DataError(f"{task.config_key}.path={path}: holds no rows; fill it, or name another file")
    _prepare_cases(task, cases)
    return cases


def no_rows_error(task: Task) -> ConfigError:
    """The error for a task without a path, in a run without evaluation documents."""
    return ConfigError(
        f"{task.config_key}.path: not set, and there are no evaluation documents; give it a file, or the run "
        "data.eval_path or data.eval_share"
    )


def _read_shipped_cases(file: Path) -> list[TaskCase]:
    """A case for each template in a JSON file that shardtune ships, {"templates": [{...}, ...]}."""
    rows = json.loads(file.read_text(encoding="utf-8"))["templates"]
    return [TaskCase(f"{file.name}:{number}", document=None, fields=dict(row)) for number, row in enumerate(rows, 1)]


def _prepare_cases(task: Task, cases: list[TaskCase]) -> None:
    """Let the kind of task check and convert each case, and refuse all bad rows in one message. Raises DataError."""
    bad_rows = []
    for case in cases:
        try:
            task.prepare_case(case)
        except RowError as refusal:
            # All rows are checked first, so that the user can mend them in one go.
            bad_rows.append(f"{case.location}: {refusal.message}")
    if bad_rows:
        listed = "\n  ".join(bad_rows[:MAX_LISTED_ROWS])
        if len(bad_rows) > MAX_LISTED_ROWS:
            listed += f"\n  and {len(bad_rows) - MAX_LISTED_ROWS} more"
        raise DataError(
            f"{task.config_key} ({task.kind}): {len(bad_rows)} of {len(cases)} rows cannot be used; it needs "
            f"{task.rows_description}; mend them, or name other columns with {task.config_key}.columns\n  {listed}"
        )


def _read_file_cases(task: Task, *, may_be_url: bool) -> Iterator[TaskCase]:
    """Yield a case for each row of the files in the task's path, at most `max_rows`.

    - The kind of task has a file format of its own (such as bbq): the case has the columns of the row.
    - Else the file is in a training format: the case has the document that the format's reader builds from the row.

    A kind whose files hold several questions in a row splits them first (`task.expand_rows`). `may_be_url`: whether the path
    may be a URL. Raises ConfigError for a bad path, or one on a hub; DataError for a row that cannot be read.
    """
    path_key = f"{task.config_key}.path"
    files = expand_paths(task.config.path, path_key, allow_remote=may_be_url)
    for file in files:
        if is_hub_path(file):
            raise ConfigError(f"{path_key}={file}: would be fetched from a hub; download its files and give their path")
    rows: Iterator[SourceRow] = (_parse_row(row) for row in Origin(path_key, files).rows())
    # Such as BBQ's, whose columns are no training format.
    if task.has_own_file_format:
        rows = task.expand_rows(rows)
    # The training format of all rows is recognised by the first one, which is put back before the others.
    first = next(rows, None)
    if first is None:
        return
    case_of_row: Callable[[SourceRow], TaskCase] = partial(_case_with_columns, task)
    if not task.has_own_file_format:
        case_of_row = _document_case_reader(task, first)
    for row in islice(chain([first], rows), task.config.max_rows):
        yield case_of_row(row)


def _parse_row(row: SourceRow | RejectedRow) -> SourceRow:
    """The row with its JSON parsed. Raises DataError with file and line if it cannot be read."""
    parsed = row.parse()
    if isinstance(parsed, RejectedRow):
        raise DataError(str(parsed))
    return parsed


def _case_with_columns(task: Task, row: SourceRow) -> TaskCase:
    """A case with the columns of a row, under the names that the kind of task reads.

    `columns` of the task maps these to names in the file, perhaps with dots that lead into objects: {"label": "meta.label"}.
    Raises DataError if such a column is missing, or a column could not be read.
    """
    fields = dict(row.fields)
    for name, column in task.config.columns.items():
        try:
            fields[name] = value_at(fields, column)
        except (KeyError, RowError):
            raise DataError(
                f"{row.file}:{row.line}: no column {column!r} ({task.config_key}.columns.{name}); the "
                f"row has {sorted(row.fields)}"
            ) from None
    # Readers put an UnreadableValue in the place of a column that cannot be read.
    for field in fields.values():
        if isinstance(field, UnreadableValue):
            raise DataError(f"{row.file}:{row.line}: {field.message}")
    return TaskCase(f"{row.file}:{row.line}", document=None, fields=fields)


def _document_case_reader(task: Task, first: SourceRow) -> Callable[[SourceRow], TaskCase]:
    """Choose the format of a file by its `first` row, and return a function that reads a row in that format as a case.

    The format is `format` of the task. If that is `auto`, it is recognised; of several formats that fit, the one that the kind
    of task prefers is taken. A case then has the document (a conversation, a prompt with its answer ...) and the row's
    columns. Raises DataError or ConfigError if none fits.
    """
    config = task.config

    def with_task_keys(message: str) -> str:
        """An error message about settings of training data, with the settings of the task that the user has set."""
        message = message.replace(f"data.sources.{task.name}.", f"{task.config_key}.")
        return message.replace("data.columns", f"{task.config_key}.columns")

    try:
        format = config.format
        if format is DataFormat.auto:
            format = recognise_format(first, config.columns, source=task.name, preferred=task.formats)
        reader = RowReader(format, config.columns, source=task.name)
        reader.accept_unread_columns()  # a task may have columns beside those of training, such as more references
    except (DataError, ConfigError) as error:
        raise type(error)(with_task_keys(str(error))) from None

    def read_document_case(row: SourceRow) -> TaskCase:
        document = reader(row)
        if isinstance(document, RejectedRow):
            raise DataError(with_task_keys(str(document)))
        # Reports of two models are matched by file and line, also with reports that have no numbers of rows.
        document.row_number = None
        return TaskCase(document.location, document=document, fields=row.fields)

    return read_document_case
