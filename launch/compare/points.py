"""The points of a new comparison: composed from axes, checked, and run one after another or as a job array."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.array_size import refuse_large_arrays
from launch.compare.settings import CompareConfig, ComparisonRow, write_rows
from launch.config.axes import Axes, label, left_out, name_in_trackers, read_axes
from launch.config.verb_words import read_group
from strategies.errors import ConfigError, NotOurs

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import Composed

STOPPED = (75, 130)
"""Exit codes of a run that was asked to stop: the points after it are not wanted now."""


@dataclass(frozen=True, slots=True)
class RequestedPoint:
    """One point as it was asked for."""

    name: str
    words: tuple[str, ...]
    """Its values on the axes."""
    composed: Composed
    refusals: tuple[str, ...]
    """Why it cannot be run."""


@dataclass(frozen=True, slots=True)
class PointsPlan:
    """All points, and how they are run."""

    settings: CompareConfig
    points: tuple[RequestedPoint, ...]
    left_out: int
    """Points that conditions left out."""
    words: tuple[str, ...]
    partial_settings: tuple[str, ...] = ()
    """A line for each setting that some points do not have."""

    @property
    def name(self) -> str:
        """The same for the same points; how often they are run may differ."""
        asked = [(point.name, point.composed.sha256) for point in self.points]
        return f"compare-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"

    def rows(self, to: Path) -> list[ComparisonRow]:
        """As they are read once they have run in `to`."""
        from trainer.config.resuming import flat, plain

        ways = ["", *(f"-repeat{number}" for number in range(2, self.settings.repeats + 1))]
        return [
            ComparisonRow(
                directories=() if point.refusals else tuple(to / f"{point.name}{way}" for way in ways),
                name=point.name,
                refused=point.refusals,
                config=flat(plain(point.composed.config)) if point.refusals else {},
                warmup=self.settings.warmup,
                price_per_hour=self.settings.price_per_hour,
            )
            for point in self.points
        ]

    def runs(self, to: Path) -> Iterator[tuple[RequestedPoint, Path]]:
        """What is run, in order: every second time the other way round, so that no point is always the later one."""
        there = [(point, row) for point, row in zip(self.points, self.rows(to), strict=True) if not point.refusals]
        for repeat in range(self.settings.repeats):
            for point, row in there if repeat % 2 == 0 else reversed(there):
                # Freezing notes in a configuration where it lies and what its run has chosen.
                own = replace(point.composed, config=deepcopy(point.composed.config))
                yield replace(point, composed=own), row.directories[repeat]


def plan_points(words: list[str]) -> PointsPlan:
    """Compose every point. Raises ConfigError for words that no point can use, and where no point could be run."""
    settings, rest = read_compare_settings(words)
    axes = read_axes(rest)
    extra = _default_words(axes, settings)
    out = left_out(axes, settings.skip, settings.where)
    chosen = [axes.chosen(point) for point, skipped in zip(axes.points(), out, strict=True) if not skipped]
    kept = [point for point, skipped in zip(axes.points(), out, strict=True) if not skipped]
    if len(kept) < 2 and settings.repeats < 2:
        why = "the conditions leave no two points" if sum(out) else "no word has several values"
        raise ConfigError(f"nothing to compare: {why}; give an axis, as in strategy=ddp,fsdp2, or compare.repeats=3")
    refuse_large_arrays(kept, repeats=settings.repeats)
    points = tuple(_compose(kept, chosen, extra))
    if all(point.refusals for point in points):
        raise ConfigError(_problem_lines({point.name: list(point.refusals) for point in points}))
    return PointsPlan(settings, points, sum(out), tuple(words), tuple(axes.partly()))


def read_compare_settings(words: list[str]) -> tuple[CompareConfig, list[str]]:
    """The settings of the comparison, and the words of its runs. Raises ConfigError with every problem."""
    settings, rest, problems = read_group("compare", CompareConfig(), words)
    least = {"steps": 1, "repeats": 1, "warmup": 0, "price_per_hour": 0}
    for name, bound in least.items():
        if (value := getattr(settings, name)) is not None and value < bound:
            problems.append(f"compare.{name}={value:g}: must be at least {bound}")
    if problems:
        raise ConfigError(problems)
    return settings, rest


def _default_words(axes: Axes, settings: CompareConfig) -> list[str]:
    """Words that every point gets where nothing else was typed. Raises ConfigError for words that are not a point's."""
    typed = {values[0].partition("=")[0] for values in axes.words}
    problems = []
    if "run.dir" in typed:
        problems.append("run.dir: the points have directories of their own; to=<directory> says where")
    if (budgets := sorted(key for key in typed if key.startswith("budget."))) and settings.steps is not None:
        problems.append(f"compare.steps={settings.steps}: {', '.join(budgets)} says how long too; give one of them")
    if problems:
        raise ConfigError(problems)
    extra = [f"budget.steps={settings.steps}"] if settings.steps is not None else []
    usual = {"export.at_end": "false", "logging.step_parts": "true"}
    return extra + [f"{key}={value}" for key, value in usual.items() if key not in typed]


