"""Reads JSON files: one object a line, or one list of objects, both streamed; UTF-8 and JSON strictly (RFC 8259, RFC 3629).

`orjson` reads a row. It keeps the last of two values of a doubled key without a word, and rounds whole numbers beyond 64
bits. If a count says that it may have done so, or if `orjson` refuses the row, the json module reads the row again. A value that
cannot be used (with a doubled key, NaN, numbers that overflow, halves of surrogate pairs, deep nesting) is replaced by an
`UnreadableValue`: it makes the row unusable only if its column is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from strategies.errors import DataError
from trainer.data.document import RejectedRow, SourceRow, excerpt
from trainer.data.fields import RowError, UnreadableValue, show_value
from trainer.data.read.opening import (
    MAX_ROW_BYTES,
    READ_BYTES,
    InputPath,
    decode_utf8,
    open_text_bytes,
    reject_too_long_row,
)

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row. Fixed, so that it does not hang on the depth of the caller's stack."""
MAX_DIGITS = 4300
"""Longest whole number in digits: the limit of Python's own conversion."""
_LEAST_ROUNDED = 2.0**63
"""From here on `orjson` may have rounded a whole number to a float."""
_TOO_DEEP = UnreadableValue("nested_too_deep", f"lists and objects are nested deeper than {MAX_DEPTH} levels")
_LONE_SURROGATE = UnreadableValue("lone_surrogate", "half a surrogate pair (\\ud800 to \\udfff), which is no character")
_TOKEN_REGEX = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)[ \t\r\n]*+|[][{},]', re.DOTALL)
"""A text and the blanks after it, or a sign that nests or separates values.

Group 1 is None for a sign, empty for a text whose closing quote has not been read yet, else the closing quote.
"""
_DEPTH_CHANGE = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
"""By how much a sign changes the depth of nesting; others do not."""
LIST_FILE_HINT = "; a file that holds one list of rows must be called .json: rename it"
"""What to do about a list of rows in a file that should have one object a line."""
_AFTER_TEXT = b",:]}"
"""What may follow a text. Anything else says that a quote is missing or one too many, which turns texts inside out."""


@dataclass(slots=True)
class UnparsedRow(SourceRow):
    """A JSON row that stays raw until it is parsed, so that worker processes do the parsing."""

    raw: bytes = b""
    """The row as it is in the file."""

    def parse(self) -> SourceRow | RejectedRow:
        """The row with its `fields`, or why it cannot be read."""
        try:
            self.fields = decode_row(self.raw)
        except RowError as refusal:
            return RejectedRow(
                self.file, self.line, refusal.reason, refusal.message, excerpt(self.raw), row_number=self.row_number
            )
        return self


def read_json_lines(path: InputPath) -> Iterator[SourceRow | RejectedRow]:
    """Read a file of JSON lines: one unparsed row for each line that is not blank. Workers parse them later.

    A line longer than `MAX_ROW_BYTES` is a rejected row. Raises DataError if the file cannot be read as text.
    """
    file = str(path)
    line_number = 0
    with open_text_bytes(path) as stream:
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            line_number += 1
            if len(raw) > MAX_ROW_BYTES:
                line_bytes = _skip_rest_of_line(stream, raw)
                yield reject_too_long_row(file, line_number, raw[:1000], line_bytes)
            elif not raw.isspace():
                yield UnparsedRow(file, line_number, raw=raw)


def _skip_rest_of_line(stream: BinaryIO, beginning: bytes) -> int:
    """Read on to the end of a line that is too long, in pieces; returns the length of the whole line in bytes.

    `beginning`: what was read of it already.
    """
    line_bytes = len(beginning)
    raw = beginning
    while not raw.endswith(b"\n") and (raw := stream.readline(READ_BYTES)):
        line_bytes += len(raw)
    return line_bytes


