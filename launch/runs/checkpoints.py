"""Lists the checkpoints of a run without reading them, and verifies them on request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from strategies import atomic_io
from strategies.errors import ConfigError, StorageError
from trainer.checkpoints.layout import STEP_DIR_REGEX, StepCheckpoint, checkpoint_dirs_of, checkpoints_in
from trainer.reporting.settings_file import read_settings_tree

MAX_PROGRESS_BYTES = 2**22
"""A longer `progress.json` is not read: somebody else may have written the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """One checkpoint of a run, without its contents. `status --json` has its fields."""

    path: Path
    step: int
    age_s: float
    """Seconds since it was written."""
    num_bytes: int
    """Of all its files together."""
    best_metric: float | None = None
    """If this is the run's best checkpoint: the value of the held-out metric by which it was chosen."""
    is_in_fallback_dir: bool = False
    """Whether it is in `checkpoint.fallback_dir`."""
    is_given_up: bool = False
    """Whether a rollback returned to an earlier checkpoint, so that the run does not continue from this one."""


@dataclass(frozen=True, slots=True)
class CheckpointList:
    """The checkpoints that a run has stored."""

    checkpoints: tuple[StoredCheckpoint, ...]
    monitored_metric: str | None
    """Name of the held-out metric by which the best one is chosen."""
    problem: str | None = None
    """Why not all could be listed; None if they were."""

    @property
    def newest(self) -> StoredCheckpoint | None:
        """The checkpoint from which the run would continue, if it is intact."""
        for checkpoint in reversed(self.checkpoints):
            if not checkpoint.is_given_up:
                return checkpoint
        return None


def list_checkpoints(run_dir: Path) -> CheckpointList:
    """List the checkpoints of a run in the order of their steps, then those that a rollback gave up. Never raises.

    A rollback returns to an earlier checkpoint, and moves later ones aside. Only names, sizes and the best step are read:
    for their contents, see `verify_checkpoints`.
    """
    settings = _read_settings(run_dir)
    checkpoint_dirs = checkpoint_dirs_of(run_dir, settings.fallback_dir)
    try:
        published_checkpoints = checkpoints_in(checkpoint_dirs)
        given_up_paths = _given_up_paths(checkpoint_dirs)
    except StorageError as error:
        return CheckpointList((), monitored_metric=None, problem=str(error))
    except OSError as error:
        return CheckpointList((), monitored_metric=None, problem=f"cannot be listed: {atomic_io.error_summary(error)}")

    best = _best_checkpoint(published_checkpoints)
    fallback_dir = checkpoint_dirs[1] if len(checkpoint_dirs) > 1 else None
    problem = None
    checkpoints: list[StoredCheckpoint] = []
    directories = [_CheckpointDirectory(step, path, is_given_up=False) for step, path in published_checkpoints]
    directories += [_CheckpointDirectory(_step_of_directory(path), path, is_given_up=True) for path in given_up_paths]
    for step, path, is_given_up in directories:
        is_best = step == best.step and not is_given_up
        try:
            checkpoints.append(
                StoredCheckpoint(
                    path=path,
                    step=step,
                    age_s=max(0.0, time.time() - path.stat().st_mtime),
                    num_bytes=sum(file.stat().st_size for file in path.iterdir()),
                    best_metric=best.metric if is_best else None,
                    is_in_fallback_dir=fallback_dir is not None and fallback_dir in path.parents,
                    is_given_up=is_given_up,
                )
            )
        except FileNotFoundError:  # a running trainer deleted it meanwhile, beyond `checkpoint.keep`
            continue
        except OSError as error:
            problem = f"{path.name} cannot be read: {atomic_io.error_summary(error)}"
    return CheckpointList(tuple(checkpoints), settings.monitored_metric, problem)


class _CheckpointDirectory(NamedTuple):
    """A directory with a checkpoint."""

    step: int
    path: Path
    is_given_up: bool
    """Whether a rollback has moved it aside."""


def _given_up_paths(checkpoint_dirs: list[Path]) -> list[Path]:
    """Find the checkpoints that a rollback gave up, and moved into `given-up-<n>/`.

    Raises OSError if a directory cannot be listed.
    """
    paths = []
    for directory in checkpoint_dirs:
        for path in sorted(directory.glob("given-up-*/step-*")):
            if STEP_DIR_REGEX.fullmatch(path.name):
                paths.append(path)
    return paths


class _BestCheckpoint(NamedTuple):
    """Which checkpoint of a run is the best."""

    step: int | None
    metric: float | None
    """Value of the held-out metric by which it was chosen."""


def _best_checkpoint(published_checkpoints: list[StepCheckpoint]) -> _BestCheckpoint:
    """Tell which checkpoint is the best, as the newest one with a readable `progress.json` says.

    The fields of the result are None if none says it. `published_checkpoints`: in the order of the steps.
    """
    for _, path in reversed(published_checkpoints):
        progress = _read_progress(path)
        if progress:
            metric = progress.get("best_metric")
            return _BestCheckpoint(progress.get("best_step"), metric if isinstance(metric, int | float) else None)
    return _BestCheckpoint(step=None, metric=None)


def verify_checkpoints(checkpoint_list: CheckpointList, report_start: Callable[[str], None]) -> dict[Path, str]:
    """Compare all files of the checkpoints with their checksums; returns {damaged checkpoint: what is wrong with it}.

    `report_start` is called with the name and size of each checkpoint before it is read: `step-000040, 1.2 GB`.
    """
    from trainer.checkpoints.manifest import checkpoint_problem

    damage_by_checkpoint = {}
    for checkpoint in checkpoint_list.checkpoints:
        report_start(f"{checkpoint.path.name}, {atomic_io.size_text(checkpoint.num_bytes)}")
        damage = checkpoint_problem(checkpoint.path)
        # A trainer that is running deletes its old checkpoints (beyond `checkpoint.keep`): one that is gone is not damaged.
        is_still_there = checkpoint.path.is_dir()
        if damage is not None and is_still_there:
            damage_by_checkpoint[checkpoint.path] = damage
    return damage_by_checkpoint


def _step_of_directory(checkpoint_dir: Path) -> int:
    """The step in the name of a checkpoint's directory: `step-000040` -> 40."""
    return int(checkpoint_dir.name.removeprefix("step-"))


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    """`progress` in the `progress.json` of a checkpoint; empty if it cannot be read."""
    try:
        contents = json.loads(atomic_io.read_bytes(checkpoint / "progress.json", max_bytes=MAX_PROGRESS_BYTES))
        progress = contents["progress"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return progress if isinstance(progress, dict) else {}


class _CheckpointSettings(NamedTuple):
    """The settings of a run that its checkpoints depend on; None for one that is not set, or cannot be read."""

    fallback_dir: str | None = None
    """`checkpoint.fallback_dir`"""
    monitored_metric: str | None = None
    """`evaluation.watch`"""


def _read_settings(run_dir: Path) -> _CheckpointSettings:
    """Read where a run keeps checkpoints and how it judges them, from its `config.yaml`. Never raises."""
    try:
        tree = read_settings_tree(run_dir / "config.yaml")
    except ConfigError:
        return _CheckpointSettings()
    return _CheckpointSettings(
        fallback_dir=_text_setting(tree, "checkpoint", "fallback_dir"),
        monitored_metric=_text_setting(tree, "evaluation", "watch"),
    )


def _text_setting(tree: dict[str, Any], group_name: str, name: str) -> str | None:
    """The text that a setting of a group has; None if it is not set, or is no text."""
    group = tree.get(group_name)
    value = group.get(name) if isinstance(group, dict) else None
    return value if isinstance(value, str) else None
