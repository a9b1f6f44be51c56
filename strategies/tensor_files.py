"""Tensors in safetensors files, one file a rank, with one index that says where each element of each tensor lies.

No file can bring code along: the index is JSON, the files are numbers. Other tools can open them: they are plain safetensors. An
index is used only if its parts cover every tensor exactly once, so that no element is read twice or left uninitialised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.atomic_io import NewFile, RetryingReader, WrittenFile, open_regular_file, read_exactly

INDEX_FILE = "index.json"
ELEMENT_BYTES = 4
"""Everything is stored in float32."""
RANK_FILE_FORMAT = "rank-{:05d}.safetensors"
MAX_INTEGER = 2**53
"""JSON numbers from here on are refused: no tensor is that large, and floats lose precision."""


class MalformedFile(ValueError):
    """A file that is not what this program writes."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """Elements `[start, start + length)` of a flattened tensor, in a file."""

    file: str
    start: int
    length: int
    offset: int
    """Bytes from the start of the file."""


TensorIndex = dict[str, list[FilePart]]
"""The parts of each tensor, by its name: in the order of their elements, together the full tensor."""


@dataclass(slots=True)
class LocalElements:
    """Elements `[start, start + len)` of a flattened tensor of `full_numel` elements, in this rank's memory."""

    name: str
    full_numel: int
    start: int
    values: Tensor
    """1-d, of any type and on any device."""


def parse_json(data: bytes) -> Any:
    """Parse JSON from a file that anybody may have written. Raises MalformedFile if that fails."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedFile("is not JSON") from error


def is_count(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer of a sensible size."""
    return type(value) is int and 0 <= value < MAX_INTEGER


# -- writing -----------------------------------------------------------------------------------------------------------


class PlannedFile(NamedTuple):
    """What is known of a safetensors file before any value is written."""

    header_bytes: bytes
    """The first bytes of the file, which list names, shapes and offsets."""
    part_by_tensor: dict[str, FilePart]
    """Where each tensor will be in the file, by its name, for the index."""


def planned_tensor_file(local_elements: Iterable[LocalElements], file: str) -> PlannedFile:
    """Lay out a safetensors file before any value is known: its first bytes, and where each tensor will be, for the index.

    `local_elements`: the tensors, each a range of a flattened parameter; only names and sizes are read. `file`: its name.
    """
    local_elements = list(local_elements)
    entries: dict[str, dict[str, Any]] = {}
    data_end = 0
    for elements in local_elements:
        assert elements.name not in entries, elements.name
        length = elements.values.numel()
        data_start = data_end
        data_end += length * ELEMENT_BYTES
        entries[elements.name] = {"dtype": "F32", "shape": [length], "data_offsets": [data_start, data_end]}

    # Eight bytes of length, then JSON, padded so that the data is aligned.
    table = json.dumps(entries, separators=(",", ":")).encode()
    table += b" " * (-len(table) % 8)
    header_bytes = len(table).to_bytes(8, "little") + table

    parts = {}
    for elements in local_elements:
        data_start, _ = entries[elements.name]["data_offsets"]
        offset = len(header_bytes) + data_start
        parts[elements.name] = FilePart(file, elements.start, elements.values.numel(), offset)
    return PlannedFile(header_bytes, parts)


def write_tensors(path: Path, header_bytes: bytes, local_elements: Iterable[LocalElements]) -> WrittenFile:
    """Write a safetensors file: `header_bytes`, as planned for the same tensors, then their values in float32. Raises OSError."""
    with NewFile(path) as file:
        file.write(header_bytes)
        for elements in local_elements:
            values = elements.values.detach().to("cpu", torch.float32).contiguous()
            file.write(values.numpy().data.cast("B"))
    return file.written


def index_json(parts_by_rank: Iterable[Mapping[str, FilePart]]) -> bytes:
    """Build the index of a training state as JSON: in which file, and where in it, each part of each tensor lies.

    One line a tensor, with a row for each part, sorted by its first element:
    `"h.0.attn.weight/exp_avg": [["rank-00000.safetensors", 0, 4096, 512], ...]`: file, first element, number of elements, offset
    in bytes. `parts_by_rank`: what each rank wrote, by the name of the tensor.
    """
    rows_by_tensor: dict[str, list[list[Any]]] = {}
    for parts in parts_by_rank:
        for name, part in parts.items():
            rows_by_tensor.setdefault(name, []).append([part.file, part.start, part.length, part.offset])
    lines = []
    for name, rows in rows_by_tensor.items():
        rows.sort(key=lambda row: row[1])  # by their first element
        lines.append(f"{json.dumps(name)}: {json.dumps(rows)}")
    return ("{" + ",\n".join(lines) + "}\n").encode()


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_index(data: bytes) -> TensorIndex:
    """Parse the index of a training state, which says where each part of each tensor lies, from the bytes of its file.

    Raises MalformedFile for anything else, also if the parts of a tensor leave gaps or overlap.
    """
    raw = parse_json(data)
    if not isinstance(raw, dict):
        raise MalformedFile("is no table of tensors")
    return {name: _parts_covering_tensor(name, rows) for name, rows in raw.items()}


