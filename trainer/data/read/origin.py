"""One origin of rows: the files that a setting names, or data sets of the Hugging Face hub, from the hub or from its cache."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from strategies.errors import DataError
from trainer.data.document import RejectedRow, SourceRow
from trainer.data.read.columnar import ROWS_PER_BATCH, count_rows, read_table, split_columns, table_rows
from trainer.data.read.compat import content_fingerprint
from trainer.data.read.json_rows import read_json, read_json_lines
from trainer.data.read.opening import InputPath, compression_of, decompression_ratio
from trainer.data.read.paths import COLUMN_KINDS, HUB_PREFIX, TEXT_KINDS, file_kind, is_hub_path, parse_hub_name
from trainer.data.read.remote import RemoteFile
from trainer.data.read.text import read_csv, read_text_file

HUB_SIZE_BYTES = 1 << 30
"""Size in bytes that stands for a hub data set."""
_READERS: dict[str, Callable[..., Iterator[SourceRow | RejectedRow]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".txt": read_text_file,
    ".md": read_text_file,
    ".parquet": read_table,
    ".arrow": read_table,
}
_UNREACHED_ERROR_NAMES = {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException", "Timeout"}
"""Errors that mean that no hub answered."""
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class InputSize(NamedTuple):
    """About how much there is to read."""

    text_bytes: float
    """Of text files, decompressed; of remote files, tables too, as they are stored."""
    table_rows: int
    """Of local tables and hub data sets, since the bytes of their compressed files tell little."""


@dataclass(slots=True)
class Origin:
    """The files or hub data sets that one setting names, in reading order."""

    key: str
    """The setting that names them, for messages."""
    paths: list[InputPath]
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set; may be left out if it has only one."""
    revision: str | None = None
    """Tag or commit of a hub data set."""
    streaming: bool = False
    """Whether hub data sets are read from the hub, by their commit, and not from a copy in its cache."""

    def rows(self, needed_columns: Collection[str] | None = None) -> Iterator[SourceRow | RejectedRow]:
        """Read all rows of all files, in order, streamed: texts and tables become named values. Rows of JSON come unparsed.

        A worker parses these later (`SourceRow.parse`). Of tables, only the columns `needed_columns` are read (None: all). Raises
        DataError, with the file, if a file has no rows, cannot be used as a whole, or its further rows cannot be told apart.
        """
        for path in self.paths:
            num_rows = 0
            for row in self._rows_of_file(path, needed_columns):
                num_rows += 1
                yield row
            if not num_rows:
                raise DataError(f"{path}:1: the file holds no rows; fill it, or take it out of {self.key}")

    def _rows_of_file(
        self, path: InputPath, needed_columns: Collection[str] | None
    ) -> Iterator[SourceRow | RejectedRow]:
        """Read the rows of one file or hub data set, by the reader for its suffix. Only readers of tables take `needed_columns`.

        The others read whole rows, since a line cannot be read in part.
        """
        if is_hub_path(path):
            return self._hub_rows(path, needed_columns)
        suffix = file_kind(path) or ""  # it has one: `expand_paths` lets no other names pass
        if suffix in COLUMN_KINDS:
            return _READERS[suffix](path, needed_columns)
        return _READERS[suffix](path)

    def content_identity(self, digest_of: Callable[[Path], str]) -> list[tuple[str, str]]:
        """Say by what the fingerprint of prepared data knows these inputs: (kind, content identity) of each file or hub data set.

        A change in it means that the data has to be prepared again.
        - A local file: its suffixes, such as `.jsonl.gz`, and its SHA-256, which `digest_of` gives.
        - A remote file: its suffixes, and a text that changes with its content.
        - A text file, local or remote: its whole name in place of the suffixes, because the name becomes the title.
        - A hub data set: "hub" and what tells its versions apart; "hub stream" and its commit if it is streamed.
        """
        identities = []
        for path in self.paths:
            if is_hub_path(path):
                identities.append(self._hub_content_identity(path))
                continue
            content_identity = path.content_identity() if isinstance(path, RemoteFile) else digest_of(path)
            is_text_file = file_kind(path) in TEXT_KINDS
            kind = path.name if is_text_file else f"{file_kind(path)}{compression_of(path)}"
            identities.append((kind, content_identity))
        return identities

    def _hub_content_identity(self, path: InputPath) -> tuple[str, str]:
        """Find what tells versions of a hub data set apart, for the fingerprint: ("hub", a text) or ("hub stream", a text).

        If it is streamed, the commit says all, and the hub need not be reached. Else the data set is loaded: the text has its
        name, split, version, fingerprint and number of rows.
        """
        name = str(path).removeprefix(HUB_PREFIX)
        if self.streaming:
            return "hub stream", _join_with_colons(name, self.subset, self.split, self.revision)
        dataset = self.load_hub_split(path)
        version = dataset.version if dataset.version is not None else ""
        split = dataset.split or self.split
        content = content_fingerprint(dataset)
        return "hub", _join_with_colons(name, self.subset, split, self.revision, version, content, dataset.num_rows)

    def size_bytes(self) -> int:
        """About how many bytes the files have, as they are stored; a hub data set counts as 1 GiB, whatever its size."""
        return sum(HUB_SIZE_BYTES if is_hub_path(path) else _file_size_bytes(path) for path in self.paths)

    def estimate_size(self) -> InputSize:
        """Estimate how much there is to read, to show progress and to check the room on the disk.

        Reads the beginnings of compressed text files, and what tables say of their rows. Loads hub data sets.
        """
        text_bytes = 0.0
        num_table_rows = 0
        for path in self.paths:
            if is_hub_path(path):
                num_table_rows += self._num_rows(self.load_hub_split(path))
            elif isinstance(path, RemoteFile):
                text_bytes += path.size_bytes()
            elif file_kind(path) in COLUMN_KINDS:
                num_table_rows += count_rows(path)
            else:
                text_bytes += _file_size_bytes(path) * decompression_ratio(path)
        return InputSize(text_bytes, num_table_rows)

    def file_records(self, digest_of: Callable[[Path], str]) -> list[dict[str, Any]]:
        """Describe the files for the audit of the data: {"path", "bytes", "sha256"} of each.

        Remote files lack "sha256", hub data sets all but "path". `digest_of` gives the SHA-256 of a local file.
        """
        records: list[dict[str, Any]] = []
        for path in self.paths:
            record: dict[str, Any] = {"path": str(path)}
            if not is_hub_path(path):
                record["bytes"] = _file_size_bytes(path)
                if isinstance(path, Path):
                    record["sha256"] = digest_of(path)
            records.append(record)
        return records

    def _hub_rows(self, path: InputPath, needed_columns: Collection[str] | None) -> Iterator[SourceRow | RejectedRow]:
        """Read the rows of a hub data set, numbered from 1, with the values of Arrow as JSON has them: dates and bytes as text.

        `needed_columns`: only these are read (None: all).
        """
        dataset = self.load_hub_split(path)
        split = str(dataset.split or self.split or "")
        # What stands in place of a file name in messages: hub:NAME/SUBSET/SPLIT.
        shown_name = "/".join(filter(None, (str(path), self.subset, split)))
        column_names: list[str] = dataset.column_names
        if not column_names:  # a stream may only know its columns once it is read: its first rows are then read twice
            column_names = next((table.column_names for table in self._arrow_tables(dataset, shown_name)), [])
        read_columns, unread_columns = split_columns(column_names, needed_columns)
        tables = self._arrow_tables(dataset.select_columns(read_columns), shown_name)
        batches = itertools.chain.from_iterable(table.combine_chunks().to_batches() for table in tables)
        return table_rows(batches, shown_name, unread_columns=unread_columns)

    def _arrow_tables(self, dataset: Any, shown_name: str) -> Iterator[Any]:
        """Read a hub data set (of the library `datasets`) as Arrow tables. Raises DataError if a stream breaks off."""
        try:
            yield from dataset.with_format("arrow").iter(ROWS_PER_BATCH)
        except Exception as error:
            # Without streaming, the rows lie in a local cache, and an error there says enough.
            if not self.streaming or isinstance(error, DataError):
                raise
            raise _load_error(shown_name, error, streaming=True) from error

    def _num_rows(self, dataset: Any) -> int:
        """How many rows a hub data set has, as loaded by `datasets`; 0 for a stream that does not say."""
        if not self.streaming:
            return int(dataset.num_rows)
        split_info = (dataset.info.splits or {}).get(str(dataset.split))
        return int(split_info.num_examples or 0) if split_info is not None else 0

    def load_hub_split(self, path: InputPath) -> Any:
        """Load one split of a hub data set by `datasets`. Raises DataError that says what to do about it.

        If the settings name no split, the data set must have only one. Downloads it into the library's cache, unless it is
        streamed.
        """
        import datasets

        name = parse_hub_name(str(path), self.key)
        # `datasets.load_dataset` would take a directory of this name for the data set.
        if Path(name).exists():
            raise DataError(
                f"{path}: a local {name} exists here and would be read instead; to read it, write ./{name} as the path, "
                "otherwise start in another directory"
            )
        # Progress bars of the library would stand between our own lines.
        had_progress_bars = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            loaded: Any = datasets.load_dataset(
                name, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:
            options = {"config": self.subset, "split": self.split, "revision": self.revision}
            shown_options = ", ".join(f"{option} {value!r}" for option, value in options.items() if value)
            full_name = f"{path} ({shown_options})" if shown_options else str(path)
            raise _load_error(full_name, error, streaming=self.streaming) from error
        finally:
            if had_progress_bars:
                datasets.enable_progress_bars()
        if not isinstance(loaded, dict):
            return loaded
        if len(loaded) != 1:
            raise DataError(f"{path} has the splits {', '.join(loaded)}; name one of them")
        return next(iter(loaded.values()))


def _join_with_colons(*fields: Any) -> str:
    """The fields as one text with colons between them; None is an empty field."""
    return ":".join("" if field is None else str(field) for field in fields)


def _file_size_bytes(path: InputPath) -> int:
    """Size of a local or remote file in bytes."""
    return path.size_bytes() if isinstance(path, RemoteFile) else path.stat().st_size


def _load_error(full_name: str, error: Exception, *, streaming: bool = False) -> DataError:
    """Make the error for a hub data set that `datasets` could not load: the cause in a line, and what to do about it.

    Example: "hub:org/name cannot be loaded: Unknown split "dev"...; name a split that it has". `full_name`: the data set with the
    options it was asked for with. `streaming`: whether it was to be read from the hub row by row.
    """
    text = str(error).strip()
    cause = text.splitlines()[0][:300] if text else type(error).__name__
    return DataError(f"{full_name} cannot be loaded: {cause}; {_load_remedy(error, text, cause, streaming=streaming)}")


def _load_remedy(error: Exception, text: str, cause: str, *, streaming: bool) -> str:
    """Say what to do about a hub data set that `datasets` could not load, by the kind of error: "name a split that it has".

    `text`: the message of the error, and `cause`, its first line. `streaming`: whether it was to be read row by row.
    """
    # By name, because the classes live in several libraries, which are not imported here.
    class_names = {error_class.__name__ for error_class in type(error).__mro__}
    is_offline = any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in _OFFLINE_VARIABLES)
    is_hub_unreached = is_offline or bool(class_names & _UNREACHED_ERROR_NAMES)
    # Such as "Config name is missing", "BuilderConfig 'x' not found".
    is_about_config = "onfig" in cause and "ValueError" in class_names and "ConnectionError" not in class_names
    if "DatasetNotFoundError" in class_names and not is_offline:
        return "check the name; for a private or gated data set, log in with a token that has access (HF_TOKEN)"
    if is_about_config:
        return f"name one of its configs; the message says which there are: {' '.join(text.split())[:600]}"
    if "split" in cause.lower():
        return "name a split that it has"
    if "scripts are no longer supported" in text:
        return (
            "it needs code from the hub, which is not run; use a copy converted to Parquet (often refs/convert/parquet)"
        )
    if streaming and is_hub_unreached:
        return (
            "data.streaming=true reads from the hub, which is not reached here; run shardtune prepare where it is, into a "
            "data.cache_dir that is seen here, or set data.streaming=false"
        )
    if is_hub_unreached:
        return (
            "no hub was reached and the data set is not in the local cache; load it once on a machine with internet "
            "(the cache is HF_HOME), or download its files and give their path"
        )
    return "download its files and give their path if this keeps happening"
