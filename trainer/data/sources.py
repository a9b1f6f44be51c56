"""Finds the inputs that a data configuration names, by split and source; reads their rows; checks that the disk has room."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import HELD_OUT, BalanceConfig, DataConfig, DataFormat, FilterConfig, Layout, PrivacyConfig
from trainer.data.document import Document, InputId, RejectedRow, SourceRow
from trainer.data.fields import KeptColumns, parse_label
from trainer.data.format_recognition import recognise_format
from trainer.data.formats import RowReader
from trainer.data.read.json_rows import UnparsedRow
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths, held_out_sets, is_hub_path
from trainer.data.selection.balance import balance_problems
from trainer.data.transforms.checks import CHECK_KINDS
from trainer.data.transforms.filters import filter_problems

MAX_UNREADABLE_ROWS = 1000
"""Rows at the beginning of an input among which one must be readable, so that its format can be recognised."""
MAX_RANGE_ROWS = 512
MAX_RANGE_BYTES = 4 << 20
"""Largest range of rows that a worker prepares at a time."""
TABLE_ROW_BYTES = 1024
"""What a row of a table counts for where ranges are measured in bytes of text."""


@dataclass(slots=True)
class RowRange:
    """Consecutive rows of one source and one split: what one call of a worker prepares, and turns into a block."""

    number: int
    """Counts the ranges of all inputs from 0."""
    split: str
    source: str
    offset: int
    """Number of rows of the same split and source before this range."""
    rows: list[SourceRow | RejectedRow]


@dataclass(slots=True)
class SourceInput:
    """Files or a hub data set whose rows are read in one way: a source of training data, or a held-out set.

    A held-out split has one, named like the split; that of evaluation may have several, by name.
    """

    split: str
    source: str
    key: str
    """The setting that names it, for messages."""
    origin: Origin
    format: DataFormat
    columns: dict[str, str]
    weight: float | None = None
    licence: str | None = None
    ignored_columns: frozenset[str] = frozenset()
    group_column: str | None = None
    """Column that says what its rows belong to, such as "patient": rows of one group go to the same split."""
    needed_columns: frozenset[str] | None = None
    """Columns that its reader needs, once it is known."""

    @property
    def id(self) -> InputId:
        """By which readers are found."""
        return InputId(self.split, self.source)


COMMIT_REGEX = re.compile(r"[0-9a-f]{40}")
"""A whole commit of the hub; shorter ones and names of branches may move."""


def data_problems(config: DataConfig) -> Iterator[str]:
    """Find settings of `data` that contradict each other or cannot be used: each with key, value, constraint and remedy.

    Opens no file: files are checked where they are read. Ranges of single numbers are checked at their fields.
    """
    yield from _path_problems(config)
    yield from _held_out_problems(config)
    yield from _weight_problems(config)
    for kind in config.checks.quarantine:  # problems of documents, such as "mojibake", that put them into quarantine
        if kind not in CHECK_KINDS:
            yield f"data.checks.quarantine: {kind!r} is not looked for; known are {', '.join(CHECK_KINDS)}"
    # Most settings are the defaults, and their checks need not be imported for these.
    if config.filters != FilterConfig():
        yield from filter_problems(config.filters)
    if config.balance != BalanceConfig():
        yield from balance_problems(config.balance)
    if config.streaming:
        yield from _streaming_problems(config)
    # A pack is several documents in one row, one behind the other.
    if config.packing and config.layout is Layout.padded:
        yield "data.packing=true: needs rows without padding; set data.layout=auto, or data.packing=false"
    if config.privacy != PrivacyConfig():
        # Imported here, because it compiles seventy regular expressions.
        from trainer.data.transforms.privacy.stage import privacy_problems

        yield from privacy_problems(config.privacy)


def _path_problems(config: DataConfig) -> Iterator[str]:
    """Find problems of the settings that name the training data: none is named, it is named twice, or a source has no path.

    Each is one sentence with the setting and what to do. Whether the files exist is not looked at here.
    """
    has_path = config.path not in (None, "")
    if not has_path and not config.sources:
        yield (
            "data.path: not set; name the training data: a file, a directory, a glob, or hub:<name>; or several under "
            "data.sources"
        )
    if has_path and config.sources:
        yield f"data.path={config.path}: data.sources names the training data too; keep one of the two"
    for name, source in config.sources.items():
        if source.path in (None, ""):
            yield f"data.sources.{name}.path: not set; give the source's files"


def _held_out_problems(config: DataConfig) -> Iterator[str]:
    """Find problems of the settings of held-out data: a split with files and a share, or groups with nothing held out.

    Groups (`data.group_by`) only say which rows must stay on one side of a split.
    """
    for split in HELD_OUT:
        path = getattr(config, f"{split}_path")
        share = getattr(config, f"{split}_share")
        if path is not None and share:
            yield f"data.{split}_share={share:g}: data.{split}_path gives that split already; set one of the two"
    holds_out = any((config.eval_share, config.test_share, config.eval_path, config.test_path))
    if config.group_by is not None and not holds_out:
        yield f"data.group_by={config.group_by}: nothing is held out; give data.eval_share=0.05 as well, or set it to null"


def _weight_problems(config: DataConfig) -> Iterator[str]:
    """Find problems of the weights by which sources are mixed: only some sources have one, or every weight is 0."""
    weighted_names = {name for name, source in config.sources.items() if source.weight is not None}
    if weighted_names and len(weighted_names) < len(config.sources):
        unweighted_names = ", ".join(sorted(config.sources.keys() - weighted_names))
        yield f"data.sources: {unweighted_names} has no weight, and others have; give every source one, or none"
    elif weighted_names and not any(source.weight for source in config.sources.values()):
        yield "data.sources: every weight is 0, so nothing is left to train on; give one source more than 0"


def _streaming_problems(config: DataConfig) -> Iterator[str]:
    """Find problems of `data.streaming`: a hub data set that is not pinned to a commit, or no hub data set at all.

    A branch or tag may move: its name, in the fingerprint of the prepared data, would then stand for other rows. Only sources can
    have a commit.
    """
    is_any_hub_path_named = False
    for name, source in config.sources.items():
        hub_paths = [path for path in _paths_in(source.path) if is_hub_path(path)]
        is_any_hub_path_named |= bool(hub_paths)
        if hub_paths and not COMMIT_REGEX.fullmatch(source.revision or ""):
            yield (
                f"data.sources.{name}.revision={source.revision}: data.streaming=true reads {hub_paths[0]} at one commit; give "
                "its 40 characters, which the hub shows beside the files"
            )
    for key in ("path", "eval_path", "test_path"):
        hub_paths = [path for path in _paths_in(getattr(config, key)) if is_hub_path(path)]
        is_any_hub_path_named |= bool(hub_paths)
        if hub_paths:
            yield (
                f"data.{key}={hub_paths[0]}: data.streaming=true reads hub data sets at a commit, which only sources have: "
                f"data.sources.<name>.path={hub_paths[0]} and its revision; or leave data.streaming out"
            )
    if not is_any_hub_path_named:
        yield "data.streaming=true: no data set of the hub is named (hub:<name>), and files are always streamed; leave it out"


def _paths_in(path_setting: Any) -> list[str]:
    """The paths in the value of a setting: a single path, a list of paths, or a mapping of names to paths."""
    if isinstance(path_setting, dict):
        paths = list(path_setting.values())
    elif isinstance(path_setting, list | tuple):
        paths = list(path_setting)
    else:
        paths = [path_setting]
    return [str(path) for path in paths]


def find_inputs(config: DataConfig) -> list[SourceInput]:
    """Find the inputs that `data` names, in the order in which they are read: training sources, then held-out sets.

    Raises ConfigError for settings that cannot be used, DataError for files that do not exist.
    """
    if config_problems := [*data_problems(config)]:
        raise ConfigError(config_problems)
    inputs = [*_training_inputs(config)]
    for split in HELD_OUT:
        for name, held_out in held_out_sets(getattr(config, f"{split}_path"), split).items():
            inputs.append(_input_with_common_settings(config, split, name, held_out.setting, held_out.paths))
    for source_input in inputs:
        _check_no_read_column_is_ignored(source_input)
    return inputs


def _training_inputs(config: DataConfig) -> Iterator[SourceInput]:
    """Make the inputs of training data: each of `data.sources` with its own settings, or all files of `data.path` as one.

    The latter is a source with the name "data".
    """
    if not config.sources:
        yield _input_with_common_settings(config, "train", "data", "data.path", config.path)
        return
    for name, source in config.sources.items():
        key = f"data.sources.{name}"
        origin = Origin(
            f"{key}.path",
            expand_paths(source.path, f"{key}.path", allow_remote=config.remote),
            subset=source.subset,
            split=source.split,
            revision=source.revision,
            streaming=config.streaming,
        )
        yield SourceInput(
            "train",
            source=name,
            key=key,
            origin=origin,
            # A setting that the source lacks is that of `data`.
            format=config.format if source.format is DataFormat.auto else source.format,
            columns=dict(source.columns) or dict(config.columns),
            ignored_columns=frozenset(config.ignore_columns),
            group_column=config.group_by,
            weight=source.weight,
            licence=source.licence,
        )


def _input_with_common_settings(config: DataConfig, split: str, source: str, key: str, paths: Any) -> SourceInput:
    """Make an input whose format and columns are those of `data`: the files of `data.path`, or a held-out set.

    `key`: the setting that names its `paths`, such as "data.eval_path". It is not streamed, since that needs a hub data set at a
    commit, which only sources can have.
    """
    return SourceInput(
        split,
        source=source,
        key=key,
        origin=Origin(key, expand_paths(paths, key, allow_remote=config.remote)),
        format=config.format,
        columns=dict(config.columns),
        ignored_columns=frozenset(config.ignore_columns),
        group_column=config.group_by,
    )


def _check_no_read_column_is_ignored(source_input: SourceInput) -> None:
    """Raise ConfigError if `data.ignore_columns` names a column that the input's `columns` or `data.group_by` name as well."""
    read_and_ignored = source_input.ignored_columns & {*source_input.columns.values(), source_input.group_column}
    if not read_and_ignored:
        return
    is_group_ignored = source_input.group_column in read_and_ignored
    read_by = "data.group_by reads" if is_group_ignored else f"{source_input.key} reads by its columns"
    raise ConfigError(f"data.ignore_columns names {min(read_and_ignored)}, which {read_by}; keep one")


