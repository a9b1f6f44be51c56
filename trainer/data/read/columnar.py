"""Reads Parquet and Arrow files, and Arrow tables: values become those that JSON knows, by one stated rule.

Text, numbers, true/false, lists and structs stay; dictionary columns become their values; a map becomes an object. Dates, times
and decimals become texts, exactly: dates and times as in RFC 3339 with a blank for the T. NaN, with which table libraries mark a
missing number, becomes None. Bytes become text if they are UTF-8. A value that JSON has nothing for (other bytes, an infinite
number, a map with a key twice) becomes an `UnreadableValue` in its column. Columns that nobody asked for are not read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from strategies.errors import DataError
from trainer.data.document import RejectedRow, SourceRow
from trainer.data.fields import RowError, UnreadableValue
from trainer.data.read.opening import (
    MAX_ROW_BYTES,
    InputPath,
    check_no_lfs_pointer,
    decode_utf8,
    identify_content,
    open_binary,
    reject_too_long_row,
    unreadable_file,
)
from trainer.data.read.remote import RemoteFile

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 512
"""Rows turned into Python values at a time."""
FIRST_BYTES_BY_FORMAT = {"Parquet": (b"PAR1",), "Arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
"""How a file of each format may begin."""
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""The last bytes of a whole Arrow stream."""


def read_table(path: InputPath, needed_columns: Collection[str] | None = None) -> Iterator[SourceRow | RejectedRow]:
    """Read the rows of a Parquet file, or of an Arrow IPC file or stream, with the columns `needed_columns` (None: all).

    The buffers are checked before they become values, since damaged ones would kill the process. Raises DataError if the file is
    damaged, or not what its name says.
    """
    _raise_if_content_contradicts_name(path)
    with _open_table(path) as table:
        # The others are only named in the report.
        read_columns, unread_columns = split_columns(_column_names(table.schema, str(path)), needed_columns)
        batches = _check_buffers(batch.select(read_columns) for batch in table.read_batches(read_columns))
        yield from table_rows(_small_batches(batches), str(path), unread_columns=unread_columns)


def _small_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at most `ROWS_PER_BATCH`: each is turned into Python values as a whole."""
    for batch in batches:
        for begin in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.slice(begin, ROWS_PER_BATCH)


def count_rows(path: Path) -> int:
    """Count the rows of a Parquet or Arrow file without reading values. Raises DataError if it is damaged."""
    with _open_table(path) as table:
        return sum(batch.num_rows for batch in table.read_batches([]))


def _format_by_name(path: InputPath) -> str:
    """The format that a table has by its name: "Parquet" or "Arrow"."""
    return "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"


class _OpenTable(NamedTuple):
    """An open Parquet or Arrow file."""

    schema: pa.Schema
    read_batches: Callable[[list[str]], Iterator[pa.RecordBatch]]
    """Reads the rows, given the columns that are wanted."""


@contextmanager
def _open_table(path: InputPath) -> Iterator[_OpenTable]:
    """Open a Parquet or Arrow file for the body of the `with` statement.

    Of Parquet, only the wanted columns are read. Batches of Arrow have all columns: they are mapped, and those that nobody looks
    at cost nothing. Raises DataError if the file is damaged, also while the body reads batches.
    """
    import pyarrow as pa

    try:
        if _format_by_name(path) == "Parquet":
            import pyarrow.parquet as pq

            with open_binary(path) as source, pq.ParquetFile(source) as file:
                yield _OpenTable(file.schema_arrow, lambda names: file.iter_batches(ROWS_PER_BATCH, columns=names))
        else:
            with pa.memory_map(str(path)) if isinstance(path, Path) else open_binary(path) as source:
                schema, batches = _arrow_batches(path, source)
                yield _OpenTable(schema, lambda names: batches)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged_file_error(path, error) from error


def _arrow_batches(path: InputPath, source: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Open an Arrow IPC file or stream: (its schema, its batches).

    While the batches of a stream are read, raises DataError if the stream is cut off, or if bytes follow its end: pyarrow notices
    neither.
    """
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
    source.seek(0)
    stream = pa.ipc.open_stream(source)

    def stream_batches() -> Iterator[pa.RecordBatch]:
        """The batches, then a look at how the stream ends."""
        yield from stream
        end = source.tell()
        source.seek(end - len(_END_OF_STREAM))
        if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise DataError(f"{path}: the Arrow stream is cut off: its end mark is missing; copy or make it again")
        if source.read(1):
            file_bytes = source.seek(0, os.SEEK_END)
            raise DataError(f"{path}: {file_bytes - end} bytes follow the end of the Arrow stream; make the file again")

    return stream.schema, stream_batches()


