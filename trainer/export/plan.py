"""The plan of a whole model's files: their names, and the tensors of each, found on meta tensors before a value is read.

Every process of an export makes the same plan, and writes the files that are dealt to it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.export.trained_model import ModelValues
from trainer.model.conversions import Conversions, StoredGroup

SINGLE_FILE = "model.safetensors"
NUMBERED_FILE = "model-{:05d}-of-{:05d}.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ExportTensor:
    """One stored tensor of an export."""

    name: str
    """Its name in the file."""
    num_bytes: int
    group_index: int
    """Index in `ExportPlan.groups` of the group that it is converted from."""


@dataclass(slots=True)
class ExportFile:
    """One file of an export."""

    name: str = ""
    tensors: list[ExportTensor] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The files of a whole model, in order."""

    dtype: torch.dtype
    """The type in which floating-point tensors are stored."""
    groups: list[StoredGroup]
    """Groups of the model's parameters that are converted together. A stored weight that the architecture ignores is a group
    without members."""
    group_bytes: list[int]
    """About how many bytes a process holds while it converts a group, for each of `groups`."""
    files: list[ExportFile]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.num_bytes for file in self.files)

    @property
    def process_bytes(self) -> int:
        """The most bytes that a process holds: one file and one group."""
        largest_file_bytes = max((file.num_bytes for file in self.files), default=0)
        return largest_file_bytes + max(self.group_bytes, default=0)

    def index_json(self) -> str | None:
        """The index that says in which file each tensor is, as transformers writes it; None for a single file."""
        if len(self.files) == 1:
            return None
        file_by_tensor = {}
        for file in self.files:
            file_by_tensor.update({tensor.name: file.name for tensor in file.tensors})
        return json.dumps({"metadata": {"total_size": self.num_bytes}, "weight_map": file_by_tensor}, indent=1)

    def plan_sha256(self) -> str:
        """A hash of what is written where: of the stored type, and of the name, size and file of each tensor."""
        rows: list[tuple[str, str, int]] = []
        for file in self.files:
            rows += [(file.name, tensor.name, tensor.num_bytes) for tensor in file.tensors]
        return hashlib.sha256(json.dumps([str(self.dtype), rows]).encode()).hexdigest()


def plan_files(model_values: ModelValues, dtype: torch.dtype, max_file_bytes: int) -> ExportPlan:
    """Plan which tensor of a whole model goes into which file, before any value is read. Every process makes the same plan.

    A file has at most `max_file_bytes`, or one larger tensor. First come the model's parameters, converted back to the names
    and shapes of the base's files; then stored weights that the architecture ignores. Floating-point tensors are stored as
    `dtype`. Reads only headers of the base's files. Raises ConfigError if a conversion fails.
    """
    conversions = model_values.base.conversions
    # A group: parameters that are converted together, such as those of all experts of a layer, or mostly a single one.
    groups = conversions.stored_groups(model_values.base_names())
    group_bytes: list[int] = []
    tensors: list[ExportTensor] = []
    for group_index, group in enumerate(groups):
        # On the meta device: shapes and types without values.
        meta_members = {name: model_values.meta_tensor(name) for name in group.members}
        stored_tensors = conversions.convert_back(group, meta_members)
        for name, tensor in stored_tensors.items():
            tensors.append(ExportTensor(name, _num_stored_bytes(tensor, dtype), group_index))
        # A conversion that joins tensors holds both the members and what is made of them.
        held_tensors = [*meta_members.values(), *stored_tensors.values()]
        group_bytes.append(sum(tensor.nbytes for tensor in held_tensors))
    for name in conversions.carried():  # stored weights that the architecture ignores
        tensor = conversions.files.on_meta(name)
        tensors.append(ExportTensor(name, _num_stored_bytes(tensor, dtype), group_index=len(groups)))
        groups.append(StoredGroup(members=[], name=name))
        group_bytes.append(tensor.nbytes)
    files = _assign_to_files(tensors, max_file_bytes)
    return ExportPlan(dtype=dtype, groups=groups, group_bytes=group_bytes, files=files)


def stored_tensors_of_group(plan: ExportPlan, group_index: int, model_values: ModelValues) -> dict[str, Tensor]:
    """Read one group of parameters, and convert it to the tensors that are stored, by name, not yet in the plan's type.

    A group is parameters that are converted together, such as those of all experts of a layer. One without members is a stored
    weight that the architecture ignores: it is read as it is. Raises StorageError if the checkpoint cannot be read,
    ConfigError if a conversion fails.
    """
    conversions: Conversions = model_values.base.conversions
    group = plan.groups[group_index]
    if not group.members:
        return {group.name: conversions.files.rows(group.name)}
    members = {name: model_values.full_tensor(name) for name in group.members}
    return conversions.convert_back(group, members)


def _num_stored_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    """Bytes of a tensor when it is stored as `dtype`, or as its own type if that is no floating-point one."""
    item_bytes = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
    return tensor.numel() * item_bytes


def _assign_to_files(tensors: list[ExportTensor], max_file_bytes: int) -> list[ExportFile]:
    """Distribute tensors over files in their order: a file ends before the tensor that would make it larger than the limit.

    A tensor larger than `max_file_bytes` has a file of its own. Names the files: a single one is `SINGLE_FILE`, several have
    numbers.
    """
    files = [ExportFile()]
    file_bytes = 0
    for tensor in tensors:
        # A file without tensors takes any tensor, however large.
        if files[-1].tensors and file_bytes + tensor.num_bytes > max_file_bytes:
            files.append(ExportFile())
            file_bytes = 0
        files[-1].tensors.append(tensor)
        file_bytes += tensor.num_bytes
    if len(files) == 1:
        files[0].name = SINGLE_FILE
        return files
    for number, file in enumerate(files, 1):
        file.name = NUMBERED_FILE.format(number, len(files))
    return files
