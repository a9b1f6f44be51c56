"""A row of any source, and a row that cannot be read; both know their file and line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from trainer.data.read.strict import Refused, decode_object, decode_utf8

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
    """Named values: texts, numbers, true/false, None, and lists and objects of these."""
    raw: bytes | None = None
    """The JSON line as it is in the file, kept after parsing for whoever wants to quote it."""

    def parse(self) -> Row | BadRow:
        """The row with its `fields` set, or why it cannot be read. Never raises for what the row holds."""
        if self.fields or self.raw is None:
            return self
        try:
            self.fields = decode_object(decode_utf8(self.raw))
        except Refused as refused:
            return BadRow(self.file, self.line, refused.reason, refused.message, excerpt(self.raw))
        return self


@dataclass(slots=True)
class BadRow:
    """A row that cannot be read; it goes to quarantine."""

    file: str
    line: int
    reason: str
    """Code for counting: `not_json`, `not_utf8`, `nul_byte`, `not_an_object`, `duplicate_key`, `nan`,
    `number_too_large`, `lone_surrogate`, `nested_too_deep`, `too_long`, `wrong_cell_count`, `binary`, `empty`."""
    message: str
    """One sentence for a person, without file and line."""
    excerpt: str
    """The row's first 200 characters, with control characters escaped."""

    def parse(self) -> BadRow:
        """Itself: what reading gives can be parsed without asking which of the two it is."""
        return self

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def excerpt(start: bytes | str) -> str:
    """The first 200 characters, decoded with replacement, control characters and surrogates escaped."""
    text = start if isinstance(start, str) else start[: 4 * EXCERPT].decode("utf-8", "replace")
    return _UNPRINTABLE.sub(_escape, text.rstrip("\r\n")[:EXCERPT])


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
