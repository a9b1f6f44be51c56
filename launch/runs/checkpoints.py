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

MOST = 2**22
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
    """The held-out metric that evaluation watches, where this is the run's best checkpoint."""
    elsewhere: bool = False
    """Whether it lies in `checkpoint.fallback_dir`."""
    given_up: bool = False
    """Whether it is of a branch that the run does not go on from."""


@dataclass(frozen=True, slots=True)
class Store:
    """Where a run keeps its checkpoints, and which."""

    checkpoints: tuple[StoredCheckpoint, ...]
    watch: str | None
    """The held-out metric by which the best is chosen."""
    problem: str | None = None
    """Why they could not all be listed."""

    @property
    def newest(self) -> StoredCheckpoint | None:
        """The one that the run would go on from, if it is whole."""
        return next((each for each in reversed(self.checkpoints) if not each.given_up), None)


def saved(run_dir: Path) -> Store:
    """The checkpoints of a run, by step; those given up last. Nothing here raises."""
    checkpoint, evaluation = _settings(run_dir)
    fallback = checkpoint.get("fallback_dir")
    places = places_of(run_dir, fallback if isinstance(fallback, str) else None)
    problem = None
    try:
        there = published(places)
        aside = [
            path
            for place in places
            for path in sorted(place.glob("given-up-*/step-*"))
            if STEP_NAME.fullmatch(path.name)
        ]
    except StorageError as error:
        return Store((), None, str(error))
    except OSError as error:
        return Store((), None, f"cannot be listed: {atomic_io.reason(error)}")
    progress: dict[str, Any] = next((told for _, path in reversed(there) if (told := _progress(path))), {})
    found: list[StoredCheckpoint] = []
    for step, path, given_up in [(*each, False) for each in there] + [(_step(path), path, True) for path in aside]:
        best = progress.get("best_metric") if step == progress.get("best_step") and not given_up else None
        try:
            found.append(
                StoredCheckpoint(
                    path=path,
                    step=step,
                    age_s=max(0.0, time.time() - path.stat().st_mtime),
                    size=sum(file.stat().st_size for file in path.iterdir()),
                    best=best if isinstance(best, int | float) else None,
                    elsewhere=len(places) > 1 and places[1] in path.parents,
                    given_up=given_up,
                )
            )
        except FileNotFoundError:  # deleted meanwhile, beyond checkpoint.keep
            continue
        except OSError as error:
            problem = f"{path.name} cannot be read: {atomic_io.reason(error)}"
    watch = evaluation.get("watch")
    return Store(tuple(found), watch if isinstance(watch, str) else None, problem)


def damage(store: Store, say: Callable[[str], None]) -> dict[Path, str]:
    """What is wrong with each checkpoint that is not whole. Reads all of their bytes; `say` is told which is read."""
    from trainer.checkpoints.manifest import verify

    found = {}
    for each in store.checkpoints:
        say(f"{each.path.name}, {atomic_io.size_text(each.size)}")
        problem = verify(each.path)
        if problem is not None and each.path.is_dir():  # else deleted meanwhile
            found[each.path] = problem
    return found


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _progress(path: Path) -> dict[str, Any]:
    """How far the run was; empty where that cannot be read."""
    try:
        value = json.loads(atomic_io.read_bytes(path / "progress.json", most=MOST))["progress"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`checkpoint`, `evaluation`) of the run's configuration, empty where they cannot be read."""
    try:
        tree = read_tree(run_dir / "config.yaml")
    except ConfigError:
        return {}, {}
    parts = [tree.get(key) for key in ("checkpoint", "evaluation")]
    checkpoint, evaluation = (part if isinstance(part, dict) else {} for part in parts)
    return checkpoint, evaluation
