"""Parquet and Arrow files, and Arrow tables: values become those that JSON knows, by one stated rule.

Text, numbers, true/false, lists and structs stay; dictionary columns become their values; a map becomes an object.
Dates, times, durations and decimals become texts, exactly: dates and times as in RFC 3339 with a blank for the T,
durations as a number with its unit.
NaN, with which table libraries mark a missing number, becomes None; an infinite number makes the row a bad row. Bytes
become text where they are UTF-8 and a bad row otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import DataError
from trainer.data.read.opening import identify, require_regular, unreadable
from trainer.data.read.row import BadRow, Row, excerpt
from trainer.data.read.strict import MAX_ROW_BYTES, Refused, decode_utf8

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 512
"""Rows turned into Python values at a time."""
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
Converter = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, a row group at a time. Raises DataError where the file is damaged or is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_head(path, (b"PAR1",), "Parquet")
    try:
        with pq.ParquetFile(path) as file:
            yield from table_rows(_validated(file.iter_batches(BATCH)), str(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, "Parquet", error) from error


def read_arrow(path: Path) -> Iterator[Row | BadRow]:
    """Rows of an Arrow IPC file or stream, memory-mapped. Raises DataError where it is damaged or cut off."""
    import pyarrow as pa

    _require_head(path, (b"ARROW1", b"\xff\xff\xff\xff"), "Arrow")
    try:
        with pa.memory_map(str(path)) as source:
            yield from table_rows(_arrow_batches(path, source), str(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, "Arrow", error) from error


def _arrow_batches(path: Path, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        batches: Iterator[pa.RecordBatch] = (reader.get_batch(index) for index in range(reader.num_record_batches))
        yield from _slices(batches)
        return
    source.seek(0)
    yield from _slices(iter(pa.ipc.open_stream(source)))
    end = source.tell()
    source.seek(end - len(_END_OF_STREAM))
    if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise DataError(f"{path}: the Arrow stream is cut off: its end mark is missing; copy or make it again")
    if end != source.size():
        raise DataError(f"{path}: {source.size() - end} bytes follow the end of the Arrow stream; make the file again")


def _slices(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in _validated(batches):
        for start in range(0, batch.num_rows, BATCH):
            yield batch.slice(start, BATCH)


def _require_head(path: Path, heads: tuple[bytes, ...], kind: str) -> None:
    require_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise unreadable(path, error) from error
    if not head:
        raise DataError(f"{path}:1: the file is empty (0 bytes)")
    if not head.startswith(heads):
        found = identify(head) or ("JSON text" if head.lstrip()[:1] in (b"{", b"[") else "something else")
        raise DataError(f"{path}: not {kind} as its name says: it holds {found}; rename it")


def _damaged(path: Path, kind: str, error: BaseException) -> DataError:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path}: the {kind} file is damaged or cut off ({cause[:200]}); copy or make it again")


def table_rows(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[Row | BadRow]:
    """Rows of Arrow batches that share a schema, numbered from 1 under the file name `name`."""
    number = 0
    plan: dict[str, Converter] | None = None
    target: pa.Schema | None = None
    for batch in batches:
        if plan is None or target is None:
            target = _target(batch.schema, name)
            plan = {column.name: convert for column in batch.schema if (convert := _converter(column.type)) is not None}
        large = batch.nbytes > MAX_ROW_BYTES
        for fields in _values(_cast(batch, target, name)):
            number += 1
            yield _row(name, number, fields, plan, large=large)


def _validated(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        _validate(batch)
        yield batch


def _validate(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid for buffers that contradict each other: reading them would end the process, not the run.

    A text column that is not UTF-8 but sound otherwise passes; `_values` finds its rows.
    """
    import pyarrow as pa
    from pyarrow import types

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error) or not (types.is_string(column.type) or types.is_large_string(column.type)):
                raise
            column.view(pa.binary() if types.is_string(column.type) else pa.large_binary()).validate(full=True)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Refused]:
    """Rows as Python values; a batch with a text that is not UTF-8 is read value by value to find the row."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                yield Refused("not_utf8", f"byte 0x{byte:02x} in a text column is not UTF-8; write the column anew")
        return
    yield from rows


def _row(
    name: str, number: int, fields: dict[str, Any] | Refused, plan: dict[str, Converter], *, large: bool
) -> Row | BadRow:
    if isinstance(fields, Refused):
        return BadRow(name, number, fields.reason, fields.message, "")
    for column, convert in plan.items():
        value = fields[column]
        if value is not None:
            try:
                fields[column] = convert(value)
            except Refused as refused:
                message = f'column "{column}": {refused.message}'
                return BadRow(name, number, refused.reason, message, _show(fields))
    if large and (size := len(json.dumps(fields, ensure_ascii=False))) > MAX_ROW_BYTES:
        message = f"the row has {size / 2**20:.0f} MiB, the most is {MAX_ROW_BYTES >> 20} MiB; split it"
        return BadRow(name, number, "too_long", message, _show(fields))
    return Row(name, number, fields)


def _show(fields: dict[str, Any]) -> str:
    parts = (
        f"{name!r}: {value[:200] if isinstance(value, str | bytes | list) else value!r}"
        for name, value in fields.items()
    )
    return excerpt("{" + ", ".join(parts) + "}")


def _target(schema: pa.Schema, name: str) -> pa.Schema:
    import pyarrow as pa

    doubled = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if doubled or "" in schema.names:
        what = f"the column {doubled[0]!r} twice" if doubled else "a column without a name"
        raise DataError(f"{name}: the schema has {what}; every column needs a name of its own")
    try:
        return pa.schema([pa.field(column.name, _plain(column.type)) for column in schema])
    except TypeError as error:
        raise DataError(f"{name}: {error}; store such columns as text, or drop them") from None


def _cast(batch: pa.RecordBatch, target: pa.Schema, name: str) -> pa.RecordBatch:
    import pyarrow as pa

    columns = []
    for column, wanted in zip(batch.columns, target, strict=True):
        if column.type != wanted.type:
            try:
                column = column.cast(wanted.type)
            except pa.ArrowException as error:
                raise DataError(
                    f'{name}: column "{wanted.name}" of type {column.type} cannot be turned into text ({error}); store '
                    "it as text, or drop it"
                ) from error
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=target)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The Arrow type to which values of `kind` are cast before they become Python values."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_duration(kind):
        return pa.int64()
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind) or types.is_decimal(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    if types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([pa.field(part.name, _plain(part.type)) for part in kind])
    if types.is_nested(kind) or types.is_interval(kind) or types.is_run_end_encoded(kind):
        raise TypeError(f"no rule turns {kind} into JSON")
    return kind


def _converter(kind: pa.DataType) -> Converter | None:
    """What Python values of a column of `kind`, cast to its plain type, still need; None where they are JSON's own."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type)
    if types.is_floating(kind):
        return _number
    if (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    ):
        return _text
    if types.is_duration(kind):
        return lambda value: f"{value}{kind.unit}"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _converter(kind.value_type)
        return None if inner is None else lambda values: [None if v is None else inner(v) for v in values]
    if types.is_struct(kind):
        parts = {part.name: convert for part in kind if (convert := _converter(part.type)) is not None}
        return (lambda value: _struct(value, parts)) if parts else None
    if types.is_map(kind):
        item = _converter(kind.item_type)
        return lambda pairs: _map(pairs, item)
    return None


def _number(value: float) -> float | None:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return None
    raise Refused("nan", f"{value} is not a JSON value; use null or a finite number")


def _text(value: bytes) -> str:
    try:
        return decode_utf8(value)
    except Refused:
        found = identify(value[:4096])
        raise Refused(
            "binary", f"{len(value)} bytes that are not UTF-8 text{f' but {found}' if found else ''}; store text"
        ) from None


def _struct(value: dict[str, Any], parts: dict[str, Converter]) -> dict[str, Any]:
    return {name: parts[name](item) if name in parts and item is not None else item for name, item in value.items()}


def _map(pairs: list[tuple[Any, Any]], convert: Converter | None) -> dict[str, Any]:
    fields = {str(key): convert(item) if convert and item is not None else item for key, item in pairs}
    if len(fields) != len(pairs):
        raise Refused("duplicate_key", "a map has the same key twice; only one can be meant")
    return fields
