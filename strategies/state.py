"""Training state on disk in one form for every strategy.

Per trainable parameter, under its plain name: the full-precision weight and each element-wise optimizer moment, all as
the flattened parameter; and whole, where an optimizer has it, what is not element-wise (factored moments). FSDP2's dim-0
shards and ZeRO's flat partitions are both contiguous runs of the flattened parameter, so a rank writes and reads runs, and
`torch.distributed.checkpoint` matches them whatever the strategy or the world size was when they were written. Frozen
parameters are not saved: they are the base model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from strategies.base import Progress
from strategies.errors import ConfigError

PROGRESS = "progress.json"
TENSORS = "state"


@dataclass(slots=True)
class Run:
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
    put: Callable[[str, torch.Tensor], None] | None = None
    """Stores a loaded tensor under its key, where `tensors` are not views into live memory."""


class FlatRun(torch.Tensor):
    """A run as `torch.distributed.checkpoint` sees it: one chunk of a 1-d tensor of `numel` elements."""

    numel_whole: int
    start: int
    held: torch.Tensor

    @staticmethod
    def wrap(held: torch.Tensor, numel: int, start: int) -> FlatRun:
        """Describe the plain 1-d tensor `held` as elements `[start, start + len)` of `numel`."""
        run = held.as_subclass(FlatRun)
        run.numel_whole, run.start, run.held = numel, start, held
        return run

    def size(self, dim: int | None = None) -> Any:
        """The size of the whole, which the loader compares with what was saved."""
        whole = torch.Size([self.numel_whole])
        return whole if dim is None else whole[dim]

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.held.numel()]))

    def __create_write_items__(self, fqn: str, _obj: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([self.start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=self._chunk(),
                    properties=TensorProperties.create_from_tensor(self.held),
                    size=torch.Size([self.numel_whole]),
                ),
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _index: MetadataIndex) -> torch.Tensor:
        return self.held


@dataclass(kw_only=True, slots=True)
class StateHeader:
    """What is true of the whole saved state; lies beside the tensors as JSON."""

    progress: Progress
    optimizer_steps: int
    """Updates applied, which moment bias correction counts; less than `progress.step` where steps were skipped."""
    world_size: int
    strategy: str
    loss_scale: float | None = None
    groups: list[dict[str, float]] = field(default_factory=list)
    """What an optimizer counts per parameter group, in the order of its groups."""


def save_state(path: Path, runs: Iterable[Run], header: StateHeader, rank: int) -> None:
    """Write runs and header into the existing directory `path`. All ranks must call."""
    tensors: dict[str, torch.Tensor] = {}
    for run in runs:
        if run.write:
            for key, tensor in run.tensors.items():
                if tensor.numel():
                    flat = tensor.detach().to("cpu", torch.float32)
                    tensors[f"{run.name}/{key}"] = FlatRun.wrap(flat, run.numel, run.start)
    dcp.save(tensors, checkpoint_id=str(path / TENSORS))
    if rank == 0:
        (path / PROGRESS).write_text(json.dumps(asdict(header), indent=1))


def read_header(path: Path) -> StateHeader:
    """The header of a saved state. Reads a small JSON file, no tensors."""
    raw = json.loads((path / PROGRESS).read_text())
    raw["progress"] = Progress(**raw["progress"])
    return StateHeader(**raw)


@torch.no_grad()
def load_state(path: Path, runs: Iterable[Run]) -> StateHeader:
    """Read the part of a saved state that this rank holds into its runs. All ranks must call.

    Raises ConfigError where the saved parameters or moments are not the ones this run trains.
    """
    held = list(runs)
    header = read_header(path)
    reader = dcp.FileSystemReader(str(path / TENSORS))
    saved = set(reader.read_metadata().state_dict_metadata)
    wanted = {f"{run.name}/{key}" for run in held for key in run.tensors}
    if wanted != saved and (missing := sorted(wanted - saved)[:3] or sorted(saved - wanted)[:3]):
        side = "does not hold" if wanted - saved else "holds, beyond what this run trains,"
        raise ConfigError(
            f"run.resume: the state in {path} {side} {', '.join(missing)} ...: it was written by a run with another "
            "model, tuning method or optimizer; start a new run.dir"
        )
    buffers: dict[str, torch.Tensor] = {}
    for run in held:
        for key, tensor in run.tensors.items():
            if tensor.numel():
                flat = torch.empty(tensor.numel(), dtype=torch.float32)
                buffers[f"{run.name}/{key}"] = FlatRun.wrap(flat, run.numel, run.start)
    # Every rank must join the plan, also one that holds nothing.
    dcp.load(buffers, storage_reader=reader)
    for run in held:
        for key, tensor in run.tensors.items():
            if not tensor.numel():
                continue
            value = buffers[f"{run.name}/{key}"].held  # type: ignore[attr-defined]
            if run.put is not None:
                run.put(key, value)
            else:
                tensor.copy_(value.to(tensor.device, tensor.dtype))
    return header
