"""Where rows come from: path values become files, and files become rows with a file and a line.

Refuses, with file and line, whatever a lenient reader would load as something else: malformed JSON, NaN, bytes that are
not UTF-8, NUL bytes, rows that are not objects, CSV records with too few or too many cells, empty files.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from strategies.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv")
MAX_CELL = 2**31 - 1
"""Longest CSV cell in characters; the csv module's own limit of 131,072 is shorter than real documents."""
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(slots=True)
class Row:
    """One object of a file: its fields, and the line on which it starts (from 1)."""

    file: Path
    line: int
    fields: dict[str, Any]


def expand(path_value: Any, key: str) -> list[Path]:
    """Files named by `path_value`: a file, a directory or a glob, or a list of these, in the order given.

    A name that exists as typed is never read as a glob. A file named twice is read once. Raises DataError naming `key`.
    """
    values = list(path_value) if isinstance(path_value, Sequence) and not isinstance(path_value, str) else [path_value]
    if not values:
        raise DataError(f"{key}=[] names no file; give a file, a directory or a glob")
    files: dict[Path, Path] = {}
    for value in values:
        if not isinstance(value, str | os.PathLike) or not str(value):
            raise DataError(f"{key}={value!r} is not a path; give a file, a directory, a glob or a list of these")
        for file in _expand_one(str(value), key):
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _expand_one(value: str, key: str) -> list[Path]:
    path = Path(value).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise DataError(f"{key}={value}: the directory holds no {', '.join(SUFFIXES)} file")
        return found
    if path.exists():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not found:
            raise DataError(f"{key}={value} does not exist{_nearest(path)}")
    for file in found:
        if file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{key}={value}: cannot read {file}; files must end in {', '.join(SUFFIXES)}")
    return found


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


def read_rows(paths: Iterable[Path]) -> Iterator[Row]:
    """All rows of the files, in order. JSONL and CSV are streamed. Raises DataError with file and line."""
    for path in paths:
        reader = {".csv": _read_csv, ".json": _read_json}.get(path.suffix.lower(), _read_jsonl)
        count = 0
        try:
            for row in reader(path):
                count += 1
                yield row
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if not count:
            raise DataError(f"{path}:1: the file holds no rows")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Physical lines with their numbers, decoded strictly; a byte order mark is skipped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in raw:
                hint = "; the file looks like UTF-16, save it as UTF-8" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise DataError(f"{path}:{number}: NUL byte in column {raw.index(0) + 1}{hint}")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = f"0x{raw[error.start]:02x}"
                raise DataError(
                    f"{path}:{number}: byte {bad} in column {error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value; use null or a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
        yield Row(path, number, _object(value, path, number))


def _object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: a row must be an object with named fields, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects; a .json file that holds one object a line is read as JSONL."""
    text = "".join(line for _, line in _lines(path))
    start = _skip(text, 0)
    if text[start : start + 1] == "{":
        first_line = text[start:].split("\n", 1)[0].strip()
        if first_line.endswith("}"):
            yield from _read_jsonl(path)
            return
    if text[start : start + 1] != "[":
        if start == len(text):
            raise DataError(f"{path}:1: the file is empty")
        raise DataError(f"{_at(path, text, start)}: a .json file must hold a list of objects, or one object a line")
    line, counted = 1, 0
    position = _skip(text, start + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON in the object that starts here: {error}") from error
        yield Row(path, line, _object(value, path, line))
        position = _skip(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position = _skip(text, position + 1)
        if separator not in (",", "]") or (separator == "," and text[position : position + 1] == "]"):
            raise DataError(f"{_at(path, text, position)}: not valid JSON: ',' and an object, or ']' expected")
    position = _skip(text, position + 1)
    if position != len(text):
        raise DataError(f"{_at(path, text, position)}: not valid JSON: text after the end of the list")


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _at(path: Path, text: str, position: int) -> str:
    return f"{path}:{text.count(chr(10), 0, position) + 1}"


def _read_csv(path: Path) -> Iterator[Row]:
    """RFC 4180 with a header line; a record may span lines and is named by its first."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not valid CSV: {error}") from error
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            doubled = sorted({name for name in header if header.count(name) > 1})
            if doubled or "" in header:
                what = f"the column {doubled[0]!r} twice" if doubled else "a column without a name"
                raise DataError(f"{path}:{line}: the header has {what}")
        elif len(cells) != len(header):
            raise DataError(
                f"{path}:{line}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)}); "
                "quote cells that hold commas or line breaks"
            )
        else:
            yield Row(path, line, dict(zip(header, cells, strict=True)))
