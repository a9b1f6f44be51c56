"""Which checkpoint a run goes on from."""

from __future__ import annotations

import re
from pathlib import Path

from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.seal import verify_together

STEP_NAME = re.compile(r"step-(\d{1,15})")


def published(places: list[Path]) -> list[tuple[int, Path]]:
    """(step, path) of all that has the name of a checkpoint in these directories, ascending; of a step the first place's last."""
    found = []
    for order, place in enumerate(places):
        if place.is_dir():
            for path in place.iterdir():
                if name := STEP_NAME.fullmatch(path.name):
                    found.append((int(name[1]), -order, path))
    return [(step, path) for step, _, path in sorted(found)]


def choose(places: list[Path], resume: str, runtime: Runtime) -> Path | None:
    """The checkpoint to resume from, the same on all ranks; None starts afresh. All ranks must call.

    Errors: ConfigError for a named one that cannot be used; StorageError where there are checkpoints and none can be used.
    """
    if resume == "never":
        return None
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
