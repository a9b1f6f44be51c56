"""The jobs of a comparison: all of its points that train the same, with other strategies or seeds.

A job is what a step computes: method, learning rate, precision, data. Points of one job differ in strategy and seed alone; with
equal seeds they must have equal losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

from launch.compare.curves import loss_relevant_settings
from launch.compare.run_files import RecordedRun, last_held_out_metrics
from trainer.reporting.findings import findings_in

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint


@dataclass(frozen=True)
class ComparedJob:
    """All points of a comparison that train the same: their settings differ in nothing but seed and strategy."""

    points: tuple[ComparedPoint, ...]
    settings: dict[str, Any]
    """The settings that decide what a step computes, by dotted key, without the seed."""

    @cached_property
    def done_runs(self) -> list[RecordedRun]:
        """The runs of all points and repeats that are done. A run that was stopped or failed is no measure of quality."""
        runs: list[RecordedRun] = []
        for point in self.points:
            runs += [run for run in point.repeats if run.unfinished_state is None and run.steps]
        return runs

    def value_of_each_seed(self, metric: str) -> list[float]:
        """The quality of the job by a held-out metric, once for each seed: the median over the runs with this seed.

        The runs of one seed differ in strategy, or are repeats. The metric is that of a run's last evaluation. Runs that
        are not done, and runs without the metric, are left out.
        """
        values_by_seed: dict[Any, list[float]] = {}
        for run in self.done_runs:
            value = last_held_out_metrics(run).get(metric)
            if value is not None and math.isfinite(value):
                values_by_seed.setdefault(run.config.get("run.seed"), []).append(value)
        return [median(values) for values in values_by_seed.values()]

    @cached_property
    def num_seeds(self) -> int:
        """How many seeds the done runs have together."""
        return len({run.config.get("run.seed") for run in self.done_runs})

    @property
    def has_diverged(self) -> bool:
        """Whether a run that is done has diverged: such a job has no quality, whatever was measured before."""
        return any(_run_has_diverged(run) for run in self.done_runs)


def group_points_into_jobs(points: Sequence[ComparedPoint]) -> list[ComparedJob]:
    """Group the points that took a step into jobs: the points of a job train the same, with other strategies or seeds.

    So their settings that can change a loss are equal, apart from the seed. Jobs are in the order of their first points.
    """
    points_by_job: dict[str, list[ComparedPoint]] = {}
    settings_by_job: dict[str, dict[str, Any]] = {}
    for point in points:
        if not point.measured.steps:
            continue
        settings = loss_relevant_settings(point.first_repeat)
        settings.pop("run.seed", None)
        # As text, because a dict cannot be a key.
        job_key = json.dumps(settings, sort_keys=True, default=str)
        points_by_job.setdefault(job_key, []).append(point)
        settings_by_job[job_key] = settings
    return [ComparedJob(tuple(points), settings_by_job[job_key]) for job_key, points in points_by_job.items()]


def point_has_diverged(point: ComparedPoint) -> bool:
    """Whether the losses of any repeat ended worse than they began, or are not finite."""
    return any(_run_has_diverged(run) for run in point.repeats)


def _run_has_diverged(run: RecordedRun) -> bool:
    """Whether a detector found that the run diverged, or the loss of its last step is not finite."""
    if "diverged" in {finding.name for finding in findings_in(run.record.challenges)}:
        return True
    return bool(run.steps) and run.steps[max(run.steps)]["loss"] is None
