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
from typing import TYPE_CHECKING, Any

from launch.cluster.array_size import refuse_large_arrays
from launch.compare.settings import CompareConfig, ComparisonRow, write_rows
from launch.config.axes import Axes, excluded_points, label, name_in_trackers, read_axes
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
    """A point of a comparison, composed from the words of the command; it may be refused."""

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
        """A name that follows from the points alone: with more repeats it stays."""
        identities = [(point.name, point.composed.sha256) for point in self.points]
        return f"compare-{hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:8]}"

    def rows(self, to: Path) -> list[ComparisonRow]:
        """As they are read once they have run in `to`."""
        return [self._row(point, to) for point in self.points]

    def _row(self, point: RequestedPoint, to: Path) -> ComparisonRow:
        """The row of one point: a directory for each repeat, or of a refused point its configuration instead."""
        from trainer.config.resuming import flat, plain

        directories: tuple[Path, ...] = ()
        config: dict[str, Any] = {}
        if point.refusals:
            config = flat(plain(point.composed.config))
        else:
            suffixes = ["", *(f"-repeat{number}" for number in range(2, self.settings.repeats + 1))]
            directories = tuple(to / f"{point.name}{suffix}" for suffix in suffixes)
        return ComparisonRow(
            directories=directories,
            name=point.name,
            refused=point.refusals,
            config=config,
            warmup=self.settings.warmup,
            price_per_hour=self.settings.price_per_hour,
        )

    def runs(self, to: Path) -> Iterator[tuple[RequestedPoint, Path]]:
        """What is run, in order: every second time the other way round, so that no point is always the later one."""
        accepted = [point for point in self.points if not point.refusals]
        for repeat in range(self.settings.repeats):
            for point in accepted if repeat % 2 == 0 else reversed(accepted):
                # Freezing notes in a configuration where it lies and what its run has chosen.
                own_config = replace(point.composed, config=deepcopy(point.composed.config))
                yield replace(point, composed=own_config), self._row(point, to).directories[repeat]


def plan_points(words: list[str]) -> PointsPlan:
    """Compose every point. Raises ConfigError for words that no point can use, and where no point could be run."""
    settings, run_words = read_compare_settings(words)
    axes = read_axes(run_words)
    default_words = _default_words(axes, settings)
    is_left_out = excluded_points(axes, settings.skip, settings.where)
    points = [point for point, skipped in zip(axes.points(), is_left_out, strict=True) if not skipped]
    if len(points) < 2 and settings.repeats < 2:
        why = "the conditions leave no two points" if sum(is_left_out) else "no word has several values"
        raise ConfigError(f"nothing to compare: {why}; give an axis, as in strategy=ddp,fsdp2, or compare.repeats=3")
    refuse_large_arrays(points, repeats=settings.repeats)
    requested = _compose(points, [axes.values_on_axes(point) for point in points], default_words)
    if all(point.refusals for point in requested):
        raise ConfigError(_problem_lines({point.name: list(point.refusals) for point in requested}))
    return PointsPlan(settings, tuple(requested), sum(is_left_out), tuple(words), tuple(axes.settings_of_some_points()))


def read_compare_settings(words: list[str]) -> tuple[CompareConfig, list[str]]:
    """The settings of the comparison, and the words of its runs. Raises ConfigError with every problem."""
    settings, run_words, problems = read_group("compare", CompareConfig(), words)
    for name, least in {"steps": 1, "repeats": 1, "warmup": 0, "price_per_hour": 0}.items():
        number = getattr(settings, name)
        if number is not None and number < least:
            problems.append(f"compare.{name}={number:g}: must be at least {least}")
    if problems:
        raise ConfigError(problems)
    return settings, run_words


def _default_words(axes: Axes, settings: CompareConfig) -> list[str]:
    """Words that every point gets where nothing else was typed. Raises ConfigError for words that are not a point's."""
    typed = {values[0].partition("=")[0] for values in axes.words}
    budgets = sorted(key for key in typed if key.startswith("budget."))
    problems = []
    if "run.dir" in typed:
        problems.append("run.dir: the points have directories of their own; to=<directory> says where")
    if budgets and settings.steps is not None:
        problems.append(f"compare.steps={settings.steps}: {', '.join(budgets)} says how long too; give one of them")
    if problems:
        raise ConfigError(problems)
    # A comparison exports nothing, and shows the parts of a step.
    defaults = {"export.at_end": "false", "logging.step_parts": "true"}
    words = [f"{key}={value}" for key, value in defaults.items() if key not in typed]
    return words if settings.steps is None else [f"budget.steps={settings.steps}", *words]


