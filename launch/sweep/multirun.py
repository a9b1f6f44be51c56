"""`train -m`: one run for each combination of the settings that have several values.

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

from strategies import exit_codes
from strategies.errors import ConfigError, ShardtuneError

if TYPE_CHECKING:
    from launch.config.frozen import ComposedConfig


class RunPoint(Protocol):
    """Runs one point (a combination of values) to its end in `run_dir`; returns its exit code.

    `isolate`: in processes of its own.
    """

    def __call__(self, composed: ComposedConfig, run_dir: Path, *, isolate: bool) -> int: ...


def run_all_points(
    arguments: list[str],
    *,
    run_point: RunPoint,
    show_point: Callable[[ComposedConfig], None] | None,
    check: bool,
) -> int:
    """Run `train -m`: every combination of the values that settings have (a point); returns the first exit code that is not 0.

    `run_point`: trains one point. `arguments`: the arguments of the command. `show_point`: called with each point instead of
    running it. `check`: whether each point is validated, which running needs. Raises ConfigError with the problems of all points.
    """
    from launch.cluster.array_size import refuse_large_arrays
    from launch.config.axes import point_label, read_axes, set_point_name_in_trackers
    from launch.config.compose import compose_config, default_run_dir

    # Compose every point before the first one starts.
    axes = read_axes(arguments)
    points = axes.points()
    if show_point is None:  # before anything is composed: that takes long for many points
        refuse_large_arrays(points)
    labels = [axes.describe_point(point) for point in points]
    composed_points = []
    problems = []
    for number, point in enumerate(points):
        try:
            composed_points.append(compose_config(point, check=check))
        except ConfigError as error:
            problems += [f"point {number} ({labels[number]}): {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    for line in axes.partial_setting_lines():
        print(line, file=sys.stderr)
    if show_point is not None:
        for number, composed in enumerate(composed_points):
            print(f"# point {number}: {labels[number]}")
            show_point(composed)
        return 0

    # A directory for each point, and names for the trackers.
    if composed_points[0].config.run.dir:
        base_dir = Path(composed_points[0].config.run.dir).expanduser()
    else:
        # Named by the hash of all points together, so that a requeued SLURM job finds the directory again.
        hashes_of_points = json.dumps([composed.sha256 for composed in composed_points])
        base_dir = default_run_dir(hashlib.sha256(hashes_of_points.encode()).hexdigest())
    run_dirs = [base_dir / str(number) for number in range(len(points))]
    for point, composed in zip(points, composed_points, strict=True):
        value_by_key = axes.values_on_axes(point)
        axis_arguments = [f"{key}={value}" for key, value in value_by_key.items()]
        set_point_name_in_trackers(composed.config.logging, base_dir, point_label(value_by_key), axis_arguments)

    if composed_points[0].config.launcher.name.value == "slurm":
        from launch.cluster.submission import submit_sweep

        exit_code = submit_sweep(composed_points, run_dirs)
        _write_wandb_workspace_script(run_dirs)  # each job that ends writes it anew, with what is known then
        return exit_code
    return _run_points_one_by_one(composed_points, run_dirs, labels, run_point)


def _run_points_one_by_one(
    composed_points: list[ComposedConfig], run_dirs: list[Path], labels: list[str], run_point: RunPoint
) -> int:
    """Run the points one after another, print their table, and return the first exit code that is not 0.

    After a point that fails, the later points still run. After a point that is stopped, they do not. Each point has processes
    of its own (`isolate`), so that neither memory nor a crash of one reaches the next.
    """
    from launch.sweep.multirun_answer import sweep_points_table_text

    run_codes: list[int] = []
    for composed, run_dir, label in zip(composed_points, run_dirs, labels, strict=True):
        print(f"[{len(run_codes) + 1}/{len(composed_points)}] {label} -> {run_dir}", flush=True)
        try:
            exit_code = run_point(composed, run_dir, isolate=True)
        except ShardtuneError as error:
            print(f"shardtune train: {error}", file=sys.stderr)
            exit_code = error.exit_code
        run_codes.append(exit_code)
        if exit_code in exit_codes.STOPPED_CODES:  # the later points are not wanted now
            break
    print(f"\n{sweep_points_table_text(labels, run_dirs, run_codes)}")
    _write_wandb_workspace_script(run_dirs)
    return next((exit_code for exit_code in run_codes if exit_code), 0)


def _write_wandb_workspace_script(run_dirs: list[Path]) -> None:
    """Give the user a script that shows all points of a sweep in W&B: writes it into their common directory, and prints a line.

    Nothing is written or printed if the points do not log to W&B.
    """
    from launch.compare.workspace import write_workspace_script_of_runs
    from launch.output import wrap_text

    workspace_line = write_workspace_script_of_runs(run_dirs, run_dirs[0].parent)
    if workspace_line is not None:
        print("\n".join(wrap_text(workspace_line, 0)))
