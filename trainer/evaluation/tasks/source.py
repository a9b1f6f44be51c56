"""Reads the rows of a task, from a file in the formats of `prepare` or from the run's evaluation documents. Needs no model.

Every row must be usable. A task that silently left rows out would measure something else from one day to the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document, Rejected, Row
from trainer.data.fields import Fault, Refusal, value_at
from trainer.data.format_recognition import recognise_format
from trainer.data.formats import RowReader
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths, is_hub_path
from trainer.evaluation.tasks.base import Case, Task

MAX_LISTED_ROWS = 5
"""Most bad rows that an error lists."""


def read_cases(task: Task, held_out: list[Document] | None, *, remote: bool = False) -> list[Case]:
    """The rows of a task, each checked by its kind, at most `max_rows`.

    The first of these that there is:
    - what the kind of task loads by itself (unchecked, as lm-evaluation-harness does),
    - the files in the task's `path`,
    - the rows that shardtune ships for this kind,
    - `held_out`, the run's evaluation documents.

    `remote`: whether the path may be a URL. Raises DataError with file and line for rows that cannot be used, or if there are no
    rows; ConfigError for a bad path, or if there is none of the above.
    """
    config = task.config
    if task.loads_own_rows:
        return task.cases()
    if config.path is None and task.shipped_rows is not None:
        rows = json.loads(task.shipped_rows.read_text(encoding="utf-8"))["templates"]
        cases = []
        for number, row in enumerate(rows, 1):
            cases.append(Case(f"{task.shipped_rows.name}:{number}", None, dict(row)))
    elif config.path is None:
        if not held_out:
            raise ConfigError(
                f"{task.key}.path: not set, and there are no evaluation documents; give it a file, or the run "
                "data.eval_path or data.eval_share"
            )
        cases = [Case(document.location, document) for document in held_out]
    else:
        cases = list(_file_cases(task, remote=remote))
    cases = cases[: config.max_rows]
    if not cases:
        raise DataError(f"{task.key}.path={config.path}: holds no rows; fill it, or name another file")

    # All bad rows are found before the error, so that the user can mend them together.
    bad_rows = []
    for case in cases:
        try:
            task.parse_case(case)
        except Refusal as refusal:
            bad_rows.append(f"{case.location}: {refusal.message}")
    if bad_rows:
        listed = "\n  ".join(bad_rows[:MAX_LISTED_ROWS])
        if len(bad_rows) > MAX_LISTED_ROWS:
            listed += f"\n  and {len(bad_rows) - MAX_LISTED_ROWS} more"
        raise DataError(
            f"{task.key} ({task.kind}): {len(bad_rows)} of {len(cases)} rows cannot be used; it needs {task.reads}; mend them, "
            f"or name other columns with {task.key}.columns\n  {listed}"
        )
    return cases


def _file_cases(task: Task, *, remote: bool) -> Iterator[Case]:
    """The rows of the files in the task's path as cases, at most `max_rows`.

    A kind of task with a file format of its own (such as bbq) gets the columns of each row. Any other kind gets the document that
    the reader of a training format makes of the row. Raises ConfigError for a bad path, DataError for a row that cannot be read.
    """
    key = f"{task.key}.path"
    files = expand_paths(task.config.path, key, remote=remote)
    for path in files:
        if is_hub_path(path):
            raise ConfigError(f"{key}={path}: would be fetched from a hub; download its files and give their path")
    rows: Iterator[Row] = (_parse_row(row) for row in Origin(key, files).rows())
    has_own_columns = task.needs_path and not task.reads_documents
    if has_own_columns:
        rows = task.expand_rows(rows)
    # The first row decides which format all rows are read in.
    first = next(rows, None)
    if first is None:
        return
    make_case = _case_with_columns if has_own_columns else _document_reader(task, first)
    for row in islice(_prepend(first, rows), task.config.max_rows):
        yield make_case(task, row)


def _parse_row(row: Row | Rejected) -> Row:
    """The row with its JSON parsed. Raises DataError with file and line if it cannot be read."""
    parsed = row.parse()
    if isinstance(parsed, Rejected):
        raise DataError(str(parsed))
    return parsed


def _prepend(first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    """All rows in their order, after `first` was taken out of the iterator to look at it."""
    yield first
    yield from rows


def _case_with_columns(task: Task, row: Row) -> Case:
    """A row as the columns that the kind of task reads, renamed by the task's `columns`. Raises DataError.

    `columns` maps names of the kind to names of the file, perhaps with dots that lead into objects.
    """
    fields = dict(row.fields)
    for name, column in task.config.columns.items():
        try:
            fields[name] = value_at(fields, column)
        except (KeyError, Refusal):
            raise DataError(
                f"{row.file}:{row.line}: no column {column!r} ({task.key}.columns.{name}); the row has {sorted(row.fields)}"
            ) from None
    # A column that could not be read is a Fault in the row's fields, and an error only where it is used.
    for field in fields.values():
        if isinstance(field, Fault):
            raise DataError(f"{row.file}:{row.line}: {field.message}")
    return Case(f"{row.file}:{row.line}", None, fields)


def _document_reader(task: Task, first: Row) -> Callable[[Task, Row], Case]:
    """A function that makes a case of a row by reading it as a document (a conversation, a prompt with its answer ...).

    Its format is `format` of the task, else the one that the first row has; of several that fit, the one the kind prefers.
    """
    config = task.config

    def with_task_keys(message: str) -> str:
        """Readers name settings of training data; the user has set those of the task."""
        message = message.replace(f"data.sources.{task.name}.", f"{task.key}.")
        return message.replace("data.columns", f"{task.key}.columns")

    try:
        format = config.format
        if format is DataFormat.auto:
            format = recognise_format(first, config.columns, source=task.name, preferred=task.formats)
        reader = RowReader(format, config.columns, source=task.name)
        reader.accept_unread_columns()
    except (DataError, ConfigError) as error:
        raise type(error)(with_task_keys(str(error))) from None

    def make_case(task: Task, row: Row) -> Case:
        document = reader(row)
        if isinstance(document, Rejected):
            raise DataError(with_task_keys(str(document)))
        return Case(document.location, document, row.fields)

    return make_case
