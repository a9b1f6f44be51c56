"""Reads JSON files: one object a line, or one list of objects, both streamed; UTF-8 and JSON strictly (RFC 8259, RFC 3629).

`orjson` reads a row. It keeps the last of two values of a doubled key without a word, and rounds whole numbers beyond 64
bits. If a count says that it may have done so, or if `orjson` refuses the row, the json module reads the row again. A value that
cannot be used (with a doubled key, NaN, numbers that overflow, halves of surrogate pairs, deep nesting) is replaced by a
`Fault`: it makes the row unusable only if its column is read.
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
from trainer.data.document import Rejected, Row, excerpt
from trainer.data.fields import Fault, Refusal, show_value
from trainer.data.read.opening import BUFFER_BYTES, MAX_ROW_BYTES, File, decode_utf8, open_text, too_long_row

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row. Fixed, so that it does not hang on the depth of the caller's stack."""
MAX_DIGITS = 4300
"""Longest whole number in digits: the limit of Python's own conversion."""
_EXACT = 2.0**63
"""From here on `orjson` may have rounded a whole number to a float."""
_TOO_DEEP = Fault("nested_too_deep", f"lists and objects are nested deeper than {MAX_DEPTH} levels")
_LONE_SURROGATE = Fault("lone_surrogate", "half a surrogate pair (\\ud800 to \\udfff), which is no character")
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)[ \t\r\n]*+|[][{},]', re.DOTALL)
"""A text and the blanks after it, or a sign that nests or separates values.

Group 1 is None for a sign, empty for a text whose closing quote has not been read yet, else the closing quote.
"""
_DEPTH_CHANGE = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
"""By how much a sign changes the depth of nesting; others do not."""
_AFTER_TEXT = b",:]}"
"""What may follow a text. Anything else says that a quote is missing or one too many, which turns texts inside out."""


@dataclass(slots=True)
class Line(Row):
    """A JSON row that stays raw until it is parsed, so that worker processes do the parsing."""

    raw: bytes = b""
    """The row as it is in the file."""

    def parse(self) -> Row | Rejected:
        """The row with its `fields`, or why it cannot be read."""
        try:
            self.fields = decode_line(self.raw)
        except Refusal as refusal:
            return Rejected(self.file, self.line, refusal.reason, refusal.message, excerpt(self.raw))
        return self


def read_json_lines(path: File) -> Iterator[Row | Rejected]:
    """One row for each line that is not blank, unparsed. A line above 64 MiB is a bad row. Raises DataError."""
    name = str(path)
    number = 0
    with open_text(path) as stream:
        while raw := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(raw) > MAX_ROW_BYTES:
                yield too_long_row(name, number, raw[:1000], _skip_line(stream, raw))
            elif not raw.isspace():
                yield Line(name, number, raw=raw)


def _skip_line(stream: BinaryIO, raw: bytes) -> int:
    """Skip the rest of a line that begins with `raw`; returns the length of the whole line in bytes."""
    length = len(raw)
    while not raw.endswith(b"\n") and (raw := stream.readline(BUFFER_BYTES)):
        length += len(raw)
    return length


def read_json(path: File) -> Iterator[Row | Rejected]:
    """Rows of a `.json` file: the elements of a list, or one object a line. Raises DataError with the line."""
    number, first_line = _first_line(path)
    if first_line.startswith(b"["):
        return _list_rows(path)
    if first_line.startswith(b"{") and first_line.endswith(b"}"):
        return read_json_lines(path)
    if not first_line:
        raise DataError(f"{path}:1: the file is empty: it holds only blanks")
    hint = ""
    if first_line.startswith(b"{"):
        hint = "; it begins with one object spread over several lines: wrap the object in [ ], or save only the list inside it"
    raise DataError(f"{path}:{number}: a .json file must hold a list of objects, or one object a line{hint}")


def _first_line(path: File) -> tuple[int, bytes]:
    """(number of the first line that is not blank, its bytes without blanks around them); empty bytes if there is none."""
    number = 0
    with open_text(path) as stream:
        while raw := stream.readline(MAX_ROW_BYTES):
            number += 1
            if not raw.isspace():
                return number, raw.strip()
    return number, b""


