"""Plans the points of a new comparison from the axes on the command line, and runs them in turn or as a job array."""

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
from launch.compare.settings import CompareConfig, ComparisonRow, setting_keys, write_comparison_file
from launch.config.axes import Axes, excluded_points, name_in_trackers, point_label, read_axes
from launch.config.verb_arguments import read_group
from strategies.errors import ConfigError, NotRunOwner

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import Composed

STOP_EXIT_CODES = (75, 130)
"""Exit codes of a run that was asked to stop (preempted, Ctrl-C): the points after it are not wanted now."""


@dataclass(frozen=True, slots=True)
class RequestedPoint:
    """A planned point: one combination of values on the axes, with its whole configuration. It may be refused."""

    name: str
    arguments: tuple[str, ...]
    """Its values on the axes, as arguments such as `strategy=ddp`."""
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
    arguments: tuple[str, ...]
    """All arguments of the command; `comparison.json` keeps them."""
    partial_settings: tuple[str, ...] = ()
    """A line for each setting that some points do not have."""

    @property
    def name(self) -> str:
        """Default name of the comparison's directory: a hash of the points alone, so that it stays with more repeats."""
        identities = [(point.name, point.composed.sha256) for point in self.points]
        digest = hashlib.sha256(json.dumps(identities).encode()).hexdigest()
        return f"compare-{digest[:8]}"

    def rate_argument(self, point: RequestedPoint) -> list[str]:
        """The learning rate of a point, such as `(optim.lr=0.0002)`, if it differs between points and is no axis; else empty."""
        all_rates = {other.composed.config.optim.lr for other in self.points}
        is_axis = any(argument.startswith("optim.lr=") for argument in point.arguments)
        rate = point.composed.config.optim.lr
        if len(all_rates) == 1 or is_axis or rate is None:
            return []
        return [f"(optim.lr={rate:g})"]

    def rows(self, to: Path) -> list[ComparisonRow]:
        """The rows of the comparison in `to`: for each point, the directories of its runs, or why it was refused."""
        return [self._row(point, to) for point in self.points]

    def _row(self, point: RequestedPoint, to: Path) -> ComparisonRow:
        """The row of one point: a run directory for each repeat, or of a refused point its configuration and the reasons."""
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
            command_keys=setting_keys(self.arguments),
        )

    def runs(self, to: Path) -> Iterator[tuple[RequestedPoint, Path]]:
        """(point, run directory) of each run, one for each repeat of a point, in the order in which they are started.

        Every second repeat goes through the points backwards, so that no point is always the later one: a machine that gets warm
        or is shared would make it slower than the others.
        """
        runnable_points = [point for point in self.points if not point.refusals]
        for repeat in range(self.settings.repeats):
            for point in runnable_points if repeat % 2 == 0 else reversed(runnable_points):
                # A copy for each run: freezing writes the run's directory and its resolved settings into the configuration.
                own_config = replace(point.composed, config=deepcopy(point.composed.config))
                yield replace(point, composed=own_config), self._row(point, to).directories[repeat]


def plan_points(arguments: list[str]) -> PointsPlan:
    """Compose the configuration of every point, without starting anything.

    `arguments`: the settings from the command line. A setting with several values, as in `strategy=ddp,fsdp2`, is an axis, and
    each combination of values is a point. `compare.skip` and `compare.where` leave some points out. Raises ConfigError for
    settings that no point can use, for fewer than two runs, and if every point is refused (`train` would refuse its settings).
    """
    settings, run_arguments = read_compare_settings(arguments)
    axes = read_axes(run_arguments)
    default_arguments = _default_arguments(axes, settings)
    is_left_out = excluded_points(axes, settings.skip, settings.where)
    points = [point for point, left_out in zip(axes.points(), is_left_out, strict=True) if not left_out]
    if len(points) < 2 and settings.repeats < 2:
        why = "the conditions leave no two points" if sum(is_left_out) else "no word has several values"
        raise ConfigError(f"nothing to compare: {why}; give an axis, as in strategy=ddp,fsdp2, or compare.repeats=3")
    refuse_large_arrays(points, repeats=settings.repeats)

    axis_values = [axes.values_on_axes(point) for point in points]
    requested = _compose_points(points, axis_values, default_arguments)
    if all(point.refusals for point in requested):
        refusals_by_name = {point.name: list(point.refusals) for point in requested}
        raise ConfigError(_problem_lines(refusals_by_name))
    return PointsPlan(
        settings=settings,
        points=tuple(requested),
        left_out=sum(is_left_out),
        arguments=tuple(arguments),
        partial_settings=tuple(axes.settings_of_some_points()),
    )


