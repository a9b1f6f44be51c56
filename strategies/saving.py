"""Writes training state: at once from live tensors, or from a copy while training goes on.

Each rank writes one file of tensors. Rank 0 adds the index of where each tensor lies, and the progress of the run.
`strategies/state.py` describes the format and reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from strategies.atomic_io import WrittenFile, disk_space_problem, error_summary, sync_directory, write_new_file
from strategies.errors import StorageError
from strategies.runtime import Runtime, gather_objects
from strategies.tensor_files import (
    INDEX_FILE,
    RANK_FILE_FORMAT,
    FilePart,
    LocalElements,
    index_json,
    planned_tensor_file,
    size_on_disk,
    write_tensors,
)

PROGRESS_FILE = "progress.json"
SPARE_BYTES = 2**20
"""Room for the small files and the directory, beside the tensors."""


@dataclass(slots=True)
class FlatRange:
    """Elements `[start, start + len)` of one flattened parameter and of its optimizer moments, held by this rank."""

    name: str
    full_numel: int
    """Elements of the full parameter."""
    start: int
    """Index of the first element held here."""
    tensors_by_key: dict[str, torch.Tensor]
    """`weight` and the moments (`exp_avg`, ...), each 1-d of equal length; or one tensor that is not element-wise."""
    is_written: bool = True
    """Whether this rank writes it into a checkpoint: of several ranks that hold the same elements, one does."""

    def local_elements(self) -> list[LocalElements]:
        """The tensors of the range as they are written and read: each under its name on disk, `h.0.attn.weight/exp_avg` say.

        Empty tensors, of a rank that holds nothing of a parameter, are left out.
        """
        tensors_by_name = {
            f"{self.name}/{key}": tensor for key, tensor in self.tensors_by_key.items() if tensor.numel()
        }
        return [LocalElements(name, self.full_numel, self.start, tensor) for name, tensor in tensors_by_name.items()]


@dataclass(slots=True)
class RankFileOutcome:
    """Whether one rank's file was written."""

    written: WrittenFile | None = None
    """None if the rank has nothing to write."""
    problem: str | None = None
    """Why it could not be written; None if it was."""
    attached: list[WrittenFile] = field(default_factory=list)
    """The further files that were written, see `RankState.attachments`."""


class _FilesOfRank(NamedTuple):
    """The files that a rank has written."""

    part_by_tensor: dict[str, FilePart]
    """Where each tensor lies in its file of tensors."""
    tensor_file: WrittenFile | None
    """None if the rank has no tensors, or could not write them."""
    attached: list[WrittenFile]