def _compose(points: list[list[str]], chosen: list[dict[str, str]], extra: list[str]) -> Iterator[RequestedPoint]:
    from launch.config.compose import compose, refusals

    problems: dict[str, list[str]] = {}
    names: set[str] = set()
    found = []
    for point, values in zip(points, chosen, strict=True):
        name = base = label(values)
        for number in range(2, len(points) + 2):
            if name not in names:
                break
            name = f"{base}-{number}"
        names.add(name)
        try:
            composed = compose([*point, *extra], check=False)
        except ConfigError as error:
            problems[name] = error.problems
            continue
        if (steps := composed.config.budget.steps) is not None:
            # Speeds are medians of logging intervals: there are to be some, and the first is left out.
            logging = composed.config.logging
            logging.every_steps = min(logging.every_steps, max(1, steps // 10))
        words = tuple(f"{key}={value}" for key, value in values.items())
        found.append(RequestedPoint(name, words, composed, tuple(refusals(composed.config))))
    if problems:
        raise ConfigError(_problem_lines(problems | {asked.name: [] for asked in found}))
    doubled = [asked.name for n, asked in enumerate(found) if asked.words in [one.words for one in found[:n]]]
    if doubled:
        raise ConfigError(f"{', '.join(doubled)}: the same as another point; name a value once, or set compare.repeats")
    yield from found


def _problem_lines(problems: dict[str, list[str]]) -> list[str]:
    """Each problem once, with the points that have it, unless all have."""
    where: dict[str, list[str]] = {}
    for name, found in problems.items():
        for problem in found:
            where.setdefault(problem, []).append(name)
    return [
        problem if len(names) == len(problems) else f"{', '.join(names)}: {problem}" for problem, names in where.items()
    ]


def run_points(plan: PointsPlan, to: Path, pages: PeriodicPage | None = None) -> int:
    """Run what is not done yet, or submit it; returns 0, or the exit code of the run that was asked to stop.

    `pages` are written meanwhile.

    Where every run failed: the first one's code. Raises ConfigError where a directory holds another run, StorageError.
    """
    from launch.cluster.submission import submit_array
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import is_finished
    from launch.runs.freeze import freeze, queued_as_asked
    from trainer.config.run import LauncherName
    from trainer.stopping.signals import release

    runs = list(plan.runs(to))
    for point, run_dir in runs:
        name_in_trackers(point.composed.config.logging, to, run_dir.name, point.words)
    left = [(point, run_dir) for point, run_dir in runs if not is_finished(run_dir)]
    by_slurm = LauncherName.slurm in {point.composed.config.launcher.name for point, _ in runs}
    try:
        for point, run_dir in runs:
            if not (by_slurm and queued_as_asked(point.composed, run_dir)):  # what is in the queue is as it shall be
                freeze(point.composed, run_dir)
    except NotOurs:
        raise
    except ConfigError as error:
        refusal = f"to={to}: holds other runs; name another directory, or undo:"
        raise ConfigError("\n    ".join([refusal, *error.problems])) from error
    write_rows(to, plan.rows(to), list(plan.words))
    if by_slurm and left:
        release()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the answer's
            code = submit_array([point.composed for point, _ in left], [run_dir for _, run_dir in left])
            print(f"how the points stand, now and when their jobs have ended: shardtune compare {shlex.quote(str(to))}")
            return code
    return _one_by_one(left, RunsProgress(len(runs), len(runs) - len(left), pages))


def _one_by_one(runs: list[tuple[RequestedPoint, Path]], progress: RunsProgress) -> int:
    from launch.compare.progress import run_with_progress

    codes: dict[str, int] = {}
    try:
        for point, run_dir in runs:
            if codes.get(point.name):  # it would fail again; the same command tries it once more
                progress.passed_over()
                continue
            codes[point.name] = run_with_progress(point.name, point.composed, run_dir, progress, verb="compare")
            if codes[point.name] in STOPPED:
                return codes[point.name]
    except KeyboardInterrupt:  # between two runs
        return 130
    return next((code for code in codes.values() if code), 0) if codes and all(codes.values()) else 0
