"""The complete checkpoints of a run's branch, and which of them are no longer kept, by `checkpoint.keep`. Used on rank 0.

A branch is a sequence of steps, each taken from the weights of the one before. A run that goes back to an earlier checkpoint
gives the later ones up: they are moved aside.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import error_summary
from strategies.errors import StorageError
from trainer.checkpoints.given_up import move_to_given_up_dir, remove_unfinished_dirs
from trainer.checkpoints.in_use import is_read_by_another_process, remove_stale_reader_marks
from trainer.checkpoints.layout import checkpoints_in
from trainer.checkpoints.resume_selection import restore_replaced


class CheckpointBranch:
    """The checkpoints of the branch that a run is on. Nothing here communicates."""

    def __init__(self, checkpoint_dirs: list[Path], print_line: Callable[[str], None]) -> None:
        """`checkpoint_dirs`: the run's own directory for checkpoints, then a fallback; the caller may change the list."""
        self.checkpoint_dirs = checkpoint_dirs
        self.print_line = print_line
        self.complete_paths: set[Path] = set()
        """Checkpoints that are known to be complete: the one resumed from, and those written by this process."""
        self._undeletable_paths: set[Path] = set()
        """Old checkpoints that could not be deleted, each of which was warned of once."""

    def begin_at(self, resumed: Path | None) -> None:
        """Begin the branch at the checkpoint `resumed`: newer ones are moved into `given-up-<n>`, so that none is taken for it.

        None, or a checkpoint of another run, moves all. Another checkpoint of the same step, in the other directory, counts as
        newer. Also removes unfinished files of killed runs. Raises OSError or StorageError if that fails.
        """
        restore_replaced(self.checkpoint_dirs)  # a power cut may have left a checkpoint under a temporary name
        checkpoints = checkpoints_in(self.checkpoint_dirs)
        resumed_path = None if resumed is None else resumed.resolve()
        resumed_step = None  # stays None if it is another run's checkpoint: then all of this run's are moved aside
        for step, path in checkpoints:
            if path.resolve() == resumed_path:
                resumed_step = step
                break
        self.complete_paths = set()
        given_up_paths = []
        for step, path in checkpoints:
            if path.resolve() == resumed_path:
                self.complete_paths.add(path)
            elif resumed_step is None or step >= resumed_step:
                given_up_paths.append(path)
        for checkpoint_dir in self.checkpoint_dirs:
            remove_unfinished_dirs(checkpoint_dir)
            paths_to_move = [path for path in given_up_paths if path.parent == checkpoint_dir]
            if paths_to_move:
                move_to_given_up_dir(checkpoint_dir, paths_to_move, self.print_line)

    def add_published(self, published: Path) -> None:
        """Add a checkpoint that this process has published; one of the same step in another directory is deleted."""
        for path in list(self.complete_paths):
            if path.name == published.name and path != published:
                self._delete(path)
        self.complete_paths.add(published)

    def discard_step(self, step: int) -> None:
        """Delete the checkpoint of a step that nobody needs any more, unless it is the only one. A failure is a warning."""
        try:
            checkpoints = checkpoints_in(self.checkpoint_dirs)
        except StorageError as error:
            self.print_line(f"warning: the checkpoint of step {step} could not be deleted ({error})")
            return
        if len(checkpoints) == 1:
            return
        for checkpoint_step, path in checkpoints:
            if checkpoint_step == step:
                self._delete(path)

    def delete_superseded(self, *, keep: int, look_back_steps: int, best_step: int | None) -> None:
        """Delete checkpoints that are no longer kept, unless another process reads them. A failure is a warning.

        `keep`, `look_back_steps`, `best_step`: see `superseded_checkpoints`.
        """
        try:
            checkpoints = checkpoints_in(self.checkpoint_dirs)
        except StorageError as error:
            self.print_line(f"warning: old checkpoints could not be looked for ({error})")
            return
        for path in superseded_checkpoints(
            checkpoints, self.complete_paths, keep=keep, look_back_steps=look_back_steps, best_step=best_step
        ):
            remove_stale_reader_marks(path)
            if not is_read_by_another_process(path):
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint. A failure is a warning, once for each checkpoint."""
        temporary_path = path.with_name(f".{path.name}.deleting")
        try:
            atomic_io.disk.rename(path, temporary_path)  # so that nobody finds half of it under its name
            self.complete_paths.discard(path)
            atomic_io.disk.remove_tree(temporary_path)
        except OSError as error:
            if path not in self._undeletable_paths:
                self.print_line(f"warning: the old checkpoint {path} could not be deleted ({error_summary(error)})")
            self._undeletable_paths.add(path)


def superseded_checkpoints(
    checkpoints: Iterable[tuple[int, Path]],
    complete_paths: Container[Path],
    *,
    keep: int,
    look_back_steps: int,
    best_step: int | None,
) -> list[Path]:
    """Decide which checkpoints to delete: those that are older than the newest `keep` complete ones.

    Two kinds are kept beside them:

    - the best one (`best_step`; None if there is none);
    - with `look_back_steps`, the newest one that is at least so many steps older than the newest, and all after it: the run can
      go back to it from an anomaly that is noticed late. If none is that old, none is deleted.

    `checkpoints`: (step, path) of all, by ascending step. `complete_paths`: those that are known to be complete.
    """
    checkpoints = list(checkpoints)
    # Only checkpoints that are known to be complete count: a damaged one would replace an intact one.
    complete_steps = [step for step, path in checkpoints if path in complete_paths]
    if len(complete_steps) < keep:
        return []
    oldest_kept_step = complete_steps[-keep]
    if look_back_steps:
        last_rollback_step = complete_steps[-1] - look_back_steps
        rollback_steps = [step for step in complete_steps if step <= last_rollback_step]
        # 0 if none is that old: then no step is older.
        oldest_kept_step = min(oldest_kept_step, max(rollback_steps, default=0))
    return [path for step, path in checkpoints if step < oldest_kept_step and step != best_step]