def make_row_readers(
    inputs: list[SourceInput],
    *,
    label: Callable[[Any], str] = parse_label,
    preferred: tuple[DataFormat, ...] = (),
    kept: KeptColumns | None = None,
    accept_unread_columns: bool = False,
) -> dict[InputId, RowReader]:
    """Make a reader for each input, by its id: it turns the rows of the input into documents of one format.

    The format is that of the settings, or recognised from the first row that can be read. Also sets `needed_columns` of each
    input.

    `label`: turns the value of a label into a text.
    `preferred`: the formats that the objective learns from; they decide if several fit.
    `kept`: columns that documents keep as they are, for rewards.
    `accept_unread_columns`: whether rows may have columns that carry meaning and are not read, such as images.

    Raises ConfigError, and DataError also if a column of the first row makes all rows bad ones.
    """
    readers = {}
    for source_input in inputs:
        first_row, format = _first_row_and_format(source_input, preferred)
        reader = RowReader(
            format,
            source_input.columns,
            source=source_input.source,
            label=label,
            ignored=source_input.ignored_columns,
            group=source_input.group_column if _needs_group(source_input, first_row) else None,
            kept=kept,
        )
        if accept_unread_columns:
            reader.accept_unread_columns()
        readers[source_input.id] = reader
        source_input.needed_columns = reader.needed_columns
        document = reader(first_row)
        # Rejected for an important column that nothing reads, or for want of one that a reward needs: every row has the columns
        # that the first one has, so stop before any work.
        if isinstance(document, RejectedRow) and document.reason.startswith(("unread_", "missing_reward_column")):
            raise DataError(str(document))
    return readers


