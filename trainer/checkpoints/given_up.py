"""Clears a directory of checkpoints for a run that continues: moves aside what it gives up, and removes unfinished files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import sync_directory
from trainer.checkpoints.layout import REPLACED_DIR_FORMAT

GIVEN_UP_DIR_FORMAT = "given-up-{}"
UNFINISHED_DIR_PATTERNS = (".step-*.writing", ".step-*.deleting", REPLACED_DIR_FORMAT.format("step-*"))


def move_to_given_up_dir(checkpoint_dir: Path, checkpoints: list[Path], print_line: Callable[[str], None]) -> None:
    """Move checkpoints that a run does not continue from into a new directory `given-up-<n>` beside them, durably.

    So no later start takes them for the run's newest, and the user can still get them back. `checkpoint_dir`: the directory that
    has them all. The metrics of the run are copied along. Prints a line. Raises OSError if that fails.
    """
    directory_number = 1
    while (checkpoint_dir / GIVEN_UP_DIR_FORMAT.format(directory_number)).exists():
        directory_number += 1
    given_up_dir = checkpoint_dir / GIVEN_UP_DIR_FORMAT.format(directory_number)
    atomic_io.disk.make_directory(given_up_dir)
    metrics_file = checkpoint_dir.parent / "metrics.jsonl"
    if metrics_file.is_file():  # the run will cut off the rows of the steps that it takes again
        shutil.copyfile(metrics_file, given_up_dir / metrics_file.name)
        atomic_io.sync_file(given_up_dir / metrics_file.name)
    for path in checkpoints:
        atomic_io.disk.rename(path, given_up_dir / path.name)
    sync_directory(given_up_dir)
    sync_directory(checkpoint_dir)
    names = ", ".join(path.name for path in checkpoints[:6])
    print_line(
        f"checkpoints that this run does not continue from ({names}) were "
        f"moved to {given_up_dir}, with the metrics so far; delete it when you need them no more"
    )


def remove_unfinished_dirs(checkpoint_dir: Path) -> None:
    """Remove what killed runs left half-written or half-deleted. A directory that cannot be removed stays."""
    for pattern in UNFINISHED_DIR_PATTERNS:
        for unfinished in list(checkpoint_dir.glob(pattern)):
            with suppress(OSError):  # it is in nobody's way
                atomic_io.disk.remove_tree(unfinished)
