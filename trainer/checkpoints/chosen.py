"""Which checkpoint a run goes on from.

A checkpoint that is named (`run.resume=<directory>`) is begun from once: the run notes in `resumed-from.json` of its directory
that it did. The same words again, of a job that is requeued or of a command repeated after a stop, go on from what the run has
made since, as `auto` would.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from strategies import durable
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.places import REPLACED_NAME, STEP_NAME, published
from trainer.checkpoints.seal import MANIFEST, MOST_MANIFEST, verify_together

RESUMED_FROM = "resumed-from.json"
MOST_RECORD = 2**16
"""Bytes of that record; more is not read."""


def put_back(places: list[Path]) -> None:
    """Give what lost its name to one that has never got it the name back, durably. Errors: OSError."""
    for _, path in published(places):
        if name := REPLACED_NAME.fullmatch(path.name):
            durable.disk.rename(path, path.with_name(name[1]))
            durable.sync_directory(path.parent)


def settled(places: list[Path], resume: str) -> str:
    """`run.resume` as it is meant in these places: `auto` where the run began from the named one and has made newer ones since.

    Errors: StorageError where that cannot be found out.
    """
    if resume in ("auto", "never"):
        return resume
    path = Path(resume).expanduser().resolve()
    try:
        record = _record(places[0].parent / RESUMED_FROM)
        name = STEP_NAME.fullmatch(path.name)
        if record is None or record["path"] != str(path):
            return resume
        if name is not None and path.parent in [place.resolve() for place in places]:
            least = int(name[1]) + 1  # it may have been deleted since, or been written again by this branch
        elif _manifest_sha256(path) in (None, record["manifest_sha256"]):
            least = 0  # another run's: all that is here was made since
        else:
            return resume
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = places[0].parent / RESUMED_FROM
        raise StorageError(
            f"{where}: cannot be read ({durable.reason(error)}), so that nobody knows whether this run has begun from "
            f"run.resume={resume} already; delete the file to begin from there (again), or give run.resume=auto"
        ) from error
    return "auto" if any(step >= least for step, _ in published(places)) else resume


def note_begun(places: list[Path], resume: str, resumed: Path) -> None:
    """Note that the run begins from `resumed`, durably, where that is what `run.resume` names. Errors: OSError."""
    if resume in ("auto", "never") or Path(resume).expanduser().resolve() != resumed.resolve():
        return
    path = places[0].parent / RESUMED_FROM
    record = {"path": str(resumed.resolve()), "manifest_sha256": _manifest_sha256(resumed)}
    aside = path.with_name(f".{path.name}.writing")
    durable.make_directories(path.parent)
    durable.write_new(aside, (json.dumps(record, indent=1) + "\n").encode())
    durable.disk.rename(aside, path)
    durable.sync_directory(path.parent)


def _record(path: Path) -> dict[str, str] | None:
    try:
        raw: dict[str, str] = json.loads(durable.read_bytes(path, most=MOST_RECORD))
    except FileNotFoundError:
        return None
    return raw


def _manifest_sha256(directory: Path) -> str | None:
    """None where there is no such checkpoint any more."""
    try:
        return hashlib.sha256(durable.read_bytes(directory / MANIFEST, most=MOST_MANIFEST)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def choose(places: list[Path], resume: str, runtime: Runtime) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None starts afresh. All ranks must call.

    Errors: ConfigError for a named one that cannot be used; StorageError where there are checkpoints and none can be used.
    """
    if resume == "never":
        return None
    if runtime.is_main:
        put_back(places)
    asked, resume = resume, broadcast_object(settled(places, resume) if runtime.is_main else "", runtime)
    if asked != resume and runtime.is_main:
        print(
            f"run.resume={asked}: this run has begun from it already and goes on from what it has made since, as with "
            f"run.resume=auto; to go back once more, delete {places[0].parent / RESUMED_FROM}",
            flush=True,
        )
    if resume != "auto":
        path = Path(resume).expanduser()
        problem = verify_together(path, runtime)
        if problem:
            raise ConfigError(f"run.resume={resume}: {problem}; give a checkpoint directory (step-...), or auto")
        return path
    there: list[Path] = broadcast_object([path for _, path in reversed(published(places))], runtime)
    skipped = []
    for path in there:
        problem = verify_together(path, runtime)
        if problem is None:
            return path
        skipped.append(f"{path.name} {problem}")
        if runtime.is_main:
            print(f"checkpoint ignored: {path.name}: {problem}", flush=True)
    if skipped:
        raise StorageError(
            f"run.resume=auto: none of the checkpoints in {there[0].parent} can be used ({'; '.join(skipped[:6])}); nothing was "
            "changed. Bring one back from a backup, name another with run.resume=<directory>, or start anew in another run.dir"
        )
    return None