class RankState:
    """This rank's part of a training state, ready to be written. Its tensors are live, or copies in host memory.

    Writing takes three calls: `require_space_on_disk`, `write_part`, `finish`. The second does not communicate, so a thread
    can make it while training goes on.
    """

    def __init__(self, flat_ranges: Iterable[FlatRange], progress_json: bytes, runtime: Runtime) -> None:
        """Collect what this rank writes into a checkpoint, and plan its file; writes nothing yet.

        `flat_ranges`: what this rank holds of each saved tensor; those that another rank writes (`is_written` is false) are left
        out. `progress_json`: the content of `progress.json`, how far the run is, which rank 0 writes.
        """
        self.local_elements: list[LocalElements] = []
        for flat_range in flat_ranges:
            if flat_range.is_written:
                self.local_elements += flat_range.local_elements()
        self.runtime = runtime
        self._file = RANK_FILE_FORMAT.format(runtime.rank)
        self._file_header, self.part_by_tensor = planned_tensor_file(self.local_elements, self._file)
        """The first bytes of this rank's file of tensors, and where each tensor lies in it."""
        self.progress_json = progress_json
        """The content of `progress.json`."""
        self.attachments: dict[str, bytes] = {}
        """Further files of the state by name, on the rank that writes them: what a run must know beside its tensors."""

    @property
    def num_elements(self) -> int:
        """Elements of all tensors that this rank writes."""
        return sum(elements.values.numel() for elements in self.local_elements)

    def copy_values_to(self, buffer: torch.Tensor) -> None:
        """Copy the values of all tensors into `buffer`, and write the copies from now on, since training goes on.

        `buffer`: a 1-d float32 tensor on the host with at least `num_elements` elements. Values of other types are converted.
        """
        offset = 0
        for index, elements in enumerate(self.local_elements):
            size = elements.values.numel()
            copied_values = buffer[offset : offset + size].copy_(elements.values.detach())
            self.local_elements[index] = replace(elements, values=copied_values)
            offset += size

    def require_space_on_disk(self, path: Path) -> None:
        """Check, before anything is written, that the file system of `path` has room for the files of all ranks.

        All ranks must call. Raises StorageError on every rank if it has not.
        """
        attached_bytes = sum(map(len, self.attachments.values()))
        sizes = gather_objects(size_on_disk(self._file_header, self.local_elements) + attached_bytes, self.runtime)
        problem = None
        if self.runtime.is_main:
            problem = disk_space_problem(path, sum(sizes) + SPARE_BYTES)
        _raise_if_any_rank_failed(problem, self.runtime)

    def write_part(self, path: Path) -> RankFileOutcome:
        """Write this rank's tensors and attachments into the existing directory `path`, and sync them to disk.

        The second of three calls that write a training state. Not a collective, so a thread may call it while training goes on.
        Raises nothing: a problem is in the returned outcome, and `finish` raises it on all ranks.
        """
        try:
            attached = [write_new_file(path / name, content) for name, content in self.attachments.items()]
            if not self.local_elements:
                return RankFileOutcome(attached=attached)
            return RankFileOutcome(
                write_tensors(path / self._file, self._file_header, self.local_elements), attached=attached
            )
        except Exception as error:  # noqa: BLE001 - any error, such as a lost device, must reach all ranks
            return RankFileOutcome(problem=error_summary(error))

    def finish(self, path: Path, outcome: RankFileOutcome) -> list[WrittenFile]:
        """Complete a training state after all ranks wrote their parts: rank 0 adds the index of all tensors, and the header.

        `path`: the directory of the state. `outcome`: what this rank's `write_part` returned. Returns every file of the state on
        rank 0, an empty list on other ranks. Raises StorageError on every rank if any of them could not write. All ranks must
        call.
        """
        # Collect what the ranks have written.
        own_files = _FilesOfRank(self.part_by_tensor, outcome.written, outcome.attached)
        files_by_rank: list[_FilesOfRank] = gather_objects(own_files, self.runtime)
        parts_by_rank = [files_of_rank.part_by_tensor for files_of_rank in files_by_rank]
        files: list[WrittenFile] = []
        for files_of_rank in files_by_rank:
            files += files_of_rank.attached
            if files_of_rank.tensor_file is not None:
                files.append(files_of_rank.tensor_file)
        _raise_if_any_rank_failed(outcome.problem, self.runtime)

        # Write the index and the header.
        problem = None
        try:
            if self.runtime.is_main:
                files.append(write_new_file(path / INDEX_FILE, index_json(parts_by_rank)))
                files.append(write_new_file(path / PROGRESS_FILE, self.progress_json))
            elif self.local_elements:  # this rank has written a file
                # On a network file system, each host has its own cache of the directory, which it must sync.
                sync_directory(path)
        except OSError as error:
            problem = error_summary(error)
        _raise_if_any_rank_failed(problem, self.runtime)
        return files if self.runtime.is_main else []

    def save(self, path: Path) -> list[WrittenFile]:
        """Write everything at once into the existing directory `path`. All ranks must call. Returns what `finish` returns.

        Raises StorageError on every rank if any of them could not write. If there is no room, nothing is written at all.
        """
        self.require_space_on_disk(path)
        return self.finish(path, self.write_part(path))


def _raise_if_any_rank_failed(problem: str | None, runtime: Runtime) -> None:
    """Make a failure of one rank one of all, so that none waits for a rank that has left: each raises the same StorageError.

    The message is that of the lowest rank that failed. Returns if none did. `problem`: why this rank failed; None if it did not.
    All ranks must call.
    """
    for rank, rank_problem in enumerate(gather_objects(problem, runtime)):
        if rank_problem and runtime.world_size > 1:
            raise StorageError(f"{rank_problem} (rank {rank})")
        if rank_problem:
            raise StorageError(rank_problem)
