"""A row of any source; it knows its file and line. One that cannot be read is a `Rejected`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from trainer.data.document import Rejected
from trainer.data.fields import Fault
from trainer.data.read.strict import Refused, decode_line

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
        except Refused as refused:
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
