"""Paths and names of a run's checkpoints. Needs no torch."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from strategies import atomic_io
from strategies.atomic_io import error_summary
from strategies.errors import StorageError

STEP_DIR_FORMAT = "step-{:06d}"
"""Such as `step-000040`."""
STEP_DIR_REGEX = re.compile(r"step-(\d{1,15})")
REPLACED_DIR_FORMAT = ".{}.replaced"
"""Name of a checkpoint while another of the same step takes its name, on file systems that cannot swap two names at once."""
REPLACED_DIR_REGEX = re.compile(r"\.(step-\d{1,15})\.replaced")


def checkpoint_dirs_of(run_dir: Path, fallback_dir: str | None) -> list[Path]:
    """The directories that hold a run's checkpoints: its `checkpoints/`, then its own directory in `checkpoint.fallback_dir`."""
    checkpoint_dirs = [run_dir / "checkpoints"]
    if fallback_dir is not None:
        # Runs share the fallback directory: the hash tells runs of one name apart.
        absolute = run_dir.absolute()
        path_hash = hashlib.sha256(str(absolute).encode()).hexdigest()[:8]
        checkpoint_dirs.append(Path(fallback_dir).expanduser() / f"{absolute.name}-{path_hash}")
    return checkpoint_dirs


class StepCheckpoint(NamedTuple):
    """A directory with the name of a checkpoint; whether it is complete is not known."""

    step: int
    path: Path


def checkpoints_in(checkpoint_dirs: list[Path]) -> list[StepCheckpoint]:
    """List the checkpoints of a run by ascending step, by their names alone: `step-000040` is one of step 40.

    `checkpoint_dirs`: the run's own directory, then a fallback on another disk. If both have a step, that of the first comes
    last, as the newest. A checkpoint that was renamed to `.step-<n>.replaced` for a successor is listed too, if the power failed
    before the successor got the name. Raises StorageError if a directory exists and cannot be listed.
    """
    sortable_checkpoints = []  # (step, minus the index of the directory, path)
    for directory_index, checkpoint_dir in enumerate(checkpoint_dirs):
        names = list_directory_if_present(checkpoint_dir)
        for name in names:
            step_name = name  # step-<n>
            replaced_match = REPLACED_DIR_REGEX.fullmatch(name)
            if replaced_match:
                step_name = replaced_match[1]
                if step_name in names:
                    continue  # its successor has the name
            step_match = STEP_DIR_REGEX.fullmatch(step_name)
            if step_match:
                sortable_checkpoints.append((int(step_match[1]), -directory_index, checkpoint_dir / name))
    return [StepCheckpoint(step, path) for step, _, path in sorted(sortable_checkpoints)]


def list_directory(directory: Path) -> list[str]:
    """The names in a directory. Waits for a stale NFS handle or a disk error that passes. Raises OSError if that fails."""
    return atomic_io.RetryingReader().read_with_retries(
        directory, lambda: atomic_io.disk.names(directory), (errno.ESTALE,)
    )


def list_directory_if_present(directory: Path) -> list[str]:
    """List the names in a directory of checkpoints; none if it does not exist.

    Raises StorageError if it exists and cannot be listed, since nobody would know then which checkpoints there are.
    """
    try:
        return list_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot be listed ({error_summary(error)}), so that nobody knows which checkpoints it has; let "
            "this user read it, or mend the disk"
        ) from error
