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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from strategies import atomic_io
from strategies.atomic_io import read_bytes, reason
from strategies.base import Progress
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, found_on_main, gather_objects
from strategies.saving import PROGRESS, FlatRange
from strategies.tensor_files import INDEX, Index, Malformed, numel, parse_index, parse_json, read_tensors, whole_number

MOST_PROGRESS, MOST_INDEX = 2**20, 2**30
"""Bytes of the two JSON files; more is not read."""
ROWS = {
    "recent": {"loss", "grad_norm"},
    "passed": {"first", "count"},
    "evaluations": {"step", "train", "held_out"},
    "recent_losses": {"loss"},
}
"""What each row has of the lists in `Progress`."""


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
        return json.dumps(asdict(self), indent=1).encode()


def read_header(path: Path, *, patient: bool = False) -> StateHeader:
    """The header of a saved state. Reads a small JSON file, no tensors; `patient` where it was seen. Errors: StorageError."""
    try:
        raw = parse_json(read_bytes(path / PROGRESS, most=MOST_PROGRESS, patient=patient))
        _check(StateHeader, raw, but="progress")
        _check(Progress, raw.get("progress"))
        if raw.get("loss_scale") is not None and not 0 < raw["loss_scale"] < math.inf:
            raise Malformed("has a loss_scale that is none")
        _check_rows(raw["progress"])
    except OSError as error:
        raise StorageError(f"{path / PROGRESS}: {reason(error)}") from error
    except Malformed as error:
        raise StorageError(f"{path / PROGRESS}: {error}; it is damaged, or was not written by shardtune") from error
    raw["progress"] = Progress(**raw["progress"])
    return StateHeader(**raw)


def _check(kind: type, raw: Any, *, but: str | None = None) -> None:
    """Whether a JSON object has the fields of a data class, of their types. Errors: Malformed."""
    if not isinstance(raw, dict):
        raise Malformed("is no table")
    hints, known = get_type_hints(kind), {each.name for each in fields(kind)}
    needed = {"optimizer_steps", "world_size", "strategy", "progress"} & known
    if odd := sorted((set(raw) - known) | (needed - set(raw))):
        raise Malformed(f"has or lacks {odd[0][:80]}")
    for key, value in raw.items():
        if key != but and not _is(value, hints[key]):
            raise Malformed(f"has a {key} that is none")


def _check_rows(progress: dict[str, Any]) -> None:
    for key, names in ROWS.items():
        if any(set(row) != names for row in progress.get(key, ())):
            raise Malformed(f"has a {key} that is none")
    if any(not whole_number(number) for row in progress.get("passed", ()) for number in row.values()):
        raise Malformed("has a passed that is none")


def _is(value: Any, hint: Any) -> bool:
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return whole_number(value)
    if hint is float:
        return type(value) in (int, float)
    if hint is str:
        return isinstance(value, str) and len(value) < 1000
    if isinstance(hint, type(int | None)):
        return any(_is(value, each) for each in get_args(hint))
    if hint is type(None):
        return value is None
    return isinstance(value, list) and all(  # of groups
        isinstance(each, dict) and all(type(number) in (int, float) for number in each.values()) for each in value
    )


def read_index(path: Path, *, patient: bool = False) -> Index:
    """What tensors a saved state has, and where; `patient` where the file was seen. Errors: StorageError."""
    try:
        return parse_index(read_bytes(path / INDEX, most=MOST_INDEX, patient=patient))
    except OSError as error:
        raise StorageError(f"{path / INDEX}: {reason(error)}") from error
    except Malformed as error:
        raise StorageError(f"{path / INDEX}: {error}; it is damaged, or was not written by shardtune") from error


@torch.no_grad()
def load_state(path: Path, runs: Iterable[FlatRange], runtime: Runtime) -> StateHeader:
    """Read the part of a saved state that this rank holds into its runs. All ranks must call.

    Raises ConfigError where the saved parameters or moments are not the ones this run trains, StorageError where a file
    cannot be read or does not hold what its index says; the same on every rank.
    """
    held = list(runs)
    # What rank 0 sees is there, and another host may have to wait for it; what rank 0 does not see, nobody waits for.
    seen = found_on_main(lambda: set(atomic_io.disk.names(path)), runtime)
    error: ConfigError | StorageError | None = None
    try:
        header = read_header(path, patient=PROGRESS in seen)
        values = _read(path, held, seen)
    except (ConfigError, StorageError) as caught:
        error = caught
    told = gather_objects(None if error is None else (type(error), str(error)), runtime)
    for kind, text in filter(None, told):
        raise error or kind(text)
    for tensor, value in values:
        tensor.copy_(value.to(tensor.device, tensor.dtype))
    return header


def _read(path: Path, runs: list[FlatRange], seen: set[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(live tensor, saved values) for all that this rank holds. Errors: ConfigError, StorageError."""
    index = read_index(path, patient=INDEX in seen)
    wanted = {f"{run.name}/{key}": run.numel for run in runs for key in run.tensors if run.numel}
    if set(wanted) != set(index):
        missing = sorted(set(wanted) - set(index))[:3]
        side = "does not hold" if missing else "holds, beyond what this run trains,"
        names = ", ".join(missing or sorted(set(index) - set(wanted))[:3])
        raise ConfigError(_other_run(path, f"{side} {names} ..."))
    for name, size in wanted.items():
        if numel(index[name]) != size:
            raise ConfigError(_other_run(path, f"has {numel(index[name])} elements of {name}, this run {size}"))
    if unseen := {part.file for parts in index.values() for part in parts} - seen:
        raise StorageError(f"{path}: {min(unseen)[:80]}, which {INDEX} names, is missing")
    held = [each for run in runs for each in run.held()]
    try:
        values = read_tensors(path, index, held)
    except OSError as error:
        raise StorageError(f"{path}: its tensors cannot be read ({reason(error)})") from error
    return [(each.values, value) for each, value in zip(held, values, strict=True)]


def _other_run(path: Path, difference: str) -> str:
    return (
        f"run.resume: the state in {path} {difference}: it was written by a run with another model, tuning method or "
        "optimizer; start a new run.dir"
    )
