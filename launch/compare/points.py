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
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.cluster.array_size import refuse_large_arrays
from launch.compare.settings import CompareConfig, PointSource, setting_keys, write_comparison_file
from launch.config.axes import Axes, point_exclusion_flags, point_label, read_axes, set_point_name_in_trackers
from launch.config.verb_arguments import read_setting_group
from strategies import exit_codes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import ComposedConfig


@dataclass(frozen=True, slots=True)
class PlannedPoint:
    """A planned point: one combination of values on the axes, with its whole configuration. It may be refused."""

    name: str
    arguments: tuple[str, ...]
    """Its values on the axes, as arguments such as `strategy=ddp`."""
    composed: ComposedConfig
    refusals: tuple[str, ...]
    """Why it cannot be run."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a comparison: a repeat of a point."""

    point: PlannedPoint
    run_dir: Path


@dataclass(frozen=True, slots=True)
class PointsPlan:
    """All points of a new comparison, and the settings by which they are run."""

    settings: CompareConfig
    points: tuple[PlannedPoint, ...]
    num_left_out: int
    """How many points `compare.skip` and `compare.where` left out."""
    arguments: tuple[str, ...]
    """All arguments of the command; `comparison.json` keeps them."""
    lines_on_partial_settings: tuple[str, ...] = ()
    """A line for each setting that some points do not have: `tuning.rank: only where tuning is lora`."""

    @property
    def name(self) -> str:
        """Default name of the comparison's directory: a hash of the points alone, so that it stays with more repeats."""
        identities = [(point.name, point.composed.sha256) for point in self.points]
        digest = hashlib.sha256(json.dumps(identities).encode()).hexdigest()
        return f"compare-{digest[:8]}"

    def learning_rate_remark(self, point: PlannedPoint) -> str:
        """The remark `(optim.lr=0.0002)` on a point, if its rate follows from its other settings and differs between points.

        If none is set, a usual rate for the optimizer, tuning method and objective is taken. Empty if all points have the
        same rate, if the rate is an axis (then `arguments` of the point shows it), or if there is none.
        """
        all_rates = {any_point.composed.config.optim.lr for any_point in self.points}
        is_axis = any(argument.startswith("optim.lr=") for argument in point.arguments)
        rate = point.composed.config.optim.lr
        if len(all_rates) == 1 or is_axis or rate is None:
            return ""
        return f"(optim.lr={rate:g})"

    def point_sources(self, comparison_dir: Path) -> list[PointSource]:
        """What `comparison.json` in `comparison_dir` holds of each point: the directories of its runs, or why it was refused."""
        return [self._point_source(point, comparison_dir) for point in self.points]

    def _run_dirs(self, point: PlannedPoint, comparison_dir: Path) -> tuple[Path, ...]:
        """The run directory of each repeat of a point: `ddp`, `ddp-repeat2`, `ddp-repeat3` ... below `comparison_dir`."""
        suffixes = ["", *(f"-repeat{number}" for number in range(2, self.settings.repeats + 1))]
        return tuple(comparison_dir / f"{point.name}{suffix}" for suffix in suffixes)

    def _point_source(self, point: PlannedPoint, comparison_dir: Path) -> PointSource:
        """What `comparison.json` holds of one point, so that `shardtune compare <directory>` can read it later.

        A point that `train` would refuse has no run: it gets its settings and the reasons in place of run directories.
        """
        from trainer.config.resuming import flatten_settings, settings_as_dict

        run_dirs: tuple[Path, ...] = ()
        config: dict[str, Any] = {}
        if point.refusals:
            config = flatten_settings(settings_as_dict(point.composed.config))
        else:
            run_dirs = self._run_dirs(point, comparison_dir)
        return PointSource(
            directories=run_dirs,
            name=point.name,
            refused=point.refusals,
            config=config,
            warmup=self.settings.warmup,
            price_per_hour=self.settings.price_per_hour,
            command_keys=setting_keys(self.arguments),
        )

    def planned_runs(self, comparison_dir: Path) -> Iterator[PlannedRun]:
        """The runs of all points that are not refused, a run for each repeat, in the order in which they are started.

        Every second repeat goes through the points backwards, so that no point is always the later one: a machine that gets
        warm or is shared would make it slower than the others.
        """
        runnable_points = [point for point in self.points if not point.refusals]
        for repeat_index in range(self.settings.repeats):
            for point in runnable_points if repeat_index % 2 == 0 else reversed(runnable_points):
                # A copy for each run: writing config.yaml sets the run's directory and its resolved settings in the
                # configuration.
                composed_copy = replace(point.composed, config=deepcopy(point.composed.config))
                run_dir = self._run_dirs(point, comparison_dir)[repeat_index]
                yield PlannedRun(replace(point, composed=composed_copy), run_dir)


