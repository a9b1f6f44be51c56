"""Plans the points of a new comparison from the axes typed, and runs them one after another or as a job array."""

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
from launch.compare.settings import CompareConfig, ComparisonRow, keys_of_words, write_comparison_file
from launch.config.axes import Axes, excluded_points, name_in_trackers, point_label, read_axes
from launch.config.verb_words import read_group
from strategies.errors import ConfigError, NotRunOwner

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import Composed

STOP_EXIT_CODES = (75, 130)
"""Exit codes of a run that was asked to stop (preempted, Ctrl-C): the points after it are not wanted now."""


@dataclass(frozen=True, slots=True)
class RequestedPoint:
    """A point of a new comparison: one combination of the axes, with its whole configuration. It may be refused."""

    name: str
    words: tuple[str, ...]
    """Its values on the axes, such as `strategy=ddp`."""
    composed: Composed
    refusals: tuple[str, ...]
    """Why it cannot be run."""


@dataclass(frozen=True, slots=True)
class PointsPlan:
    """All points of a new comparison, and the settings by which they are run."""

    settings: CompareConfig
    points: tuple[RequestedPoint, ...]
    left_out: int
    """Points that conditions left out."""
    words: tuple[str, ...]
    """All words of the command; `comparison.json` keeps them."""
    partial_settings: tuple[str, ...] = ()
    """A line for each setting that some points do not have."""

    @property
    def name(self) -> str:
        """Default name of the comparison's directory: a hash of the points alone, so that it stays with more repeats."""
        identities = [(point.name, point.composed.sha256) for point in self.points]
        digest = hashlib.sha256(json.dumps(identities).encode()).hexdigest()
        return f"compare-{digest[:8]}"

    def rate_words(self, point: RequestedPoint) -> list[str]:
        """The learning rate of a point as a word, if the points have different ones that follow from their other settings."""
        rates = {other.composed.config.optim.lr for other in self.points}
        is_axis = any(word.startswith("optim.lr=") for word in point.words)
        rate = point.composed.config.optim.lr
        if len(rates) == 1 or is_axis or rate is None:
            return []
        return [f"(optim.lr={rate:g})"]

    def rows(self, to: Path) -> list[ComparisonRow]:
        """The rows that `comparison.json` in `to` keeps: for each point, the directories of its runs or why it was refused."""
        return [self._row(point, to) for point in self.points]

    def _row(self, point: RequestedPoint, to: Path) -> ComparisonRow:
        """The row of the comparison for one point (combination of settings), with a run directory for each of its repeats.

        A point whose settings cannot run is refused: it has no directory, but its configuration and the reasons.
        """
        from trainer.config.resuming import flat, plain

        run_dirs: tuple[Path, ...] = ()
        config: dict[str, Any] = {}
        if point.refusals:
            config = flat(plain(point.composed.config))
        else:
            suffixes = ["", *(f"-repeat{number}" for number in range(2, self.settings.repeats + 1))]
            run_dirs = tuple(to / f"{point.name}{suffix}" for suffix in suffixes)
        return ComparisonRow(
            directories=run_dirs,
            name=point.name,
            refused=point.refusals,
            config=config,
            warmup=self.settings.warmup,
            price_per_hour=self.settings.price_per_hour,
            typed_keys=keys_of_words(self.words),
        )

    def runs(self, to: Path) -> Iterator[tuple[RequestedPoint, Path]]:
        """(point, run directory) of each run, in the order in which they are started.

        Every second repeat goes through the points backwards, so that no point is always the later one: a machine that warms
        up or is shared would make it slower than the others.
        """
        accepted = [point for point in self.points if not point.refusals]
        for repeat in range(self.settings.repeats):
            for point in accepted if repeat % 2 == 0 else reversed(accepted):
                # Freezing a run writes its directory and what it chose itself into the configuration.
                own_config = replace(point.composed, config=deepcopy(point.composed.config))
                yield replace(point, composed=own_config), self._row(point, to).directories[repeat]


