"""What the job that writes the export of a pipeline asks for: one core for each of its processes, and their memory.

The sizes come from the headers of the base's files, on the host that submits. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from strategies.atomic_io import open_regular_file, read_exactly
from trainer.config.run import RunConfig
from trainer.tuning.base import AdapterConfig

GIB = 2**30
MAX_PROCESSES = 8
"""Processes that write at a time: more do not make a disk faster."""
PROCESS_BYTES = 2 * GIB
"""What a process takes before it reads anything: libraries, and the model's description."""
FLOAT32_BYTES = 4
ITEM_BYTES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element by the name of its type in a file. Other types have one byte."""
EXPORT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_HEADER_BYTES = 100 << 20
"""Longest header of a safetensors file, by its specification."""
LAYER = re.compile(r"^(.*\.\d+)\.")
"""The beginning of a tensor's name that all tensors of a layer have."""


@dataclass(frozen=True, slots=True)
class ExportResources:
    """CPU processes and memory that the job of an export requests."""

    processes: int
    memory_gib: int


def export_resources(config: RunConfig) -> ExportResources | None:
    """How many processes and GiB the export of a run takes, from the sizes of its base model's files.

    An adapter that is not merged is written by one process. Otherwise several processes write one file each at a time.
    None if the base model is not on this host, or its files are not safetensors.
    """
    if not config.model.path:
        return None
    directory = Path(config.model.path).expanduser()
    # Elements of each layer ("model.layers.0"), and of each tensor outside the layers, by name.
    elements_by_group: dict[str, int] = {}
    stored_bytes = 0
    try:
        for file in sorted(directory.glob("*.safetensors")):
            for name, count, item_bytes in _tensors_of(file):
                layer = LAYER.match(name)
                group = layer[1] if layer else name
                elements_by_group[group] = elements_by_group.get(group, 0) + count
                stored_bytes += count * item_bytes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not elements_by_group:
        return None

    # Tensors are merged and converted in float32, a group at a time: the 2 is for input and output.
    group_bytes = 2 * FLOAT32_BYTES * max(elements_by_group.values())
    if isinstance(config.tuning, AdapterConfig) and not config.export.merge:
        return ExportResources(1, math.ceil((PROCESS_BYTES + 2 * group_bytes) / GIB))
    # The size of the export, and of its largest file.
    num_elements = sum(elements_by_group.values())
    export_bytes = stored_bytes
    if str(config.export.dtype) in EXPORT_BYTES:
        export_bytes = num_elements * EXPORT_BYTES[str(config.export.dtype)]
    file_bytes = min(export_bytes, int(config.export.max_shard_gib * GIB))
    processes = max(1, min(MAX_PROCESSES, export_bytes // max(1, file_bytes)))
    # Each process holds a file and a group.
    needed = processes * (PROCESS_BYTES + file_bytes + group_bytes)
    if config.export.verify:
        # One process loads the model that was trained, and later the export.
        needed += FLOAT32_BYTES * num_elements
    return ExportResources(processes, math.ceil(needed / GIB))


def _tensors_of(file: Path) -> list[tuple[str, int, int]]:
    """(name, elements, bytes of an element) of each tensor in a safetensors file, read from its header.

    The file begins with the header's length (8 bytes, little-endian), then the header as JSON:
    {"lm_head.weight": {"dtype": "BF16", "shape": [32000, 4096], ...}, "__metadata__": ...}.
    Errors: OSError, ValueError, KeyError.
    """
    with open_regular_file(file.resolve()) as (descriptor, _):
        length_bytes = bytearray(8)
        read_exactly(descriptor, memoryview(length_bytes), 0)
        length = int.from_bytes(length_bytes, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: its header would have {length} bytes")
        header = bytearray(length)
        read_exactly(descriptor, memoryview(header), 8)
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    tensors = []
    for name, entry in entries.items():
        tensors.append((name, math.prod(entry["shape"]), ITEM_BYTES.get(entry["dtype"], 1)))
    return tensors
