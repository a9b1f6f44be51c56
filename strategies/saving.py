"""Writes training state: at once from live tensors, or from a copy while training goes on.

Each rank writes one file of tensors. Rank 0 adds the index of where each tensor lies, and the progress of the run.
`strategies/state.py` describes the format and reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from strategies.atomic_io import WrittenFile, missing_space, reason, sync_directory, write_new
from strategies.errors import StorageError
from strategies.runtime import Runtime, gather_objects
from strategies.tensor_files import (
    FILE_NAME,
    INDEX,
    FilePart,
    LocalElements,
    index_json,
    layout,
    size_on_disk,
    write_tensors,
)

PROGRESS = "progress.json"
SPARE_BYTES = 2**20
"""Bytes that the small files and the directory may take beside the tensors."""


@dataclass(slots=True)
class FlatRange:
    """Elements `[start, start + len)` of one flattened parameter and of its optimizer moments, held by this rank."""

    name: str
    numel: int
    """Elements of the whole parameter."""
    start: int
    """Index of the first element held here."""
    tensors: dict[str, torch.Tensor]
    """`weight` and the moments (`exp_avg`, ...), each 1-d of equal length; or one tensor that is not element-wise."""
    write: bool = True
    """Whether this rank writes it (one of several replicas does)."""

    def local_elements(self) -> list[LocalElements]:
        """What of it this rank has, by the names that are on the disk."""
        return [
            LocalElements(f"{self.name}/{key}", self.numel, self.start, tensor)
            for key, tensor in self.tensors.items()
            if tensor.numel()
        ]


@dataclass(slots=True)
class FileOutcome:
    """What became of one rank's file."""

    written: WrittenFile | None = None
    """None where the rank holds nothing that is written."""
    problem: str | None = None


class RankState:
    """What of the training state this rank writes, and what is true of the whole: live, or copied to host memory.

    It is written in three parts, of which the second communicates with nobody: `make_room`, `write_part`, `finish`.
    """

    def __init__(self, flat_ranges: Iterable[FlatRange], header: bytes, runtime: Runtime) -> None:
        self.local = [
            elements for flat_range in flat_ranges if flat_range.write for elements in flat_range.local_elements()
        ]
        self.runtime = runtime
        self._file = FILE_NAME.format(runtime.rank)
        self._head, self.parts = layout(self.local, self._file)
        self.header = header
        """What becomes `progress.json`."""

    @property
    def num_elements(self) -> int:
        """Of all tensors that this rank writes, together."""
        return sum(elements.values.numel() for elements in self.local)

    def move_to(self, buffer: torch.Tensor) -> None:
        """Copy the values to a float32 tensor of at least `elements` elements on the host: training may go on then."""
        end = 0
        for number, elements in enumerate(self.local):
            begin, end = end, end + elements.values.numel()
            copy = buffer[begin:end].copy_(elements.values.detach())
            self.local[number] = LocalElements(elements.name, elements.numel, elements.start, copy)

    def make_room(self, path: Path) -> None:
        """All ranks must call. Raises StorageError on every rank where the file system of `path` has no room for all of it."""
        sizes = gather_objects(size_on_disk(self._head, self.local), self.runtime)
        _agree(missing_space(path, sum(sizes) + SPARE_BYTES) if self.runtime.is_main else None, self.runtime)

    def write_part(self, path: Path) -> FileOutcome:
        """Write this rank's file into the existing directory `path`, durably. No collective, no errors."""
        try:
            return FileOutcome(write_tensors(path / self._file, self._head, self.local) if self.local else None)
        except Exception as error:  # noqa: BLE001 - also a device that is lost: all ranks are told
            return FileOutcome(problem=reason(error))

    def finish(self, path: Path, outcome: FileOutcome) -> list[WrittenFile]:
        """Write what says where all lies; every file of the state, on rank 0. All ranks must call, with their outcome.

        Raises StorageError on every rank where any of them could not write.
        """
        parts_and_files: list[tuple[dict[str, FilePart], WrittenFile | None]] = gather_objects(
            (self.parts, outcome.written), self.runtime
        )
        _agree(outcome.problem, self.runtime)
        files, problem = [file for _, file in parts_and_files if file is not None], None
        try:
            if self.runtime.is_main:
                files.append(write_new(path / INDEX, index_json(of_rank for of_rank, _ in parts_and_files)))
                files.append(write_new(path / PROGRESS, self.header))
            elif self.local:
                sync_directory(path)  # where each host keeps a cache of its own
        except OSError as error:
            problem = reason(error)
        _agree(problem, self.runtime)
        return files if self.runtime.is_main else []

    def save(self, path: Path) -> list[WrittenFile]:
        """All of it at once, into the existing directory `path`; every file of it, on rank 0. All ranks must call.

        Raises StorageError on every rank where any of them could not write, before the first byte where there is no room.
        """
        self.make_room(path)
        return self.finish(path, self.write_part(path))


def _agree(problem: str | None, runtime: Runtime) -> None:
    """Raise the first rank's problem on every rank. All ranks must call."""
    for rank, text in enumerate(gather_objects(problem, runtime)):
        if text:
            raise StorageError(text if runtime.world_size == 1 else f"{text} (rank {rank})")
