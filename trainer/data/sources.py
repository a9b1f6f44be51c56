"""Finds the inputs that a data configuration names, by split and source; reads their rows; checks that the disk has room."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, DataError, StorageError
from trainer.data.config import HELD_OUT, BalanceConfig, DataConfig, DataFormat, FilterConfig, Layout, PrivacyConfig
from trainer.data.document import Document, Rejected, Row
from trainer.data.fields import KeptColumns, parse_label
from trainer.data.format_recognition import recognise_format
from trainer.data.formats import RowReader
from trainer.data.read.json_rows import Line
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths, held_out_sets, is_hub_path
from trainer.data.selection import balance
from trainer.data.shards import Block
from trainer.data.transforms import filters
from trainer.data.transforms.checks import CHECK_KINDS


@dataclass(slots=True)
class RowRange:
    """Rows of one source and one split, in input order: what one call of a worker prepares."""

    number: int
    """Counts the ranges of all inputs from 0."""
    split: str
    source: str
    offset: int
    """Number of rows of the same split and source before this range."""
    rows: list[Row | Rejected]


@dataclass(slots=True)
class Input:
    """One origin of rows. A held-out split has one, named like the split; that of evaluation may have several, by name."""

    split: str
    source: str
    key: str
    """The setting that names it, for messages."""
    origin: Origin
    format: DataFormat
    columns: dict[str, str]
    weight: float | None = None
    licence: str | None = None
    ignored: frozenset[str] = frozenset()
    group: str | None = None
    """Column that says what its rows belong to."""
    needed_columns: frozenset[str] | None = None
    """Columns that its reader needs, once it is known."""

    @property
    def id(self) -> tuple[str, str]:
        """(split, source), by which readers are found."""
        return self.split, self.source


COMMIT = re.compile(r"[0-9a-f]{40}")
"""A whole commit of the hub; shorter ones and names of branches may move."""


def problems(config: DataConfig) -> Iterator[str]:
    """Settings of `data` that contradict each other or cannot be used: each with key, value, constraint and remedy.

    Ranges of single numbers are checked at their fields, and files are checked where they are opened.
    """
    yield from _path_problems(config)
    yield from _held_out_problems(config)
    yield from _weight_problems(config)
    for kind in config.checks.quarantine:
        if kind not in CHECK_KINDS:
            yield f"data.checks.quarantine: {kind!r} is not looked for; known are {', '.join(CHECK_KINDS)}"
    # Most settings are the defaults, and their checks need not be imported for these.
    if config.filters != FilterConfig():
        yield from filters.problems(config.filters)
    if config.balance != BalanceConfig():
        yield from balance.problems(config.balance)
    if config.streaming:
        yield from _streaming_problems(config)
    if config.packing and config.layout is Layout.padded:
        yield "data.packing=true: needs rows without padding; set data.layout=auto, or data.packing=false"
    if config.privacy != PrivacyConfig():
        # Imported here, because it compiles seventy regular expressions.
        from trainer.data.transforms.privacy import stage

        yield from stage.problems(config.privacy)


def _path_problems(config: DataConfig) -> Iterator[str]:
    """Problems of the settings that name the training data."""
    if config.path in (None, "") and not config.sources:
        yield (
            "data.path: not set; name the training data: a file, a directory, a glob, or hub:<name>; or several under "
            "data.sources"
        )
    if config.path not in (None, "") and config.sources:
        yield f"data.path={config.path}: data.sources names the training data too; keep one of the two"
    for name, source in config.sources.items():
        if source.path in (None, ""):
            yield f"data.sources.{name}.path: not set; give the source's files"


def _held_out_problems(config: DataConfig) -> Iterator[str]:
    """Problems of the settings of held-out splits and groups."""
    for split in HELD_OUT:
        share = getattr(config, f"{split}_share")
        if getattr(config, f"{split}_path") is not None and share:
            yield f"data.{split}_share={share:g}: data.{split}_path gives that split already; set one of the two"
    holds_out = (config.eval_share, config.test_share, config.eval_path, config.test_path)
    if config.group_by is not None and not any(holds_out):
        yield f"data.group_by={config.group_by}: nothing is held out; give data.eval_share=0.05 as well, or set it to null"


def _weight_problems(config: DataConfig) -> Iterator[str]:
    """Problems of the weights of sources."""
    weighted = [name for name, source in config.sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(config.sources):
        without = ", ".join(sorted(config.sources.keys() - set(weighted)))
        yield f"data.sources: {without} has no weight, and others have; give every source one, or none"
    elif weighted and not any(source.weight for source in config.sources.values()):
        yield "data.sources: every weight is 0, so nothing is left to train on; give one source more than 0"


def _streaming_problems(config: DataConfig) -> Iterator[str]:
    """Problems of `data.streaming`: hub data sets without a commit, or none of the hub.

    Without a commit, what such a set holds later could not be told from what was prepared.
    """
    names_hub_data = False
    for name, source in config.sources.items():
        hub_paths = [path for path in _paths_in(source.path) if is_hub_path(path)]
        names_hub_data |= bool(hub_paths)
        if hub_paths and not COMMIT.fullmatch(source.revision or ""):
            yield (
                f"data.sources.{name}.revision={source.revision}: data.streaming=true reads {hub_paths[0]} at one commit; give "
                "its 40 characters, which the hub shows beside the files"
            )
    for key in ("path", "eval_path", "test_path"):
        hub_paths = [path for path in _paths_in(getattr(config, key)) if is_hub_path(path)]
        names_hub_data |= bool(hub_paths)
        if hub_paths:
            yield (
                f"data.{key}={hub_paths[0]}: data.streaming=true reads hub data sets at a commit, which only sources have: "
                f"data.sources.<name>.path={hub_paths[0]} and its revision; or leave data.streaming out"
            )
    if not names_hub_data:
        yield "data.streaming=true: no data set of the hub is named (hub:<name>), and files are always streamed; leave it out"


def _paths_in(path_setting: Any) -> list[str]:
    """The paths of a setting, which holds one, a list of them, or sets by name."""
    if isinstance(path_setting, dict):
        paths = list(path_setting.values())
    elif isinstance(path_setting, list | tuple):
        paths = list(path_setting)
    else:
        paths = [path_setting]
    return [str(path) for path in paths]


def find_inputs(config: DataConfig) -> list[Input]:
    """The inputs that `data` names, in the order in which they are read: training sources, then held-out sets.

    Raises ConfigError, and DataError for files that do not exist.
    """
    config_problems = [*problems(config)]
    if config_problems:
        raise ConfigError(config_problems)
    # Training data: the sources with their own settings, or the files of `data.path` as one source called "data".
    inputs = []
    if config.sources:
        for name, source in config.sources.items():
            key = f"data.sources.{name}"
            files = expand_paths(source.path, f"{key}.path", remote=config.remote)
            origin = Origin(f"{key}.path", files, source.subset, source.split, source.revision, config.streaming)
            columns = dict(source.columns) or dict(config.columns)
            format = config.format if source.format is DataFormat.auto else source.format
            inputs.append(Input("train", name, key, origin, format, columns, source.weight, source.licence))
    else:
        origin = Origin("data.path", expand_paths(config.path, "data.path", remote=config.remote))
        inputs.append(Input("train", "data", "data.path", origin, config.format, dict(config.columns)))
    # Held-out sets with files of their own.
    for split in HELD_OUT:
        for name, (key, paths) in held_out_sets(getattr(config, f"{split}_path"), split).items():
            origin = Origin(key, expand_paths(paths, key, remote=config.remote))
            inputs.append(Input(split, name, key, origin, config.format, dict(config.columns)))

    # What all inputs have in common: ignored columns and the column of groups, which must not be ignored.
    for source_input in inputs:
        source_input.ignored = frozenset(config.ignore_columns)
        source_input.group = config.group_by
        contradictions = source_input.ignored & {*source_input.columns.values(), source_input.group}
        if contradictions:
            reader = f"{source_input.key} reads by its columns"
            if source_input.group in contradictions:
                reader = "data.group_by reads"
            raise ConfigError(f"data.ignore_columns names {min(contradictions)}, which {reader}; keep one")
    return inputs


def make_row_readers(
    inputs: list[Input],
    *,
    label: Callable[[Any], str] = parse_label,
    preferred: tuple[DataFormat, ...] = (),
    kept: KeptColumns | None = None,
    takes_all: bool = False,
) -> dict[tuple[str, str], RowReader]:
    """A reader for each input, by its id. Its format is that of the settings, or recognised from the first row that can be read.

    Sets `needed_columns` of each input. `label` reads a label; `preferred`: the formats that decide if several fit; `kept`: see
    `RowReader`; `takes_all`: whether rows may have columns that carry meaning and are not read. Raises ConfigError and DataError.
    """
    readers = {}
    for source_input in inputs:
        # The format.
        first_row: Row | Rejected
        if source_input.format is DataFormat.auto:
            first_row = _first_readable_row(source_input)
            if preferred == (DataFormat.prompt,):  # what else the rows have are columns for rewards
                format = DataFormat.prompt
            else:
                format = recognise_format(
                    first_row,
                    source_input.columns,
                    source=source_input.source,
                    ignored=source_input.ignored,
                    preferred=preferred,
                )
        else:
            first_row = next(source_input.origin.rows()).parse()
            format = source_input.format

        # Files of held-out rows need not say what these belong to.
        group_column = (source_input.group or "").split(".")[0]
        needs_group = source_input.split == "train"
        if isinstance(first_row, Rejected) or group_column in first_row.fields:
            needs_group = True

        # One format for all rows of an input: a row that does not fit is a bad row.
        reader = RowReader(
            format,
            source_input.columns,
            source=source_input.source,
            label=label,
            ignored=source_input.ignored,
            group=source_input.group if needs_group else None,
            kept=kept,
        )
        if takes_all:
            reader.accept_unread_columns()
        readers[source_input.id] = reader
        source_input.needed_columns = reader.needed_columns

        # A first look at how the reader does.
        document = reader(first_row)
        if isinstance(document, Rejected) and document.reason.startswith(("unread_", "missing_reward_column")):
            # Every row has the columns that the first one has: stop before any work.
            raise DataError(str(document))
    return readers


def _first_readable_row(source_input: Input) -> Row:
    """The first row of an input that can be read. Raises DataError if there is none among the first ones."""
    first_rejected: Rejected | None = None
    for row in islice(source_input.origin.rows(), MAX_UNREADABLE_ROWS):
        parsed = row.parse()
        if isinstance(parsed, Row):
            return parsed
        first_rejected = first_rejected or parsed
    raise DataError(f"{first_rejected}; no row of the first {MAX_UNREADABLE_ROWS} can be read")


def rows_of_inputs(inputs: list[Input], max_documents: int | None) -> Iterator[tuple[tuple[str, str], Row | Rejected]]:
    """((split, source), row) of all inputs in order; of the training split only the first `max_documents` rows."""
    train_rows_left = max_documents
    for source_input in inputs:
        rows: Iterator[Row | Rejected] = source_input.origin.rows(source_input.needed_columns)
        is_limited = source_input.split == "train" and train_rows_left is not None
        if is_limited:
            # So that no file is opened beyond the last row that is used.
            rows = islice(rows, train_rows_left)
        for row in rows:
            if is_limited and train_rows_left is not None:
                train_rows_left -= 1
            yield source_input.id, row


def row_ranges(rows: Iterator[tuple[tuple[str, str], Row | Rejected]]) -> Iterator[RowRange]:
    """Group the rows of `rows_of_inputs` into ranges, the pieces of work that a worker turns into one block of prepared data.

    A range has rows of one input, at most `MAX_RANGE_ROWS` and about `MAX_RANGE_BYTES`. Where a range ends depends on the input
    alone, so that any number of workers makes the same data set.
    """
    number = 0
    num_bytes = 0
    current = RowRange(0, "", "", 0, [])
    for (split, source), row in rows:
        is_same_input = (split, source) == (current.split, current.source)
        if not is_same_input or len(current.rows) >= MAX_RANGE_ROWS or num_bytes >= MAX_RANGE_BYTES:
            if current.rows:
                yield current
                number += 1
            offset = current.offset + len(current.rows) if is_same_input else 0
            current = RowRange(number, split, source, offset, [])
            num_bytes = 0
        current.rows.append(row)
        num_bytes += len(row.raw) if isinstance(row, Line) else TABLE_ROW_BYTES
    if current.rows:
        yield current


def evaluation_documents(paths: Any, config: DataConfig) -> Iterator[Document]:
    """The documents of `data.decontamination.paths`, evaluation sets whose text training data must not hold.

    Raises DataError for a row that is no document.
    """
    key = "data.decontamination.paths"
    ignored = frozenset(config.ignore_columns)
    # Each file is in its own format.
    for path in expand_paths(paths, key, remote=config.remote):
        file_input = Input("decontamination", str(path), key, Origin(key, [path]), DataFormat.auto, {}, ignored=ignored)
        # What is compared are texts: a picture beside them matters to nobody.
        (reader,) = make_row_readers([file_input], takes_all=True).values()
        for row in file_input.origin.rows(file_input.needed_columns):
            document = reader(row.parse())
            if not isinstance(document, Document):
                raise DataError(f"{key}: {document}")
            yield document


MAX_UNREADABLE_ROWS = 1000
"""Rows at the beginning of an input among which one must be readable, so that its format can be recognised."""
MAX_RANGE_ROWS = 512
MAX_RANGE_BYTES = 4 << 20
"""Largest range of rows that a worker prepares at a time."""
TABLE_ROW_BYTES = 1024
"""What a row of a table counts for where ranges are measured in bytes of text."""
PLENTY_FACTOR = 64
"""With so many free bytes for each byte of input, nothing is estimated; compressed text in single bytes may need that much."""
NUMBER_BYTES = 8
"""Bytes of a number in a column of the store."""


def require_disk_space(
    directory: Path,
    inputs: list[Input],
    make: Callable[[RowRange], Block],
    max_documents: int | None,
    *,
    parts: int = 1,
    more_bytes_per_row: int = 0,
) -> None:
    """Raise StorageError if the disk of `directory` has less room than 1/`parts` of the prepared data is going to take.

    What is written for each byte (of tables: each row) is measured on the first block of every input, made by `make`.
    `more_bytes_per_row`: what is written for a row meanwhile, beside the block. Nothing is measured if there is plenty of room.
    """
    # The cache may not exist yet: its disk is that of the nearest parent that does.
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    # Making a block of every input takes seconds, so it is skipped where the disk is surely large enough.
    if PLENTY_FACTOR * sum(source_input.origin.size() for source_input in inputs) <= free_bytes * parts:
        return
    total_bytes = 0.0
    train_bytes = 0.0
    for source_input in inputs:
        bytes_read, rows_read, bytes_written = _measure_first_block(source_input, make)
        bytes_written += rows_read * more_bytes_per_row
        # The size of text files is known in bytes, that of tables in rows.
        text_bytes, table_rows = source_input.origin.extent()
        written_per_byte = bytes_written / max(bytes_read, 1)
        written_per_row = bytes_written / max(rows_read, 1)
        needed_bytes = text_bytes * written_per_byte + table_rows * written_per_row
        is_train = source_input.split == "train"
        if is_train and max_documents is not None:
            needed_bytes = min(needed_bytes, written_per_row * max_documents)
        total_bytes += needed_bytes
        if is_train:
            train_bytes += needed_bytes
    if total_bytes > free_bytes * parts:
        by_shard = " by this shard" if parts > 1 else ""
        raise StorageError(
            f"data.cache_dir={directory}: about {_gib(total_bytes / parts)} GiB will be written{by_shard}, and "
            f"{_gib(free_bytes)} GiB are free "
            f"(judged by the first rows of each input; {_gib(train_bytes / parts)} GiB of it is training data); set "
            "data.cache_dir to a larger disk, or read fewer rows with data.max_documents"
        )


def _measure_first_block(source_input: Input, make: Callable[[RowRange], Block]) -> tuple[int, int, int]:
    """(bytes read, rows read, bytes that are written for them), of an input's first block."""
    rows = source_input.origin.rows(source_input.needed_columns)
    first_range = next(row_ranges((source_input.id, row) for row in rows))
    bytes_read = sum(_row_bytes(row) for row in first_range.rows if isinstance(row, Row))
    block = make(first_range)
    assert block.sequences is not None and block.documents is not None
    sequences = block.sequences
    # Joining the blocks adds three numbers for each sequence: its offset, its document and its source.
    num_columns = len(sequences.columns) + 3
    column_bytes = len(sequences.lengths) * num_columns * NUMBER_BYTES
    bytes_per_token = 5 if sequences.weights is None else 9  # the id, the mask, and perhaps the weight
    token_bytes = bytes_per_token * len(sequences.tokens)
    return bytes_read, len(first_range.rows), block.documents.nbytes + token_bytes + column_bytes


def _row_bytes(row: Row) -> int:
    """Bytes of a row in its text file; of a row of a table, those it would have as JSON."""
    if isinstance(row, Line):
        return len(row.raw) + 1  # and its line break
    return len(json.dumps(row.fields, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))


def _gib(size_bytes: float) -> str:
    """A size as a number of GiB, for a message."""
    return f"{size_bytes / 2**30:,.3g}"
