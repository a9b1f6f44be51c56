"""Training state on disk in one form for every strategy.

The state holds for each trainable parameter, under its plain name, the full-precision weight and each element-wise optimizer
moment, flattened like the parameter. Moments that are not element-wise (factored ones) are stored in full. FSDP2's dim-0 shards
and ZeRO's flat partitions are both contiguous ranges of the flattened parameter. So a rank writes and reads ranges, and an index
(`strategies/tensor_files.py`) finds them whatever strategy and world size wrote them. Frozen parameters are not saved: they are
those of the base model. No pickle is written or read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

from strategies import atomic_io
from strategies.atomic_io import error_summary, read_bytes
from strategies.base import PROGRESS_KEYS, Progress
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, call_on_main, gather_objects
from strategies.saving import PROGRESS_FILE, FlatRange
from strategies.tensor_files import (
    INDEX_FILE,
    LocalElements,
    MalformedFile,
    TensorIndex,
    is_count,
    num_elements_of_parts,
    parse_index,
    parse_json,
    read_tensors,
)

MAX_PROGRESS_BYTES = 2**20
MAX_INDEX_BYTES = 2**30
"""Larger JSON files are not read: they are not ours."""
KEYS_OF_LIST_ENTRIES = {
    "recent": {"loss", "grad_norm"},
    "passed": {"first", "count"},
    "evaluations": {"step", "train", "held_out"},
    "recent_losses": {"loss"},
}
"""The keys that each entry of a list in `progress.json` has, by the list's key."""


@dataclass(kw_only=True, slots=True)
class StateHeader:
    """What a training state has beside its tensors. It is written as JSON, under the names of the fields (`progress.json`)."""

    progress: Progress
    optimizer_steps: int
    """Applied updates, which the optimizer's bias correction counts: fewer than `progress.step` if steps were skipped."""
    world_size: int
    strategy: str
    loss_scale: float | None = None
    groups: list[dict[str, float]] = field(default_factory=list)
    """Counts that an optimizer keeps for each parameter group, in the order of its groups."""

    def json(self) -> bytes:
        """The content of `progress.json`."""
        return json.dumps({**asdict(self), "progress": self.progress.as_json()}, indent=1).encode()


def read_state_header(path: Path, *, wait_until_visible: bool = False) -> StateHeader:
    """Read how far a run was, and what else its state has beside tensors, from a small JSON file (`progress.json`).

    The file may have been written by anybody, so every field is checked. `path`: the directory of the state.
    `wait_until_visible`: another host has seen the file, so it must become visible here. Raises StorageError if that fails.
    """
    try:
        header_fields = parse_json(
            read_bytes(path / PROGRESS_FILE, max_bytes=MAX_PROGRESS_BYTES, wait_until_visible=wait_until_visible)
        )
        required = frozenset({"optimizer_steps", "world_size", "strategy", "progress"})
        _check_dataclass_fields(StateHeader, header_fields, {}, required=required, except_field="progress")
        _check_dataclass_fields(Progress, header_fields.get("progress"), PROGRESS_KEYS)
        loss_scale = header_fields.get("loss_scale")
        if loss_scale is not None and not 0 < loss_scale < math.inf:
            raise MalformedFile("has a loss_scale that is none")
        _check_list_entries(header_fields["progress"])
    except OSError as error:
        raise StorageError(f"{path / PROGRESS_FILE}: {error_summary(error)}") from error
    except MalformedFile as error:
        raise StorageError(
            f"{path / PROGRESS_FILE}: {error}; it is damaged, or was not written by shardtune"
        ) from error
    header_fields["progress"] = Progress.from_json(header_fields["progress"])
    return StateHeader(**header_fields)


