"""Paths and names of a run's checkpoints. Needs no torch."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import error_summary
from strategies.errors import StorageError

STEP_DIR = "step-{:06d}"
STEP_NAME = re.compile(r"step-(\d{1,15})")
REPLACED = ".{}.replaced"
"""Name of a checkpoint while another of the same step takes its place, on file systems that cannot swap two names at once."""
REPLACED_NAME = re.compile(r"\.(step-\d{1,15})\.replaced")


def places_of(run_dir: Path, fallback_dir: str | None) -> list[Path]:
    """The directories that hold a run's checkpoints: its `checkpoints/`, then its own directory in `checkpoint.fallback_dir`."""
    places = [run_dir / "checkpoints"]
    if fallback_dir is not None:
        absolute = run_dir.absolute()
        name = f"{absolute.name}-{hashlib.sha256(str(absolute).encode()).hexdigest()[:8]}"
        places.append(Path(fallback_dir).expanduser() / name)
    return places


def published(places: list[Path]) -> list[tuple[int, Path]]:
    """(step, path) of everything with the name of a checkpoint in these directories, by ascending step.

    If several places have the same step, the first place comes last, as the newest. A checkpoint that lost its name to a
    successor which never got it (the power failed in between) is listed too; `resume_selection.restore_replaced` renames it.
    Errors: StorageError if a directory exists and cannot be listed.
    """
    checkpoints = []
    for order, place in enumerate(places):
        names = names_in(place)
        for name in names:
            replaced = REPLACED_NAME.fullmatch(name)
            if replaced and replaced[1] in names:
                continue  # its successor has the name
            step_name = replaced[1] if replaced else name
            match = STEP_NAME.fullmatch(step_name)
            if match:
                checkpoints.append((int(match[1]), -order, place / name))
    return [(step, path) for step, _, path in sorted(checkpoints)]


def listed(directory: Path) -> list[str]:
    """The names in a directory. Waits for a stale NFS handle or a disk error that passes. Errors: OSError."""
    return atomic_io.RetryingReader().read(directory, lambda: atomic_io.disk.names(directory), (errno.ESTALE,))


def names_in(directory: Path) -> list[str]:
    """The names in a directory; none if it does not exist. Errors: StorageError if it exists and cannot be listed."""
    try:
        return listed(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot be listed ({error_summary(error)}), so that nobody knows which checkpoints it has; let "
            "this user read it, or mend the disk"
        ) from error
