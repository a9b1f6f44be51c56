"""One origin of rows: the files that a setting names, or data sets of the Hugging Face hub, from the hub or from its cache."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from strategies.errors import DataError
from trainer.data.document import Rejected, Row
from trainer.data.read.columnar import ROWS_PER_BATCH, count_rows, read_table, split_columns, table_rows
from trainer.data.read.compat import content_fingerprint
from trainer.data.read.json_rows import read_json, read_json_lines
from trainer.data.read.opening import File, compression_of, expansion
from trainer.data.read.paths import COLUMN_KINDS, PREFIX, TEXT_KINDS, check_name, is_hub, kind_of
from trainer.data.read.remote import RemoteFile
from trainer.data.read.text import read_csv, read_text_file

HUB_SIZE_BYTES = 1 << 30
"""Size in bytes that stands for a hub data set."""
_READERS: dict[str, Callable[..., Iterator[Row | Rejected]]] = {
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
UNREACHED_ERRORS = {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException", "Timeout"}
"""Errors that mean that no hub answered."""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(slots=True)
class Origin:
    """Files and hub data sets in reading order, with the subset, split and revision of a hub data set."""

    key: str
    """The setting that names them, for messages."""
    paths: list[File]
    subset: str | None = None
    split: str | None = None
    """May be left out where a hub data set has only one."""
    revision: str | None = None
    streaming: bool = False
    """Whether hub data sets are read from the hub, by their commit, and not from a copy in its cache."""

    def rows(self, needed_columns: Collection[str] | None = None) -> Iterator[Row | Rejected]:
        """All rows, in order, streamed; of tables the columns `needed_columns` (None: all). Rows of JSON lines come unparsed.

        Raises DataError, naming the file, for whatever concerns a file as a whole or leaves its further rows unknown.
        """
        for path in self.paths:
            num_rows = 0
            for row in self._rows_of_file(path, needed_columns):
                num_rows += 1
                yield row
            if not num_rows:
                raise DataError(f"{path}:1: the file holds no rows; fill it, or take it out of {self.key}")

    def _rows_of_file(self, path: File, needed_columns: Collection[str] | None) -> Iterator[Row | Rejected]:
        """Rows of one file or hub data set, by the reader of its kind."""
        if is_hub(path):
            return self._hub_rows(path, needed_columns)
        kind = kind_of(path) or ""  # `expand` lets no other names pass
        if kind in COLUMN_KINDS:
            return _READERS[kind](path, needed_columns)
        return _READERS[kind](path)

    def identity(self, digest: Callable[[Path], str]) -> list[tuple[str, str]]:
        """What the fingerprint covers: kinds and contents, not names. `digest` gives the SHA-256 of a file.

        The kind is the suffix with that of the compression; of a text file the whole name, which becomes the title. A file
        elsewhere gives a text that changes with its content, a hub data set its name, the version loaded and its size, or, where
        it is streamed, its commit.
        """
        identities = []
        for path in self.paths:
            if is_hub(path):
                identities.append(self._hub_identity(path))
                continue
            content = path.identity() if isinstance(path, RemoteFile) else digest(path)
            kind = path.name if kind_of(path) in TEXT_KINDS else f"{kind_of(path)}{compression_of(path)}"
            identities.append((kind, content))
        return identities

    def _hub_identity(self, path: File) -> tuple[str, str]:
        """(kind, text that differs between versions of a hub data set)."""
        name = str(path).removeprefix(PREFIX)
        if self.streaming:  # the commit says all, and the hub need not be reached
            return "hub stream", _joined_text(name, self.subset, self.split, self.revision)
        dataset = self.dataset(path)
        version = dataset.version if dataset.version is not None else ""
        split = dataset.split or self.split
        content = content_fingerprint(dataset)
        return "hub", _joined_text(name, self.subset, split, self.revision, version, content, dataset.num_rows)

    def size(self) -> int:
        """Bytes, roughly."""
        return sum(HUB_SIZE_BYTES if is_hub(path) else _size(path) for path in self.paths)

    def extent(self) -> tuple[float, int]:
        """How much there is to read: bytes of text, decompressed (an estimate), and rows of tables, whose bytes tell little."""
        text_bytes = 0.0
        table_rows = 0
        for path in self.paths:
            if is_hub(path):
                table_rows += self._count(self.dataset(path))
            elif isinstance(path, RemoteFile):
                text_bytes += path.size()
            elif kind_of(path) in COLUMN_KINDS:
                table_rows += count_rows(path)
            else:
                text_bytes += _size(path) * expansion(path)
        return text_bytes, table_rows

    def files(self, digest: Callable[[Path], str]) -> list[dict[str, Any]]:
        """Names, sizes and digests, for the records."""
        records: list[dict[str, Any]] = []
        for path in self.paths:
            record: dict[str, Any] = {"path": str(path)}
            if not is_hub(path):
                record["bytes"] = _size(path)
                if isinstance(path, Path):
                    record["sha256"] = digest(path)
            records.append(record)
        return records

    def _hub_rows(self, path: File, needed_columns: Collection[str] | None) -> Iterator[Row | Rejected]:
        """Rows of a hub data set, numbered from 1, with values as in `columnar`."""
        dataset = self.dataset(path)
        split = str(dataset.split or self.split or "")
        place = "/".join(part for part in (str(path), self.subset, split) if part)
        names: list[str] = dataset.column_names
        if not names:  # a stream may only know its columns once it is read
            names = next((table.column_names for table in self._tables(dataset, place)), [])
        read_columns, unread_columns = split_columns(names, needed_columns)
        tables = self._tables(dataset.select_columns(read_columns), place)
        batches = itertools.chain.from_iterable(table.combine_chunks().to_batches() for table in tables)
        return table_rows(batches, place, unread_columns=unread_columns)

    def _tables(self, dataset: Any, place: str) -> Iterator[Any]:
        """The rows of a hub data set as Arrow tables. Raises DataError where a stream breaks off."""
        try:
            yield from dataset.with_format("arrow").iter(ROWS_PER_BATCH)
        except Exception as error:
            if not self.streaming or isinstance(error, DataError):
                raise
            raise _load_error(place, error, streaming=True) from error

    def _count(self, dataset: Any) -> int:
        """Rows; 0 of a stream that does not say how many it has."""
        if not self.streaming:
            return int(dataset.num_rows)
        split_info = (dataset.info.splits or {}).get(str(dataset.split))
        return int(split_info.num_examples or 0) if split_info is not None else 0

    def dataset(self, path: File) -> Any:
        """One split of a hub data set as `datasets` loads it. Raises DataError that says what to do about it."""
        import datasets

        name = check_name(str(path), self.key)
        # `datasets.load_dataset` would take a directory of this name for the data set.
        if Path(name).exists():
            raise DataError(
                f"{path}: a local {name} exists here and would be read instead; to read it, write ./{name} as the path, "
                "otherwise start in another directory"
            )
        had_progress_bars = datasets.utils.logging.is_progress_bar_enabled()
        # Their bars would stand between our own lines.
        datasets.disable_progress_bars()
        try:
            loaded: Any = datasets.load_dataset(
                name, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except Exception as error:
            settings = {"config": self.subset, "split": self.split, "revision": self.revision}
            described = ", ".join(f"{word} {setting!r}" for word, setting in settings.items() if setting)
            what = f"{path} ({described})" if described else str(path)
            raise _load_error(what, error, streaming=self.streaming) from error
        finally:
            if had_progress_bars:
                datasets.enable_progress_bars()
        if not isinstance(loaded, dict):
            return loaded
        if len(loaded) != 1:
            raise DataError(f"{path} has the splits {', '.join(loaded)}; name one of them")
        return next(iter(loaded.values()))


def _joined_text(*parts: Any) -> str:
    """The parts with colons between them; None is an empty part."""
    return ":".join("" if part is None else str(part) for part in parts)


def _size(path: File) -> int:
    return path.size() if isinstance(path, RemoteFile) else path.stat().st_size


def _load_error(what: str, error: Exception, *, streaming: bool = False) -> DataError:
    """The cause in a line, and what to do about it."""
    text = str(error).strip()
    cause = text.splitlines()[0][:300] if text else type(error).__name__
    # By name, because the classes live in several libraries, which are not imported here.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    is_offline = any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in _OFFLINE)
    is_unreached = is_offline or bool(kinds & UNREACHED_ERRORS)
    if "DatasetNotFoundError" in kinds and not is_offline:
        remedy = "check the name; for a private or gated data set, log in with a token that has access (HF_TOKEN)"
    elif "onfig" in cause and "ValueError" in kinds and "ConnectionError" not in kinds:
        remedy = f"name one of its configs; the message says which there are: {' '.join(text.split())[:600]}"
    elif "split" in cause.lower():
        remedy = "name a split that it has"
    elif "scripts are no longer supported" in text:
        remedy = (
            "it needs code from the hub, which is not run; use a copy converted to Parquet (often refs/convert/parquet)"
        )
    elif streaming and is_unreached:
        remedy = (
            "data.streaming=true reads from the hub, which is not reached here; run shardtune prepare where it is, into a "
            "data.cache_dir that is seen here, or set data.streaming=false"
        )
    elif is_unreached:
        remedy = (
            "no hub was reached and the data set is not in the local cache; load it once on a machine with internet "
            "(the cache is HF_HOME), or download its files and give their path"
        )
    else:
        remedy = "download its files and give their path if this keeps happening"
    return DataError(f"{what} cannot be loaded: {cause}; {remedy}")
