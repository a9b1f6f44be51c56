"""The inputs that a data configuration names, by split and source; their rows; and whether the disk has room."""

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
from trainer.data.fields import label_of
from trainer.data.formats import RowReader, recognise
from trainer.data.read.json_rows import Line
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand, is_hub, sets_of
from trainer.data.selection import balance
from trainer.data.shards import Block
from trainer.data.transforms import filters
from trainer.data.transforms.checks import KINDS


@dataclass(slots=True)
class RowRange:
    """Rows of one source and one split, in input order."""

    number: int
    split: str
    source: str
    offset: int
    """Number of rows of the same split and source before this job."""
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
        """(split, source): what a job says about its rows."""
        return self.split, self.source


COMMIT = re.compile(r"[0-9a-f]{40}")


def problems(data: DataConfig) -> Iterator[str]:
    """What of data's settings contradicts itself or cannot be used: one line a problem, with key, value, constraint and remedy.

    Ranges of single numbers stand at their fields, what files there are is said where they are opened.
    """
    if data.path in (None, "") and not data.sources:
        yield (
            "data.path: not set; name the training data: a file, a directory, a glob, or hub:<name>; or several under "
            "data.sources"
        )
    if data.path not in (None, "") and data.sources:
        yield f"data.path={data.path}: data.sources names the training data too; keep one of the two"
    for name, source in data.sources.items():
        if source.path in (None, ""):
            yield f"data.sources.{name}.path: not set; give the source's files"
    for split in HELD_OUT:
        share = getattr(data, f"{split}_share")
        if getattr(data, f"{split}_path") is not None and share:
            yield f"data.{split}_share={share:g}: data.{split}_path gives that split already; set one of the two"
    if data.group_by is not None and not any((data.eval_share, data.test_share, data.eval_path, data.test_path)):
        yield f"data.group_by={data.group_by}: nothing is held out; give data.eval_share=0.05 as well, or set it to null"
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(data.sources):
        without = ", ".join(sorted(data.sources.keys() - set(weighted)))
        yield f"data.sources: {without} has no weight, and others have; give every source one, or none"
    elif weighted and not any(source.weight for source in data.sources.values()):
        yield "data.sources: every weight is 0, so nothing is left to train on; give one source more than 0"
    known = ", ".join(KINDS)
    for kind in data.checks.quarantine:
        if kind not in KINDS:
            yield f"data.checks.quarantine: {kind!r} is not looked for; known are {known}"
    if data.filters != FilterConfig():
        yield from filters.problems(data.filters)
    if data.balance != BalanceConfig():
        yield from balance.problems(data.balance)
    if data.streaming:
        yield from _streaming_problems(data)
    if data.packing and data.layout is Layout.padded:
        yield "data.packing=true: needs rows without padding; set data.layout=auto, or data.packing=false"
    if data.privacy != PrivacyConfig():
        from trainer.data.transforms.privacy import stage  # which makes seventy expressions

        yield from stage.problems(data.privacy)


def _streaming_problems(data: DataConfig) -> Iterator[str]:
    """Hub data sets whose commit is not given: what they hold later could not be told from what was prepared."""
    hub = []
    for name, source in data.sources.items():
        of = [path for path in _path_texts(source.path) if is_hub(path)]
        hub += of
        if of and not COMMIT.fullmatch(source.revision or ""):
            yield (
                f"data.sources.{name}.revision={source.revision}: data.streaming=true reads {of[0]} at one commit; give its 40 "
                "characters, which the hub shows beside the files"
            )
    for key in ("path", "eval_path", "test_path"):
        of = [path for path in _path_texts(getattr(data, key)) if is_hub(path)]
        hub += of
        if of:
            yield (
                f"data.{key}={of[0]}: data.streaming=true reads hub data sets at a commit, which only sources have: "
                f"data.sources.<name>.path={of[0]} and its revision; or leave data.streaming out"
            )
    if not hub:
        yield "data.streaming=true: no data set of the hub is named (hub:<name>), and files are always streamed; leave it out"