def _first_row_and_format(
    source_input: SourceInput, preferred: tuple[DataFormat, ...]
) -> tuple[SourceRow | RejectedRow, DataFormat]:
    """Decide in which format all rows of an input are read: (its first row, the format).

    A format in the settings is taken. Otherwise it is recognised from the first row that can be read, which is then the row
    returned. Prompts alone are not recognised, since most rows have something like a prompt: the format `prompt` is taken if the
    objective wants prompts only.
    """
    if source_input.format is not DataFormat.auto:
        return next(source_input.origin.rows()).parse(), source_input.format
    first_row = _first_readable_row(source_input)
    if preferred == (DataFormat.prompt,):
        return first_row, DataFormat.prompt
    format = recognise_format(
        first_row,
        source_input.columns,
        source=source_input.source,
        ignored=source_input.ignored_columns,
        preferred=preferred,
    )
    return first_row, format


def _needs_group(source_input: SourceInput, first_row: SourceRow | RejectedRow) -> bool:
    """Whether every row of an input must have the column of groups (`data.group_by`), by which rows stay on one side of a split.

    Training rows must; held-out rows if the first one has it, since files of a held-out split need no groups.
    """
    if source_input.split == "train" or isinstance(first_row, RejectedRow):
        return True
    top_level_column = (source_input.group_column or "").split(".")[0]  # of "meta.patient", "meta"
    return top_level_column in first_row.fields


