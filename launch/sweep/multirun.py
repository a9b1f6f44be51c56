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
    points, problems, composed = axes.points(), [], []
    if show is None:
        refuse_large_arrays(points)
    for number, point in enumerate(points):
        try:
            composed.append(compose(point, check=check))
        except ConfigError as error:
            problems += [f"point {number} ({axes.describe_point(point)}): {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    for line in axes.settings_of_some_points():
        print(line, file=sys.stderr)
    if show is not None:
        for number, one in enumerate(composed):
            print(f"# point {number}: {axes.describe_point(points[number])}")
            show(one)
        return 0
    asked = composed[0].config.run.dir
    together = hashlib.sha256(json.dumps([one.sha256 for one in composed]).encode()).hexdigest()
    base = Path(asked).expanduser() if asked else default_run_dir(together)
    run_dirs = [base / str(number) for number in range(len(points))]
    labels = [axes.describe_point(point) for point in points]
    for point, one in zip(points, composed, strict=True):
        chosen = axes.values_on_axes(point)
        name_in_trackers(one.config.logging, base, label(chosen), [f"{key}={value}" for key, value in chosen.items()])
    if composed[0].config.launcher.name.value == "slurm":
        from launch.cluster.submission import submit_array

        return submit_array(composed, run_dirs)
    return _one_by_one(composed, run_dirs, labels, launch)


def _one_by_one(composed: list[Composed], run_dirs: list[Path], labels: list[str], launch: Launch) -> int:
    codes: list[int] = []
    for one, run_dir, label in zip(composed, run_dirs, labels, strict=True):
        print(f"[{len(codes) + 1}/{len(composed)}] {label} -> {run_dir}", flush=True)
        try:
            codes.append(launch(one, run_dir, isolate=True))
        except ShardtuneError as error:
            print(f"shardtune train: {error}", file=sys.stderr)
            codes.append(error.exit_code)
        if codes[-1] in (75, 130):  # asked to stop: the points after this one are not wanted now
            break
    from launch.sweep.multirun_answer import table

    print(f"\n{table(labels, run_dirs, codes)}")
    return next((code for code in codes if code), 0)
