"""Reads CSV (commas or semicolons) and TSV files with a header line, one row a record (RFC 4180); and text files, one row each.

Cells stay texts. A record may span lines and is named by its first. A text file has its name as its title.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import PurePath
from typing import BinaryIO

from strategies.errors import DataError
from trainer.data.document import RejectedRow, SourceRow, excerpt
from trainer.data.fields import RowError
from trainer.data.read.opening import HEAD_BYTES, MAX_ROW_BYTES, InputPath, compression_of, decode_utf8, open_text_bytes

INDEX_COLUMN = "Unnamed: 0"
"""Name of a first column without one, as pandas calls it."""
_NAME_BY_SEPARATOR = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def read_csv(path: InputPath, delimiter: str = ",") -> Iterator[SourceRow | RejectedRow]:
    """Read the rows of a delimited file: each has its cells by the names of the header, as texts.

    A record with too few or too many cells, NUL or bytes that are not UTF-8 is a bad row. With commas, a header that has
    semicolons and no comma means semicolons: spreadsheets write these if numbers have a comma. Raises DataError if the further
    rows cannot be separated: an unclosed or misplaced quote, a header with doubled or missing names, other separators than the
    file's name says.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's own limit of 131,072 is shorter than real documents
    with open_text_bytes(path) as stream:
        # `peek` shows the first bytes without reading on.
        header = next((line for line in stream.peek(HEAD_BYTES).splitlines() if line.strip()), b"")
        if delimiter == "," and b";" in header and b"," not in header:
            delimiter = ";"
        yield from _read_records(path, _RecordLines(path, stream), delimiter)


class _RecordLines:
    """Gives the csv module the lines of a delimited file, which it joins to records: a quoted cell may have line breaks.

    Remembers the first line of the current record, and what is wrong with the bytes of its lines.
    """

    def __init__(self, path: InputPath, stream: BinaryIO) -> None:
        self.path = path
        self.stream = stream
        self.num_read = 0
        """Lines read so far."""
        self.first_line = b""
        """The first line of the record."""
        self.byte_error: RowError | None = None
        """Why the current record cannot be used: bytes that are not UTF-8, or NUL; None if it can."""

    def __iter__(self) -> Iterator[str]:
        """The lines as text, for the csv module. Of a line that is not UTF-8, the error is remembered (`byte_error`).

        So the record is rejected. The csv module gets such a line with surrogates, since it must still find where the record
        ends. Raises DataError for a line that is too long, which one unclosed cell may be.
        """
        while raw := self.stream.readline(MAX_ROW_BYTES + 1):
            self.num_read += 1
            if len(raw) > MAX_ROW_BYTES:
                raise DataError(
                    f"{self.path}:{self.num_read}: the line is longer than {MAX_ROW_BYTES >> 20} MiB; split the cell"
                )
            self.first_line = self.first_line or raw
            try:
                yield decode_utf8(raw)
            except RowError as refusal:
                self.byte_error = self.byte_error or refusal
                yield raw.decode("utf-8", "surrogateescape")

    def begin_record(self) -> int:
        """Forget the last record; returns the number of the line on which the next one begins."""
        self.first_line = b""
        self.byte_error = None
        return self.num_read + 1


def _read_records(path: InputPath, lines: _RecordLines, delimiter: str) -> Iterator[SourceRow | RejectedRow]:
    """Read a delimited file record by record: the first one is the header, blank lines are skipped.

    A record with bytes that are not UTF-8, or with more or fewer cells than the header, becomes a `RejectedRow`. Raises DataError
    for a record after which rows can no longer be separated, such as a quote that is never closed.
    """
    # strict=True: otherwise a misplaced quote would silently swallow the following rows.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    file = str(path)
    header: list[str] | None = None
    while True:
        line = lines.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _malformed_csv_error(path, line, lines, error) from error
        is_one_line = lines.num_read == line
        is_blank_line = not cells or (len(cells) == 1 and is_one_line and lines.first_line.isspace())
        if is_blank_line:
            continue
        if header is None:
            header = _parse_header(path, line, cells, delimiter, lines.byte_error)
        elif lines.byte_error is not None:
            yield RejectedRow(file, line, lines.byte_error.reason, lines.byte_error.message, excerpt(lines.first_line))
        elif len(cells) != len(header):
            message = _wrong_cell_count_message(cells, header, delimiter)
            yield RejectedRow(file, line, "wrong_cell_count", message, excerpt(lines.first_line))
        else:
            # a cell's own line breaks are line feeds, whatever ends the file's lines
            texts = [cell.replace("\r\n", "\n") for cell in cells]
            yield SourceRow(file, line, dict(zip(header, texts, strict=True)))