class _PointArguments(NamedTuple):
    """What makes a point, before its configuration is composed."""

    run_arguments: list[str]
    """All settings of its runs, such as `strategy=ddp` and `budget.steps=50`."""
    value_by_axis: dict[str, str]
    """Its values on the axes, by which it is named: {"strategy": "ddp"}."""


def plan_points(arguments: list[str]) -> PointsPlan:
    """Work out which points a new comparison has, with the whole configuration of each, without starting anything.

    `arguments`: settings from the command line. One with several values, as in `strategy=ddp,fsdp2`, is an axis, and each
    combination of values is a point; `compare.skip` and `compare.where` leave some out.

    A point whose settings `train` would refuse stays in the plan, with the reasons. Raises ConfigError for settings that no
    point can use, for fewer than two runs, and if every point is refused.
    """
    settings, run_arguments = read_compare_settings(arguments)
    axes = read_axes(run_arguments)
    shared_arguments = _arguments_of_every_point(axes, settings)
    is_left_out = point_exclusion_flags(axes, settings.skip, settings.where)  # a flag for each of `axes.points()`
    arguments_of_points = [
        point_arguments for point_arguments, left_out in zip(axes.points(), is_left_out, strict=True) if not left_out
    ]
    if len(arguments_of_points) < 2 and settings.repeats < 2:
        reason = "the conditions leave no two points" if any(is_left_out) else "no setting has several values"
        raise ConfigError(f"nothing to compare: {reason}; give an axis, as in strategy=ddp,fsdp2, or compare.repeats=3")
    # Each run may become a task of a SLURM job array, and a cluster limits their number.
    refuse_large_arrays(arguments_of_points, num_repeats=settings.repeats)

    # Points are named by these values, such as {"strategy": "ddp", "tuning": "lora"}.
    points = _compose_points(
        [
            _PointArguments([*point_arguments, *shared_arguments], axes.values_on_axes(point_arguments))
            for point_arguments in arguments_of_points
        ]
    )
    if all(point.refusals for point in points):
        refusals_by_point = {point.name: list(point.refusals) for point in points}
        raise ConfigError(_problem_lines_by_point(refusals_by_point))
    return PointsPlan(
        settings=settings,
        points=tuple(points),
        num_left_out=sum(is_left_out),
        arguments=tuple(arguments),
        lines_on_partial_settings=tuple(axes.partial_setting_lines()),
    )


def read_compare_settings(arguments: list[str]) -> tuple[CompareConfig, list[str]]:
    """Split the arguments of `shardtune compare` into its own settings (`compare.*`) and those of the runs that it starts.

    `["compare.steps=50", "strategy=ddp,fsdp2"]` gives (CompareConfig(steps=50), ["strategy=ddp,fsdp2"]). Raises ConfigError
    with every problem at once.
    """
    settings, run_arguments, problems = read_setting_group("compare", CompareConfig(), arguments)
    minimum_by_setting = {"steps": 1, "repeats": 1, "warmup": 0, "price_per_hour": 0}
    for setting, minimum in minimum_by_setting.items():
        value = getattr(settings, setting)
        if value is not None and value < minimum:
            problems.append(f"compare.{setting}={value:g}: must be at least {minimum}")
    if problems:
        raise ConfigError(problems)
    return settings, run_arguments