def split_columns(names: list[str], needed_columns: Collection[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Divide the columns of a table: (those to read, the others). All are read if `needed_columns` is None, or none is there."""
    columns_to_read = names
    if needed_columns is not None:
        columns_to_read = [name for name in names if name in needed_columns] or names
    return columns_to_read, tuple(name for name in names if name not in columns_to_read)


def _raise_if_content_contradicts_name(path: InputPath) -> None:
    """Raise DataError if a file is not what its name says, a Parquet or an Arrow file; its first bytes tell."""
    try:
        with open_binary(path) as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable_file(path, error) from error
    if not head:
        raise DataError(f"{path}:1: the file is empty (0 bytes)")
    check_no_lfs_pointer(path, head)
    file_format = _format_by_name(path)
    if head.startswith(FIRST_BYTES_BY_FORMAT[file_format]):
        return
    content = identify_content(head)
    if content is None:
        content = "JSON text" if head.lstrip()[:1] in (b"{", b"[") else "something else"
    raise DataError(f"{path}: the name says that it is {file_format}, but it holds {content}; rename it")


def _damaged_file_error(path: InputPath, error: BaseException) -> DataError:
    """Make the error for a table file that pyarrow cannot read."""
    if isinstance(path, RemoteFile) and isinstance(error, OSError):
        return DataError(f"{path}: cannot be read: {error}; download the file and give its path")
    lines = str(error).strip().splitlines()
    cause = lines[0] if lines else type(error).__name__
    return DataError(
        f"{path}: the {_format_by_name(path)} file is damaged or cut off ({cause[:200]}); copy or make it again"
    )


def table_rows(
    batches: Iterable[pa.RecordBatch], file_name: str, *, unread_columns: tuple[str, ...] = ()
) -> Iterator[SourceRow | RejectedRow]:
    """Turn Arrow batches that share a schema into rows, numbered from 1 as lines of `file_name`.

    `unread_columns`: further columns of the file, which the batches do not hold. A row of more than `MAX_ROW_BYTES` characters as
    JSON becomes a rejected row.
    """
    row_number = 0
    for batch in batches:
        may_be_too_long = batch.nbytes > MAX_ROW_BYTES  # only then are rows measured one by one
        column_names = _column_names(batch.schema, file_name)
        columns = [_column_values(column) for column in batch.columns]
        rows = zip(*columns, strict=True) if columns else [()] * batch.num_rows
        for row_values in rows:
            row_number += 1
            fields = dict(zip(column_names, row_values, strict=True))
            num_characters = 0
            if may_be_too_long:
                num_characters = len(json.dumps(fields, ensure_ascii=False, default=str))
            if num_characters > MAX_ROW_BYTES:
                yield reject_too_long_row(file_name, row_number, repr(fields), num_characters)
            else:
                yield SourceRow(file_name, row_number, fields, unread_columns=unread_columns)


def _check_buffers(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Check Arrow batches before they become Python values, and yield them unchanged: to read broken buffers would crash.

    A text column whose only fault is that it is not UTF-8 passes: `_column_values` finds the rows. Raises ArrowInvalid for any
    other fault.
    """
    import pyarrow as pa
    from pyarrow import types

    for batch in batches:
        for column in batch.columns:
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                is_text = types.is_string(column.type) or types.is_large_string(column.type)
                is_wrong_encoding = is_text and "UTF8" in str(error)
                if not is_wrong_encoding:
                    raise
                # The same buffers as bytes: everything but the encoding is checked again.
                bytes_type = pa.binary() if types.is_string(column.type) else pa.large_binary()
                column.view(bytes_type).validate(full=True)
        yield batch


def _column_names(schema: pa.Schema, file_name: str) -> list[str]:
    """The names of a table's columns. Raises DataError for an empty name, and for one that is there twice: a row is a dict."""
    doubled_names = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if doubled_names or "" in schema.names:
        fault = f"the column {doubled_names[0]!r} twice" if doubled_names else "a column without a name"
        raise DataError(f"{file_name}: the schema has {fault}; every column needs a name of its own")
    return list(schema.names)


def _column_values(column: pa.Array) -> list[Any]:
    """Turn an Arrow column into Python values as JSON has them: dates as texts, NaN as None.

    An `UnreadableValue` stands for each value that JSON has nothing for, such as infinity, and says why.
    """
    import pyarrow as pa

    try:
        json_ready_type = _json_ready_type(column.type)
        # Dates, decimals, dictionary and extension types become texts and numbers; most columns are such already.
        if column.type != json_ready_type:
            column = column.cast(json_ready_type)
    except (TypeError, pa.ArrowException) as error:
        fault = UnreadableValue(
            "no_json", f"its type {column.type} cannot be turned into text ({error}); store it as text"
        )
        return [fault if valid else None for valid in column.is_valid().to_pylist()]
    if _is_json_native_type(json_ready_type):
        with suppress(UnicodeDecodeError, KeyError):  # these say that some value is faulty: look at each
            return list(column.to_pylist(maps_as_pydicts="strict"))
    return [_scalar_value(scalar) for scalar in column]


def _scalar_value(scalar: pa.Scalar) -> Any:
    """Turn an Arrow scalar into a value as JSON has it.

    An `UnreadableValue` for a text that is not UTF-8, a map with a key twice, or what JSON lacks.
    """
    try:
        return _as_json_value(scalar.as_py(maps_as_pydicts="strict"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return UnreadableValue("not_utf8", f"byte 0x{byte:02x} in a text column is not UTF-8; write the column anew")
    except KeyError:  # what pyarrow raises for the map
        return UnreadableValue("duplicate_key", "a map has the same key twice; only one can be meant")
    except RowError as refusal:
        return UnreadableValue(refusal.reason, refusal.message)


def _as_json_value(node: Any) -> Any:
    """Turn a Python value that Arrow made, or one inside of it, into one that JSON has: NaN -> None, b"text" -> "text".

    Raises RowError for what JSON has nothing for: infinity, and bytes that are no text.
    """
    if isinstance(node, float) and not math.isfinite(node):
        if math.isnan(node):
            return None
        raise RowError("nan", f"{node} is not a JSON value; use null or a finite number")
    if isinstance(node, bytes):
        try:
            return decode_utf8(node)
        except RowError:
            content = identify_content(node[:4096])
            hint = f" but {content}" if content else ""
            raise RowError("binary", f"{len(node)} bytes that are not UTF-8 text{hint}; store text") from None
    if isinstance(node, list):
        return [_as_json_value(element) for element in node]
    if isinstance(node, dict):
        return {str(name): _as_json_value(element) for name, element in node.items()}
    return node


def _is_json_native_type(arrow_type: pa.DataType) -> bool:
    """Whether the Python values of an Arrow type are JSON's own, so that a column can be converted as a whole.

    That is texts, whole numbers, true/false, null, and lists and objects of these. A float is none, since it may be NaN or
    infinite.
    """
    from pyarrow import types

    if types.is_struct(arrow_type):
        return all(_is_json_native_type(field.type) for field in arrow_type)
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return _is_json_native_type(arrow_type.value_type)
    is_text = types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type)
    return is_text or types.is_integer(arrow_type) or types.is_boolean(arrow_type) or types.is_null(arrow_type)


def _json_ready_type(arrow_type: pa.DataType) -> pa.DataType:
    """Find the type to which values of an Arrow type are cast, so that as Python values they are what JSON is to have.

    Examples: timestamp -> string, dictionary<string> -> string, list<date> -> list<string>, int64 -> int64. Raises TypeError if
    JSON has nothing for the type, such as a duration.
    """
    import pyarrow as pa
    from pyarrow import types

    # Encodings: the type of what they encode.
    if types.is_dictionary(arrow_type):
        return _json_ready_type(arrow_type.value_type)
    if isinstance(arrow_type, pa.BaseExtensionType):
        return _json_ready_type(arrow_type.storage_type)
    # Dates, times and decimals: their text.
    is_point_in_time = types.is_date(arrow_type) or types.is_time(arrow_type) or types.is_timestamp(arrow_type)
    if is_point_in_time or types.is_decimal(arrow_type):
        return pa.string()
    # Containers: the same container of plain types.
    if types.is_large_list(arrow_type):
        return pa.large_list(_json_ready_type(arrow_type.value_type))
    if types.is_list(arrow_type) or types.is_fixed_size_list(arrow_type):
        return pa.list_(_json_ready_type(arrow_type.value_type))
    if types.is_map(arrow_type):
        return pa.map_(_json_ready_type(arrow_type.key_type), _json_ready_type(arrow_type.item_type))
    if types.is_struct(arrow_type):
        return pa.struct([pa.field(field.name, _json_ready_type(field.type)) for field in arrow_type])
    # What JSON has nothing for.
    is_span_of_time = types.is_interval(arrow_type) or types.is_duration(arrow_type)
    if is_span_of_time or types.is_nested(arrow_type) or types.is_run_end_encoded(arrow_type):
        raise TypeError(f"no rule turns {arrow_type} into JSON")
    # Texts, numbers, true/false and null are plain already.
    return arrow_type