def _list_rows(path: File) -> Iterator[Row | Rejected]:
    """One row for each element of a list, unparsed: the bytes between its commas. An element that is not JSON is a bad row.

    Goes from token to token and counts brackets. Raises DataError if one element cannot be separated from the next.
    """
    buffer = b""  # what was read, from the current element on
    begin = 0  # where the element begins in `buffer`
    position = 0  # where to look for the next token
    line = 1  # of buffer[begin] in the file
    depth = -1  # -1 before the list's own bracket, 0 between its elements
    has_elements = False
    with open_text(path) as stream:
        while True:
            token = _TOKEN.search(buffer, position)
            # A text at the very end of the buffer may go on, or be followed by something that is yet to be read.
            if token is None or token[1] == b"" or (token[1] and token.end() == len(buffer)):
                next_token = len(buffer) if token is None else token.start()
                position = next_token - begin
                buffer = _read_more(path, stream, buffer[begin:], line)
                begin = 0
                continue
            if token[1] and buffer[token.end()] not in _AFTER_TEXT:
                message = (
                    "after the text that starts here ',', ':' or a bracket is expected; a quote is never closed, or one "
                    "too many"
                )
                raise _broken_list(path, line, buffer[begin : token.start()], message)

            sign = token[0]
            position = token.end()
            if depth > 0:  # inside an element
                depth += _DEPTH_CHANGE.get(sign, 0)
                continue

            element = buffer[begin : token.start()]
            if depth < 0:
                depth = 0  # the bracket that `read_json` saw
            elif sign not in (b",", b"]"):  # an element goes on
                if element.strip() or sign == b"}":
                    raise _broken_list(path, line, element, "',' and an object, or ']' expected")
                depth += _DEPTH_CHANGE.get(sign, 0)
                continue
            elif raw := element.strip():  # an element ends
                has_elements = True
                blanks_before = element[: element.index(raw)]
                number = line + blanks_before.count(b"\n")
                if len(raw) <= MAX_ROW_BYTES:
                    yield Line(str(path), number, raw=raw)
                else:
                    yield too_long_row(str(path), number, raw[:1000], len(raw))
            elif sign == b"," or has_elements:
                following = "another" if sign == b"," else "the closing bracket"
                raise _broken_list(path, line, element, f"a comma before {following} is not allowed")
            begin = position
            line += element.count(b"\n")
            if sign == b"]":
                break
        _require_end(path, stream, buffer[begin:], line)


def _read_more(path: File, stream: BinaryIO, element: bytes, line: int) -> bytes:
    """Read on in a list of rows: `element`, what was read of a row so far, with the bytes that follow it in `stream`.

    `line`: the line on which the element begins, for messages. Raises DataError at the end of the file.
    """
    blanks = element[: len(element) - len(element.lstrip())]
    if len(element) > 2 * MAX_ROW_BYTES:
        limit_mib = MAX_ROW_BYTES >> 20
        raise _broken_list(
            path, line, blanks, f"the element that starts here is longer than {limit_mib} MiB or never ends"
        )
    # Reads double each time, because a long element is looked at again from its beginning.
    following = stream.read(max(BUFFER_BYTES, len(element)))
    if not following:
        raise _broken_list(
            path, line, blanks, "what starts here is cut off, or a quote or a bracket of it is never closed"
        )
    return element + following


def _require_end(path: File, stream: BinaryIO, following: bytes, line: int) -> None:
    """Raise DataError if anything but blanks follows the list. `following`, which begins on `line`, was read already."""
    while not following.strip():
        line += following.count(b"\n")
        following = stream.read(BUFFER_BYTES)
        if not following:
            return
    blanks = following[: len(following) - len(following.lstrip())]
    raise _broken_list(path, line, blanks, "text after the end of the list")


def _broken_list(path: File, line: int, before: bytes, message: str) -> DataError:
    """The error of a list with a mistake after the bytes `before`, which begin on `line`."""
    error_line = line + before.count(b"\n")
    return DataError(f"{path}:{error_line}: not valid JSON: {message}; rows from here on cannot be separated")


class _ObjectWithDoubledKeys(dict[str, Any]):
    """An object that has some keys twice; of each it holds the last value."""

    doubled_keys: tuple[str, ...] = ()


def decode_line(raw: bytes) -> dict[str, Any]:
    """The one JSON object in `raw`, its faulty columns as `Fault`. Raises Refusal if it is not one object.

    Example: b'{"a": 1, "b": NaN}' -> {"a": 1, "b": Fault("nan", ...)}.
    """
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        row = None
    # The fast way, for nearly all rows.
    if type(row) is dict and _lost_nothing(row, raw):
        return row
    # The json module decodes more slowly, and reports what orjson hides.
    text = decode_utf8(raw)
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        position = f"column {error.colno}"
        if error.lineno > 1:
            position = f"line {error.lineno} of the row, {position}"
        raise Refusal("not_json", f"not valid JSON: {error.msg} ({position}){_hint(text, error)}") from None
    except RecursionError:
        raise Refusal(_TOO_DEEP.reason, _TOO_DEEP.message) from None
    if not isinstance(row, dict):
        raise Refusal("not_an_object", f"a row must be an object with named fields, and is {show_value(row)}")
    # A fault in a column's name spoils the row, one in its value the column alone.
    fault = _first_fault([*row])
    if fault is not None:
        raise Refusal(fault.reason, fault.message)
    fields = {name: _first_fault(column) or column for name, column in row.items()}
    for name in getattr(row, "doubled_keys", ()):
        fields[name] = _duplicate_key(name)
    return fields


