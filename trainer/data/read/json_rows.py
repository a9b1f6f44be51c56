"""JSON files: one object a line, or one list of objects, both streamed; UTF-8 and JSON read strictly (RFC 8259, RFC 3629).

`orjson` reads a row. It keeps the last of two values of a doubled key without a word, and rounds whole numbers beyond 64
bits; where a count says that either may be, and where `orjson` refuses the row, the json module reads it again. What one
column cannot take (a doubled key, NaN, numbers that overflow, halves of surrogate pairs, deep nesting) stands as a `Fault` in
its place: it makes the row unusable only if that column is read.
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
from trainer.data.read.opening import BUFFER, MAX_ROW_BYTES, File, decode_utf8, open_text, too_long_row

MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row. Fixed, so that it does not hang on the depth of the caller's stack."""
MAX_DIGITS = 4300
"""Longest whole number in digits: the limit of Python's own conversion."""
_EXACT = 2.0**63
"""From here on `orjson` may have rounded a whole number to a float."""
_TOO_DEEP = Fault("nested_too_deep", f"lists and objects are nested deeper than {MAX_DEPTH} levels")
_LONE_SURROGATE = Fault("lone_surrogate", "half a surrogate pair (\\ud800 to \\udfff), which is no character")
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)[ \t\r\n]*+|[][{},]', re.DOTALL)
"""A text and the blanks after it, whose last quote may still be to be read, or what nests and parts values."""
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
        except Refusal as refused:
            return Rejected(self.file, self.line, refused.reason, refused.message, excerpt(self.raw))
        return self


def read_json_lines(path: File) -> Iterator[Row | Rejected]:
    """One row a line that is not blank, unparsed. Lines above 64 MiB are bad rows. Raises DataError."""
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
    """Read on to the end of a line of which `raw` was the beginning; its length in bytes."""
    length = len(raw)
    while not raw.endswith(b"\n") and (raw := stream.readline(BUFFER)):
        length += len(raw)
    return length


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
        return DataError(f"{path}:{number}: not valid JSON: {message}; rows from here on cannot be separated")

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
                yield (
                    Line(str(path), number, raw=raw) if whole else too_long_row(str(path), number, raw[:1000], len(raw))
                )
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


class _ObjectWithDoubledKeys(dict[str, Any]):
    """An object with keys that are there twice."""

    doubled_keys: tuple[str, ...] = ()


def decode_line(raw: bytes) -> dict[str, Any]:
    """The one JSON object in `raw`, its faulty columns as `Fault`. Raises Refusal."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = None
    if type(value) is dict and _lost_nothing(value, raw):
        return value
    text = decode_utf8(raw)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        where = f"{line}column {error.colno}"
        raise Refusal("not_json", f"not valid JSON: {error.msg} ({where}){_hint(text, error)}") from None
    except RecursionError:
        raise Refusal(_TOO_DEEP.reason, _TOO_DEEP.message) from None
    if not isinstance(value, dict):
        raise Refusal("not_an_object", f"a row must be an object with named fields, and is {show_value(value)}")
    if (fault := _fault_in([*value])) is not None:
        raise Refusal(fault.reason, fault.message)
    doubled = {name: _duplicate_key(name) for name in getattr(value, "doubled_keys", ())}
    return {name: _fault_in(item) or item for name, item in value.items()} | doubled


def _lost_nothing(fields: dict[str, Any], raw: bytes) -> bool:
    """Whether `orjson` lost nothing: no key that was there twice, no rounded number; and no deep nesting.

    Every key brings a colon, and further ones stand in texts: where as many are in the bytes, no key is missing. Only an
    escaped colon could make up for one.
    """
    colons, nodes, stack = 0, 0, list[Any]((fields,))
    while stack:
        node = stack.pop()
        nodes += 1
        if type(node) is dict:
            colons += len(node)
            node = node.values()
        for value in node:
            kind = type(value)
            if kind is str:
                colons += value.count(":")
            elif kind is dict or kind is list:
                stack.append(value)
            elif kind is float and not -_EXACT < value < _EXACT:
                return False
    shallow = nodes <= MAX_DEPTH or all(_fault_in(value) is None for value in fields.values())
    return colons == raw.count(b":") and shallow and b"\\u003" not in raw


def _fault_in(value: Any) -> Fault | None:
    """What is wrong with the value of a column, whose row is one level of nesting itself."""
    level, depth = [value], 1
    while level:
        for node in level:
            if isinstance(node, Fault):
                return node
            if isinstance(node, _ObjectWithDoubledKeys):
                return _duplicate_key(node.doubled_keys[0])
            if isinstance(node, str) and not node.isascii() and any("\ud800" <= c <= "\udfff" for c in node):
                return _LONE_SURROGATE
        inside = [node for node in level if isinstance(node, dict | list)]
        depth += bool(inside)
        if depth > MAX_DEPTH:
            return _TOO_DEEP
        level = [item for node in inside for item in ((*node, *node.values()) if isinstance(node, dict) else node)]
    return None


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """What the writer probably did, where the place of the error tells."""
    position = error.pos
    if error.msg == "Extra data":
        if "\r" in text.strip():
            return "; the line holds carriage returns: end lines with a line feed"
        comma = text[position : position + 1] == ","
        return "; remove the comma after the object" if comma else "; a line holds one object"
    before = text[:position].rstrip()
    late = before.endswith(",") and text[position : position + 1] in ("}", "]")
    if late or error.msg.startswith("Illegal trailing comma"):  # as Python says it since 3.13
        return "; a comma before the closing bracket is not allowed"
    if text[position : position + 1] == "'":
        return "; JSON takes double quotes"
    if text.startswith(("True", "False", "None"), position):
        return "; JSON writes true, false and null"
    if error.msg.startswith("Invalid control") and position < len(text.rstrip()):
        return "; inside a text, write line breaks and tabs as \\n and \\t"
    if position >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return "; the object is cut off, or spread over several lines"
    return ""


def _duplicate_key(name: str) -> Fault:
    return Fault("duplicate_key", f"an object has the key {name[:60]!r} twice; only one can be meant")


def _constant(name: str) -> Fault:
    return Fault("nan", f"{name} is not a JSON value; use null or a number")


def _float(digits: str) -> float | Fault:
    value = float(digits)
    if math.isinf(value):
        return Fault("number_too_large", f"the number {digits:.24} is beyond what a float can hold (1.8e308)")
    return value


def _int(digits: str) -> int | Fault:
    if len(digits) > MAX_DIGITS:
        return Fault("number_too_large", f"the whole number {digits:.24}... has more than {MAX_DIGITS} digits")
    return int(digits)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    doubled, names = _ObjectWithDoubledKeys(fields), [name for name, _ in pairs]
    doubled.doubled_keys = tuple(name for name in fields if names.count(name) > 1)
    return doubled


_DECODER = json.JSONDecoder(
    parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_make_object
)
"""Reads JSON strictly; what it refuses stands as a `Fault` in its place, a doubled object as a `_ObjectWithDoubledKeys`."""