def read_json(path: InputPath) -> Iterator[SourceRow | RejectedRow]:
    """Read a `.json` file: its rows are the elements of a list, or one object a line.

    The first line that is not blank tells which. Rows come unparsed, since workers parse them later. Raises DataError with the
    line if it is neither.
    """
    line_number, first_line = _first_filled_line(path)
    if first_line.startswith(b"["):
        return _read_json_list(path)
    if first_line.startswith(b"{") and first_line.endswith(b"}"):
        return read_json_lines(path)
    if not first_line:
        raise DataError(f"{path}:1: the file is empty: it holds only blanks")
    hint = ""
    if first_line.startswith(b"{"):
        hint = "; it begins with one object spread over several lines: wrap the object in [ ], or save only the list inside it"
    raise DataError(f"{path}:{line_number}: a .json file must hold a list of objects, or one object a line{hint}")


def _first_filled_line(path: InputPath) -> tuple[int, bytes]:
    """(number of the first line that is not blank, its bytes without outer blanks); empty bytes if all lines are blank."""
    line_number = 0
    with open_text_bytes(path) as stream:
        while raw := stream.readline(MAX_ROW_BYTES):
            line_number += 1
            if not raw.isspace():
                return line_number, raw.strip()
    return line_number, b""


def _read_json_list(path: InputPath) -> Iterator[SourceRow | RejectedRow]:
    """Read the list in a `.json` file: one unparsed row for each element. Workers parse them later.

    An element longer than `MAX_ROW_BYTES` is a rejected row. Rows that begin on one line have their numbers in the list, since
    the line does not tell them apart. Raises DataError if one element cannot be separated from the next.
    """
    previous_row: SourceRow | RejectedRow | None = None
    with open_text_bytes(path) as stream:
        try:
            for number, (line_number, raw) in enumerate(_ListSplitter(path, stream).elements(), start=1):
                row = _row_of_element(str(path), line_number, raw)
                if previous_row is not None:
                    # Only here is it known whether a further row begins on its line.
                    if previous_row.line == line_number:
                        previous_row.row_number = number - 1
                        row.row_number = number
                    yield previous_row
                previous_row = row
        except DataError:
            # The rows in front of what cannot be separated are read even so.
            if previous_row is not None:
                yield previous_row
            raise
    if previous_row is not None:
        yield previous_row


def _row_of_element(file: str, line_number: int, raw: bytes) -> SourceRow | RejectedRow:
    """The unparsed row of an element of a list, or a rejected row if it is longer than `MAX_ROW_BYTES`."""
    if len(raw) <= MAX_ROW_BYTES:
        return UnparsedRow(file, line_number, raw=raw)
    return reject_too_long_row(file, line_number, raw[:1000], len(raw))


