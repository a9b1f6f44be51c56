"""Finds the files that path settings name: files, directories, globs and lists of these; hub names stay as they are.

Nothing that could be data is passed over in silence: broken links, loops of links, pipes and directories that cannot be
read are errors. Some files are passed over by rule: hidden ones, files of other kinds in a directory, and `README`, `LICENSE`
and the like beside data files.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from strategies.errors import ConfigError, DataError
from trainer.data.read.opening import (
    COMPRESSION_BY_SUFFIX,
    InputPath,
    compression_of,
    read_json_object,
    require_regular_file,
)
from trainer.data.read.remote import remote_files

TEXT_KINDS = (".txt", ".md")
LINE_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
COLUMN_KINDS = (".parquet", ".arrow")
SUPPORTED_SUFFIXES_TEXT = (
    f"{', '.join((*LINE_KINDS, *TEXT_KINDS))} (each also with {', '.join(COMPRESSION_BY_SUFFIX)}), "
    f"{' and '.join(COLUMN_KINDS)}"
)
"""For messages: the names that can be read."""
HUB_PREFIX = "hub:"
"""What a data path begins with that names a data set of the hub."""
_HUB_NAME_REGEX = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ADDRESS_REGEX = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://")
_README_REGEX = re.compile(r"(readme|licen[cs]e|notice|changelog|contributing|citation|authors)\b", re.IGNORECASE)


def file_kind(path: InputPath) -> str | None:
    """The suffix that says how to read a file: of `rows.jsonl.gz` it is `.jsonl`; None for a file that cannot be read."""
    suffixes = path.suffixes
    kinds: tuple[str, ...] = LINE_KINDS + TEXT_KINDS
    if compression_of(path):
        suffixes = suffixes[:-1]
    else:
        kinds += COLUMN_KINDS  # these are never read compressed
    kind = suffixes[-1].lower() if suffixes else ""
    return kind if kind in kinds else None


def is_remote_address(path: str) -> bool:
    """Whether a path names a file on another machine, such as `s3://bucket/file`."""
    return _ADDRESS_REGEX.match(path) is not None


def parse_hub_name(path: str, setting: str) -> str:
    """The name after `hub:` in a path that a setting names: "hub:org/data" -> "org/data". Raises DataError."""
    name = path.removeprefix(HUB_PREFIX)
    if not _HUB_NAME_REGEX.fullmatch(name):
        raise DataError(f"{setting}={path!r} is no name of a hub data set; write hub:NAME or hub:ORGANISATION/NAME")
    return name


def is_hub_path(path: InputPath | str) -> bool:
    """Whether the path names a data set of the hub (`hub:org/name`)."""
    return str(path).startswith(HUB_PREFIX)


def expand_paths(path_setting: Any, setting: str, *, allow_remote: bool = False) -> list[InputPath]:
    """Find the files that a setting such as `data.path` names, in the order in which it names them, each once.

    `path_setting`: one of these, or a list of them:
    - `hub:org/name`: kept as it is, as a path;
    - an address (s3://, https:// and so on): the remote files that it names, looked up over the network; an error without
      `allow_remote`;
    - a file: itself, even if its name could be read as a glob;
    - a directory: the data files in it and below, sorted by path; one written by `datasets.save_to_disk` gives its Arrow files;
    - a glob: the files that match.
    `setting`: the name of the setting, for messages. Raises DataError.
    """
    paths = [path_setting]
    if isinstance(path_setting, Sequence) and not isinstance(path_setting, str):
        paths = list(path_setting)
    if not paths:
        raise DataError(f"{setting}=[] names no file; give a file, a directory or a glob")
    # By resolved path (links followed), the path as it was named: two paths name the same file if they lead to the same one.
    file_by_resolved_path: dict[InputPath, InputPath] = {}
    for path in paths:
        if not isinstance(path, str | os.PathLike) or not str(path):
            raise DataError(f"{setting}={path!r} is not a path; give a file, a directory, a glob or a list of these")
        path_text = str(path)
        if "\0" in path_text:
            raise DataError(f"{setting}={path_text!r} holds a NUL character, which no path may")
        if is_hub_path(path_text):
            parse_hub_name(path_text, setting)  # raises if it cannot be one
            file_by_resolved_path.setdefault(Path(path), Path(path))
        elif is_remote_address(path_text):
            if not allow_remote:
                raise DataError(
                    f"{setting}={path} is an address; set data.remote=true to read it over the network, or download the file, "
                    "or write hub:ORGANISATION/NAME"
                )
            for remote_file in remote_files(path_text, setting, file_kind):
                file_by_resolved_path[remote_file] = remote_file
        else:
            for file in _expand_local_path(path_text.removeprefix("file://"), setting):
                file_by_resolved_path.setdefault(file.resolve(), file)
    return list(file_by_resolved_path.values())


class HeldOutSet(NamedTuple):
    """The files of a set of held-out documents."""

    setting: str
    """The setting that names them, such as "data.eval_path.law"."""
    paths: Any
    """A path, or a list of paths, as the setting has them."""


def held_out_sets(path_setting: Any, split: str) -> dict[str, HeldOutSet]:
    """Find the sets of a held-out split by name, from the value of its setting `data.<split>_path`.

    Example: {"law": "law.jsonl"} of `eval` -> {"law": ("data.eval_path.law", "law.jsonl")}; "test.jsonl" of `test` -> {"test":
    ("data.test_path", "test.jsonl")}.

    Files without names are one set, which is named like the split. Only evaluation may have sets with names of their own. Raises
    ConfigError for names elsewhere, and for a name that cannot be one.
    """
    setting = f"data.{split}_path"
    if path_setting is None:
        return {}
    if not isinstance(path_setting, Mapping):
        return {split: HeldOutSet(setting, path_setting)}
    if split != "eval" or not path_setting:
        example = "" if path_setting else ", or sets of them as {name: file}"
        raise ConfigError(f"{setting}={dict(path_setting)}: name files{example}")
    sets: dict[str, HeldOutSet] = {}
    for name, files in path_setting.items():
        is_valid_name = re.fullmatch(r"[\w.-]+", str(name)) is not None
        if not is_valid_name or name == split:
            raise ConfigError(
                f"{setting}.{name}: is no name of a set; take letters, digits, dots and dashes, and not {split}"
            )
        sets[str(name)] = HeldOutSet(f"{setting}.{name}", files)
    return sets


def _expand_local_path(path_text: str, setting: str) -> list[Path]:
    """Find the files that one local path names. Raises DataError, with the setting and a hint at what may be meant.

    - A directory or a file of that very name: the files in it, or itself.
    - Else it is read as a glob: the files that match.
    """
    path = Path(path_text).expanduser()
    try:
        if path.is_dir():
            return _directory_files(path, setting)
        if path.exists():
            return [_require_readable(path, setting)]
    except OSError as error:
        raise DataError(f"{setting}={path_text}: {error.strerror}") from error
    if path.is_symlink():
        raise DataError(f"{setting}={path_text}: {_describe_broken_link(path)}")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
    files = [_require_readable(match, setting) for match in matches if not match.is_dir()]
    if files:
        return files
    if matches:
        raise DataError(
            f"{setting}={path_text} matches only directories; write {path_text.rstrip('/')}/**/*.jsonl or the like"
        )
    # "a,b" may be meant as a list; else there may be a close name, or a hub data set of that name.
    hint = _list_hint(path_text)
    if not hint:
        hint = _close_name_hint(path) + _hub_hint(path_text)
    raise DataError(f"{setting}={path_text} does not exist{hint}")


def _require_readable(path: Path, setting: str) -> Path:
    """Return the path, if it is a file of a kind that can be read. Raises DataError that names the `setting`."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{setting}: {path}: {_describe_broken_link(path)}")
    if file_kind(path) is None:
        if path.suffix.lower() == ".zip":
            raise DataError(
                f"{setting}: cannot read {path}; a zip file holds one file and is named like it: rows.jsonl.zip"
            )
        raise DataError(f"{setting}: cannot read {path}; files must end in {SUPPORTED_SUFFIXES_TEXT}")
    require_regular_file(path)
    return path