def _lost_nothing(fields: dict[str, Any], raw: bytes) -> bool:
    """Whether `orjson` lost nothing when it read `raw`: no key that was there twice, no rounded number; and no deep nesting.

    Every key has a colon behind it, and texts may contain more. If the bytes have as many colons as that, no key is missing:
    {"a": "x:y"} has two, one for its key and one in its text. Only an escaped colon (`\\u003a`) in a text could make up for a
    lost one.
    """
    num_colons = 0
    num_containers = 0
    stack: list[Any] = [fields]
    while stack:
        container = stack.pop()
        num_containers += 1
        if type(container) is dict:
            num_colons += len(container)
            container = container.values()
        for node in container:
            node_type = type(node)  # `is` instead of isinstance: this runs for every value of every row
            if node_type is str:
                num_colons += node.count(":")
            elif node_type is dict or node_type is list:
                stack.append(node)
            elif node_type is float and not -_EXACT < node < _EXACT:
                return False
    # So few containers cannot be nested too deeply, which is the usual case.
    is_shallow = num_containers <= MAX_DEPTH or all(_first_fault(column) is None for column in fields.values())
    return num_colons == raw.count(b":") and is_shallow and b"\\u003" not in raw


def _first_fault(column: Any) -> Fault | None:
    """The first fault in the value of a column, searched level by level; None if it is sound. The row counts as one level.

    Faults: what the decoder left as a `Fault`, a key that is there twice, half a surrogate pair, nesting beyond `MAX_DEPTH`.
    """
    level = [column]
    depth = 1
    while level:
        next_level: list[Any] = []
        has_containers = False
        for node in level:
            if isinstance(node, Fault):
                return node
            if isinstance(node, _ObjectWithDoubledKeys):
                return _duplicate_key(node.doubled_keys[0])
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


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """A hint at the mistake that whoever wrote the row probably made; empty if the position of the error does not tell.

    `text`: the row. `error`: what the json module found wrong with it, and where.
    """
    position = error.pos
    character = text[position : position + 1]
    end = len(text.rstrip())
    # Something follows the object: {"a": 1},
    if error.msg == "Extra data":
        if "\r" in text.strip():
            return "; the line holds carriage returns: end lines with a line feed"
        return "; remove the comma after the object" if character == "," else "; a line holds one object"
    # {"a": 1,}
    follows_comma = text[:position].rstrip().endswith(",") and character in ("}", "]")
    if follows_comma or error.msg.startswith("Illegal trailing comma"):  # as Python says it since 3.13
        return "; a comma before the closing bracket is not allowed"
    # {'a': 1}
    if character == "'":
        return "; JSON takes double quotes"
    # {"a": True}
    if text.startswith(("True", "False", "None"), position):
        return "; JSON writes true, false and null"
    # A line break within a text.
    if error.msg.startswith("Invalid control") and position < end:
        return "; inside a text, write line breaks and tabs as \\n and \\t"
    # {"a": 1
    if position >= end or error.msg.startswith("Unterminated"):
        return "; the object is cut off, or spread over several lines"
    return ""


def _duplicate_key(name: str) -> Fault:
    """The fault of an object that has a key twice."""
    return Fault("duplicate_key", f"an object has the key {name[:60]!r} twice; only one can be meant")


def _parse_constant(name: str) -> Fault:
    """The fault that NaN and Infinity become, which Python's json would read."""
    return Fault("nan", f"{name} is not a JSON value; use null or a number")


def _parse_float(digits: str) -> float | Fault:
    """A number with a point or an exponent; a fault if it is too large."""
    number = float(digits)
    if math.isinf(number):
        return Fault("number_too_large", f"the number {digits:.24} is beyond what a float can hold (1.8e308)")
    return number


def _parse_int(digits: str) -> int | Fault:
    """A whole number; a fault if it is too large."""
    if len(digits) > MAX_DIGITS:
        return Fault("number_too_large", f"the whole number {digits:.24}... has more than {MAX_DIGITS} digits")
    return int(digits)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as the json module hands it over, one that remembers its keys that are there twice."""
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
"""Reads JSON strictly; what it refuses stands as a `Fault` in its place, a doubled object as a `_ObjectWithDoubledKeys`."""
