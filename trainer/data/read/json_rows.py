"""JSON files: one object a line, or one list of objects; both are streamed."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from strategies.errors import DataError
from trainer.data.document import Rejected
from trainer.data.read.opening import BUFFER, File, open_text
from trainer.data.read.row import DECODER, MAX_ROW_BYTES, Refused, Row, checked, excerpt, hint

_BLANK = re.compile(r"[ \t\r\n]*")
_TAIL = 12
"""Longest start of a JSON token, in characters, that can be mistaken for an error while the rest is not read yet."""


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
        return _ListReader(path).rows()
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


class _ListReader:
    """Decodes a list element by element from a buffer that grows as needed and forgets what was read."""

    def __init__(self, path: File) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self.line = 1
        self.counted = 0
        self.dropped = 0  # characters of the current line that the buffer no longer holds
        self.ended = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def rows(self) -> Iterator[Row | Rejected]:
        """Every element of the list, in order."""
        with open_text(self.path) as self.stream:
            self._blank()
            self.position += 1  # the bracket that `read_json` saw
            if self._blank() == "]":
                return self._finish()
            while True:
                yield self._element()
                separator = self._blank()
                if separator == "]":
                    return self._finish()
                if separator != ",":
                    raise self._broken("',' and an object, or ']' expected")
                self.position += 1
                if self._blank() == "]":
                    raise self._broken("a comma before the closing bracket is not allowed")

    def _element(self) -> Row | Rejected:
        line = self._line()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                near_end = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _TAIL
                if not (near_end and self._more()):
                    raise self._malformed(error) from None
                continue
            except RecursionError:
                raise DataError(
                    f"{self.path}:{line}: not valid JSON: the object that starts here is nested too deep"
                ) from None
            if end < len(self.text) or not self._more():  # a number at the very end of the buffer may go on
                break
        source = self.text[self.position : end]
        self.position = end
        try:
            _require_utf8(source)
            fields = checked(value, source)
        except Refused as refused:
            return Rejected(str(self.path), line, refused.reason, refused.message, excerpt(source))
        if len(source) > MAX_ROW_BYTES:
            return _too_long(str(self.path), line, source[:1000].encode(), len(source))
        return Row(str(self.path), line, fields)

    def _more(self) -> bool:
        """Read on; False at the end of the file. What was decoded is dropped, and counted into the line number."""
        if self.ended:
            return False
        self._line()
        newline = self.text.rfind("\n", 0, self.position)
        self.dropped = self.position + self.dropped if newline < 0 else self.position - newline - 1
        self.text = self.text[self.position :]
        self.position = self.counted = 0
        if len(self.text) > 2 * MAX_ROW_BYTES:
            raise DataError(
                f"{self.path}:{self.line}: the element that starts here is longer than {MAX_ROW_BYTES >> 20} MiB or "
                "never ends; close its quotes and brackets"
            )
        # an element that outgrows the buffer is decoded again from its start, so reads double
        raw = self.stream.read(max(BUFFER, len(self.text)))
        self.ended = not raw
        self.text += self.decoder.decode(raw, final=self.ended)
        return True

    def _blank(self) -> str:
        """Skip blanks; the character that follows, or nothing at the end of the file."""
        while True:
            match = _BLANK.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or not self._more():
                return self.text[self.position : self.position + 1]

    def _line(self) -> int:
        self.line += self.text.count("\n", self.counted, self.position)
        self.counted = self.position
        return self.line

    def _finish(self) -> None:
        self.position += 1
        if self._blank():
            raise self._broken("text after the end of the list")

    def _broken(self, message: str) -> DataError:
        return DataError(
            f"{self.path}:{self._line()}: not valid JSON: {message}; rows from here on cannot be told apart"
        )

    def _malformed(self, error: json.JSONDecodeError) -> DataError:
        line = self._line() + self.text.count("\n", self.position, error.pos)
        newline = self.text.rfind("\n", 0, error.pos)
        column = error.pos - newline + (self.dropped if newline < 0 else 0)
        return DataError(
            f"{self.path}:{line}: not valid JSON: {error.msg} (column {column}){hint(self.text, error)}; rows from here "
            "on cannot be told apart"
        )


def _require_utf8(source: str) -> None:
    try:
        source.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(source[error.start]) - 0xDC00
        raise Refused(
            "not_utf8", f"byte 0x{byte:02x}, {error.start + 1} characters into the object, is not UTF-8"
        ) from None
