"""Decides which checkpoints of a run are no longer kept, by `checkpoint.keep`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path


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