def _wrong_cell_count_message(cells: list[str], header: list[str], delimiter: str) -> str:
    """Write the message for a record with more or fewer cells than the header: "2 cells where the header has 3 (a, b, c)".

    Behind that it says what to do.
    """
    num_cells = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    columns = ", ".join(header[:8])
    if len(header) > 8:
        columns += ", ..."
    return (
        f"{num_cells} where the header has {len(header)} ({columns}); quote cells that hold "
        f"{_NAME_BY_SEPARATOR[delimiter]} or line breaks"
    )


def _malformed_csv_error(path: InputPath, line: int, lines: _RecordLines, error: csv.Error) -> DataError:
    """Make the error for a record that the csv module cannot read, with what probably happened.

    `line`: the number of the line on which it begins. `lines.num_read`: up to which line it was read.
    """
    if "unexpected end of data" in str(error):
        fault = "a quote is opened and never closed in the record that starts here"
    elif "new-line character" in str(error):
        fault = "the line holds carriage returns alone; end lines with line feeds, or quote the cell"
    # `read_csv` has set the module's limit to this size.
    elif "field larger" in str(error):
        fault = f"a cell is longer than {MAX_ROW_BYTES >> 20} MiB, perhaps because a quote is never closed"
    else:
        fault = f'{error}; double the quotes inside quoted cells ("") and quote the whole cell'
        if lines.num_read > line:
            fault += f" (the record that starts here was read up to line {lines.num_read})"
    return DataError(f"{path}:{line}: not valid CSV: {fault}; rows from here on cannot be separated")


def _parse_header(
    path: InputPath, line: int, cells: list[str], delimiter: str, byte_error: RowError | None
) -> list[str]:
    """Read the names of the columns from the first record of a delimited file. `byte_error`: what is wrong with its bytes.

    A first column without a name, as pandas writes a table's index, is called `INDEX_COLUMN`. Raises DataError for a header that
    cannot be one: a wrong separator, Excel's `sep=` line, doubled or missing names.
    """
    if byte_error is not None:
        raise DataError(f"{path}:{line}: in the header: {byte_error.message}")
    header = [name.strip() for name in cells]
    if len(header) > 1 and header[0] == "" and INDEX_COLUMN not in header:
        header[0] = INDEX_COLUMN
    if len(header) == 1:
        _check_separator(path, line, cells[0], delimiter)
    if header[0].lower().startswith("sep="):
        raise DataError(f"{path}:{line}: the first line is {','.join(header)!r}, which Excel writes; delete this line")
    doubled_names = sorted({name for name in header if header.count(name) > 1})
    defect = ""
    if "" in header:
        defect = f"column {header.index('') + 1} without a name"
    elif doubled_names:
        defect = f"the column {doubled_names[0]!r} twice"
    if defect:
        raise DataError(f"{path}:{line}: the header has {defect}; every column needs a name of its own")
    return header


def _check_separator(path: InputPath, line: int, cell: str, delimiter: str) -> None:
    """Raise DataError if the only cell of a header holds another separator: the file is then separated by that."""
    for separator, separator_name in _NAME_BY_SEPARATOR.items():
        if separator == delimiter or separator not in cell:
            continue
        # The separator goes by the suffix of the file's name, of which there are two.
        if separator == ",":
            remedy = "name the file .csv"
        elif separator == "\t":
            remedy = "name the file .tsv"
        else:
            remedy = f"save it with {_NAME_BY_SEPARATOR[delimiter]}"
        raise DataError(
            f"{path}:{line}: the header is the single column {cell.strip()[:80]!r}: the file seems to be "
            f"separated by {separator_name}, not {_NAME_BY_SEPARATOR[delimiter]}; {remedy}"
        )


def read_text_file(path: InputPath) -> Iterator[SourceRow | RejectedRow]:
    """Read a text file as one row, with the fields `text` and `title`; line ends become line feeds. Raises DataError.

    A file that is too long, blank or not UTF-8 gives a rejected row.
    """
    with open_text_bytes(path) as stream:
        raw = stream.read(MAX_ROW_BYTES + 1)
    name = str(path)
    if len(raw) > MAX_ROW_BYTES:
        message = f"the file is longer than {MAX_ROW_BYTES >> 20} MiB, the most one document may have; split it"
        yield RejectedRow(name, 1, "too_long", message, excerpt(raw))
        return
    lines: list[str] = []
    # Line by line, so that an error names the line.
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            lines.append(decode_utf8(line))
        except RowError as refusal:
            yield RejectedRow(name, 1, refusal.reason, f"line {number}: {refusal.message}", excerpt(raw))
            return
    text = "\n".join(lines)
    if not text.strip():
        yield RejectedRow(name, 1, "empty", "the file holds only blanks", excerpt(text))
        return
    # Only after decoding: a lone carriage return is a line end in old texts.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield SourceRow(name, 1, {"text": text, "title": file_title(path)}, derived_columns=("title",))


def file_title(path: InputPath) -> str:
    """The file's name without its suffixes: `a/notes.md.gz` -> "notes"."""
    name = path.name.removesuffix(path.suffix) if compression_of(path) else path.name
    return PurePath(name).stem