class _ListSplitter:
    """Splits a JSON list of any size into the bytes of its elements, without parsing them or holding the file in memory.

    It goes from token to token and counts brackets.
    """

    def __init__(self, path: InputPath, stream: BinaryIO) -> None:
        self.path = path
        self.stream = stream
        self.buffer = b""
        """What was read from the file; what is before the current element may be dropped."""
        self.element_begin = 0
        """Where the current element begins in `buffer`."""
        self.search_begin = 0
        """Where to look for the next token in `buffer`."""
        self.line = 1
        """The line of the file on which the current element begins."""

    def elements(self) -> Iterator[tuple[int, bytes]]:
        """Split the list: (line on which an element begins, its bytes without outer blanks) of each element.

        Raises DataError for a list that is cut off, for commas and brackets in wrong places, and for text behind the list.
        """
        self._skip_opening_bracket()
        num_elements = 0
        delimiter = b","
        while delimiter != b"]":
            # Afterwards `self.line` is still the line on which the element begins, blanks included.
            element, delimiter = self._next_element()
            stripped_element = element.strip()
            if stripped_element:
                num_elements += 1
                blanks_before = element[: element.index(stripped_element)]
                yield self.line + blanks_before.count(b"\n"), stripped_element
            # Nothing stands between two commas, or between a comma and the closing bracket. The empty list alone may have
            # nothing.
            elif delimiter == b"," or num_elements:
                following = "another" if delimiter == b"," else "the closing bracket"
                raise _broken_list_error(self.path, self.line, element, f"a comma before {following} is not allowed")
            self._begin_element()
        _require_end_of_file(self.path, self.stream, self.buffer[self.element_begin :], self.line)

    def _skip_opening_bracket(self) -> None:
        """Pass over the bracket that opens the list. It is there, since `read_json` saw it."""
        while (bracket := self.buffer.find(b"[")) < 0:
            self._read_on(keep_from=len(self.buffer))
        self.search_begin = bracket + 1
        self._begin_element()

    def _begin_element(self) -> None:
        """Let the next element begin at `search_begin`, which is behind the sign that ended the last one."""
        self.line += self.buffer.count(b"\n", self.element_begin, self.search_begin)
        self.element_begin = self.search_begin

    def _next_element(self) -> tuple[bytes, bytes]:
        """Find the current element of the list: (its bytes, the "," or "]" behind it). Leaves `search_begin` behind that sign.

        Raises DataError for a list that is cut off, or has quotes and brackets in wrong places.
        """
        depth = 0  # of nesting inside the element
        # One loop without calls for each token: it runs over every byte of the file.
        while True:
            token = _TOKEN_REGEX.search(self.buffer, self.search_begin)
            # token[1]: the quote that closes a text; empty if it was not read yet; None for a sign, such as a comma.
            # A text at the very end of the buffer may go on, or be followed by something that is yet to be read.
            if token is None or token[1] == b"" or (token[1] and token.end() == len(self.buffer)):
                self._read_on(keep_from=len(self.buffer) if token is None else token.start())
                continue
            # A misplaced quote would turn everything that follows inside out.
            if token[1] and self.buffer[token.end()] not in _AFTER_TEXT:
                message = (
                    "after the text that starts here ',', ':' or a bracket is expected; a quote is never closed, or one "
                    "too many"
                )
                raise _broken_list_error(self.path, self.line, self.buffer[self.element_begin : token.start()], message)
            sign = token[0]
            self.search_begin = token.end()
            if depth > 0:
                depth += _DEPTH_CHANGE.get(sign, 0)
                continue
            element = self.buffer[self.element_begin : token.start()]
            if sign in (b",", b"]"):
                return element, sign
            # A text or an opening bracket can only begin an element.
            if element.strip() or sign == b"}":
                raise _broken_list_error(self.path, self.line, element, "',' and an object, or ']' expected")
            depth += _DEPTH_CHANGE.get(sign, 0)

    def _read_on(self, keep_from: int) -> None:
        """Read the following bytes of the file into `buffer`, and drop what is before the current element.

        `keep_from`: where the search for tokens goes on, in the present `buffer`. Raises DataError at the end of the file, and
        for an element that is far too long.
        """
        element = self.buffer[self.element_begin :]
        blanks = element[: len(element) - len(element.lstrip())]
        if len(element) > 2 * MAX_ROW_BYTES:
            limit_mib = MAX_ROW_BYTES >> 20
            message = f"the element that starts here is longer than {limit_mib} MiB or never ends"
            raise _broken_list_error(self.path, self.line, blanks, message)
        # Reads double each time, because a long element is looked at again from its beginning.
        following = self.stream.read(max(READ_BYTES, len(element)))
        if not following:
            message = "what starts here is cut off, or a quote or a bracket of it is never closed"
            raise _broken_list_error(self.path, self.line, blanks, message)
        self.search_begin = keep_from - self.element_begin
        self.buffer = element + following
        self.element_begin = 0


def _require_end_of_file(path: InputPath, stream: BinaryIO, following: bytes, line: int) -> None:
    """Raise DataError if anything but blanks follows the list. `following`: what was read already, which begins on `line`."""
    while not following.strip():
        line += following.count(b"\n")
        following = stream.read(READ_BYTES)
        if not following:
            return
    blanks = following[: len(following) - len(following.lstrip())]
    raise _broken_list_error(path, line, blanks, "text after the end of the list")


def _broken_list_error(path: InputPath, line: int, bytes_before: bytes, message: str) -> DataError:
    """Make the error for a list with a mistake behind `bytes_before`, which begin on `line`: it names the mistake's line."""
    error_line = line + bytes_before.count(b"\n")
    return DataError(f"{path}:{error_line}: not valid JSON: {message}; rows from here on cannot be separated")


