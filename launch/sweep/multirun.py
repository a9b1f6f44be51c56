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


class Launch(Protocol):
    """Runs one point to its end; returns its exit code."""

    def __call__(self, composed: Composed, run_dir: Path, *, isolate: bool) -> int: ...


def multirun(words: list[str], *, launch: Launch, show: Callable[[Composed], None] | None, check: bool) -> int:
    """Run all points by `launch`, or only `show` them; returns the first exit code that is not 0.

    `check`: whether each point is validated, as running one needs.
    """
    from launch.cluster.array_size import refuse_large_arrays
    from launch.config.axes import label, name_in_trackers, read_axes
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
        base = Path(jobs[0].config.run.dir).expanduser()
    else:
        # Named by all jobs together: a requeued SLURM job finds the directory again.
        digests = json.dumps([job.sha256 for job in jobs])
        base = default_run_dir(hashlib.sha256(digests.encode()).hexdigest())
    run_dirs = [base / str(number) for number in range(len(points))]
    for point, job in zip(points, jobs, strict=True):
        settings = axes.values_on_axes(point)
        setting_words = [f"{key}={setting}" for key, setting in settings.items()]
        name_in_trackers(job.config.logging, base, label(settings), setting_words)
    if jobs[0].config.launcher.name.value == "slurm":
        from launch.cluster.submission import submit_array

        return submit_array(jobs, run_dirs)
    return _one_by_one(jobs, run_dirs, labels, launch)


def _one_by_one(jobs: list[Composed], run_dirs: list[Path], labels: list[str], launch: Launch) -> int:
    """Run the points in turn and print their table; the first exit code that is not 0. A stopped point ends it."""
    codes: list[int] = []
    for job, run_dir, label in zip(jobs, run_dirs, labels, strict=True):
        print(f"[{len(codes) + 1}/{len(jobs)}] {label} -> {run_dir}", flush=True)
        try:
            codes.append(launch(job, run_dir, isolate=True))
        except ShardtuneError as error:
            print(f"shardtune train: {error}", file=sys.stderr)
            codes.append(error.exit_code)
        if codes[-1] in (75, 130):  # asked to stop: the points after this one are not wanted now
            break
    from launch.sweep.multirun_answer import table

    print(f"\n{table(labels, run_dirs, codes)}")
    return next((code for code in codes if code), 0)