def _arguments_of_every_point(axes: Axes, settings: CompareConfig) -> list[str]:
    """The `key=value` arguments that every point gets besides its own, such as `["budget.steps=50", "export.at_end=false"]`.

    `compare.steps` becomes the budget; nothing is exported; the parts of a step are timed. A setting that the user typed
    keeps its value. Raises ConfigError if `run.dir` was typed, or a budget beside `compare.steps`.
    """
    # Each entry has the alternatives of one typed setting: ("strategy=ddp", "strategy=fsdp2") for `strategy=ddp,fsdp2`.
    cli_keys = {arguments_of_setting[0].partition("=")[0] for arguments_of_setting in axes.alternative_arguments}
    budget_keys = sorted(key for key in cli_keys if key.startswith("budget."))
    problems = []
    if "run.dir" in cli_keys:
        problems.append("run.dir: the points have directories of their own; to=<directory> says where")
    if budget_keys and settings.steps is not None:
        problems.append(f"compare.steps={settings.steps}: {', '.join(budget_keys)} says how long too; give one of them")
    if problems:
        raise ConfigError(problems)

    arguments_of_every_point = []
    if settings.steps is not None:
        arguments_of_every_point.append(f"budget.steps={settings.steps}")
    if "export.at_end" not in cli_keys:
        arguments_of_every_point.append("export.at_end=false")
    if "logging.step_parts" not in cli_keys:
        arguments_of_every_point.append("logging.step_parts=true")
    return arguments_of_every_point


