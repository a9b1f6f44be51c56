"""Paths and names of a run's checkpoints. Needs no torch."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import reason
from strategies.errors import StorageError

STEP_DIR = "step-{:06d}"
STEP_NAME = re.compile(r"step-(\d{1,15})")
REPLACED = ".{}.replaced"
"""What a checkpoint is called while one of the same step takes its name, where a file system cannot swap the two."""
REPLACED_NAME = re.compile(r"\.(step-\d{1,15})\.replaced")


def places_of(run_dir: Path, fallback_dir: str | None) -> list[Path]:
    """`checkpoints/` of a run's directory, then its own part of `checkpoint.fallback_dir`."""
    places = [run_dir / "checkpoints"]
    if fallback_dir is not None:
        whole = run_dir.absolute()
        name = f"{whole.name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"
        places.append(Path(fallback_dir).expanduser() / name)
    return places


def published(places: list[Path]) -> list[tuple[int, Path]]:
    """(step, path) of all that has the name of a checkpoint in these directories, ascending; of a step the first place's last.

    Also what lost its name to one that has never got it: the power went between the two
    (`resume_selection.put_back`). Errors: StorageError where a directory is there and cannot be listed.
    """
    found = []
    for order, place in enumerate(places):
        there = names_in(place)
        for name in there:
            replaced = REPLACED_NAME.fullmatch(name)
            if replaced and replaced[1] in there:
                continue
            if step := STEP_NAME.fullmatch(replaced[1] if replaced else name):
                found.append((int(step[1]), -order, place / name))
    return [(step, path) for step, _, path in sorted(found)]


def listed(directory: Path) -> list[str]:
    """What is in a directory; a stale handle of it, or a disk that stumbles, is waited for. Errors: OSError."""
    return atomic_io.RetryingReader().read(directory, lambda: atomic_io.disk.names(directory), (errno.ESTALE,))


def names_in(directory: Path) -> list[str]:
    """What is in a directory; nothing where there is none. Errors: StorageError where it is there and cannot be listed."""
    try:
        return listed(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot be listed ({reason(error)}), so that nobody knows which checkpoints it has; let this user "
            "read it, or mend the disk"
        ) from error
