"""What a row's bytes may hold: UTF-8 and JSON read strictly.

The json module alone lets NaN, doubled keys, overflowing numbers and halves of surrogate pairs pass; here each is a
`Refused` with a reason. Sources: RFC 8259 (JSON), RFC 3629 (UTF-8).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_ROW_BYTES = 64 * 2**20
"""Longest row in bytes; a longer one is a mistake of whoever wrote the file, and would not fit a context anyway."""
MAX_DEPTH = 100
"""Deepest nesting of lists and objects in a row. Fixed, so that it does not hang on the depth of the caller's stack."""
MAX_DIGITS = 4300
"""Longest whole number in digits: the limit of Python's own conversion."""


class Refused(ValueError):
    """A row cannot be taken as it is. `reason` is a code for counting, `message` a sentence for a person."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(message)


def decode_utf8(raw: bytes) -> str:
    """The text of `raw`. Raises Refused (`nul_byte`, `not_utf8`) with the column and the byte."""
    if b"\0" in raw:
        raise Refused("nul_byte", f"NUL byte in column {raw.index(0) + 1}; the file is damaged or is not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, column = raw[error.start], error.start + 1
        raise Refused(
            "not_utf8", f"byte 0x{byte:02x} in column {column} is not UTF-8; save the file as UTF-8"
        ) from None


def decode_object(text: str) -> dict[str, Any]:
    """The one JSON object that `text` holds. Raises Refused."""
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise Refused("not_json", f"not valid JSON: {error.msg} (column {error.pos + 1}){hint(text, error)}") from None
    except RecursionError:
        raise _too_deep() from None
    check_value(value, text)
    return value


def decode_element(text: str, start: int) -> tuple[Any | Refused, int]:
    """The JSON value that begins at `start`, or why it is refused; and where it ends.

    Raises json.JSONDecodeError where no value can be told apart there, which may only mean that text is missing.
    """
    try:
        value, end = _STRICT.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except Refused as refused:
        return refused, _LENIENT.raw_decode(text, start)[1]
    return value, end


def check_value(value: Any, text: str) -> None:
    """Refuse what the decoder lets through: values that are no object, deep nesting, halves of surrogate pairs."""
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"a row must be an object with named fields, found {_kind(value)}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Refused(
                "lone_surrogate", "half a surrogate pair (\\ud800 to \\udfff), which is no character"
            ) from None


def hint(text: str, error: json.JSONDecodeError) -> str:
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
    return names.get(type(value), "null")


def _too_deep() -> Refused:
    return Refused("nested_too_deep", f"lists and objects are nested deeper than {MAX_DEPTH} levels")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth


def _constant(name: str) -> NoReturn:
    raise Refused("nan", f"{name} is not a JSON value; use null or a number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Refused("number_too_large", f"the number {_short(digits)} is beyond what a float can hold (1.8e308)")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Refused("number_too_large", f"the whole number {_short(digits)} has more than {MAX_DIGITS} digits")
    return int(digits)


def _short(digits: str) -> str:
    return digits if len(digits) <= 24 else f"{digits[:20]}..."


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Refused("duplicate_key", f"an object has the key {name[:60]!r} twice; only one can be meant")
            seen.add(name)
    return fields


_STRICT = json.JSONDecoder(parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_pairs)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)
"""Finds where a refused value ends; its numbers are never used."""