class _ObjectWithDoubledKeys(dict[str, Any]):
    """An object of JSON that has some keys twice; of each it holds the last value."""

    doubled_keys: tuple[str, ...] = ()


def decode_row(raw: bytes) -> dict[str, Any]:
    """Parse one row of JSON, which must be an object, with an `UnreadableValue` in place of each column that cannot be used.

    Example: b'{"a": 1, "b": NaN}' -> {"a": 1, "b": UnreadableValue("nan", ...)}. So a bad value matters only if its column is
    read. Raises RowError if the row is not one object, or if the name of a column is faulty.
    """
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        row = None
    # The fast way, for nearly all rows. Of a key that is there twice, orjson keeps the last value alone; and it rounds numbers.
    if type(row) is dict and _was_read_exactly(row, raw):
        return row
    row = _decode_strictly(decode_utf8(raw))
    name_fault = _first_fault([*row])
    if name_fault is not None:
        raise RowError(name_fault.reason, name_fault.message)
    fields = {name: _first_fault(column) or column for name, column in row.items()}
    if isinstance(row, _ObjectWithDoubledKeys):
        for name in row.doubled_keys:
            fields[name] = _duplicate_key_fault(name)
    return fields


def _decode_strictly(text: str) -> dict[str, Any]:
    """Parse a row of JSON by Python's json module, which is slower than orjson and shows what orjson hides.

    Doubled keys become an `_ObjectWithDoubledKeys`, NaN and numbers out of range an `UnreadableValue`. Raises RowError for a text
    that is no JSON, is nested too deeply, or is no object.
    """
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        position = f"column {error.colno}"
        if error.lineno > 1:
            position = f"line {error.lineno} of the row, {position}"
        raise RowError(
            "not_json", f"not valid JSON: {error.msg} ({position}){_json_mistake_hint(text, error)}"
        ) from None
    except RecursionError:
        raise RowError(_TOO_DEEP.reason, _TOO_DEEP.message) from None
    if not isinstance(row, dict):
        # Such as [{"text": "a"}, {"text": "b"}] on one line.
        is_list_of_rows = isinstance(row, list) and bool(row) and isinstance(row[0], dict)
        hint = LIST_FILE_HINT if is_list_of_rows else ""
        raise RowError("not_an_object", f"a row must be an object with named fields, and is {show_value(row)}{hint}")
    return row


def _was_read_exactly(fields: dict[str, Any], raw: bytes) -> bool:
    r"""Whether `orjson` read `raw` exactly as `fields`: no key that was there twice, no rounded number; and no deep nesting.

    A key that is there twice has two colons and leaves one entry, so colons are counted. Every key has a colon behind it, and
    texts may contain more. If the bytes have as many colons as the keys and texts of `fields`, no key is missing: {"a": "x:y"}
    has two. Only an escaped colon (`\u003a` or `\u003A`) in a text could make up for a lost key.
    """
    num_colons = 0
    num_containers = 0
    containers: list[Any] = [fields]
    while containers:
        container = containers.pop()
        num_containers += 1
        if type(container) is dict:
            num_colons += len(container)
            container = container.values()
        for node in container:
            node_type = type(node)  # `is` instead of isinstance: this runs for every value of every row
            if node_type is str:
                num_colons += node.count(":")
            elif node_type is dict or node_type is list:
                containers.append(node)
            elif node_type is float and not -_LEAST_ROUNDED < node < _LEAST_ROUNDED:
                return False
    # So few containers cannot be nested too deeply, which is the usual case.
    is_shallow = num_containers <= MAX_DEPTH or all(_first_fault(column) is None for column in fields.values())
    return num_colons == raw.count(b":") and is_shallow and b"\\u003" not in raw


