"""Training state on disk in one form for every strategy.

Per trainable parameter, under its plain name: the full-precision weight and each element-wise optimizer moment, all as
the flattened parameter; and whole, where an optimizer has it, what is not element-wise (factored moments). FSDP2's dim-0
shards and ZeRO's flat partitions are both contiguous runs of the flattened parameter, so a rank writes and reads runs, and
an index (`strategies/tensor_files.py`) matches them whatever the strategy or the world size was when they were written.
Frozen parameters are not saved: they are the base model's. No pickle is written, and none is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from strategies import atomic_io
from strategies.atomic_io import read_bytes, reason
from strategies.base import PROGRESS_KEYS, Progress
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, call_on_main, gather_objects
from strategies.saving import PROGRESS, FlatRange
from strategies.tensor_files import INDEX, Index, Malformed, is_count, numel, parse_index, parse_json, read_tensors

MAX_PROGRESS_BYTES, MAX_INDEX_BYTES = 2**20, 2**30
"""Bytes of the two JSON files; more is not read."""
ROW_FIELDS = {
    "recent": {"loss", "grad_norm"},
    "passed": {"first", "count"},
    "evaluations": {"step", "train", "held_out"},
    "recent_losses": {"loss"},
}
"""The keys of each row of the lists in `progress.json`."""


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

    def json(self) -> bytes:
        """What becomes `progress.json`."""
        return json.dumps({**asdict(self), "progress": self.progress.as_json()}, indent=1).encode()


def read_header(path: Path, *, patient: bool = False) -> StateHeader:
    """The header of a saved state. Reads a small JSON file, no tensors; `patient` where it was seen. Errors: StorageError."""
    try:
        raw = parse_json(read_bytes(path / PROGRESS, most=MAX_PROGRESS_BYTES, patient=patient))
        _check_fields(StateHeader, raw, except_field="progress")
        _check_fields(Progress, raw.get("progress"), keys=PROGRESS_KEYS)
        if raw.get("loss_scale") is not None and not 0 < raw["loss_scale"] < math.inf:
            raise Malformed("has a loss_scale that is none")
        _check_rows(raw["progress"])
    except OSError as error:
        raise StorageError(f"{path / PROGRESS}: {reason(error)}") from error
    except Malformed as error:
        raise StorageError(f"{path / PROGRESS}: {error}; it is damaged, or was not written by shardtune") from error
    raw["progress"] = Progress.from_json(raw["progress"])
    return StateHeader(**raw)


def _check_fields(
    kind: type, raw: Any, *, except_field: str | None = None, keys: Mapping[str, str] | None = None
) -> None:
    """Raise Malformed if a JSON object does not have the fields of a data class, with their types.

    `keys`: the keys of fields that have another name in the JSON object.
    """
    if not isinstance(raw, dict):
        raise Malformed("is no table")
    keys = keys or {}
    hints = get_type_hints(kind)
    types = {keys.get(declared.name, declared.name): hints[declared.name] for declared in fields(kind)}
    names = set(types)
    needed = {"optimizer_steps", "world_size", "strategy", "progress"} & names
    if odd_names := sorted((set(raw) - names) | (needed - set(raw))):
        raise Malformed(f"has or lacks {odd_names[0][:80]}")
    for key, value in raw.items():
        if key != except_field and not _has_type(value, types[key]):
            raise Malformed(f"has a {key} that is none")


def _check_rows(progress: dict[str, Any]) -> None:
    for key, names in ROW_FIELDS.items():
        if any(set(row) != names for row in progress.get(key, ())):
            raise Malformed(f"has a {key} that is none")
    if any(not is_count(number) for row in progress.get("passed", ()) for number in row.values()):
        raise Malformed("has a passed that is none")


def _has_type(value: Any, expected: Any) -> bool:
    if expected is bool:
        return isinstance(value, bool)
    if expected is int:
        return is_count(value)
    if expected is float:
        return type(value) in (int, float)
    if expected is str:
        return isinstance(value, str) and len(value) < 1000
    if isinstance(expected, type(int | None)):
        return any(_has_type(value, alternative) for alternative in get_args(expected))
    if expected is type(None):
        return value is None
    return isinstance(value, list) and all(  # of groups
        isinstance(alternative, dict) and all(type(number) in (int, float) for number in alternative.values())
        for alternative in value
    )


def read_index(path: Path, *, patient: bool = False) -> Index:
    """What tensors a saved state has, and where; `patient` where the file was seen. Errors: StorageError."""
    try:
        return parse_index(read_bytes(path / INDEX, most=MAX_INDEX_BYTES, patient=patient))
    except OSError as error:
        raise StorageError(f"{path / INDEX}: {reason(error)}") from error
    except Malformed as error:
        raise StorageError(f"{path / INDEX}: {error}; it is damaged, or was not written by shardtune") from error


@torch.no_grad()
def load_state(path: Path, ranges: Iterable[FlatRange], runtime: Runtime) -> StateHeader:
    """Read the part of a saved state that this rank holds into its runs. All ranks must call.

    Raises ConfigError where the saved parameters or moments are not the ones this run trains, StorageError where a file
    cannot be read or does not hold what its index says; the same on every rank.
    """
    flat_ranges = list(ranges)
    # What rank 0 sees is there, and another host may have to wait for it; what rank 0 does not see, nobody waits for.
    visible_names = call_on_main(lambda: set(atomic_io.disk.names(path)), runtime)
    error: ConfigError | StorageError | None = None
    try:
        header = read_header(path, patient=PROGRESS in visible_names)
        loaded = _read_values(path, flat_ranges, visible_names)
    except (ConfigError, StorageError) as caught:
        error = caught
    errors = gather_objects(None if error is None else (type(error), str(error)), runtime)
    for kind, text in filter(None, errors):
        raise error or kind(text)
    for tensor, saved in loaded:
        tensor.copy_(saved.to(tensor.device, tensor.dtype))
    return header


def _read_values(path: Path, runs: list[FlatRange], visible_names: set[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(live tensor, saved values) for all that this rank holds. Errors: ConfigError, StorageError."""
    index = read_index(path, patient=INDEX in visible_names)
    numel_by_name = {f"{run.name}/{key}": run.numel for run in runs for key in run.tensors if run.numel}
    if set(numel_by_name) != set(index):
        missing = sorted(set(numel_by_name) - set(index))[:3]
        side = "does not hold" if missing else "holds, beyond what this run trains,"
        names = ", ".join(missing or sorted(set(index) - set(numel_by_name))[:3])
        raise ConfigError(_of_other_run(path, f"{side} {names} ..."))
    for name, size in numel_by_name.items():
        if numel(index[name]) != size:
            raise ConfigError(_of_other_run(path, f"has {numel(index[name])} elements of {name}, this run {size}"))
    if unseen := {part.file for parts in index.values() for part in parts} - visible_names:
        raise StorageError(f"{path}: {min(unseen)[:80]}, which {INDEX} names, is missing")
    local_elements = [elements for run in runs for elements in run.local_elements()]
    try:
        values = read_tensors(path, index, local_elements)
    except OSError as error:
        raise StorageError(f"{path}: its tensors cannot be read ({reason(error)})") from error
    return [(elements.values, saved) for elements, saved in zip(local_elements, values, strict=True)]


def _of_other_run(path: Path, difference: str) -> str:
    return (
        f"run.resume: the state in {path} {difference}: it was written by a run with another model, tuning method or "
        "optimizer; start a new run.dir"
    )