def _compose_points(arguments_of_points: list[_PointArguments]) -> list[PlannedPoint]:
    """Compose the whole configuration of every point, as `train` would with its arguments, and name the points.

    A configuration that is valid but that `train` would refuse makes a point with `refusals`. A setting that does not exist
    or has a wrong value is an error: raises ConfigError with the problems of all points.
    """
    from launch.config.compose import compose_config, start_problems

    names = _unique_labels([point_arguments.value_by_axis for point_arguments in arguments_of_points])
    problems_by_point: dict[str, list[str]] = {}
    points = []
    for name, point_arguments in zip(names, arguments_of_points, strict=True):
        try:
            # Unchecked: settings that cannot be trained with make a refused point, and no error.
            composed = compose_config(point_arguments.run_arguments, check=False)
        except ConfigError as error:
            problems_by_point[name] = error.problems
            continue
        num_steps = composed.config.budget.steps
        if num_steps is not None:
            # Speeds are medians over rows of logging intervals, and the first interval is left out: a short run needs short ones.
            logging = composed.config.logging
            logging.every_steps = min(logging.every_steps, max(1, num_steps // 10))
        point = PlannedPoint(
            name=name,
            arguments=tuple(f"{key}={value}" for key, value in point_arguments.value_by_axis.items()),
            composed=composed,
            refusals=tuple(start_problems(composed.config)),  # why `train` would not start; empty if it would
        )
        points.append(point)

    if problems_by_point:
        # Points without a problem are added, so that a problem of all points can be told from one of some.
        for point in points:
            problems_by_point[point.name] = []
        raise ConfigError(_problem_lines_by_point(problems_by_point))
    if repeated_names := _repeated_point_names(points):
        raise ConfigError(
            f"{', '.join(repeated_names)}: the same as another point; name a value once, or set compare.repeats"
        )
    return points


def _repeated_point_names(points: list[PlannedPoint]) -> list[str]:
    """Names of points with the same values on the axes as an earlier one, as `optim.lr=1e-3,1e-3` makes them."""
    seen_arguments: set[tuple[str, ...]] = set()
    names = []
    for point in points:
        if point.arguments in seen_arguments:
            names.append(point.name)
        seen_arguments.add(point.arguments)
    return names


def _unique_labels(axis_values_by_point: list[dict[str, str]]) -> list[str]:
    """Name each point by its values on the axes: {"strategy": "fsdp2", "tuning": "lora"} gives `fsdp2-lora`.

    Different values may give the same name, as paths with the same file name do: the second such point is `fsdp2-lora-2`.
    """
    labels: list[str] = []
    for values in axis_values_by_point:
        base_label = point_label(values)
        label = base_label
        number = 2
        while label in labels:
            label = f"{base_label}-{number}"
            number += 1
        labels.append(label)
    return labels


def _problem_lines_by_point(problems_by_point: dict[str, list[str]]) -> list[str]:
    """Lines of an error message about several points: each problem once, after the names of its points unless all have it.

    `problems_by_point`: {"ddp-lora": ["..."], "ddp-full": []}, with every point, so that an empty list is one without a
        problem.
    """
    names_by_problem: dict[str, list[str]] = {}
    for name, problems in problems_by_point.items():
        for problem in problems:
            names_by_problem.setdefault(problem, []).append(name)
    lines = []
    for problem, names in names_by_problem.items():
        all_points_have_it = len(names) == len(problems_by_point)
        lines.append(problem if all_points_have_it else f"{', '.join(names)}: {problem}")
    return lines


def run_planned_points(plan: PointsPlan, comparison_dir: Path, periodic_page: PeriodicPage | None = None) -> int:
    """Run the comparison as planned: each run that has not finished yet, in turn or as one SLURM job array.

    The directories of the runs are below `comparison_dir`. Writes the `config.yaml` of every run first, and
    `comparison.json`, so that the same command, given again, continues. `periodic_page`: a page that shows the points so
    far, rewritten while the runs train; None for none.

    Returns the exit code. For a job array: that of the submission. Else that of a run that was stopped, that of the first
    run if every run failed, else 0. Raises ConfigError if a directory holds another run, and StorageError.
    """
    from launch.compare.progress import RunsProgress
    from launch.config.frozen import is_finished
    from trainer.config.run import LauncherName

    runs = list(plan.planned_runs(comparison_dir))
    uses_slurm = any(run.point.composed.config.launcher.name == LauncherName.slurm for run in runs)
    unfinished_runs = [run for run in runs if not is_finished(run.run_dir)]
    # Every config.yaml is written before the first run starts: a directory that holds another run ends the command here.
    _write_run_configs(runs, comparison_dir, uses_slurm=uses_slurm)
    write_comparison_file(comparison_dir, plan.point_sources(comparison_dir), list(plan.arguments))
    if uses_slurm and unfinished_runs:
        return _submit_runs(unfinished_runs, comparison_dir)
    num_finished = len(runs) - len(unfinished_runs)
    return _run_one_by_one(unfinished_runs, RunsProgress(len(runs), num_finished, periodic_page))


def _write_run_configs(runs: list[PlannedRun], comparison_dir: Path, *, uses_slurm: bool) -> None:
    """Prepare the directory of each run: name the run in the trackers, and write its `config.yaml`.

    The file is left alone for a run that already waits in SLURM's queue with the same settings. Raises ConfigError if a
    directory holds another run, NotRunOwner if another process trains in one, and StorageError.
    """
    from launch.runs.freeze import job_with_same_config, write_run_config

    for run in runs:
        set_point_name_in_trackers(
            run.point.composed.config.logging, comparison_dir, run.run_dir.name, run.point.arguments
        )
    try:
        for run in runs:
            is_queued_unchanged = uses_slurm and job_with_same_config(run.point.composed, run.run_dir)
            if not is_queued_unchanged:
                write_run_config(run.point.composed, run.run_dir)
    except ConfigError as error:
        refusal = f"to={comparison_dir}: holds other runs; name another directory, or undo:"
        raise ConfigError("\n    ".join([refusal, *error.problems])) from error


def _submit_runs(runs: list[PlannedRun], comparison_dir: Path) -> int:
    """Submit the runs as one SLURM job array, and print the command that compares them later.

    Returns the submission's exit code.
    """
    from launch.cluster.submission import submit_sweep
    from trainer.stopping.signals import unblock_signals

    unblock_signals()  # a signal is no longer kept for a run that this process starts: it starts none
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the comparison, which --json prints there
        configs = [run.point.composed for run in runs]
        exit_code = submit_sweep(configs, [run.run_dir for run in runs])
        command = f"shardtune compare {shlex.quote(str(comparison_dir))}"
        print(f"to compare the points, now or when their jobs have ended: {command}")
    return exit_code


def _run_one_by_one(runs: list[PlannedRun], progress: RunsProgress) -> int:
    """Start the runs one after another on this machine, and wait for each. Later repeats of a point that failed are skipped.

    Returns the exit code: that of a run that was stopped by a signal or Ctrl-C, 130 for Ctrl-C between two runs, the first
    point's code if all points failed, else 0.
    """
    from launch.compare.progress import run_with_progress

    exit_code_by_point: dict[str, int] = {}  # of the last repeat that ran
    try:
        for run in runs:
            point = run.point
            has_failed = bool(exit_code_by_point.get(point.name))
            if has_failed:  # the same command, given again, tries the point once more
                progress.skip_run()
                continue
            exit_code = run_with_progress(point.name, point.composed, run.run_dir, progress, verb="compare")
            exit_code_by_point[point.name] = exit_code
            if exit_code in exit_codes.STOPPED_CODES:
                return exit_code
    except KeyboardInterrupt:  # between two runs
        return exit_codes.INTERRUPTED
    point_codes = list(exit_code_by_point.values())
    all_failed = bool(point_codes) and all(point_codes)
    return point_codes[0] if all_failed else 0