def _parts_covering_tensor(name: str, rows: Any) -> list[FilePart]:
    """Check and parse an index's rows on one tensor, which say where its parts lie.

    `rows`: parsed JSON, each [file, first element, number of elements, offset in bytes]. Raises MalformedFile unless they cover
    the tensor exactly once, in order: then no element is read twice or left out. `name`: of the tensor, for messages.
    """
    if not isinstance(rows, list) or not rows:
        raise MalformedFile(f"has no parts of {name[:80]}")
    parts: list[FilePart] = []
    covered_end = 0  # the elements before it are covered
    for row in rows:
        if not _is_index_row(row) or not stays_in_directory(row[0]):
            raise MalformedFile(f"has a part of {name[:80]} that is none")
        part = FilePart(*row)
        if part.start != covered_end or part.length == 0:
            raise MalformedFile(f"does not cover {name[:80]} once: its element {covered_end} is missing or comes twice")
        parts.append(part)
        covered_end += part.length
    return parts


def _is_index_row(row: Any) -> bool:
    """Whether a JSON value is a file's name and three counts."""
    return isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and all(map(is_count, row[1:]))


def stays_in_directory(name: str) -> bool:
    """Whether a file's name is a plain name without a path, so that no file outside the directory is opened."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name


def num_elements_of_parts(parts: list[FilePart]) -> int:
    """Elements of a tensor."""
    return parts[-1].start + parts[-1].length


def read_tensors(directory: Path, index: TensorIndex, local_elements: Iterable[LocalElements]) -> list[Tensor]:
    """Read the saved values of this rank's ranges of tensors, whatever ranks wrote them: new float32 tensors, 1-d, on the CPU.

    `local_elements`: the ranges, of which only name, start and length are used. `index`: which files of `directory` hold which
    elements; a range may lie across several files. Opens one file after the other and reads each in the order of its bytes.
    Raises OSError if a file cannot be read or is too short, MalformedFile if the index does not cover a range.
    """
    buffers: list[Tensor] = []
    targets_by_file: dict[str, list[_ReadTarget]] = {}
    for elements in local_elements:
        num_elements = elements.values.numel()
        buffer = torch.empty(num_elements, dtype=torch.float32)
        num_filled = 0
        for part in index[elements.name]:
            # The overlap of the elements in the file and those of this rank.
            start = max(part.start, elements.start)
            stop = min(part.start + part.length, elements.start + num_elements)
            if start < stop:
                offset = part.offset + (start - part.start) * ELEMENT_BYTES
                target = buffer[start - elements.start : stop - elements.start]
                targets_by_file.setdefault(part.file, []).append(_ReadTarget(offset, target))
                num_filled += stop - start
        if num_filled != num_elements:
            raise MalformedFile(f"does not cover {elements.name[:80]}")
        buffers.append(buffer)

    reader = RetryingReader()
    for file, targets in targets_by_file.items():
        targets.sort(key=lambda target: target.offset)
        # After a disk error, all targets of the file are filled again.
        reader.read_with_retries(directory / file, partial(_fill_targets, directory / file, targets))
    return buffers


class _ReadTarget(NamedTuple):
    """A tensor to be filled from a file."""

    offset: int
    """Bytes from the start of the file."""
    values: Tensor
    """float32, 1-d, on the CPU: filled in place."""


def _fill_targets(file: Path, targets: list[_ReadTarget]) -> None:
    """Fill each target tensor with the bytes of `file` from its offset on. Raises OSError if that fails."""
    with open_regular_file(file) as (descriptor, _):
        for target in targets:
            read_exactly(descriptor, target.values.numpy().data.cast("B"), target.offset)


def size_on_disk(header_bytes: bytes, local_elements: Iterable[LocalElements]) -> int:
    """Bytes of the file that `write_tensors` makes."""
    return len(header_bytes) + ELEMENT_BYTES * sum(elements.values.numel() for elements in local_elements)
