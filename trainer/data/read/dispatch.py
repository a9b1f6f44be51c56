"""Reading: files and hub data sets become rows, each physical row once, as a row or as a bad row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from strategies.errors import DataError
from trainer.data.document import Rejected
from trainer.data.read import hub
from trainer.data.read.columnar import read_arrow, read_parquet
from trainer.data.read.csv_rows import read_csv
from trainer.data.read.json_rows import read_json, read_json_lines
from trainer.data.read.opening import COMPRESSION, File
from trainer.data.read.paths import COLUMN_KINDS, SUPPORTED, TEXT_KINDS, is_hub, kind_of
from trainer.data.read.remote import Remote
from trainer.data.read.row import Row
from trainer.data.read.text_files import read_text_file

_READERS: dict[str, Callable[..., Iterator[Row | Rejected]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".txt": read_text_file,
    ".md": read_text_file,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def read(
    paths: Iterable[File],
    *,
    key: str,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    wanted: Collection[str] | None = None,
) -> Iterator[Row | Rejected]:
    """All rows of the files and hub data sets, in order, streamed. `key` is the setting that named them.

    `wanted`: columns to read where the others cost something (tables); None reads all.
    `config`, `split` and `revision` are those of hub data sets. Rows of JSON lines come unparsed: call `Row.parse`.
    Raises DataError, naming the file, for whatever concerns a file as a whole or leaves its further rows unknown.
    """
    for path in paths:
        if is_hub(path):
            rows = hub.open_hub(hub.check_name(str(path), key), config, split, revision, wanted)
        else:
            kind = kind_of(path)
            if kind is None:
                raise DataError(f"{key}: cannot read {path}; files must end in {SUPPORTED}")
            rows = _READERS[kind](path, wanted) if kind in COLUMN_KINDS else _READERS[kind](path)
        count = 0
        for row in rows:
            count += 1
            yield row
        if not count:
            raise DataError(f"{path}:1: the file holds no rows; fill it, or take it out of {key}")


def inputs_of(
    paths: Iterable[File], *, config: str | None = None, split: str | None = None, revision: str | None = None
) -> list[tuple[str, Path | str]]:
    """What the fingerprint of prepared data must cover: for each input, its kind, and a file to hash or a text.

    The kind is the suffix with that of the compression; of a text file the whole name, which becomes the title. A hub
    data set gives `hub` and a text that changes with its version, a file elsewhere a text that changes with its content.
    Raises DataError where a data set cannot be loaded.
    """
    inputs: list[tuple[str, Path | str]] = []
    for path in paths:
        if is_hub(path):
            name = hub.check_name(str(path), "data.path")
            inputs.append(("hub", hub.identity(name, config, split, revision)))
            continue
        content = path.identity() if isinstance(path, Remote) else path
        compression = path.suffix.lower() if path.suffix.lower() in COMPRESSION else ""
        inputs.append((path.name if kind_of(path) in TEXT_KINDS else f"{kind_of(path)}{compression}", content))
    return inputs
