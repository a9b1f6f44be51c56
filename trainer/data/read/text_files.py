"""Text files: one document a file, with the file's name as its title."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from trainer.data.document import Rejected
from trainer.data.read.opening import COMPRESSION, File, open_text
from trainer.data.read.row import Row, excerpt
from trainer.data.read.strict import MAX_ROW_BYTES, Refused, decode_utf8


def read_text_file(path: File) -> Iterator[Row | Rejected]:
    """The file as one row with the fields `text` and `title`; line ends become line feeds. Raises DataError."""
    with open_text(path) as stream:
        raw = stream.read(MAX_ROW_BYTES + 1)
    name = str(path)
    if len(raw) > MAX_ROW_BYTES:
        message = f"the file is longer than {MAX_ROW_BYTES >> 20} MiB, the most one document may have; split it"
        yield Rejected(name, 1, "too_long", message, excerpt(raw))
        return
    try:
        text = decode_utf8(raw)
    except Refused as refused:
        yield Rejected(name, 1, refused.reason, _by_line(raw, refused), excerpt(raw))
        return
    if not text.strip():
        yield Rejected(name, 1, "empty", "the file holds only blanks", excerpt(text))
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield Row(name, 1, {"text": text, "title": title(path)}, added=("title",))


def title(path: File) -> str:
    """The file's name without its suffixes."""
    name = path.name.removesuffix(path.suffix) if path.suffix.lower() in COMPRESSION else path.name
    return PurePath(name).stem


def _by_line(raw: bytes, refused: Refused) -> str:
    """The message with the line of the first bad byte, which `decode_utf8` counts from the start of the file."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            decode_utf8(line)
        except Refused as here:
            return f"line {number}: {here.message}"
    return refused.message
