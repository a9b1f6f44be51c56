"""Text files: one document a file, with the file's name as its title."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.data.read.opening import COMPRESSION, open_text
from trainer.data.read.row import BadRow, Row, excerpt
from trainer.data.read.strict import MAX_ROW_BYTES, Refused, decode_utf8


def read_text_file(path: Path) -> Iterator[Row | BadRow]:
    """The file as one row with the fields `text` and `title`; line ends become line feeds. Raises DataError."""
    with open_text(path) as stream:
        raw = stream.read(MAX_ROW_BYTES + 1)
    name = str(path)
    if len(raw) > MAX_ROW_BYTES:
        message = f"the file is longer than {MAX_ROW_BYTES >> 20} MiB, the most one document may have; split it"
        yield BadRow(name, 1, "too_long", message, excerpt(raw))
        return
    try:
        text = decode_utf8(raw)
    except Refused as refused:
        yield BadRow(name, 1, refused.reason, _by_line(raw, refused), excerpt(raw))
        return
    if not text.strip():
        yield BadRow(name, 1, "empty", "the file holds only blanks", excerpt(text))
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield Row(name, 1, {"text": text, "title": title(path)})


def title(path: Path) -> str:
    """The file's name without its suffixes."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSION else path
    return inner.stem


def _by_line(raw: bytes, refused: Refused) -> str:
    """The message with the line of the first bad byte, which `decode_utf8` counts from the start of the file."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            decode_utf8(line)
        except Refused as here:
            return f"line {number}: {here.message}"
    return refused.message
