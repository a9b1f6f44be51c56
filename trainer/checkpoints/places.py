"""Where a run's checkpoints lie, and what they are called; needs no torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

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

    Also what lost its name to one that has never got it: the power went between the two (`chosen.put_back`). Errors: OSError.
    """
    found = []
    for order, place in enumerate(places):
        there = {path.name: path for path in place.iterdir()} if place.is_dir() else {}
        for name, path in there.items():
            replaced = REPLACED_NAME.fullmatch(name)
            if replaced and replaced[1] in there:
                continue
            if step := STEP_NAME.fullmatch(replaced[1] if replaced else name):
                found.append((int(step[1]), -order, path))
    return [(step, path) for step, _, path in sorted(found)]
