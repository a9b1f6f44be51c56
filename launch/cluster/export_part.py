"""What the job that writes the export of a pipeline asks for: one core for each of its processes, and their memory.

The sizes come from the headers of the base's files, on the host that submits. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from strategies.atomic_io import open_regular_file, read_exactly
from trainer.config.run import RunConfig
from trainer.tuning.base import AdapterConfig

GIB = 2**30
MAX_PROCESSES = 8
"""Processes that write at a time: more do not make a disk faster."""
PROCESS_BYTES = 2 * GIB
"""What a process takes before it reads anything: libraries, and the model's description."""
FLOAT32_BYTES = 4
BYTES_BY_STORED_TYPE = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element by the name of its type in a file. Other types have one byte."""
BYTES_BY_EXPORT_TYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element by the value of `export.dtype`; `auto` keeps the stored type."""
MAX_HEADER_BYTES = 100 << 20
"""Longest header of a safetensors file, by its specification."""
LAYER_PREFIX_REGEX = re.compile(r"^(.*\.\d+)\.")
"""The beginning of a tensor's name that all tensors of a layer have."""


@dataclass(frozen=True, slots=True)
class ExportResources:
    """CPU processes and memory that the job of an export requests."""

    processes: int
    memory_gib: int


class StoredTensor(NamedTuple):
    """One tensor in a safetensors file, by the file's header."""

    name: str
    num_elements: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BaseModelSize:
    """The size of the files of a base model."""

    num_elements: int
    """Elements of all tensors."""
    largest_group_elements: int
    """Elements of the largest layer, or of a larger tensor outside the layers, such as an embedding."""
    stored_bytes: int
    """Bytes of all tensors as they are stored."""


def export_resources(config: RunConfig) -> ExportResources | None:
    """How many processes and GiB of memory the job that exports a run asks SLURM for, from the sizes of its base model's files.

    - An adapter that is not merged: one process writes it.
    - A whole model: up to `MAX_PROCESSES` processes write it, one file each at a time. With `export.verify`, one of them also
      loads the model in float32, to compare its logits.

    None if the base model is not on this host, or its files are not safetensors.
    """
    base = _base_model_size(config)
    if base is None:
        return None
    # A process merges and converts one layer at a time in float32. It holds the layer twice: as input and as output.
    layer_bytes = 2 * FLOAT32_BYTES * base.largest_group_elements
    if isinstance(config.tuning, AdapterConfig) and not config.export.merge:
        return ExportResources(processes=1, memory_gib=math.ceil((PROCESS_BYTES + 2 * layer_bytes) / GIB))
    export_type = str(config.export.dtype)
    export_bytes = base.stored_bytes
    if export_type in BYTES_BY_EXPORT_TYPE:
        export_bytes = base.num_elements * BYTES_BY_EXPORT_TYPE[export_type]
    largest_file_bytes = min(export_bytes, int(config.export.max_shard_gib * GIB))
    num_full_files = export_bytes // max(1, largest_file_bytes)
    processes = max(1, min(MAX_PROCESSES, num_full_files))
    needed_bytes = processes * (PROCESS_BYTES + largest_file_bytes + layer_bytes)
    if config.export.verify:
        # One process loads the model that was trained, and later the export.
        needed_bytes += FLOAT32_BYTES * base.num_elements
    return ExportResources(processes, memory_gib=math.ceil(needed_bytes / GIB))


def _base_model_size(config: RunConfig) -> BaseModelSize | None:
    """Add up the sizes of the run's base model, from the headers of its safetensors files; None if there are none here."""
    if not config.model.path:
        return None
    directory = Path(config.model.path).expanduser()
    # By layer ("model.layers.0"); a tensor outside the layers counts by its own name.
    num_elements_by_group: dict[str, int] = {}
    stored_bytes = 0
    try:
        for file in sorted(directory.glob("*.safetensors")):
            for tensor in _stored_tensors(file):
                layer_prefix = LAYER_PREFIX_REGEX.match(tensor.name)
                group = layer_prefix[1] if layer_prefix else tensor.name
                num_elements_by_group[group] = num_elements_by_group.get(group, 0) + tensor.num_elements
                stored_bytes += tensor.num_bytes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not num_elements_by_group:
        return None
    return BaseModelSize(sum(num_elements_by_group.values()), max(num_elements_by_group.values()), stored_bytes)


def _stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors in a safetensors file with their sizes, by its header. No value is read, so it is quick for large models.

    The file begins with the header's length (8 bytes, little-endian), then the header as JSON: {"lm_head.weight": {"dtype":
    "BF16", "shape": [32000, 4096], ...}, "__metadata__": ...}. Raises OSError if the file cannot be read, ValueError, KeyError or
    TypeError if it is no safetensors file.
    """
    with open_regular_file(file.resolve()) as (descriptor, _):
        length_bytes = bytearray(8)
        read_exactly(descriptor, memoryview(length_bytes), 0)
        length = int.from_bytes(length_bytes, "little")
        # A broken file could ask for any amount of memory.
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: its header would have {length} bytes")
        header = bytearray(length)
        read_exactly(descriptor, memoryview(header), 8)
    entry_by_name = json.loads(header)
    entry_by_name.pop("__metadata__", None)  # no tensor
    tensors = []
    for name, entry in entry_by_name.items():
        num_elements = math.prod(entry["shape"])
        # Weights of other types, such as F8_E4M3, have 8 bits.
        element_bytes = BYTES_BY_STORED_TYPE.get(entry["dtype"], 1)
        tensors.append(StoredTensor(name, num_elements, num_elements * element_bytes))
    return tensors
