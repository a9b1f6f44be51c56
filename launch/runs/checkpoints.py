"""Lists the checkpoints of a run without reading them, and verifies them on request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError, StorageError
from trainer.checkpoints.layout import STEP_NAME, places_of, published
from trainer.reporting.settings_file import read_tree

MOST_BYTES = 2**22
"""Bytes of the configuration, and of a checkpoint's progress; more is not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """One checkpoint."""

    path: Path
    step: int
    age_s: float
    """Seconds since it was written."""
    size: int
    """Bytes."""
    best: float | None = None
    """The held-out metric that evaluation watches, if this is the run's best checkpoint."""
    elsewhere: bool = False
    """Whether it lies in `checkpoint.fallback_dir`."""
    given_up: bool = False
    """Whether it is of a branch that the run does not continue: a rollback went back behind it."""


@dataclass(frozen=True, slots=True)
class CheckpointList:
    """The checkpoints that a run has stored."""

    checkpoints: tuple[StoredCheckpoint, ...]
    watch: str | None
    """The held-out metric by which the best is chosen."""
    problem: str | None = None
    """Why they could not all be listed."""

    @property
    def newest(self) -> StoredCheckpoint | None:
        """The checkpoint from which the run would continue, if it is intact."""
        for checkpoint in reversed(self.checkpoints):
            if not checkpoint.given_up:
                return checkpoint
        return None


def list_checkpoints(run_dir: Path) -> CheckpointList:
    """The checkpoints of a run, by step; those given up last. Nothing here raises."""
    checkpoint_settings, evaluation_settings = _settings(run_dir)
    fallback = checkpoint_settings.get("fallback_dir")
    watch = evaluation_settings.get("watch")
    directories = places_of(run_dir, fallback if isinstance(fallback, str) else None)
    given_up_paths = []
    try:
        published_checkpoints = published(directories)
        for directory in directories:
            for path in sorted(directory.glob("given-up-*/step-*")):
                if STEP_NAME.fullmatch(path.name):
                    given_up_paths.append(path)
    except StorageError as error:
        return CheckpointList((), None, str(error))
    except OSError as error:
        return CheckpointList((), None, f"cannot be listed: {atomic_io.error_summary(error)}")
    best_step, best_metric = _best(published_checkpoints)
    problem = None
    checkpoints: list[StoredCheckpoint] = []
    entries = [(step, path, False) for step, path in published_checkpoints]
    entries += [(_step(path), path, True) for path in given_up_paths]
    for step, path, given_up in entries:
        try:
            checkpoints.append(
                StoredCheckpoint(
                    path=path,
                    step=step,
                    age_s=max(0.0, time.time() - path.stat().st_mtime),
                    size=sum(file.stat().st_size for file in path.iterdir()),
                    best=best_metric if step == best_step and not given_up else None,
                    elsewhere=len(directories) > 1 and directories[1] in path.parents,
                    given_up=given_up,
                )
            )
        except FileNotFoundError:  # deleted meanwhile, beyond checkpoint.keep
            continue
        except OSError as error:
            problem = f"{path.name} cannot be read: {atomic_io.error_summary(error)}"
    return CheckpointList(tuple(checkpoints), watch if isinstance(watch, str) else None, problem)


def _best(published_checkpoints: list[tuple[int, Path]]) -> tuple[int | None, float | None]:
    """(step, metric) of the best checkpoint, as the newest one whose progress can be read has it."""
    for _, path in reversed(published_checkpoints):
        progress = _progress(path)
        if progress:
            metric = progress.get("best_metric")
            return progress.get("best_step"), metric if isinstance(metric, int | float) else None
    return None, None


def find_damage(store: CheckpointList, report: Callable[[str], None]) -> dict[Path, str]:
    """What is wrong with each damaged checkpoint. Reads all of their bytes; `report` is called with the one that is read."""
    from trainer.checkpoints.manifest import verify

    damage = {}
    for checkpoint in store.checkpoints:
        report(f"{checkpoint.path.name}, {atomic_io.size_text(checkpoint.size)}")
        problem = verify(checkpoint.path)
        if problem is not None and checkpoint.path.is_dir():  # else deleted meanwhile
            damage[checkpoint.path] = problem
    return damage


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _progress(path: Path) -> dict[str, Any]:
    """The progress that a checkpoint holds; empty if it cannot be read."""
    try:
        progress = json.loads(atomic_io.read_bytes(path / "progress.json", most=MOST_BYTES))["progress"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return progress if isinstance(progress, dict) else {}


def _settings(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`checkpoint`, `evaluation`) of the run's configuration, empty where they cannot be read."""
    try:
        tree = read_tree(run_dir / "config.yaml")
    except ConfigError:
        return {}, {}
    parts = [tree.get(key) for key in ("checkpoint", "evaluation")]
    checkpoint, evaluation = (part if isinstance(part, dict) else {} for part in parts)
    return checkpoint, evaluation