def _first_fault(column: Any) -> UnreadableValue | None:
    """Find why the value of a column cannot be used, searched level by level; None if it is sound.

    Faults: what the decoder left as an `UnreadableValue`, a key that is there twice, half a surrogate pair, nesting beyond
    `MAX_DEPTH`. The row counts as the first level of nesting.
    """
    level = [column]
    depth = 1
    while level:
        next_level: list[Any] = []
        has_containers = False
        for node in level:
            if isinstance(node, UnreadableValue):
                return node
            if isinstance(node, _ObjectWithDoubledKeys):
                return _duplicate_key_fault(node.doubled_keys[0])
            if isinstance(node, str) and _has_lone_surrogate(node):
                return _LONE_SURROGATE
            if isinstance(node, dict):
                next_level += (*node, *node.values())
                has_containers = True
            elif isinstance(node, list):
                next_level += node
                has_containers = True
        if has_containers:
            depth += 1
        if depth > MAX_DEPTH:
            return _TOO_DEEP
        level = next_level
    return None


def _has_lone_surrogate(text: str) -> bool:
    """Whether a text has half a surrogate pair; Python joins the halves of whole pairs."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _json_mistake_hint(row: str, error: json.JSONDecodeError) -> str:
    """Guess which mistake whoever wrote the row made, for the error message; empty if the position of the error does not tell.

    `error`: what the json module found wrong with the row, and where.
    """
    position = error.pos
    character = row[position : position + 1]
    is_at_end = position >= len(row.rstrip())
    # Something follows the object: {"a": 1},
    if error.msg == "Extra data":
        if "\r" in row.strip():
            return "; the line holds carriage returns: end lines with a line feed"
        return "; remove the comma after the object" if character == "," else "; a line holds one object"
    # {"a": 1,}
    follows_comma = row[:position].rstrip().endswith(",") and character in ("}", "]")
    if follows_comma or error.msg.startswith("Illegal trailing comma"):  # as Python says it since 3.13
        return "; a comma before the closing bracket is not allowed"
    # {'a': 1}
    if character == "'":
        return "; JSON takes double quotes"
    # {"a": True}
    if row.startswith(("True", "False", "None"), position):
        return "; JSON writes true, false and null"
    # A line break within a text.
    if error.msg.startswith("Invalid control") and not is_at_end:
        return "; inside a text, write line breaks and tabs as \\n and \\t"
    # [
    if is_at_end and row.lstrip().startswith("["):
        return LIST_FILE_HINT
    # {"a": 1
    if is_at_end or error.msg.startswith("Unterminated"):
        return "; the object is cut off, or spread over several lines"
    return ""


def _duplicate_key_fault(name: str) -> UnreadableValue:
    """The fault of an object that has a key twice."""
    return UnreadableValue("duplicate_key", f"an object has the key {name[:60]!r} twice; only one can be meant")


def _parse_constant(name: str) -> UnreadableValue:
    """The fault that NaN and Infinity become, which Python's json would read."""
    return UnreadableValue("nan", f"{name} is not a JSON value; use null or a number")


def _parse_float(digits: str) -> float | UnreadableValue:
    """A number with a point or an exponent; a fault if it is too large."""
    number = float(digits)
    if math.isinf(number):
        return UnreadableValue("number_too_large", f"the number {digits:.24} is beyond what a float can hold (1.8e308)")
    return number


def _parse_int(digits: str) -> int | UnreadableValue:
    """A whole number; a fault if it is too large."""
    if len(digits) > MAX_DIGITS:
        return UnreadableValue(
            "number_too_large", f"the whole number {digits:.24}... has more than {MAX_DIGITS} digits"
        )
    return int(digits)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object of these pairs; if a key is there twice, an `_ObjectWithDoubledKeys`, which remembers such keys.

    The json module calls it for each object that it reads.
    """
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    with_doubled_keys = _ObjectWithDoubledKeys(fields)
    with_doubled_keys.doubled_keys = tuple(name for name in fields if names.count(name) > 1)
    return with_doubled_keys


_DECODER = json.JSONDecoder(
    parse_constant=_parse_constant,
    parse_float=_parse_float,
    parse_int=_parse_int,
    object_pairs_hook=_make_object,
)
"""Reads JSON strictly; what it refuses becomes an `UnreadableValue`, or an `_ObjectWithDoubledKeys`."""
