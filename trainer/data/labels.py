"""Labels of documents: several as one text while rows are read, numbers (or bits of one) in the prepared data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.stages.checks import Refusal, label_of

if TYPE_CHECKING:
    from trainer.data.assemble import Columns
    from trainer.data.store.documents import DocumentTable

MARK = "|"
"""Between the labels of a document that has several."""
MOST = 62
"""Labels that fit into the bits of a non-negative int64 column, one bit spare."""


def labels_of(value: Any) -> str:
    """Any number of labels as one text, sorted, with `|` between them; none is the empty text. Raises Refusal: bad_label."""
    if isinstance(value, str):
        value = [name for name in value.split(MARK) if name.strip()]
    names = {label_of(name) for name in (value if isinstance(value, list) else [value])}
    if marked := next((name for name in names if MARK in name), None):
        raise Refusal("bad_label", f'"label" holds {marked!r}; the name of a label must not contain {MARK}')
    return MARK.join(sorted(names))


def split_labels(label: str) -> list[str]:
    """The names in what `labels_of` made."""
    return label.split(MARK) if label else []


def number_labels(
    columns: Columns, table: DocumentTable, names: list[str] | None, *, multi_label: bool
) -> tuple[list[str] | None, np.ndarray | None]:
    """The label names in the order of their ids, and the id of each text in `columns.labels`.

    With `multi_label` the id of several labels has the bit of each. Names that are not given are those of the training
    split. Raises DataError for others, and for more than fit into the bits.
    """
    if not columns.labels:
        return names, None
    parts = [split_labels(label) if multi_label else [label] for label in columns.labels]
    if names is None:
        known = np.unique(columns.label[columns.of_split("train")])
        names = _sorted({name for number in known if number >= 0 for name in parts[number]})
        strange = [number for number, part in enumerate(parts) if not {*part} <= {*names}]
        if (rows := np.flatnonzero(np.isin(columns.label, strange))).size:
            row = table.row(int(rows[0]))
            raise DataError(
                f"{row['file']}:{row['line']}: label {row['label']!r} is none of {names} (the labels of the training "
                "data); set objective.labels to name them all"
            )
    if not multi_label:
        return names, np.array([names.index(label) for label in columns.labels], np.int64)
    if len(names) > MOST:
        raise DataError(
            f"objective.multi_label=true: the data has {len(names)} labels, at most {MOST} fit; leave rare ones out, or "
            "train one run for each part of them"
        )
    return names, np.array([sum(1 << names.index(name) for name in part) for part in parts], np.int64)


def namer(names: list[str] | None, *, multi_label: bool) -> Callable[[int], str]:
    """What says a number of the prepared data by its names."""

    def name(label: int) -> str:
        if names is None:
            return str(label)
        if not multi_label:
            return f"{label} ({names[label]})"
        return ", ".join(name for bit, name in enumerate(names) if label >> bit & 1) or "none"

    return name


def _sorted(labels: set[str]) -> list[str]:
    """By number if all are whole numbers, else by name."""
    numeric = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=int) if numeric else sorted(labels)
