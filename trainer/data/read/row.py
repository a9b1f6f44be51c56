"""A row of any source, and how a JSON line becomes one: UTF-8 and JSON read strictly. Sources: RFC 8259 (JSON), RFC 3629 (UTF-8).

A row knows its file and line; one that cannot be read is a `Rejected`. `orjson` reads a line. It keeps the last of two values
of a doubled key without a word, and rounds whole numbers beyond 64 bits; where a count says that either may be, and where
`orjson` refuses the line, the json module reads it again. What one column cannot take (a doubled key, NaN, numbers that
overflow, halves of surrogate pairs, deep nesting) stands as a `Fault` in its place: it makes the row unusable only if that
column is read.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from trainer.data.document import Rejected
from trainer.data.fields import Fault, Refusal

EXCERPT = 200
"""Length of an excerpt in characters."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


@dataclass(slots=True)
class Row:
    """One row of a source. A JSON line stays raw until `parse`, so that worker processes do the parsing."""

    file: str
    """Path as the user would write it, or `hub:NAME/SPLIT`."""
    line: int
    """Line on which the row starts, from 1; the row's number in Parquet, Arrow and hub data; 1 in text files."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Named values: texts, numbers, true/false, None, lists and objects of these; a `Fault` where a column has none."""
    raw: bytes | None = None
    """The JSON line as it is in the file, kept after parsing for whoever wants to quote it."""
    others: tuple[str, ...] = ()
    """Further columns of the file, which nobody asked for: their values were not read."""
    added: tuple[str, ...] = ()
    """Columns that reading made: the file has none of that name."""

    def parse(self) -> Row | Rejected:
        """The row with its `fields` set, or why it cannot be read. Never raises for what the row holds."""
        if self.fields or self.raw is None:
            return self
        try:
            self.fields = decode_line(self.raw)
        except Refusal as refused:
            return Rejected(self.file, self.line, refused.reason, refused.message, excerpt(self.raw))
        return self

    def excerpt(self) -> str:
        """The row's first characters, as they are in the file or as its columns show them."""
        if self.raw is not None:
            return excerpt(self.raw)
        shown = (f"{name!r}: {_start(value)}" for name, value in self.fields.items())
        return excerpt("{" + ", ".join(shown) + "}")


def excerpt(start: bytes | str) -> str:
    """The first 200 characters, decoded with replacement, control characters and surrogates escaped."""
    text = start if isinstance(start, str) else start[: 4 * EXCERPT].decode("utf-8", "replace")
    return _UNPRINTABLE.sub(_escape, text.rstrip("\r\n")[:EXCERPT])


def _start(value: Any) -> str:
    return str(value) if isinstance(value, Fault) else repr(value[:EXCERPT] if isinstance(value, str | list) else value)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


MAX_ROW_BYTES = 64 * 2**20
"""Longest row in bytes; a longer one is a mistake of whoever wrote the file, and would not fit a context anyway."""
MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row. Fixed, so that it does not hang on the depth of the caller's stack."""
MAX_DIGITS = 4300
"""Longest whole number in digits: the limit of Python's own conversion."""
_EXACT = 2.0**63
"""From here on `orjson` may have rounded a whole number to a float."""


class _Doubled(dict[str, Any]):
    """An object with keys that are there twice."""

    twice: tuple[str, ...] = ()


