"""Chooses the checkpoint from which a run resumes.

A checkpoint named by `run.resume=<directory>` is used once, and `resumed-from.json` in the run directory records
that. When the same words come again, from a requeued job or a command repeated after a stop, the run resumes from
what it has made since, as with `auto`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import reason
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, call_on_main
from strategies.tensor_files import Malformed
from trainer.checkpoints.layout import REPLACED_NAME, STEP_NAME, names_in, published
from trainer.checkpoints.manifest import MANIFEST, MOST_MANIFEST, NO_MANIFEST, read_manifest, verify_together

RESUMED_FROM = "resumed-from.json"
MOST_RECORD = 2**16
"""Bytes of that record; more is not read."""


def put_back(places: list[Path]) -> None:
    """Give what lost its name to one that has never got it the name back, durably. Errors: OSError, StorageError."""
    for _, path in published(places):
        if name := REPLACED_NAME.fullmatch(path.name):
            atomic_io.disk.rename(path, path.with_name(name[1]))
            atomic_io.sync_directory(path.parent)


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
            f"{where}: cannot be read ({reason(error)}), so that nobody knows whether this run has begun from "
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
    atomic_io.make_directories(path.parent)
    atomic_io.write_new(aside, (json.dumps(record, indent=1) + "\n").encode())
    atomic_io.disk.rename(aside, path)
    atomic_io.sync_directory(path.parent)


def _record(path: Path) -> dict[str, str] | None:
    try:
        raw: dict[str, str] = json.loads(atomic_io.read_bytes(path, most=MOST_RECORD))
    except FileNotFoundError:
        return None
    return raw


def _manifest_sha256(directory: Path) -> str | None:
    """None where there is no such checkpoint any more."""
    try:
        return hashlib.sha256(atomic_io.read_bytes(directory / MANIFEST, most=MOST_MANIFEST)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def refused(resume: str, places: list[Path]) -> str | None:
    """Why the directory that `run.resume` names is none to go on from, and what to give; None where it may be one.

    `places`: where its checkpoints lie if it is a run directory. Reads its manifest, no tensors. Errors: StorageError.
    """
    path = Path(resume).expanduser()
    try:
        read_manifest(path)
        return None
    except Malformed as error:
        problem = str(error)
    there = set(names_in(path))
    advice = "give a checkpoint directory (step-...), auto or never"
    if newest := next(filter(_reads_well, (each for _, each in reversed(published([path, *places])))), None):
        advice = f"give its newest: run.resume={newest}"
    if there & {"config.yaml", "checkpoints"}:
        problem = "is a run directory, and no checkpoint" + ("" if newest else "; it has none that can be used")
    elif newest:
        problem = "is no checkpoint, but holds some"
    elif problem == NO_MANIFEST and not STEP_NAME.search(path.name):
        problem = f"is no checkpoint: it has no {MANIFEST}" if there else "is empty"
    return f"run.resume={resume}: {problem}; {advice}"


def _reads_well(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except Malformed:
        return False
    return True


def _look(places: list[Path], resume: str) -> tuple[str, list[Path]]:
    """(`run.resume` as it is meant, for `auto` all checkpoints from the newest on). Errors: OSError, StorageError."""
    put_back(places)
    meant = settled(places, resume)
    return meant, [path for _, path in reversed(published(places))] if meant == "auto" else []


def choose(places: list[Path], resume: str, runtime: Runtime) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None starts afresh. All ranks must call.

    Errors: ConfigError for a named one that cannot be used; StorageError where there are checkpoints and none can be used,
    or where nobody can say which there are.
    """
    if resume == "never":
        return None
    asked, (resume, there) = resume, call_on_main(lambda: _look(places, resume), runtime)
    if asked != resume and runtime.is_main:
        print(
            f"run.resume={asked}: this run has begun from it already and continues from what it has made since, as with "
            f"run.resume=auto; to go back once more, delete {places[0].parent / RESUMED_FROM}",
            flush=True,
        )
    if resume != "auto":
        path = Path(resume).expanduser()
        problem = verify_together(path, runtime)
        if problem:
            raise ConfigError(f"run.resume={resume}: {problem}; give a checkpoint directory (step-...), or auto")
        return path
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