def _describe_broken_link(path: Path) -> str:
    """Say why a symbolic link leads nowhere, for messages: its target does not exist, or it leads back to itself."""
    target = path.readlink()
    try:
        path.stat()
    except FileNotFoundError:
        return f"the link leads to {target}, which does not exist"
    except OSError:
        pass
    return f"the link leads to {target} and back to itself: a loop"


def _directory_files(path: Path, setting: str) -> list[Path]:
    """Find the data files of a directory and of all below it, sorted by path. Raises DataError if there are none.

    `setting`: the name of the setting that has the directory. One that `datasets.save_to_disk` wrote gives its Arrow files.
    """
    arrow_files = _arrow_files_of_saved_dataset(path, setting)
    if arrow_files is not None:
        return arrow_files
    files = list(_readable_files_below(path, setting, (path.resolve(),)))
    # Beside data files a README is about them; in a directory of texts alone it is one of the texts.
    has_data_files = any(file_kind(file) not in TEXT_KINDS for file in files)
    if has_data_files:
        files = [file for file in files if file_kind(file) not in TEXT_KINDS or not _README_REGEX.match(file.name)]
    if not files:
        raise DataError(f"{setting}={path}: the directory holds no file that ends in {SUPPORTED_SUFFIXES_TEXT}")
    return sorted(files)