def read_compare_settings(arguments: list[str]) -> tuple[CompareConfig, list[str]]:
    """Split arguments into (the `compare.*` settings, the other arguments, which are settings of the runs).

    Raises ConfigError with every problem at once.
    """
    settings, run_arguments, problems = read_group("compare", CompareConfig(), arguments)
    minimum_by_setting = {"steps": 1, "repeats": 1, "warmup": 0, "price_per_hour": 0}
    for name, minimum in minimum_by_setting.items():
        number = getattr(settings, name)
        if number is not None and number < minimum:
            problems.append(f"compare.{name}={number:g}: must be at least {minimum}")
    if problems:
        raise ConfigError(problems)
    return settings, run_arguments


def _default_arguments(axes: Axes, settings: CompareConfig) -> list[str]:
    """Settings that every point of a comparison gets: `compare.steps` as budget, no export, times of the parts of a step.

    A setting that is on the command line keeps its value there. Raises ConfigError for settings that points cannot have.
    """
    given_keys = {values[0].partition("=")[0] for values in axes.alternatives}
    budget_keys = sorted(key for key in given_keys if key.startswith("budget."))
    problems = []
    if "run.dir" in given_keys:
        problems.append("run.dir: the points have directories of their own; to=<directory> says where")
    if budget_keys and settings.steps is not None:
        problems.append(f"compare.steps={settings.steps}: {', '.join(budget_keys)} says how long too; give one of them")
    if problems:
        raise ConfigError(problems)

    arguments = []
    if settings.steps is not None:
        arguments.append(f"budget.steps={settings.steps}")
    for key, value in {"export.at_end": "false", "logging.step_parts": "true"}.items():
        if key not in given_keys:
            arguments.append(f"{key}={value}")
    return arguments


def _compose_points(
    points: list[list[str]], axis_values: list[dict[str, str]], default_arguments: list[str]
) -> list[RequestedPoint]:
    """Compose the configuration of every point. Raises ConfigError with the problems of all points.

    `points`: the arguments of each point. `axis_values`: for each point {axis: value}, by which it is named. `default_arguments`:
    see `_default_arguments`.
    """
    from launch.config.compose import compose, refusals

    problems_by_point: dict[str, list[str]] = {}
    requested = []
    for name, arguments, values in zip(_unique_labels(axis_values), points, axis_values, strict=True):
        try:
            composed = compose([*arguments, *default_arguments], check=False)
        except ConfigError as error:
            problems_by_point[name] = error.problems
            continue
        steps = composed.config.budget.steps
        if steps is not None:
            # Speeds are medians of logging intervals, and the first is left out: a short run needs short intervals.
            logging = composed.config.logging
            logging.every_steps = min(logging.every_steps, max(1, steps // 10))
        axis_arguments = tuple(f"{key}={value}" for key, value in values.items())
        requested.append(RequestedPoint(name, axis_arguments, composed, tuple(refusals(composed.config))))

    if problems_by_point:
        # Points without a problem are added, so that a problem of all points can be told from one of some.
        for point in requested:
            problems_by_point[point.name] = []
        raise ConfigError(_problem_lines(problems_by_point))
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
        if point.arguments in seen:
            names.append(point.name)
        seen.add(point.arguments)
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
    """Lines of an error message: each problem once, after the names of the points that have it unless all points have it.

    `problems_by_point` has every point: one without a problem has an empty list.
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
    """Run every planned run in `to` that has not finished yet, one after another, or submit them as one SLURM job array.

    `pages` are rewritten while the runs train. Returns the exit code: that of a run that was stopped, that of the first run if
    every run failed, else 0. Raises ConfigError if a directory holds another run, and StorageError.
    """
    from launch.cluster.submission import submit_array
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import is_finished
    from launch.runs.freeze import freeze, job_with_same_config
    from trainer.config.run import LauncherName
    from trainer.stopping.signals import release

    runs = list(plan.runs(to))
    for point, run_dir in runs:
        name_in_trackers(point.composed.config.logging, to, run_dir.name, point.arguments)
    unfinished = [(point, run_dir) for point, run_dir in runs if not is_finished(run_dir)]
    by_slurm = any(point.composed.config.launcher.name == LauncherName.slurm for point, _ in runs)
    # All runs are frozen before the first starts: a directory that holds another run ends the command here.
    try:
        for point, run_dir in runs:
            is_queued_unchanged = by_slurm and job_with_same_config(point.composed, run_dir)
            if not is_queued_unchanged:
                freeze(point.composed, run_dir)
    except NotRunOwner:
        raise
    except ConfigError as error:
        refusal = f"to={to}: holds other runs; name another directory, or undo:"
        raise ConfigError("\n    ".join([refusal, *error.problems])) from error
    write_comparison_file(to, plan.rows(to), list(plan.arguments))

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

    Returns the exit code: that of a run that was stopped, 130 after Ctrl-C between two runs, the first point's code if all
    failed, else 0.
    """
    from launch.compare.progress import run_with_progress

    exit_codes: dict[str, int] = {}
    try:
        for point, run_dir in runs:
            if exit_codes.get(point.name):  # a repeat failed; the same command, given again, tries the point once more
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
