"""JSON files: one object a line, or one list of objects; both are streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from strategies.errors import DataError
from trainer.data.document import Rejected
from trainer.data.read.opening import BUFFER, File, open_text
from trainer.data.read.row import MAX_ROW_BYTES, Row, excerpt

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)[ \t\r\n]*+|[][{},]', re.DOTALL)
"""A text and the blanks after it, whose last quote may still be to be read, or what nests and parts values."""
_AFTER_TEXT = b",:]}"
"""What may follow a text. Anything else says that a quote is missing or one too many, which turns texts inside out."""


def read_json_lines(path: File) -> Iterator[Row | Rejected]:
    """One row a line that is not blank, unparsed. Lines above 64 MiB are bad rows. Raises DataError."""
    name = str(path)
    number = 0
    with open_text(path) as stream:
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                yield _too_long(name, number, raw[:1000], _skip_line(stream, raw))
            elif not raw.isspace():
                if number == 1 and b"\r" in raw.strip() and not raw.endswith(b"\n"):
                    _refuse_carriage_returns(Row(name, 1, raw=raw))
                yield Row(name, number, raw=raw)


def _skip_line(stream: BinaryIO, raw: bytes) -> int:
    """Read on to the end of a line of which `raw` was the beginning; its length in bytes."""
    length = len(raw)
    while not raw.endswith(b"\n"):
        raw = stream.readline(BUFFER)
        if not raw:
            break
        length += len(raw)
    return length


def _too_long(name: str, line: int, start: bytes, length: int) -> Rejected:
    message = f"the row has {length / 2**20:.0f} MiB, the most is {MAX_ROW_BYTES >> 20} MiB; split it"
    return Rejected(name, line, "too_long", message, excerpt(start))


def _refuse_carriage_returns(row: Row) -> None:
    """A whole file that is one line only because its lines end with carriage returns would be lost as one bad row."""
    if isinstance(row.parse(), Rejected):
        raise DataError(
            f"{row.file}:1: the lines end with carriage returns alone; end them with line feeds, for example by "
            f"tr '\\r' '\\n' < {row.file}"
        )
    row.fields = {}


def read_json(path: File) -> Iterator[Row | Rejected]:
    """A list of objects; or, under the same name, one object a line. Raises DataError with the line."""
    number, start = _first_line(path)
    if start.startswith(b"["):
        return _list_rows(path)
    if start.startswith(b"{") and start.endswith(b"}"):
        return read_json_lines(path)
    if not start:
        raise DataError(f"{path}:1: the file is empty: it holds only blanks")
    found = ""
    if start.startswith(b"{"):
        found = "; it begins with one object spread over several lines: put [ ] around it, or around the list in it"
    raise DataError(f"{path}:{number}: a .json file must hold a list of objects, or one object a line{found}")


def _first_line(path: File) -> tuple[int, bytes]:
    """Number of the first line that is not blank, and its bytes without blanks around them."""
    number = 0
    with open_text(path) as stream:
        while raw := stream.readline(MAX_ROW_BYTES):
            number += 1
            if not raw.isspace():
                return number, raw.strip()
    return number, b""


def _list_rows(path: File) -> Iterator[Row | Rejected]:
    """One row an element of a list, unparsed: what stands between its commas. One that is no JSON is a bad row, as a line is.

    Raises DataError where the elements cannot be told apart.
    """
    data, start, at, depth, empty = b"", 0, 0, -1, True
    line = 1  # of data[start], where an element begins

    def broken(before: bytes, message: str) -> DataError:
        number = line + before.count(b"\n")
        return DataError(f"{path}:{number}: not valid JSON: {message}; rows from here on cannot be told apart")

    with open_text(path) as stream:
        while True:
            token = _TOKEN.search(data, at)
            if token is None or token[1] == b"" or (token[1] and token.end() == len(data)):
                rest = data[start:]
                lead = rest[: len(rest) - len(rest.lstrip())]
                if len(rest) > 2 * MAX_ROW_BYTES:
                    raise broken(
                        lead, f"the element that starts here is longer than {MAX_ROW_BYTES >> 20} MiB or never ends"
                    )
                if not (part := stream.read(max(BUFFER, len(rest)))):  # a long element is looked at again: reads double
                    raise broken(lead, "what starts here is cut off, or a quote or a bracket of it is never closed")
                at, data, start = (token.start() if token else len(data)) - start, rest + part, 0
                continue
            if token[1] and data[token.end()] not in _AFTER_TEXT:
                raise broken(
                    data[start : token.start()],
                    "after the text that starts here ',', ':' or a bracket is expected; a quote is never closed, or one too many",
                )
            what, at, own = token[0], token.end(), b"" if depth > 0 else data[start : token.start()]
            if depth < 0:
                depth = 0  # the bracket that `read_json` saw
            elif depth or what not in (b",", b"]"):
                if not depth and (own.strip() or what == b"}"):
                    raise broken(own, "',' and an object, or ']' expected")
                depth += (what in (b"[", b"{")) - (what in (b"]", b"}"))
                continue
            elif raw := own.strip():
                empty, number = False, line + own[: own.index(raw)].count(b"\n")
                whole = len(raw) <= MAX_ROW_BYTES
                yield Row(str(path), number, raw=raw) if whole else _too_long(str(path), number, raw[:1000], len(raw))
            elif what == b"," or not empty:
                raise broken(
                    own, f"a comma before {'another' if what == b',' else 'the closing bracket'} is not allowed"
                )
            start, line = at, line + own.count(b"\n")
            if what == b"]":
                break
        while not (rest := data[start:]).strip():
            if not (data := stream.read(BUFFER)):
                return
            start, line = 0, line + rest.count(b"\n")
        raise broken(rest[: len(rest) - len(rest.lstrip())], "text after the end of the list")
