"""What a data configuration names: inputs (files or hub data sets) by split and source, their rows, their identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import DataConfig, DataFormat
from trainer.data.document import Document
from trainer.data.formats import RowReader, recognise
from trainer.data.read.origin import Origin
from trainer.data.read.row import BadRow, Row
from trainer.data.stages.checks import label_of

HELD_OUT = ("eval", "test")


@dataclass(slots=True)
class Input:
    """One origin of rows. The held-out splits have one each, named like the split."""

    split: str
    source: str
    key: str
    """The setting that names it, for messages."""
    origin: Origin
    format: DataFormat
    columns: dict[str, str]
    weight: float | None = None
    licence: str | None = None

    @property
    def id(self) -> tuple[str, str]:
        """(split, source): what a job says about its rows."""
        return self.split, self.source


def inputs_of(config: DataConfig) -> list[Input]:
    """The inputs in the order in which they are read. Raises ConfigError, and DataError for files that do not exist."""
    if config.path in (None, "") and not config.sources:
        raise ConfigError(
            "data.path is not set; name the training data: a file, a directory, a glob, or hub:<name>; "
            "or several under data.sources"
        )
    if config.path not in (None, "") and config.sources:
        raise ConfigError("data.path and data.sources are both set; keep one of them")
    for split in HELD_OUT:
        share = getattr(config, f"{split}_share")
        if getattr(config, f"{split}_path") is not None and share:
            raise ConfigError(f"data.{split}_share={share} and data.{split}_path are both set; keep one of them")
        if not 0 <= share <= 0.5:
            raise ConfigError(f"data.{split}_share={share} must lie between 0 and 0.5")
    found = []
    if config.sources:
        for name, source in config.sources.items():
            key = f"data.sources.{name}"
            if source.path in (None, ""):
                raise ConfigError(f"{key}.path is not set; name its files")
            origin = Origin.of(
                source.path, f"{key}.path", subset=source.subset, split=source.split, revision=source.revision
            )
            columns = dict(source.columns) or dict(config.columns)
            format = config.format if source.format is DataFormat.auto else source.format
            found.append(Input("train", name, key, origin, format, columns, source.weight, source.licence))
    else:
        origin = Origin.of(config.path, "data.path")
        found.append(Input("train", "data", "data.path", origin, config.format, dict(config.columns)))
    for split in HELD_OUT:
        value = getattr(config, f"{split}_path")
        if value is not None:
            key = f"data.{split}_path"
            found.append(Input(split, split, key, Origin.of(value, key), config.format, dict(config.columns)))
    return found


def readers_of(
    inputs: list[Input], *, label: Callable[[Any], str] = label_of, meant: tuple[DataFormat, ...] = ()
) -> dict[tuple[str, str], RowReader]:
    """What makes documents of each input's rows, its format recognised from the first row that can be read.

    `label` reads a label; `meant` are the formats that decide where several fit.
    """
    made = {}
    for item in inputs:
        format = item.format
        if format is DataFormat.auto:
            format = recognise(_first_row(item), item.columns, source=item.source, meant=meant)
        made[item.id] = RowReader(format, item.columns, source=item.source, label=label)
    return made


def _first_row(item: Input) -> Row:
    first_bad: BadRow | None = None
    for row in islice(item.origin.rows(), 1000):
        parsed = row.parse() if isinstance(row, Row) else row
        if isinstance(parsed, Row):
            return parsed
        first_bad = first_bad or parsed
    if first_bad is None:
        raise DataError(f"{item.key}: holds no rows")
    raise DataError(f"{first_bad.file}:{first_bad.line}: {first_bad.message}; no row of the first 1000 can be read")


def rows_of(inputs: list[Input], max_documents: int | None) -> Iterator[tuple[tuple[str, str], Row | BadRow]]:
    """All rows, each with its input's id; of the training split the first `max_documents`."""
    left = max_documents
    for item in inputs:
        rows: Iterator[Row | BadRow] = item.origin.rows()
        if item.split == "train" and left is not None:
            rows = islice(rows, left)
        for row in rows:
            if item.split == "train" and left is not None:
                left -= 1
            yield item.id, row


def evaluation_documents(paths: Any, config: DataConfig) -> Iterator[Document]:
    """Documents of the files against which training data is decontaminated. Raises DataError for a row that is none."""
    key = "data.decontamination.paths"
    for path in Origin.of(paths, key).paths:  # each file in its own format
        item = Input("decontamination", str(path), key, Origin(key, [path]), DataFormat.auto, {})
        reader = readers_of([item])[item.id]
        for row in item.origin.rows():
            parsed = row.parse() if isinstance(row, Row) else row
            found = parsed if isinstance(parsed, BadRow) else reader(parsed)
            if not isinstance(found, Document):
                raise DataError(f"{key}: {found}")
            yield found
