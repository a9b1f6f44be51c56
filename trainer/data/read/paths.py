"""Path values become files: files, directories, globs and lists of these; hub names stay as they are.

Nothing that could be data is passed over in silence: broken links, loops of links, pipes and directories that cannot be
read are errors. Passed over by rule: hidden names, names of other kinds in a directory, and `README`, `LICENSE` and the
like beside data files.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.read.opening import COMPRESSION, File, compression_of, read_object, require_regular
from trainer.data.read.remote import remote_files

TEXT_KINDS = (".txt", ".md")
LINE_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
COLUMN_KINDS = (".parquet", ".arrow")
SUPPORTED = (
    f"{', '.join((*LINE_KINDS, *TEXT_KINDS))} (each also with {', '.join(COMPRESSION)}), {' and '.join(COLUMN_KINDS)}"
)
"""For messages: the names that can be read."""
PREFIX = "hub:"
"""What a data path begins with that names a data set of the hub."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


_ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://")
_ABOUT_FILES = re.compile(r"(readme|licen[cs]e|notice|changelog|contributing|citation|authors)\b", re.IGNORECASE)


def kind_of(path: File) -> str | None:
    """The suffix that says how to read a file, without that of its compression (`.jsonl`); None if unknown."""
    packed = bool(compression_of(path))
    kind = "".join(path.suffixes[: -1 if packed else None][-1:]).lower()
    return kind if kind in LINE_KINDS + TEXT_KINDS + (() if packed else COLUMN_KINDS) else None


def is_address(value: str) -> bool:
    """Whether a path value names a file on another machine."""
    return _ADDRESS.match(value) is not None


def check_name(value: str, key: str) -> str:
    """The name after `hub:`. Raises DataError where it cannot be one."""
    name = value.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise DataError(f"{key}={value!r} is no name of a hub data set; write hub:NAME or hub:ORGANISATION/NAME")
    return name


def is_hub(path: File | str) -> bool:
    """Whether the path names a data set of the hub (`hub:org/name`)."""
    return str(path).startswith(PREFIX)


def expand(path_value: Any, key: str, *, remote: bool = False) -> list[File]:
    """Files named by `path_value`: a file, a directory, a glob or `hub:org/name`, or a list of these, in that order.

    With `remote` also addresses (s3://, https:// and so on), which are looked up; without it they are an error.
    A directory is searched with all below it, sorted by path; one written by `datasets.save_to_disk` gives its Arrow
    files. A name that exists as typed is never read as a glob. A file named twice is read once. Raises DataError that
    names `key` (the setting).
    """
    values = list(path_value) if isinstance(path_value, Sequence) and not isinstance(path_value, str) else [path_value]
    if not values:
        raise DataError(f"{key}=[] names no file; give a file, a directory or a glob")
    files: dict[File, File] = {}
    for value in values:
        if not isinstance(value, str | os.PathLike) or not str(value):
            raise DataError(f"{key}={value!r} is not a path; give a file, a directory, a glob or a list of these")
        if "\0" in str(value):
            raise DataError(f"{key}={str(value)!r} holds a NUL character, which no path may")
        if is_hub(str(value)):
            check_name(str(value), key)
            files.setdefault(Path(value), Path(value))
            continue
        if is_address(str(value)):
            if not remote:
                raise DataError(
                    f"{key}={value} is an address; set data.remote=true to read it over the network, or download the file, "
                    "or write hub:ORGANISATION/NAME"
                )
            files.update({file: file for file in remote_files(str(value), key, kind_of)})
            continue
        for found in _expand_one(str(value).removeprefix("file://"), key):
            files.setdefault(found.resolve(), found)
    return list(files.values())


def sets_of(value: Any, split: str) -> dict[str, tuple[str, Any]]:
    """The sets of a held-out split by name, as (the setting that names it, its files): one named like the split, or several.

    `value` is that of `data.<split>_path`. Raises ConfigError for a name that cannot be one.
    """
    key = f"data.{split}_path"
    if not isinstance(value, Mapping):
        return {} if value is None else {split: (key, value)}
    if split != "eval" or not value:
        raise ConfigError(f"{key}={dict(value)}: name files{'' if value else ', or sets of them as {name: file}'}")
    for name in value:
        if not re.fullmatch(r"[\w.-]+", str(name)) or name == split:
            raise ConfigError(
                f"{key}.{name}: is no name of a set; take letters, digits, dots and dashes, and not {split}"
            )
    return {str(name): (f"{key}.{name}", files) for name, files in value.items()}


