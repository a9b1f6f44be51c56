"""Parquet and Arrow files, and Arrow tables: values become those that JSON knows, by one stated rule.

Text, numbers, true/false, lists and structs stay; dictionary columns become their values; a map becomes an object.
Dates, times and decimals become texts, exactly: dates and times as in RFC 3339 with a blank for the T. NaN, with which
table libraries mark a missing number, becomes None. Bytes become text where they are UTF-8. What has no such value (other
bytes, an infinite number, a map with a key twice) is a `Fault` in its column. Columns that nobody asked for are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import DataError
from trainer.data.document import Rejected, Row
from trainer.data.fields import Fault, Refusal
from trainer.data.read.opening import (
    MAX_ROW_BYTES,
    File,
    decode_utf8,
    identify,
    open_binary,
    refuse_pointer,
    too_long_row,
    unreadable_file,
)
from trainer.data.read.remote import RemoteFile

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 512
"""Rows turned into Python values at a time."""
HEADS = {"Parquet": (b"PAR1",), "Arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
"""How a file of each kind may begin."""
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def read_table(path: File, needed_columns: Collection[str] | None = None) -> Iterator[Row | Rejected]:
    """Rows of a Parquet file, or of an Arrow IPC file or stream, with the columns `needed_columns` (None: all).

    Raises DataError where the file is damaged or none.
    """
    _require_head(path)
    with _opened(path) as (schema, read_batches):
        read_columns, unread_columns = split_columns(_names(schema, str(path)), needed_columns)
        batches = _validate(batch.select(read_columns) for batch in read_batches(read_columns))
        yield from table_rows(_slices(batches), str(path), unread_columns=unread_columns)


def _slices(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at most `ROWS_PER_BATCH`: each is turned into Python values as a whole."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.slice(start, ROWS_PER_BATCH)


def count_rows(path: Path) -> int:
    """Rows of a Parquet or Arrow file, of which only the outline is read. Raises DataError where it is damaged."""
    with _opened(path) as (_, batches):
        return sum(batch.num_rows for batch in batches([]))


def _kind(path: File) -> str:
    return "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"


@contextmanager
def _opened(path: File) -> Iterator[tuple[pa.Schema, Callable[[list[str]], Iterator[pa.RecordBatch]]]]:
    """The schema of a file, and what reads its batches: of Parquet with the named columns alone, of Arrow, mapped, with all."""
    import pyarrow as pa

    try:
        if _kind(path) == "Parquet":
            import pyarrow.parquet as pq

            with open_binary(path) as source, pq.ParquetFile(source) as file:
                # Parquet reads the columns that are asked for; a mapped Arrow file costs nothing for those that
                # nobody looks at.
                yield file.schema_arrow, lambda names: file.iter_batches(ROWS_PER_BATCH, columns=names)
        else:
            with pa.memory_map(str(path)) if isinstance(path, Path) else open_binary(path) as source:
                schema, batches = _arrow_batches(path, source)
                yield schema, lambda names: batches
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _arrow_batches(path: File, source: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """(schema, batches) of an Arrow IPC file or stream. The library does not notice that a stream is cut off: this does."""
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
    source.seek(0)
    stream = pa.ipc.open_stream(source)

    def batches() -> Iterator[pa.RecordBatch]:
        """The batches, then a look at how the stream ends."""
        yield from stream
        end = source.tell()
        source.seek(end - len(_END_OF_STREAM))
        if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise DataError(f"{path}: the Arrow stream is cut off: its end mark is missing; copy or make it again")
        if source.read(1):
            more = source.seek(0, 2) - end
            raise DataError(f"{path}: {more} bytes follow the end of the Arrow stream; make the file again")

    return stream.schema, batches()


def split_columns(names: list[str], needed_columns: Collection[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """(columns to read, the other columns). All are read if `needed_columns` is None, or if the file has none of these."""
    read_columns = [name for name in names if needed_columns is None or name in needed_columns] or names
    return read_columns, tuple(name for name in names if name not in read_columns)


def _require_head(path: File) -> None:
    """Raise DataError if a file does not begin as its name promises."""
    try:
        with open_binary(path) as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable_file(path, error) from error
    if not head:
        raise DataError(f"{path}:1: the file is empty (0 bytes)")
    refuse_pointer(path, head)
    if head.startswith(HEADS[_kind(path)]):
        return
    content = identify(head)
    if content is None:
        content = "JSON text" if head.lstrip()[:1] in (b"{", b"[") else "something else"
    raise DataError(f"{path}: the name says that it is {_kind(path)}, but it holds {content}; rename it")


def _damaged(path: File, error: BaseException) -> DataError:
    if isinstance(path, RemoteFile) and isinstance(error, OSError):
        return DataError(f"{path}: cannot be read: {error}; download the file and give its path")
    lines = str(error).strip().splitlines()
    cause = lines[0] if lines else type(error).__name__
    return DataError(f"{path}: the {_kind(path)} file is damaged or cut off ({cause[:200]}); copy or make it again")


def table_rows(
    batches: Iterable[pa.RecordBatch], name: str, *, unread_columns: tuple[str, ...] = ()
) -> Iterator[Row | Rejected]:
    """Rows of Arrow batches that share a schema, numbered from 1 under the file name `name`.

    `unread_columns`: further columns of the file, which the batches do not hold.
    """
    number = 0
    for batch in batches:
        may_be_too_long = batch.nbytes > MAX_ROW_BYTES  # only then are rows measured one by one
        names = _names(batch.schema, name)
        columns = [_column_values(column) for column in batch.columns]
        rows = zip(*columns, strict=True) if columns else [()] * batch.num_rows
        for values in rows:
            number += 1
            row = Row(name, number, dict(zip(names, values, strict=True)), unread_columns=unread_columns)
            size = len(json.dumps(row.fields, ensure_ascii=False, default=str)) if may_be_too_long else 0
            if size > MAX_ROW_BYTES:
                yield too_long_row(name, number, repr(row.fields), size)
            else:
                yield row


def _validate(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Raise ArrowInvalid for buffers that contradict each other: reading them would end the process, not the run.

    A text column that is not UTF-8 but sound otherwise passes; `_column_values` finds its rows.
    """
    import pyarrow as pa
    from pyarrow import types

    for batch in batches:
        for column in batch.columns:
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                is_text = types.is_string(column.type) or types.is_large_string(column.type)
                if "UTF8" not in str(error) or not is_text:
                    raise
                # The same buffers as bytes: everything but the encoding is checked again.
                as_bytes = pa.binary() if types.is_string(column.type) else pa.large_binary()
                column.view(as_bytes).validate(full=True)
        yield batch