def plan_points(words: list[str]) -> PointsPlan:
    """Compose the configuration of every combination of the values in `words`, without starting anything.

    `words`: the settings as typed; one with several values, as in `strategy=ddp,fsdp2`, is an axis, and a combination of values
    is a point. `compare.skip` and `compare.where` leave some out. Raises ConfigError for words that no point can use, for fewer
    than two runs, and if every point is refused (its settings cannot run).
    """
    settings, run_words = read_compare_settings(words)
    axes = read_axes(run_words)
    default_words = _default_words(axes, settings)
    is_left_out = excluded_points(axes, settings.skip, settings.where)
    points = [point for point, left_out in zip(axes.points(), is_left_out, strict=True) if not left_out]
    if len(points) < 2 and settings.repeats < 2:
        why = "the conditions leave no two points" if sum(is_left_out) else "no word has several values"
        raise ConfigError(f"nothing to compare: {why}; give an axis, as in strategy=ddp,fsdp2, or compare.repeats=3")
    refuse_large_arrays(points, repeats=settings.repeats)

    axis_values = [axes.values_on_axes(point) for point in points]
    requested = _compose_points(points, axis_values, default_words)
    if all(point.refusals for point in requested):
        refusals_by_name = {point.name: list(point.refusals) for point in requested}
        raise ConfigError(_problem_lines(refusals_by_name))
    return PointsPlan(
        settings=settings,
        points=tuple(requested),
        left_out=sum(is_left_out),
        words=tuple(words),
        partial_settings=tuple(axes.settings_of_some_points()),
    )


def read_compare_settings(words: list[str]) -> tuple[CompareConfig, list[str]]:
    """(the `compare.` settings among the words, the other words, which are of the runs).

    Raises ConfigError with every problem at once.
    """
    settings, run_words, problems = read_group("compare", CompareConfig(), words)
    minimum_by_setting = {"steps": 1, "repeats": 1, "warmup": 0, "price_per_hour": 0}
    for name, minimum in minimum_by_setting.items():
        number = getattr(settings, name)
        if number is not None and number < minimum:
            problems.append(f"compare.{name}={number:g}: must be at least {minimum}")
    if problems:
        raise ConfigError(problems)
    return settings, run_words


def _default_words(axes: Axes, settings: CompareConfig) -> list[str]:
    """Settings that every point gets beside those typed: no export, times of the parts of a step, `compare.steps` as budget.

    A default that was typed is left out. Raises ConfigError for typed words that the points of a comparison cannot have.
    """
    typed_keys = {values[0].partition("=")[0] for values in axes.alternatives}
    budget_keys = sorted(key for key in typed_keys if key.startswith("budget."))
    problems = []
    if "run.dir" in typed_keys:
        problems.append("run.dir: the points have directories of their own; to=<directory> says where")
    if budget_keys and settings.steps is not None:
        problems.append(f"compare.steps={settings.steps}: {', '.join(budget_keys)} says how long too; give one of them")
    if problems:
        raise ConfigError(problems)

    words = []
    if settings.steps is not None:
        words.append(f"budget.steps={settings.steps}")
    for key, value in {"export.at_end": "false", "logging.step_parts": "true"}.items():
        if key not in typed_keys:
            words.append(f"{key}={value}")
    return words