def _check_dataclass_fields(
    dataclass_type: type,
    json_value: Any,
    key_by_field: Mapping[str, str],
    *,
    required: frozenset[str] = frozenset(),
    except_field: str | None = None,
) -> None:
    """Check that JSON from a file can become a `dataclass_type`: an object with its fields alone, and values of their types.

    `key_by_field`: the JSON key of each field that has another name in JSON, such as `{"recent_steps": "recent"}`. `required`:
    keys that it must have; others may be missing. `except_field`: a key whose value is checked elsewhere.

    Raises MalformedFile, such as `has a step that is none` for a step that is no number.
    """
    if not isinstance(json_value, dict):
        raise MalformedFile("is no table")
    hints = get_type_hints(dataclass_type)
    type_by_key = {}
    for declared in fields(dataclass_type):
        type_by_key[key_by_field.get(declared.name, declared.name)] = hints[declared.name]
    unknown_or_missing = sorted((set(json_value) - set(type_by_key)) | (required - set(json_value)))
    if unknown_or_missing:
        raise MalformedFile(f"has or lacks {unknown_or_missing[0][:80]}")
    for key, entry in json_value.items():
        if key != except_field and not _has_declared_type(entry, type_by_key[key]):
            raise MalformedFile(f"has a {key} that is none")  # such as: a step that is no step


def _check_list_entries(progress: dict[str, Any]) -> None:
    """Check the entries of the lists in `progress.json`, such as the last evaluations, before code reads them by key.

    `progress`: the part "progress" of the file. Each entry must have the keys of `KEYS_OF_LIST_ENTRIES`, and a range of skipped
    samples (`passed`) only counts. A list may be missing. Raises MalformedFile if one is not so.
    """
    for list_key, entry_keys in KEYS_OF_LIST_ENTRIES.items():
        if any(set(entry) != entry_keys for entry in progress.get(list_key, ())):
            raise MalformedFile(f"has a {list_key} that is none")
    for skipped_range in progress.get("passed", ()):
        if not all(is_count(number) for number in skipped_range.values()):
            raise MalformedFile("has a passed that is none")


def _has_declared_type(entry: Any, declared_type: Any) -> bool:
    """Whether a JSON value has the type that a field of `StateHeader` or `Progress` declares.

    `declared_type`: bool, int, float, str, an optional one (`int | None`), or a list of rows of numbers.
    """
    if declared_type is bool:
        return isinstance(entry, bool)
    if declared_type is int:
        return is_count(entry)  # no bool, and not below 0
    if declared_type is float:
        return type(entry) in (int, float)  # no bool, which is an int as well
    if declared_type is str:
        return isinstance(entry, str) and len(entry) < 1000  # a strategy's name or a W&B id, which are much shorter
    if isinstance(declared_type, type(int | None)):
        return any(_has_declared_type(entry, alternative) for alternative in get_args(declared_type))
    if declared_type is type(None):
        return entry is None
    # The other fields are lists of rows of numbers.
    return isinstance(entry, list) and all(_is_row_of_numbers(row) for row in entry)


def _is_row_of_numbers(row: Any) -> bool:
    return isinstance(row, dict) and all(type(number) in (int, float) for number in row.values())


def read_index(path: Path, *, wait_until_visible: bool = False) -> TensorIndex:
    """Read the index of a saved state, which says in which file, and where in it, each tensor lies.

    `path`: the directory of the state. `wait_until_visible`: another host has seen the file, so it must become visible here.
    Raises StorageError if that fails.
    """
    try:
        return parse_index(
            read_bytes(path / INDEX_FILE, max_bytes=MAX_INDEX_BYTES, wait_until_visible=wait_until_visible)
        )
    except OSError as error:
        raise StorageError(f"{path / INDEX_FILE}: {error_summary(error)}") from error
    except MalformedFile as error:
        raise StorageError(f"{path / INDEX_FILE}: {error}; it is damaged, or was not written by shardtune") from error


