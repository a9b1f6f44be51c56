"""The rows of a task: a file in the formats of `prepare`, or the run's evaluation documents. Needs no model.

Every row must be usable. A task that silently leaves rows out measures something else from one day to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document, Rejected, Row
from trainer.data.fields import Fault, Refusal, value_at
from trainer.data.formats import RowReader, recognise
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand, is_hub
from trainer.evaluation.tasks.base import Case, Task

MAX_LISTED_ROWS = 5
"""Bad rows that are told, of all that there are."""


def read_cases(task: Task, held_out: list[Document] | None, *, remote: bool = False) -> list[Case]:
    """The rows of a task, checked. Errors: DataError naming file and line for rows that cannot be used, or where there are none;
    ConfigError for a path that cannot be meant."""
    config = task.config
    if task.loads_own_rows:
        return task.cases()
    if config.path is None and task.shipped_rows is not None:
        rows = json.loads(task.shipped_rows.read_text(encoding="utf-8"))["templates"]
        cases = [Case(f"{task.shipped_rows.name}:{number}", None, dict(row)) for number, row in enumerate(rows, 1)]
    elif config.path is None:
        if not held_out:
            raise ConfigError(
                f"{task.key}.path: not set, and there are no evaluation documents; give it a file, or the run "
                "data.eval_path or data.eval_share"
            )
        cases = [Case(document.where, document) for document in held_out]
    else:
        cases = list(_file_cases(task, remote=remote))
    cases = cases[: config.max_rows]
    if not cases:
        raise DataError(f"{task.key}.path={config.path}: holds no rows; fill it, or name another file")
    wrong = []
    for case in cases:
        try:
            task.read(case)
        except Refusal as refusal:
            wrong.append(f"{case.where}: {refusal.message}")
    if wrong:
        more = f"\n  and {len(wrong) - MAX_LISTED_ROWS} more" if len(wrong) > MAX_LISTED_ROWS else ""
        raise DataError(
            f"{task.key} ({task.kind}): {len(wrong)} of {len(cases)} rows cannot be used; it needs {task.reads}; mend them, or "
            f"name other columns with {task.key}.columns\n  " + "\n  ".join(wrong[:MAX_LISTED_ROWS]) + more
        )
    return cases


def _file_cases(task: Task, *, remote: bool) -> Iterator[Case]:
    key = f"{task.key}.path"
    files = expand(task.config.path, key, remote=remote)
    if hub := next((path for path in files if is_hub(path)), None):
        raise ConfigError(f"{key}={hub}: would be fetched from a hub; download its files and give their path")
    rows: Iterator[Row] = (_parse_row(row) for row in Origin(key, files).rows())
    own = task.needs_path and not task.reads_documents
    if own:
        rows = task.expand_rows(rows)
    if (first := next(rows, None)) is None:
        return
    document_of = _case_with_columns if own else _document_reader(task, first)
    for row in islice(_prepend(first, rows), task.config.max_rows):
        yield document_of(task, row)


def _parse_row(row: Row | Rejected) -> Row:
    parsed = row.parse()
    if isinstance(parsed, Rejected):
        raise DataError(str(parsed))
    return parsed


def _prepend(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _case_with_columns(task: Task, row: Row) -> Case:
    """A row with the columns that the kind names, whatever format that is."""
    fields = dict(row.fields)
    for wanted, name in task.config.columns.items():
        try:
            fields[wanted] = value_at(fields, name)
        except (KeyError, Refusal):
            raise DataError(
                f"{row.file}:{row.line}: no column {name!r} ({task.key}.columns.{wanted}); the row has {sorted(row.fields)}"
            ) from None
    if fault := next((value for value in fields.values() if isinstance(value, Fault)), None):
        raise DataError(f"{row.file}:{row.line}: {fault.message}")
    return Case(f"{row.file}:{row.line}", None, fields)


def _document_reader(task: Task, first: Row) -> Any:
    """What makes a document of a row, by the format of the first one."""
    config = task.config

    def own(text: str) -> str:  # a reader speaks of the settings of training data
        return text.replace(f"data.sources.{task.name}.", f"{task.key}.").replace("data.columns", f"{task.key}.columns")

    try:
        format = config.format
        if format is DataFormat.auto:
            format = recognise(first, config.columns, source=task.name, meant=task.formats)
        reader = RowReader(format, config.columns, source=task.name, refuses=False)
    except (DataError, ConfigError) as error:
        raise type(error)(own(str(error))) from None

    def document_of(task: Task, row: Row) -> Case:
        found = reader(row)
        if isinstance(found, Rejected):
            raise DataError(own(str(found)))
        return Case(found.where, found, row.fields)

    return document_of