def _first_readable_row(source_input: SourceInput) -> SourceRow:
    """The first row of an input that can be read. Raises DataError if none of its first `MAX_UNREADABLE_ROWS` can."""
    first_rejected: RejectedRow | None = None
    for row in islice(source_input.origin.rows(), MAX_UNREADABLE_ROWS):
        parsed = row.parse()
        if isinstance(parsed, SourceRow):
            return parsed
        first_rejected = first_rejected or parsed
    raise DataError(f"{first_rejected}; no row of the first {MAX_UNREADABLE_ROWS} can be read")


def rows_of_inputs(
    inputs: list[SourceInput], max_documents: int | None
) -> Iterator[tuple[InputId, SourceRow | RejectedRow]]:
    """Read the rows of all inputs, in order: (id of the input, row) of each.

    `max_documents`: how many rows of the training split are read, all its sources together; None for all.
    """
    num_train_rows_left = max_documents
    for source_input in inputs:
        rows = source_input.origin.rows(source_input.needed_columns)
        if source_input.split != "train" or num_train_rows_left is None:
            for row in rows:
                yield source_input.id, row
            continue
        for row in islice(rows, num_train_rows_left):  # so that no file is opened beyond the last row that is used
            num_train_rows_left -= 1
            yield source_input.id, row


def row_ranges(ids_and_rows: Iterator[tuple[InputId, SourceRow | RejectedRow]]) -> Iterator[RowRange]:
    """Group rows into ranges, each of which a worker turns into one block of prepared data.

    A range has rows of one input, at most `MAX_RANGE_ROWS` and about `MAX_RANGE_BYTES`. Where a range ends depends on the input
    alone, so that any number of workers prepares the same data set.

    `ids_and_rows`: (id of the input, row), as `rows_of_inputs` gives them.
    """
    number = 0
    num_bytes = 0
    current = RowRange(number=0, split="", source="", offset=0, rows=[])
    for (split, source), row in ids_and_rows:
        is_same_input = (split, source) == (current.split, current.source)
        is_full = len(current.rows) >= MAX_RANGE_ROWS or num_bytes >= MAX_RANGE_BYTES
        if not is_same_input or is_full:
            if current.rows:
                yield current
                number += 1
            offset = current.offset + len(current.rows) if is_same_input else 0
            current = RowRange(number, split, source, offset, [])
            num_bytes = 0
        current.rows.append(row)
        # Rows of text files are measured in bytes, those of tables count alike.
        num_bytes += len(row.raw) if isinstance(row, UnparsedRow) else TABLE_ROW_BYTES
    if current.rows:
        yield current


def evaluation_documents(paths: Any, config: DataConfig) -> Iterator[Document]:
    """Read the evaluation sets whose texts training data must not contain, such as public benchmarks: their documents.

    `paths`: the value of `data.decontamination.paths`. Each file is read in its own format. Raises DataError for a row that is no
    document.
    """
    key = "data.decontamination.paths"
    ignored = frozenset(config.ignore_columns)
    for path in expand_paths(paths, key, allow_remote=config.remote):
        file_input = SourceInput(
            split="decontamination",
            source=str(path),
            key=key,
            origin=Origin(key, [path]),
            format=DataFormat.auto,
            columns={},
            ignored_columns=ignored,
        )
        # Only texts are compared, so that a picture beside them does no harm.
        (reader,) = make_row_readers([file_input], accept_unread_columns=True).values()
        for row in file_input.origin.rows(file_input.needed_columns):
            document = reader(row.parse())
            if not isinstance(document, Document):  # but a rejected row, which says why
                raise DataError(f"{key}: {document}")
            yield document