def _names(schema: pa.Schema, name: str) -> list[str]:
    # A doubled name would lose a column when rows become dictionaries.
    doubled = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if doubled or "" in schema.names:
        what = f"the column {doubled[0]!r} twice" if doubled else "a column without a name"
        raise DataError(f"{name}: the schema has {what}; every column needs a name of its own")
    return list(schema.names)


def _column_values(column: pa.Array) -> list[Any]:
    """A column as JSON's values, with a `Fault` where there is none."""
    import pyarrow as pa

    try:
        plain_type = _plain_type(column.type)
        # Dates, decimals, dictionary and extension types; most columns are plain already.
        if column.type != plain_type:
            column = column.cast(plain_type)
    except (TypeError, pa.ArrowException) as error:
        fault = Fault("no_json", f"its type {column.type} cannot be turned into text ({error}); store it as text")
        return [fault if valid else None for valid in column.is_valid().to_pylist()]
    if _is_json_ready(plain_type):
        with suppress(UnicodeDecodeError, KeyError):  # only where these come is it worth to look value by value
            return list(column.to_pylist(maps_as_pydicts="strict"))
    return [_scalar_value(scalar) for scalar in column]


def _scalar_value(scalar: pa.Scalar) -> Any:
    """A scalar as JSON's value, or as a `Fault`."""
    try:
        return _to_json(scalar.as_py(maps_as_pydicts="strict"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return Fault("not_utf8", f"byte 0x{byte:02x} in a text column is not UTF-8; write the column anew")
    except KeyError:
        return Fault("duplicate_key", "a map has the same key twice; only one can be meant")
    except Refusal as refusal:
        return Fault(refusal.reason, refusal.message)


def _to_json(value: Any) -> Any:
    """A Python value of Arrow's as JSON has it. Raises Refusal."""
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise Refusal("nan", f"{value} is not a JSON value; use null or a finite number")
    if isinstance(value, bytes):
        try:
            return decode_utf8(value)
        except Refusal:
            content = identify(value[:4096])
            hint = f" but {content}" if content else ""
            raise Refusal("binary", f"{len(value)} bytes that are not UTF-8 text{hint}; store text") from None
    if isinstance(value, list):
        return [_to_json(element) for element in value]
    if isinstance(value, dict):
        return {str(name): _to_json(element) for name, element in value.items()}
    return value


def _is_json_ready(kind: pa.DataType) -> bool:
    """Whether Python's values of a plain type are JSON's own."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_json_ready(part.type) for part in kind)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_json_ready(kind.value_type)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_text or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The Arrow type to which values of `kind` are cast before they become Python values. Raises TypeError."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_large_list(kind):
        return pa.large_list(_plain_type(kind.value_type))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([pa.field(part.name, _plain_type(part.type)) for part in kind])
    if types.is_nested(kind) or types.is_interval(kind) or types.is_duration(kind) or types.is_run_end_encoded(kind):
        raise TypeError(f"no rule turns {kind} into JSON")
    return kind
