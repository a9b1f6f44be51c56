"""`train -m`: one run for each combination of the words that give several values.

Every point is composed and validated before the first one starts. Here the points run one after another, each in its
own processes. With launcher=slurm they are a job array, or one array for each kind of node that they ask for.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from strategies.errors import ConfigError, ShardtuneError

if TYPE_CHECKING:
    from launch.config.frozen import Composed


class RunPoint(Protocol):
    """Runs one point to its end in `run_dir`, with `isolate` in processes of its own; returns its exit code."""

    def __call__(self, composed: Composed, run_dir: Path, *, isolate: bool) -> int: ...


def multirun(words: list[str], *, launch: RunPoint, show: Callable[[Composed], None] | None, check: bool) -> int:
    """Run every combination of the words' values by `launch`, or only `show` it; returns the first exit code that is not 0.

    `check`: whether each point is validated, as running one needs. Raises ConfigError with the problems of all points.
    """
    from launch.cluster.array_size import refuse_large_arrays
    from launch.config.axes import name_in_trackers, point_label, read_axes
    from launch.config.compose import compose, default_run_dir

    axes = read_axes(words)
    points = axes.points()
    if show is None:  # before anything is composed: that takes long for many points
        refuse_large_arrays(points)
    labels = [axes.describe_point(point) for point in points]
    jobs = []
    problems = []
    for number, point in enumerate(points):
        try:
            jobs.append(compose(point, check=check))
        except ConfigError as error:
            problems += [f"point {number} ({labels[number]}): {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    for line in axes.settings_of_some_points():
        print(line, file=sys.stderr)
    if show is not None:
        for number, job in enumerate(jobs):
            print(f"# point {number}: {labels[number]}")
            show(job)
        return 0

    if jobs[0].config.run.dir:
        base_dir = Path(jobs[0].config.run.dir).expanduser()
    else:
        # Named by the hash of all jobs together: a requeued SLURM job finds the directory again.
        hashes = json.dumps([job.sha256 for job in jobs])
        base_dir = default_run_dir(hashlib.sha256(hashes.encode()).hexdigest())
    run_dirs = [base_dir / str(number) for number in range(len(points))]
    for point, job in zip(points, jobs, strict=True):
        settings = axes.values_on_axes(point)
        setting_words = [f"{key}={setting}" for key, setting in settings.items()]
        name_in_trackers(job.config.logging, base_dir, point_label(settings), setting_words)
    if jobs[0].config.launcher.name.value == "slurm":
        from launch.cluster.submission import submit_array

        exit_code = submit_array(jobs, run_dirs)
        _print_workspace(run_dirs)  # each job that ends writes it anew, with what is known then
        return exit_code
    return _run_one_by_one(jobs, run_dirs, labels, launch)


def _run_one_by_one(jobs: list[Composed], run_dirs: list[Path], labels: list[str], launch: RunPoint) -> int:
    """Run the points one after another, print their table, and return the first exit code that is not 0.

    A point that fails does not keep the later ones from running; a point that is asked to stop does.
    """
    exit_codes: list[int] = []
    for job, run_dir, label in zip(jobs, run_dirs, labels, strict=True):
        print(f"[{len(exit_codes) + 1}/{len(jobs)}] {label} -> {run_dir}", flush=True)
        try:
            exit_codes.append(launch(job, run_dir, isolate=True))
        except ShardtuneError as error:
            print(f"shardtune train: {error}", file=sys.stderr)
            exit_codes.append(error.exit_code)
        if exit_codes[-1] in (75, 130):  # asked to stop: the points after this one are not wanted now
            break
    from launch.sweep.multirun_answer import points_table

    print(f"\n{points_table(labels, run_dirs, exit_codes)}")
    _print_workspace(run_dirs)
    return next((exit_code for exit_code in exit_codes if exit_code), 0)


def _print_workspace(run_dirs: list[Path]) -> None:
    """Write the script that shows the points in W&B into their common directory, and print a line about it."""
    from launch.compare.workspace import workspace_line
    from launch.output import fold

    in_wandb = workspace_line(run_dirs, run_dirs[0].parent)
    if in_wandb is not None:
        print("\n".join(fold(in_wandb, 0)))