def _readable_files_below(directory: Path, setting: str, parents: tuple[Path, ...]) -> Iterator[Path]:
    """Find the readable files in `directory` and below, hidden ones left out. Raises DataError for a loop of links.

    `parents`: the real paths of `directory` and the directories above it, by which loops are found. A directory that
    `datasets.save_to_disk` wrote gives its Arrow files. `setting`: the name of the setting that has the directory.
    """
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{setting}: {directory}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            real_path = entry.resolve()
            if real_path in parents:
                target = entry.readlink() if entry.is_symlink() else real_path
                raise DataError(
                    f"{setting}: {entry}: the link leads to {target}, which "
                    "contains it: a loop; remove the link or name the files by a glob"
                )
            arrow_files = _arrow_files_of_saved_dataset(entry, setting)
            if arrow_files is not None:
                yield from arrow_files
            else:
                yield from _readable_files_below(entry, setting, (*parents, real_path))
        elif file_kind(entry) is not None or (entry.is_symlink() and not entry.exists()):
            yield _require_readable(entry, setting)  # raises for a broken link, whatever its name


def _arrow_files_of_saved_dataset(directory: Path, setting: str) -> list[Path] | None:
    """Find the Arrow files, in order, of a directory that `datasets.save_to_disk` wrote; None for any other directory.

    A saved DatasetDict has a directory for each split: its only one is taken. Raises DataError if there are several splits, or if
    the data set is a selection of rows, which the files do not show. `setting`: the name of the setting that has the directory.
    """
    if (directory / "dataset_dict.json").is_file():
        splits = list(read_json_object(directory / "dataset_dict.json", "save the data set again").get("splits", []))
        if len(splits) != 1:
            names = ", ".join(splits)
            example = directory / (splits[0] if splits else "train")
            raise DataError(f"{setting}={directory} holds the splits {names}; name one of them, for example {example}")
        directory = directory / splits[0]
    # A saved Dataset lists its Arrow files in state.json.
    state_file = directory / "state.json"
    if not (state_file.is_file() and (directory / "dataset_info.json").is_file()):
        return None
    state = read_json_object(state_file, "save the data set again")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{setting}={directory} was saved with a selection of rows; call flatten_indices() and save it again"
        )
    files = [directory / entry["filename"] for entry in state.get("_data_files", [])]
    for file in files:
        require_regular_file(file)
    return files


def _close_name_hint(path: Path) -> str:
    """Write a hint for a path that does not exist: "; did you mean data/train.jsonl?" for data/trian.jsonl.

    The close name is looked for in the last directory of the path that exists. Empty if that cannot be listed.
    """
    first_missing = path.absolute()
    while not first_missing.parent.exists() and first_missing.parent != first_missing:
        first_missing = first_missing.parent
    directory = first_missing.parent
    if not directory.is_dir():
        return ""
    try:
        existing_names = [sibling.name for sibling in directory.iterdir()]
    except OSError:
        return ""
    close_names = difflib.get_close_matches(first_missing.name, existing_names, n=1, cutoff=0.5)
    # A common suffix alone makes names look alike: nope.jsonl is not close to one.jsonl.
    if close_names and difflib.get_close_matches(first_missing.stem, [Path(close_names[0]).stem], cutoff=0.6):
        return f"; did you mean {directory / close_names[0]}?"
    return f"; nothing like it in {directory}"


def _list_hint(typed_path: str) -> str:
    """A hint at how a list of files is written, if the path is existing names with commas between them; else empty."""
    names = typed_path.split(",")
    if len(names) > 1 and all(Path(name).expanduser().exists() for name in names):
        return f"; several files are a list: [{typed_path}]"
    return ""


def _hub_hint(typed_path: str) -> str:
    """A hint at `hub:`, if the path looks like the name of a hub data set; else empty."""
    looks_like_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", typed_path) is not None
    if looks_like_name and file_kind(Path(typed_path)) is None:
        return f"; for a data set of the hub write {HUB_PREFIX}{typed_path}"
    return ""