def _compose_points(
    points: list[list[str]], axis_values: list[dict[str, str]], default_words: list[str]
) -> list[RequestedPoint]:
    """Compose the configuration of every point from its words. Raises ConfigError with the problems of all points.

    `axis_values` has, for each point, its value on each axis; the points are named by them.
    """
    from launch.config.compose import compose, refusals

    problems: dict[str, list[str]] = {}
    requested = []
    for name, words, values in zip(_unique_labels(axis_values), points, axis_values, strict=True):
        try:
            composed = compose([*words, *default_words], check=False)
        except ConfigError as error:
            problems[name] = error.problems
            continue
        steps = composed.config.budget.steps
        if steps is not None:
            # Speeds are medians of logging intervals, and the first is left out: a short run needs short intervals.
            logging = composed.config.logging
            logging.every_steps = min(logging.every_steps, max(1, steps // 10))
        value_words = tuple(f"{key}={value}" for key, value in values.items())
        requested.append(RequestedPoint(name, value_words, composed, tuple(refusals(composed.config))))

    if problems:
        # With the points that have none: a problem of every point is printed without their names.
        without_problem: dict[str, list[str]] = {point.name: [] for point in requested}
        raise ConfigError(_problem_lines(problems | without_problem))
    if repeated_names := _repeated_point_names(requested):
        raise ConfigError(
            f"{', '.join(repeated_names)}: the same as another point; name a value once, or set compare.repeats"
        )
    return requested


def _repeated_point_names(points: list[RequestedPoint]) -> list[str]:
    """Names of points that have the same values on the axes as an earlier one."""
    seen: set[tuple[str, ...]] = set()
    names = []
    for point in points:
        if point.words in seen:
            names.append(point.name)
        seen.add(point.words)
    return names


def _unique_labels(axis_values: list[dict[str, str]]) -> list[str]:
    """A name for each point made of its values on the axes; the second of the same name ends with -2, and so on."""
    names: list[str] = []
    for values in axis_values:
        base = name = point_label(values)
        number = 2
        while name in names:
            name = f"{base}-{number}"
            number += 1
        names.append(name)
    return names


def _problem_lines(problems_by_point: dict[str, list[str]]) -> list[str]:
    """Lines for an error: each problem once, preceded by the names of the points that have it, unless all points do.

    `problems_by_point` has every point, those without a problem with an empty list.
    """
    names_by_problem: dict[str, list[str]] = {}
    for name, problems in problems_by_point.items():
        for problem in problems:
            names_by_problem.setdefault(problem, []).append(name)
    lines = []
    for problem, names in names_by_problem.items():
        is_of_all = len(names) == len(problems_by_point)
        lines.append(problem if is_of_all else f"{', '.join(names)}: {problem}")
    return lines


def run_points(plan: PointsPlan, to: Path, pages: PeriodicPage | None = None) -> int:
    """Run every planned run in `to` that has not finished yet, or submit all of them as one SLURM job array.

    `pages` are rewritten while the runs train. Returns 0, the exit code of a run that was asked to stop, or the first run's
    code if every run failed. Raises ConfigError where a directory holds another run, StorageError.
    """
    from launch.cluster.submission import submit_array
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import is_finished
    from launch.runs.freeze import freeze, job_with_same_config
    from trainer.config.run import LauncherName
    from trainer.stopping.signals import release

    runs = list(plan.runs(to))
    for point, run_dir in runs:
        name_in_trackers(point.composed.config.logging, to, run_dir.name, point.words)
    unfinished = [(point, run_dir) for point, run_dir in runs if not is_finished(run_dir)]
    by_slurm = any(point.composed.config.launcher.name == LauncherName.slurm for point, _ in runs)
    # All runs are frozen before the first starts: a directory that holds another run ends the command here.
    try:
        for point, run_dir in runs:
            is_queued = by_slurm and job_with_same_config(point.composed, run_dir)  # with these very settings
            if not is_queued:
                freeze(point.composed, run_dir)
    except NotRunOwner:
        raise
    except ConfigError as error:
        refusal = f"to={to}: holds other runs; name another directory, or undo:"
        raise ConfigError("\n    ".join([refusal, *error.problems])) from error
    write_comparison_file(to, plan.rows(to), list(plan.words))

    if by_slurm and unfinished:
        release()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the comparison, which --json prints there
            configs = [point.composed for point, _ in unfinished]
            exit_code = submit_array(configs, [run_dir for _, run_dir in unfinished])
            print(f"to compare the points, now or when their jobs have ended: shardtune compare {shlex.quote(str(to))}")
            return exit_code
    finished_count = len(runs) - len(unfinished)
    return _run_one_by_one(unfinished, RunsProgress(len(runs), finished_count, pages))


def _run_one_by_one(runs: list[tuple[RequestedPoint, Path]], progress: RunsProgress) -> int:
    """Start the runs one after another, and wait for each. Further repeats of a point that failed are skipped.

    Returns 0 if any point succeeded, the code of a run that was asked to stop, 130 after Ctrl-C between two runs, or the
    first point's code if all failed.
    """
    from launch.compare.progress import run_with_progress

    exit_codes: dict[str, int] = {}
    try:
        for point, run_dir in runs:
            if exit_codes.get(point.name):  # it failed; the same command, typed again, tries it once more
                progress.skip_run()
                continue
            exit_code = run_with_progress(point.name, point.composed, run_dir, progress, verb="compare")
            exit_codes[point.name] = exit_code
            if exit_code in STOP_EXIT_CODES:
                return exit_code
    except KeyboardInterrupt:  # between two runs
        return 130
    all_failed = bool(exit_codes) and all(exit_codes.values())
    return next(iter(exit_codes.values())) if all_failed else 0