def _expand_one(value: str, key: str) -> list[Path]:
    path = Path(value).expanduser()
    try:
        if path.is_dir():
            return _directory(path, key)
        if path.exists():
            return [_require_readable(path, key)]
    except OSError as error:
        raise DataError(f"{key}={value}: {error.strerror}") from error
    if path.is_symlink():
        raise DataError(f"{key}={value}: {_describe_broken_link(path)}")
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [_require_readable(p, key) for p in found if not p.is_dir()]
    if files:
        return files
    if found:
        raise DataError(f"{key}={value} matches only directories; write {value.rstrip('/')}/**/*.jsonl or the like")
    raise DataError(f"{key}={value} does not exist{_other_form(value) or _nearest(path) + _perhaps_hub(value)}")


def _require_readable(path: Path, key: str) -> Path:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{key}: {path}: {_describe_broken_link(path)}")
    if kind_of(path) is None:
        if path.suffix.lower() == ".zip":
            raise DataError(
                f"{key}: cannot read {path}; a zip file holds one file and is named like it: rows.jsonl.zip"
            )
        raise DataError(f"{key}: cannot read {path}; files must end in {SUPPORTED}")
    require_regular(path)
    return path


def _describe_broken_link(path: Path) -> str:
    target = path.readlink()
    try:
        path.stat()
    except FileNotFoundError:
        return f"the link leads to {target}, which does not exist"
    except OSError:
        pass
    return f"the link leads to {target} and back to itself: a loop"


def _directory(path: Path, key: str) -> list[Path]:
    saved = _saved_files(path, key)
    if saved is not None:
        return saved
    found = list(_walk(path, key, (path.resolve(),)))
    if any(kind_of(file) not in TEXT_KINDS for file in found):
        found = [file for file in found if not (kind_of(file) in TEXT_KINDS and _ABOUT_FILES.match(file.name))]
    if not found:
        raise DataError(f"{key}={path}: the directory holds no file that ends in {SUPPORTED}")
    return sorted(found)


def _walk(directory: Path, key: str, above: tuple[Path, ...]) -> Iterator[Path]:
    """Readable files in `directory` and below; `above` are the real paths on the way here."""
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{key}: {directory}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            real = entry.resolve()
            if real in above:
                raise DataError(
                    f"{key}: {entry}: the link leads to {entry.readlink() if entry.is_symlink() else real}, which "
                    "contains it: a loop; remove the link or name the files by a glob"
                )
            saved = _saved_files(entry, key)
            yield from saved if saved is not None else _walk(entry, key, (*above, real))
        elif kind_of(entry) is not None or (entry.is_symlink() and not entry.exists()):
            yield _require_readable(entry, key)


def _saved_files(directory: Path, key: str) -> list[Path] | None:
    """Arrow files, in order, of a directory that `datasets.save_to_disk` made; None for any other directory."""
    if (directory / "dataset_dict.json").is_file():
        splits = list(read_object(directory / "dataset_dict.json", "save the data set again").get("splits", []))
        if len(splits) != 1:
            names = ", ".join(splits)
            example = directory / (splits[0] if splits else "train")
            raise DataError(f"{key}={directory} holds the splits {names}; name one of them, for example {example}")
        directory = directory / splits[0]
    state = directory / "state.json"
    if not (state.is_file() and (directory / "dataset_info.json").is_file()):
        return None
    described = read_object(state, "save the data set again")
    if described.get("_indices_data_files"):
        raise DataError(
            f"{key}={directory} was saved with a selection of rows; call flatten_indices() and save it again"
        )
    files = [directory / item["filename"] for item in described.get("_data_files", [])]
    for file in files:
        require_regular(file)
    return files


def _nearest(path: Path) -> str:
    """A hint at an existing name close to the first part of `path` that is missing."""
    missing = path.absolute()
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    if not missing.parent.is_dir():
        return ""
    try:
        names = [p.name for p in missing.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f"; did you mean {missing.parent / close[0]}?" if close else f"; nothing like it in {missing.parent}"


def _other_form(value: str) -> str:
    """How several files are written here; empty if the value is not their names with commas."""
    parts = value.split(",")
    if len(parts) > 1 and all(Path(part).expanduser().exists() for part in parts):
        return f"; several files are a list: [{value}]"
    return ""


def _perhaps_hub(value: str) -> str:
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value)
    return f"; for a data set of the hub write {PREFIX}{value}" if looks and kind_of(Path(value)) is None else ""