@torch.no_grad()
def load_state(path: Path, ranges: Iterable[FlatRange], runtime: Runtime) -> StateHeader:
    """Resume: read this rank's part of a saved training state into its live tensors, and return the rest, such as the step.

    `path`: the directory of the state, which any strategy on any number of ranks may have written. `ranges`: what this rank holds
    of each parameter, its moments and averages, as views of the live tensors. All ranks must call.

    Raises ConfigError if the saved parameters or moments are not the ones this run trains, StorageError if a file cannot be
    read or does not hold what its index says. If one rank fails all raise, and no live tensor has changed.
    """
    flat_ranges = list(ranges)
    # Read this rank's values. A file that rank 0 sees exists, so another host waits until it sees that file, too.
    visible_names = call_on_main(lambda: set(atomic_io.disk.names(path)), runtime)
    error: ConfigError | StorageError | None = None
    try:
        header = read_state_header(path, wait_until_visible=PROGRESS_FILE in visible_names)
        loaded = _read_saved_values(path, flat_ranges, visible_names)
    except (ConfigError, StorageError) as caught:
        error = caught
    # If a rank failed, raise on all, before any live tensor has changed: this rank's own error, or else that of the lowest rank.
    failure_by_rank = gather_objects(None if error is None else (type(error), str(error)), runtime)
    for failure in failure_by_rank:
        if failure is not None:
            error_class, message = failure
            raise error or error_class(message)
    for tensor, saved in loaded:
        tensor.copy_(saved.to(tensor.device, tensor.dtype))
    return header


class _LiveAndSaved(NamedTuple):
    """A live tensor, and the values that it has in a saved state."""

    live: torch.Tensor
    saved: torch.Tensor


def _read_saved_values(path: Path, ranges: list[FlatRange], visible_names: set[str]) -> list[_LiveAndSaved]:
    """Read the saved values of each tensor of `ranges`, this rank's part of the training state, without changing live tensors.

    The caller copies the values when all ranks have theirs. `path`: the directory of the saved state. `visible_names`: names of
    the files that rank 0 sees in it. Raises ConfigError if the state is another run's, StorageError if it cannot be read.
    """
    index = read_index(path, wait_until_visible=INDEX_FILE in visible_names)
    _check_saved_tensors_fit_run(path, index, ranges)
    files = {part.file for parts in index.values() for part in parts}
    missing_files = files - visible_names
    if missing_files:
        raise StorageError(f"{path}: {min(missing_files)[:80]}, which {INDEX_FILE} names, is missing")
    local_elements: list[LocalElements] = []
    for flat_range in ranges:
        local_elements += flat_range.local_elements()
    try:
        saved_values = read_tensors(path, index, local_elements)
    except OSError as error:
        raise StorageError(f"{path}: its tensors cannot be read ({error_summary(error)})") from error
    return [_LiveAndSaved(elements.values, saved) for elements, saved in zip(local_elements, saved_values, strict=True)]


def _check_saved_tensors_fit_run(path: Path, index: TensorIndex, ranges: list[FlatRange]) -> None:
    """Raise ConfigError if the state in `path` was saved by a run that trains other tensors, or tensors of other sizes.

    `index`: the parts of each saved tensor, by names such as `h.0.attn.weight/exp_avg`. `ranges`: what this rank holds of the
    tensors of this run; every rank has an entry for each parameter.
    """
    numel_by_name: dict[str, int] = {}
    for flat_range in ranges:
        if flat_range.full_numel:  # a parameter without elements is in no file
            numel_by_name |= {f"{flat_range.name}/{key}": flat_range.full_numel for key in flat_range.tensors_by_key}
    missing_names = sorted(set(numel_by_name) - set(index))
    surplus_names = sorted(set(index) - set(numel_by_name))
    if missing_names:
        raise ConfigError(_other_run_message(path, f"does not hold {', '.join(missing_names[:3])} ..."))
    if surplus_names:
        surplus_text = f"holds, beyond what this run trains, {', '.join(surplus_names[:3])} ..."
        raise ConfigError(_other_run_message(path, surplus_text))
    for name, run_numel in numel_by_name.items():
        saved_numel = num_elements_of_parts(index[name])
        if saved_numel != run_numel:
            raise ConfigError(_other_run_message(path, f"has {saved_numel} elements of {name}, this run {run_numel}"))


def _other_run_message(path: Path, difference: str) -> str:
    """The message for a state that another run wrote. `difference`: what it has or lacks, such as `does not hold ...`."""
    return (
        f"run.resume: the state in {path} {difference}: it was written by a run with another model, tuning method or "
        "optimizer; start a new run.dir"
    )