def _compose(points: list[list[str]], chosen: list[dict[str, str]], default_words: list[str]) -> list[RequestedPoint]:
    """Compose the points; `chosen` are the values of each on the axes. Raises ConfigError with the problems of all."""
    from launch.config.compose import compose, refusals

    problems: dict[str, list[str]] = {}
    requested = []
    for name, point, values in zip(_unique_labels(chosen), points, chosen, strict=True):
        try:
            composed = compose([*point, *default_words], check=False)
        except ConfigError as error:
            problems[name] = error.problems
            continue
        steps = composed.config.budget.steps
        if steps is not None:
            # Speeds are medians of logging intervals: there are to be some, and the first is left out.
            logging = composed.config.logging
            logging.every_steps = min(logging.every_steps, max(1, steps // 10))
        words = tuple(f"{key}={value}" for key, value in values.items())
        requested.append(RequestedPoint(name, words, composed, tuple(refusals(composed.config))))
    if problems:
        raise ConfigError(_problem_lines(problems | {point.name: [] for point in requested}))
    if doubled := _doubled(requested):
        raise ConfigError(f"{', '.join(doubled)}: the same as another point; name a value once, or set compare.repeats")
    return requested


def _doubled(points: list[RequestedPoint]) -> list[str]:
    """Names of points whose values are those of an earlier one."""
    seen: set[tuple[str, ...]] = set()
    names = []
    for point in points:
        if point.words in seen:
            names.append(point.name)
        seen.add(point.words)
    return names


def _unique_labels(chosen: list[dict[str, str]]) -> list[str]:
    """A name for each point out of its values; the second of the same name ends with -2, and so on."""
    names: list[str] = []
    for values in chosen:
        base = name = label(values)
        number = 2
        while name in names:
            name = f"{base}-{number}"
            number += 1
        names.append(name)
    return names


def _problem_lines(problems: dict[str, list[str]]) -> list[str]:
    """Each problem once, with the points that have it, unless all have."""
    names_by_problem: dict[str, list[str]] = {}
    for name, problems_of_point in problems.items():
        for problem in problems_of_point:
            names_by_problem.setdefault(problem, []).append(name)
    lines = []
    for problem, names in names_by_problem.items():
        is_of_all = len(names) == len(problems)
        lines.append(problem if is_of_all else f"{', '.join(names)}: {problem}")
    return lines


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
    unfinished = [(point, run_dir) for point, run_dir in runs if not is_finished(run_dir)]
    by_slurm = any(point.composed.config.launcher.name == LauncherName.slurm for point, _ in runs)
    try:
        for point, run_dir in runs:
            is_queued = by_slurm and queued_as_asked(point.composed, run_dir)  # with these very settings
            if not is_queued:
                freeze(point.composed, run_dir)
    except NotOurs:
        raise
    except ConfigError as error:
        refusal = f"to={to}: holds other runs; name another directory, or undo:"
        raise ConfigError("\n    ".join([refusal, *error.problems])) from error
    write_rows(to, plan.rows(to), list(plan.words))
    if by_slurm and unfinished:
        release()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the answer's
            configs = [point.composed for point, _ in unfinished]
            code = submit_array(configs, [run_dir for _, run_dir in unfinished])
            print(f"to compare the points, now or when their jobs have ended: shardtune compare {shlex.quote(str(to))}")
            return code
    return _one_by_one(unfinished, RunsProgress(len(runs), len(runs) - len(unfinished), pages))


def _one_by_one(runs: list[tuple[RequestedPoint, Path]], progress: RunsProgress) -> int:
    """Start the runs one after another, and wait for each. A point that failed is not repeated.

    Returns 0 if any point succeeded, the code of a run that was asked to stop, 130 after Ctrl-C between two runs, or the
    first point's code if all failed.
    """
    from launch.compare.progress import run_with_progress

    codes: dict[str, int] = {}
    try:
        for point, run_dir in runs:
            if codes.get(point.name):  # a repeat of a point that failed; repeating the command tries it once more
                progress.passed_over()
                continue
            codes[point.name] = run_with_progress(point.name, point.composed, run_dir, progress, verb="compare")
            if codes[point.name] in STOPPED:
                return codes[point.name]
    except KeyboardInterrupt:  # between two runs
        return 130
    all_failed = bool(codes) and all(codes.values())
    return next(iter(codes.values())) if all_failed else 0
