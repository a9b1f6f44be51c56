"""Tensors in safetensors files, one a rank, under one index that says where each element of each tensor lies.

Nothing here can run code that a file brings along: an index is JSON, a file is numbers, and where they lie is taken from the
index. Other tools can open the files, too: they are plain safetensors. An index is used only where its parts cover every
tensor exactly once, so that no element is read twice or left as the memory happened to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.atomic_io import NewFile, RetryingReader, WrittenFile, fill, open_regular

INDEX = "index.json"
ELEMENT_BYTES = 4
"""Bytes of an element: all is kept in float32."""
FILE_NAME = "rank-{:05d}.safetensors"
MAX_INTEGER = 2**53
"""Larger whole numbers mean nothing here."""


class Malformed(ValueError):
    """A file that is not what this program writes."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """Elements `[start, start + length)` of a flattened tensor, in a file."""

    file: str
    start: int
    length: int
    offset: int
    """Bytes from the start of the file."""


Index = dict[str, list[FilePart]]
"""By tensor; parts in the order of their elements, together the whole tensor."""


@dataclass(slots=True)
class LocalElements:
    """Elements `[start, start + len)` of a flattened tensor of `numel` elements, in this rank's memory."""

    name: str
    numel: int
    start: int
    values: Tensor
    """1-d, of any type and on any device."""


def parse_json(data: bytes) -> Any:
    """JSON out of a file that anybody may have written. Errors: Malformed."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed("is not JSON") from error


def is_count(value: Any) -> bool:
    """Whether a JSON value counts something."""
    return type(value) is int and 0 <= value < MAX_INTEGER


# -- writing -----------------------------------------------------------------------------------------------------------


def layout(local: Iterable[LocalElements], file: str) -> tuple[bytes, dict[str, FilePart]]:
    """(what stands before the data in a safetensors file of these, where each lies in it). Reads no values."""
    spans: dict[str, tuple[int, int, int]] = {}
    end = 0
    for elements in local:
        assert elements.name not in spans, elements.name
        spans[elements.name] = (elements.start, elements.values.numel(), end)
        end += elements.values.numel() * ELEMENT_BYTES
    table = {
        name: {"dtype": "F32", "shape": [length], "data_offsets": [begin, begin + length * ELEMENT_BYTES]}
        for name, (_, length, begin) in spans.items()
    }
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    return head, {
        name: FilePart(file, start, length, len(head) + begin) for name, (start, length, begin) in spans.items()
    }


def write_tensors(path: Path, head: bytes, local: Iterable[LocalElements]) -> WrittenFile:
    """A safetensors file: `head` as `layout` made it of the same tensors, then their values. Errors: OSError."""
    with NewFile(path) as file:
        file.write(head)
        for elements in local:
            values = elements.values.detach().to("cpu", torch.float32).contiguous()
            file.write(values.numpy().data.cast("B"))
    return file.written


def index_json(parts: Iterable[Mapping[str, FilePart]]) -> bytes:
    """The index of what all ranks wrote."""
    tensors: dict[str, list[list[Any]]] = {}
    for of_rank in parts:
        for name, part in of_rank.items():
            tensors.setdefault(name, []).append([part.file, part.start, part.length, part.offset])
    lines = [
        f"{json.dumps(name)}: {json.dumps(sorted(rows, key=lambda row: row[1]))}" for name, rows in tensors.items()
    ]
    return ("{" + ",\n".join(lines) + "}\n").encode()


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_index(data: bytes) -> Index:
    """An index out of a file. Errors: Malformed, also where the parts of a tensor leave gaps or overlap."""
    raw = parse_json(data)
    if not isinstance(raw, dict):
        raise Malformed("is no table of tensors")
    return {name: _parts(name, rows) for name, rows in raw.items()}


def _parts(name: str, rows: Any) -> list[FilePart]:
    if not isinstance(rows, list) or not rows:
        raise Malformed(f"has no parts of {name[:80]}")
    parts, end = [], 0
    for row in rows:
        is_row = isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and all(map(is_count, row[1:]))
        if not is_row or not stays_in_directory(row[0]):
            raise Malformed(f"has a part of {name[:80]} that is none")
        part = FilePart(*row)
        if part.start != end or part.length == 0:
            raise Malformed(f"does not cover {name[:80]} once: its element {end} is missing or comes twice")
        parts.append(part)
        end += part.length
    return parts


def stays_in_directory(name: str) -> bool:
    """Whether a name stays in its directory."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name


def numel(parts: list[FilePart]) -> int:
    """Elements of a tensor."""
    return parts[-1].start + parts[-1].length


def read_tensors(directory: Path, index: Index, local: Iterable[LocalElements]) -> list[Tensor]:
    """The values of each of `local` out of the files: float32, 1-d, on the CPU, new.

    The files are opened one after the other, each read in the order of its bytes. Errors: OSError, Malformed.
    """
    buffers: list[Tensor] = []
    by_file: dict[str, list[tuple[int, Tensor]]] = {}
    for elements in local:
        parts, size = index[elements.name], elements.values.numel()
        buffer = torch.empty(size, dtype=torch.float32)
        filled = 0
        for part in parts:
            low, high = max(part.start, elements.start), min(part.start + part.length, elements.start + size)
            if low < high:
                target = buffer[low - elements.start : high - elements.start]
                by_file.setdefault(part.file, []).append((part.offset + (low - part.start) * ELEMENT_BYTES, target))
                filled += high - low
        if filled != size:
            raise Malformed(f"does not cover {elements.name[:80]}")
        buffers.append(buffer)
    looks = RetryingReader()
    for file, targets in by_file.items():
        path = directory / file
        looks.read(path, partial(_fill_all, path, sorted(targets, key=lambda offset_and_target: offset_and_target[0])))
    return buffers


def _fill_all(file: Path, targets: list[tuple[int, Tensor]]) -> None:
    with open_regular(file) as (descriptor, _):
        for offset, target in targets:
            fill(descriptor, target.numpy().data.cast("B"), offset)


def size_on_disk(head: bytes, local: Iterable[LocalElements]) -> int:
    """Bytes of the file that `write_tensors` makes."""
    return len(head) + ELEMENT_BYTES * sum(elements.values.numel() for elements in local)