def _path_texts(value: Any) -> list[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [str(each) for each in values]


def inputs_of(config: DataConfig) -> list[Input]:
    """The inputs in the order in which they are read. Raises ConfigError, and DataError for files that do not exist."""
    if wrong := [*problems(config)]:
        raise ConfigError(wrong)
    found = []
    if config.sources:
        for name, source in config.sources.items():
            key = f"data.sources.{name}"
            files = expand(source.path, f"{key}.path", remote=config.remote)
            origin = Origin(f"{key}.path", files, source.subset, source.split, source.revision, config.streaming)
            columns = dict(source.columns) or dict(config.columns)
            format = config.format if source.format is DataFormat.auto else source.format
            found.append(Input("train", name, key, origin, format, columns, source.weight, source.licence))
    else:
        origin = Origin("data.path", expand(config.path, "data.path", remote=config.remote))
        found.append(Input("train", "data", "data.path", origin, config.format, dict(config.columns)))
    for split in HELD_OUT:
        for name, (key, value) in sets_of(getattr(config, f"{split}_path"), split).items():
            origin = Origin(key, expand(value, key, remote=config.remote))
            found.append(Input(split, name, key, origin, config.format, dict(config.columns)))
    for item in found:
        item.ignored, item.group = frozenset(config.ignore_columns), config.group_by
        if both := item.ignored & {*item.columns.values(), item.group}:
            reader = "data.group_by reads" if item.group in both else f"{item.key} reads by its columns"
            raise ConfigError(f"data.ignore_columns names {min(both)}, which {reader}; keep one")
    return found


def readers_of(
    inputs: list[Input],
    *,
    label: Callable[[Any], str] = label_of,
    preferred: tuple[DataFormat, ...] = (),
    refuses: bool = True,
) -> dict[tuple[str, str], RowReader]:
    """What makes documents of each input's rows, its format recognised from the first row that can be read.

    `label` reads a label; `preferred` are the formats that decide where several fit; `refuses` as in `RowReader`.
    """
    made = {}
    for item in inputs:
        format = item.format
        options: Any = {"source": item.source, "ignored": item.ignored}
        first: Any = _first_row(item) if format is DataFormat.auto else next(item.origin.rows()).parse()
        if format is DataFormat.auto:
            format = recognise(first, item.columns, preferred=preferred, **options)
        if item.split == "train" or not isinstance(first, Row) or (item.group or "").split(".")[0] in first.fields:
            options["group"] = item.group  # files of held-out rows need not say what these belong to
        reader = made[item.split, item.source] = RowReader(
            format, item.columns, label=label, refuses=refuses, **options
        )
        item.needed_columns = reader.needed_columns
        found = first if isinstance(first, Rejected) else reader(first)
        if isinstance(found, Rejected) and found.reason.startswith("unread_"):
            raise DataError(str(found))  # what the first row has all have: no work is lost
    return made


def _first_row(item: Input) -> Row:
    bad = list[Rejected]()
    for row in islice(item.origin.rows(), 1000):
        parsed = row.parse()
        if isinstance(parsed, Row):
            return parsed
        bad.append(parsed)
    raise DataError(f"{bad[0]}; no row of the first 1000 can be read")


def rows_of(inputs: list[Input], max_documents: int | None) -> Iterator[tuple[tuple[str, str], Row | Rejected]]:
    """All rows, each with its input's id; of the training split the first `max_documents`."""
    left = max_documents
    for item in inputs:
        rows: Iterator[Row | Rejected] = item.origin.rows(item.needed_columns)
        if item.split == "train" and left is not None:
            rows = islice(rows, left)
        for row in rows:
            if item.split == "train" and left is not None:
                left -= 1
            yield item.id, row


def jobs(
    rows: Iterator[tuple[tuple[str, str], Row | Rejected]], *, most_rows: int = 512, most_bytes: int = 4 << 20
) -> Iterator[RowRange]:
    """Group ((split, source), row) into jobs; where a job ends depends on the input alone."""
    number, size, current = 0, 0, RowRange(0, "", "", 0, [])
    for (split, source), row in rows:
        same = (split, source) == (current.split, current.source)
        if not same or len(current.rows) >= most_rows or size >= most_bytes:
            if current.rows:
                yield current
                number += 1
            current = RowRange(number, split, source, current.offset + len(current.rows) if same else 0, [])
            size = 0
        current.rows.append(row)
        size += len(row.raw) if isinstance(row, Line) else 1024
    if current.rows:
        yield current


def evaluation_documents(paths: Any, config: DataConfig) -> Iterator[Document]:
    """Documents of the files against which training data is decontaminated. Raises DataError for a row that is none."""
    key = "data.decontamination.paths"
    ignored = frozenset(config.ignore_columns)
    for path in expand(paths, key, remote=config.remote):  # each file in its own format
        item = Input("decontamination", str(path), key, Origin(key, [path]), DataFormat.auto, {}, ignored=ignored)
        # what is compared are texts: a picture beside them matters to nobody
        (reader,) = readers_of([item], refuses=False).values()
        for row in item.origin.rows(item.needed_columns):
            parsed = row.parse()
            found = parsed if isinstance(parsed, Rejected) else reader(parsed)
            if not isinstance(found, Document):
                raise DataError(f"{key}: {found}")
            yield found


PLENTY_FACTOR = 64
"""Bytes of room for each byte of input with which nothing is estimated; compressed text in single bytes may need so much."""
NUMBER_BYTES = 8
"""Bytes of a number in a column of the store."""


def require_room(
    directory: Path,
    inputs: list[Input],
    make: Callable[[RowRange], Block],
    max_documents: int | None,
    *,
    parts: int = 1,
) -> None:
    """Raise StorageError where the disk of `directory` has less room than 1/`parts` of the data is going to take.

    What is written for each byte (of tables: each row) is measured on the first block of every input, made by `make`.
    Nothing is measured where there is plenty of room.
    """
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if PLENTY_FACTOR * sum(item.origin.size() for item in inputs) <= free * parts:
        return
    total, train = 0.0, 0.0
    for item in inputs:
        read, rows, written = _measure_first_block(item, make)
        size, num_rows = item.origin.extent()
        need = written * (size / max(read, 1) + num_rows / max(rows, 1))
        if item.split == "train" and max_documents is not None:
            need = min(need, written / max(rows, 1) * max_documents)
        total, train = total + need, train + need * (item.split == "train")
    if total > free * parts:
        whose = " by this shard" if parts > 1 else ""
        raise StorageError(
            f"data.cache_dir={directory}: about {_gib(total / parts)} GiB will be written{whose}, and {_gib(free)} GiB are free "
            f"(judged by the first rows of each input; {_gib(train / parts)} GiB of it is training data); set "
            "data.cache_dir to a larger disk, or read fewer rows with data.max_documents"
        )


def _measure_first_block(item: Input, make: Callable[[RowRange], Block]) -> tuple[int, int, int]:
    """(bytes read, rows read, bytes that are written of them), of an input's first block."""
    first = next(jobs((item.id, row) for row in item.origin.rows(item.needed_columns)))
    read = sum(_size(row) for row in first.rows if isinstance(row, Row))
    block = make(first)
    assert block.sequences is not None and block.documents is not None
    made = block.sequences
    numbers = len(made.lengths) * (len(made.columns) + 3) * NUMBER_BYTES
    a_token = 5 if made.weights is None else 9
    return read, len(first.rows), block.documents.nbytes + a_token * len(made.tokens) + numbers


def _size(row: Row) -> int:
    if isinstance(row, Line):
        return len(row.raw) + 1
    return len(json.dumps(row.fields, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g}"