def decode_utf8(raw: bytes) -> str:
    """The text of `raw`. Raises Refusal (`nul_byte`, `not_utf8`) with the column and the byte."""
    if b"\0" in raw:
        raise Refusal("nul_byte", f"NUL byte in column {raw.index(0) + 1}; the file is damaged or is not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, column = raw[error.start], error.start + 1
        raise Refusal(
            "not_utf8", f"byte 0x{byte:02x} in column {column} is not UTF-8; save the file as UTF-8"
        ) from None


def decode_line(raw: bytes) -> dict[str, Any]:
    """The one JSON object in `raw`, its faulty columns as `Fault`. Raises Refusal."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = None
    if type(value) is dict and _sure(value, raw):
        return value
    text = decode_utf8(raw)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        where = f"{line}column {error.colno}"
        raise Refusal("not_json", f"not valid JSON: {error.msg} ({where}){_hint(text, error)}") from None
    except RecursionError:
        raise _too_deep() from None
    return _checked(value, text)


def _sure(fields: dict[str, Any], raw: bytes) -> bool:
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
    shallow = nodes <= MAX_DEPTH or _depth(fields) <= MAX_DEPTH
    return colons == raw.count(b":") and shallow and b"\\u003" not in raw


def _checked(value: Any, text: str) -> dict[str, Any]:
    """What `_DECODER` made of `text`, the row, with a `Fault` for each column that holds one. Raises Refusal."""
    if not isinstance(value, dict):
        raise Refusal("not_an_object", f"a row must be an object with named fields, found {_kind(value)}")
    halves = "\\ud" in text or "\\uD" in text
    if halves and _half("".join(value)):
        raise _half_refused()
    deep = text.count("[") + text.count("{") > MAX_DEPTH
    if not (halves or deep or _made):
        return value
    _made.clear()
    fields = {name: _fault_in(item, halves=halves, deep=deep) or item for name, item in value.items()}
    for name in getattr(value, "twice", ()):
        fields[name] = _doubled(name)
    return fields


def _fault_in(value: Any, *, halves: bool, deep: bool) -> Fault | None:
    if deep and _depth(value) >= MAX_DEPTH:  # the row itself is one level
        return Fault("nested_too_deep", _too_deep().message)
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, Fault):
            return node
        if isinstance(node, _Doubled):
            return _doubled(node.twice[0])
        if isinstance(node, dict | list):
            stack += reversed([*node.values(), *(node if halves else ())] if isinstance(node, dict) else node)
        elif halves and isinstance(node, str) and _half(node):
            return Fault("lone_surrogate", _half_refused().message)
    return None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
    return depth


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """What the writer probably did, where the place of the error tells."""
    position = error.pos
    if error.msg == "Extra data":
        if "\r" in text.strip():
            return "; the line holds carriage returns: end lines with a line feed"
        comma = text[position : position + 1] == ","
        return "; remove the comma after the object" if comma else "; a line holds one object"
    before = text[:position].rstrip()
    if before.endswith(",") and text[position : position + 1] in ("}", "]"):
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


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else "a number")


def _half(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _half_refused() -> Refusal:
    return Refusal("lone_surrogate", "half a surrogate pair (\\ud800 to \\udfff), which is no character")


def _too_deep() -> Refusal:
    return Refusal("nested_too_deep", f"lists and objects are nested deeper than {MAX_DEPTH} levels")


def _doubled(name: str) -> Fault:
    return Fault("duplicate_key", f"an object has the key {name[:60]!r} twice; only one can be meant")


def _fault(reason: str, message: str) -> Fault:
    _made.append(fault := Fault(reason, message))
    return fault


def _constant(name: str) -> Fault:
    return _fault("nan", f"{name} is not a JSON value; use null or a number")


def _float(digits: str) -> float | Fault:
    value = float(digits)
    if math.isinf(value):
        return _fault("number_too_large", f"the number {_short(digits)} is beyond what a float can hold (1.8e308)")
    return value


def _int(digits: str) -> int | Fault:
    if len(digits) > MAX_DIGITS:
        return _fault("number_too_large", f"the whole number {_short(digits)} has more than {MAX_DIGITS} digits")
    return int(digits)


def _short(digits: str) -> str:
    return digits if len(digits) <= 24 else f"{digits[:20]}..."


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    doubled, names = _Doubled(fields), [name for name, _ in pairs]
    doubled.twice = tuple(name for name in fields if names.count(name) > 1)
    _made.append(doubled)
    return doubled


_made: list[Any] = []
"""What `_DECODER` put in place of values since `_checked` looked: mostly nothing, and nothing need be looked for."""
_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_pairs)
"""Reads JSON strictly; what it refuses stands as a `Fault` in its place, a doubled object as a `_Doubled`."""
