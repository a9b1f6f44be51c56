"""Chooses the checkpoint from which a run resumes.

A checkpoint named by `run.resume=<directory>` is used once, and `resumed-from.json` in the run directory records that.
If the same command comes again, from a requeued job or after a stop, the run resumes from the checkpoints that it has
written since, as with `run.resume=auto`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from strategies import atomic_io
from strategies.atomic_io import error_summary
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, call_on_main
from strategies.tensor_files import MalformedFile
from trainer.checkpoints.layout import REPLACED_DIR_REGEX, STEP_DIR_REGEX, checkpoints_in, list_directory_if_present
from trainer.checkpoints.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MISSING_MANIFEST_REASON,
    checkpoint_problem_on_all_ranks,
    read_manifest,
)

RESUMED_FROM_FILE = "resumed-from.json"
MAX_RECORD_BYTES = 2**16
"""Bytes of that record; more is not read."""


def restore_replaced(checkpoint_dirs: list[Path]) -> None:
    """Undo a replacement of a checkpoint that a power cut has interrupted: the old one gets its name back, durably.

    A checkpoint that is written once more replaces the old one. On a file system that cannot swap two names, the old one is
    `.step-<n>.replaced` for a moment, and nothing has its name. Raises OSError if it cannot be renamed, StorageError if a
    directory cannot be listed.
    """
    for _, path in checkpoints_in(checkpoint_dirs):
        replaced_match = REPLACED_DIR_REGEX.fullmatch(path.name)
        if replaced_match:
            atomic_io.disk.rename(path, path.with_name(replaced_match[1]))
            atomic_io.sync_directory(path.parent)


def resolve_resume_setting(checkpoint_dirs: list[Path], resume: str) -> str:
    """Decide what `run.resume` means for this start: a checkpoint that it names is used once, and from then on it means `auto`.

    So a requeued job, whose command names the same checkpoint again, does not go back to it. Returns `auto` if the run began from
    that checkpoint before and has newer ones now, which a record in the run directory tells; else `resume` itself: `auto`,
    `never` or a path. `checkpoint_dirs`: the run's own directory for checkpoints, then a fallback. Raises StorageError if the
    record cannot be read, or a directory cannot be listed.
    """
    if resume in ("auto", "never"):
        return resume
    record_path = checkpoint_dirs[0].parent / RESUMED_FROM_FILE  # in the run directory
    try:
        first_newer_step = _first_step_after_recorded_start(Path(resume).expanduser().resolve(), checkpoint_dirs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{record_path}: cannot be read ({error_summary(error)}), so that nobody knows whether this run has begun from "
            f"run.resume={resume} already; delete the file to begin from there (again), or give run.resume=auto"
        ) from error
    if first_newer_step is None:
        return resume
    has_newer = any(step >= first_newer_step for step, _ in checkpoints_in(checkpoint_dirs))
    return "auto" if has_newer else resume


def _first_step_after_recorded_start(checkpoint: Path, checkpoint_dirs: list[Path]) -> int | None:
    """From which step on the run's checkpoints are newer than its recorded start from `checkpoint`; None without such a start.

    - The record names no start from that path: None.
    - A checkpoint of the run itself: the step after its own. It may have been deleted since, or been written again.
    - A checkpoint of another run, which is still that one, or gone: 0, so that every checkpoint of the run is newer.
    - Another checkpoint is under that path now: None.

    Raises OSError, ValueError, KeyError or TypeError if the record cannot be read.
    """
    record = _read_resumed_from_record(checkpoint_dirs[0].parent / RESUMED_FROM_FILE)
    if record is None or record["path"] != str(checkpoint):
        return None
    step_match = STEP_DIR_REGEX.fullmatch(checkpoint.name)
    own_dirs = [checkpoint_dir.resolve() for checkpoint_dir in checkpoint_dirs]
    if step_match is not None and checkpoint.parent in own_dirs:
        return int(step_match[1]) + 1
    if _sha256_of_manifest_file(checkpoint) in (None, record["manifest_sha256"]):
        return 0
    return None


def record_resumed_checkpoint(checkpoint_dirs: list[Path], resume: str, resumed: Path) -> None:
    """Record durably that the run began from the checkpoint that `run.resume` names: a requeued job does not go back to it.

    Writes `resumed-from.json` into the run directory: the checkpoint's path, and the hash of its manifest. With `auto` the same
    setting does not lead back to `resumed`, so that nothing has to be recorded. Raises OSError if that fails.
    """
    if resume in ("auto", "never") or Path(resume).expanduser().resolve() != resumed.resolve():
        return
    path = checkpoint_dirs[0].parent / RESUMED_FROM_FILE  # in the run directory
    record = {"path": str(resumed.resolve()), "manifest_sha256": _sha256_of_manifest_file(resumed)}
    temporary = path.with_name(f".{path.name}.writing")
    atomic_io.make_directories(path.parent)
    atomic_io.write_new_file(temporary, (json.dumps(record, indent=1) + "\n").encode())
    atomic_io.disk.rename(temporary, path)
    atomic_io.sync_directory(path.parent)


def _read_resumed_from_record(path: Path) -> dict[str, str] | None:
    """Read from which checkpoint a run began: {"path": ..., "manifest_sha256": ...}; None without the file.

    Raises OSError or ValueError if that fails.
    """
    try:
        record: dict[str, str] = json.loads(atomic_io.read_bytes(path, max_bytes=MAX_RECORD_BYTES))
    except FileNotFoundError:
        return None
    return record


def _sha256_of_manifest_file(directory: Path) -> str | None:
    """The hash of a checkpoint's manifest; None if the checkpoint does not exist any more."""
    try:
        return hashlib.sha256(atomic_io.read_bytes(directory / MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def resume_setting_problem(resume: str, checkpoint_dirs: list[Path]) -> str | None:
    """Check the directory that `run.resume` names before a run starts: why it is no checkpoint, and what to give instead.

    None if it may be one. Reads its manifest, no tensors. `checkpoint_dirs`: where its checkpoints lie if it is a run directory;
    the newest is then advised. Raises StorageError if a directory cannot be listed.
    """
    path = Path(resume).expanduser()
    try:
        read_manifest(path)
        return None
    except MalformedFile as error:
        problem = str(error)
    # What the user may have meant: a run directory, or one that holds checkpoints.
    names = set(list_directory_if_present(path))
    advice = "give a checkpoint directory (step-...), auto or never"
    newest_checkpoint = _newest_checkpoint_with_manifest([path, *checkpoint_dirs])
    if newest_checkpoint:
        advice = f"give its newest: run.resume={newest_checkpoint}"
    is_run_directory = bool(names & {"config.yaml", "checkpoints"})
    if is_run_directory:
        problem = "is a run directory, and no checkpoint"
        if not newest_checkpoint:
            problem += "; it has none that can be used"
    elif newest_checkpoint:
        problem = "is no checkpoint, but holds some"
    elif problem == MISSING_MANIFEST_REASON and not STEP_DIR_REGEX.search(path.name):
        problem = f"is no checkpoint: it has no {MANIFEST_FILE}" if names else "is empty"
    return f"run.resume={resume}: {problem}; {advice}"


def _newest_checkpoint_with_manifest(checkpoint_dirs: list[Path]) -> Path | None:
    """The newest checkpoint in these directories whose manifest is intact."""
    for _, checkpoint in reversed(checkpoints_in(checkpoint_dirs)):
        try:
            read_manifest(checkpoint)
            return checkpoint
        except MalformedFile:
            continue
    return None


class _ResumeCandidates(NamedTuple):
    """What a start may resume from, as rank 0 sees it."""

    resume: str
    """`run.resume` as it applies to this start, see `resolve_resume_setting`."""
    checkpoints: list[Path]
    """The run's checkpoints in the order to try them, if `resume` is `auto`; else empty."""


def _resume_candidates(checkpoint_dirs: list[Path], resume: str, last_step: int | None) -> _ResumeCandidates:
    """List the checkpoints that a start, or a rollback, may resume from, best first. Called on rank 0 only.

    The newest comes first. `last_step`: of a run that goes back after an anomaly; the newest up to this step comes first then,
    and later ones, from the oldest, at the end. Also renames checkpoints back whose replacement was cut short. Raises OSError or
    StorageError if that fails.
    """
    restore_replaced(checkpoint_dirs)
    resume = resolve_resume_setting(checkpoint_dirs, resume)
    if resume != "auto":
        return _ResumeCandidates(resume, checkpoints=[])
    checkpoints = checkpoints_in(checkpoint_dirs)  # by ascending step
    if last_step is None:
        return _ResumeCandidates(resume, [path for _, path in reversed(checkpoints)])
    newest_first = [path for step, path in reversed(checkpoints) if step <= last_step]
    later_ones = [path for step, path in checkpoints if step > last_step]
    return _ResumeCandidates(resume, newest_first + later_ones)


def choose_checkpoint(
    checkpoint_dirs: list[Path], resume: str, runtime: Runtime, *, last_step: int | None = None
) -> Path | None:
    """Choose the checkpoint to resume from, the same on all ranks; None to start without one. All ranks must call.

    Every file of it is compared with its hash. `checkpoint_dirs`: the run's own directory for checkpoints, then a fallback.
    `resume`: the setting `run.resume`:

    - `never`: None.
    - A directory: that checkpoint; ConfigError if it cannot be used. If the run has begun from it before, as with `auto`.
    - `auto`: the newest intact checkpoint of the run; with `last_step`, the newest intact one up to this step, or if there is
      none the oldest of the later ones. None if the run has no checkpoint.

    Raises StorageError if there are checkpoints and none is intact, or if they cannot be listed: a start without a checkpoint
    would lose what they hold.
    """
    if resume == "never":
        return None
    candidates = call_on_main(lambda: _resume_candidates(checkpoint_dirs, resume, last_step), runtime)
    if candidates.resume != resume and runtime.is_main:
        print(
            f"run.resume={resume}: this run has begun from it already and continues from what it has made since, as with "
            f"run.resume=auto; to go back once more, delete {checkpoint_dirs[0].parent / RESUMED_FROM_FILE}",
            flush=True,
        )
    if candidates.resume != "auto":
        # The named one or none: another would silently be a different run.
        path = Path(resume).expanduser()
        problem = checkpoint_problem_on_all_ranks(path, runtime)
        if problem:
            raise ConfigError(f"run.resume={resume}: {problem}; give a checkpoint directory (step-...), or auto")
        return path
    # In the order of the candidates, the first that is intact.
    skipped_texts = []
    for path in candidates.checkpoints:
        problem = checkpoint_problem_on_all_ranks(path, runtime)
        if problem is None:
            return path
        skipped_texts.append(f"{path.name} {problem}")
        if runtime.is_main:
            print(f"checkpoint ignored: {path.name}: {problem}", flush=True)
    if skipped_texts:
        checkpoint_dir = candidates.checkpoints[0].parent
        raise StorageError(
            f"run.resume=auto: none of the checkpoints in {checkpoint_dir} can be used ({'; '.join(skipped_texts[:6])}); "
            "nothing was changed. Bring one back from a backup, name another with run.resume=<directory>, or start anew in "
            "another run.dir"
        )
    return None
