"""Compares the held-out quality of points that train different jobs, and says whether their difference is shown.

A job is what a step computes: method, learning rate, precision, data. Points of one job differ in strategy alone, and have the
same quality. Two jobs differ for certain only if their difference is larger than what chance explains:

- points or repeats that differ in `run.seed` alone say by how much one job differs from itself;
- held-out documents, micro-batch by micro-batch in pairs, say how far the result depends on the documents chosen;
- intervals of `shardtune evaluate` say the same of a task's metric.

Of those that are known, all must agree. If none is known, no difference is shown. Repeats of one seed are no evidence: on a
deterministic machine they agree to the last digits, however much another seed would change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from launch.compare.curves import SAME_LOSS_TOLERANCE, step_settings
from launch.compare.metric_meaning import (
    DEFAULT_METRIC,
    differing_keys,
    metric_direction,
    why_measured_differently,
)
from launch.compare.run_files import RecordedRun, last_held_out_metrics
from strategies import atomic_io
from trainer.reporting.findings import findings_in
from trainer.reporting.results import EVALUATION, LAST_HELD_OUT, kept_reports
from trainer.reporting.run_record import MOST_BYTES

if TYPE_CHECKING:
    from launch.compare.compared_point import ComparedPoint

LEVEL = 0.05
"""How often, at most, equal jobs are said to differ, over all pairs of a comparison together."""
MIN_BATCHES = 4
"""Micro-batches of held-out documents below which there is no interval.

With four of them, equal models are said to differ as rarely as with eight: 5 to 6 % of 6,000 made-up pairs at a level of 5 %.
"""


@dataclass(frozen=True, slots=True)
class QualityMetric:
    """The held-out metric by which a comparison judges quality."""

    name: str
    greater_is_better: bool

    @property
    def word(self) -> str:
        """What the best value of it is called."""
        return "highest" if self.greater_is_better else "lowest"


@dataclass(frozen=True)
class ComparedJob:
    """All points of a comparison whose settings differ in nothing but seed and strategy."""

    points: tuple[ComparedPoint, ...]
    settings: dict[str, Any]
    """The settings that decide what a step computes, by dotted key, without the seed."""

    @cached_property
    def done_runs(self) -> list[RecordedRun]:
        """The runs of all points and repeats that are done: one that was stopped or failed is no measure of quality."""
        runs: list[RecordedRun] = []
        for point in self.points:
            runs += [run for run in point.repeats if run.unfinished_state is None and run.steps]
        return runs

    def values(self, metric: str) -> list[float]:
        """The metric at the last evaluation, one value for each seed: the median over the seed's strategies and repeats.

        Runs that are not done, and runs without the metric, are left out.
        """
        values_by_seed: dict[Any, list[float]] = {}
        for run in self.done_runs:
            value = last_held_out_metrics(run).get(metric)
            if value is not None and math.isfinite(value):
                values_by_seed.setdefault(run.config.get("run.seed"), []).append(value)
        return [median(values) for values in values_by_seed.values()]

    @cached_property
    def seeds(self) -> int:
        """How many seeds the done runs have together."""
        return len({run.config.get("run.seed") for run in self.done_runs})

    @property
    def has_diverged(self) -> bool:
        """Whether a run that is done has diverged: such a job has no quality, whatever was measured before."""
        return any(_run_diverged(run) for run in self.done_runs)


@dataclass(frozen=True, slots=True)
class QualityDifference:
    """How the metric of one job differs from that of its baseline, and whether chance may explain it."""

    relative: float
    """(value - baseline value) / |baseline value|: positive if the value is larger than the baseline's."""
    seeds: int
    """Seeds of the job that has more of them."""
    seed_interval: tuple[float, float] | None = None
    """Of `relative`, over seeds; None if both jobs have one seed, or if their seeds differ by rounding alone."""
    document_interval: tuple[float, float] | None = None
    """Of `relative`, over held-out documents; None if it is not known."""
    reports_apart: bool | None = None
    """Whether the intervals of `shardtune evaluate` are apart; None if it did not evaluate both."""

    @property
    def is_shown(self) -> bool:
        """Whether chance does not explain the difference: there is evidence (seeds, documents, reports), and all of it agrees."""
        excludes_chance = []
        for interval in (self.seed_interval, self.document_interval):
            if interval is not None:
                low, high = interval
                # An interval on the other side of zero is evidence for the opposite.
                excludes_chance.append(low > 0 if self.relative > 0 else high < 0)
        if self.reports_apart is not None:
            excludes_chance.append(self.reports_apart)
        is_more_than_rounding = abs(self.relative) > SAME_LOSS_TOLERANCE
        return is_more_than_rounding and bool(excludes_chance) and all(excludes_chance)

    @property
    def sources(self) -> list[str]:
        """What the judgement rests on, as nouns; empty if nothing is known of chance."""
        sources = []
        if self.document_interval is not None:
            sources.append("held-out documents")
        if self.seed_interval is not None:
            sources.append("seeds")
        if self.reports_apart is not None:
            sources.append("intervals of shardtune evaluate")
        return sources

    @property
    def evidence_text(self) -> str:
        """What the judgement rests on, with its numbers; empty if on nothing."""
        clauses = []
        if self.document_interval is not None:
            low, high = self.document_interval
            clauses.append(f"95 % interval over held-out documents {low:+.2%} to {high:+.2%}")
        if self.seed_interval is not None:
            low, high = self.seed_interval
            clauses.append(f"95 % interval over {self.seeds} seeds {low:+.2%} to {high:+.2%}")
        if self.reports_apart is not None:
            word = "apart" if self.reports_apart else "overlap"
            clauses.append(f"intervals of shardtune evaluate {word}")
        return "; ".join(clauses)


@dataclass(frozen=True)
class RankedJobs:
    """The jobs of a comparison, the best first, by one held-out metric."""

    metric: QualityMetric
    jobs: list[ComparedJob]
    differences: list[QualityDifference | None] = field(default_factory=list)
    """Of each job from the best one; None for the best."""

    def value(self, job: ComparedJob) -> float:
        """The metric of a job: the median of its seeds."""
        return median(job.values(self.metric.name))

    @property
    def best(self) -> ComparedJob:
        """The job with the best value."""
        return self.jobs[0]

    @property
    def not_shown_worse(self) -> list[ComparedJob]:
        """The best job, and those whose difference from it is not shown."""
        return [job for job, difference in zip(self.jobs, self.differences, strict=True) if not _is_shown(difference)]

    @property
    def shown_worse(self) -> list[ComparedJob]:
        """The jobs that are worse than the best one for certain."""
        return [job for job, difference in zip(self.jobs, self.differences, strict=True) if _is_shown(difference)]

    @property
    def sources(self) -> list[str]:
        """What the answer rests on, as nouns: of the differences that are shown, or of all if none is; empty if on nothing."""
        known = [difference for difference in self.differences if difference is not None]
        shown = [difference for difference in known if difference.is_shown]
        sources: dict[str, None] = {}
        for difference in shown or known:
            sources |= dict.fromkeys(difference.sources)
        return list(sources)


def _is_shown(difference: QualityDifference | None) -> bool:
    return difference is not None and difference.is_shown


def diverged(point: ComparedPoint) -> bool:
    """Whether the losses of any repeat ended worse than they began, or are not finite."""
    return any(_run_diverged(run) for run in point.repeats)


def _run_diverged(run: RecordedRun) -> bool:
    if "diverged" in {finding.name for finding in findings_in(run.record.challenges)}:
        return True
    return bool(run.steps) and run.steps[max(run.steps)]["loss"] is None


def jobs_of(points: Sequence[ComparedPoint]) -> list[ComparedJob]:
    """The points that took a step, grouped into jobs: points of one job have equal settings apart from seed and strategy."""
    points_by_key: dict[str, list[ComparedPoint]] = {}
    settings_by_key: dict[str, dict[str, Any]] = {}
    for point in points:
        if not point.measured.steps:
            continue
        settings = step_settings(point.first_repeat)
        settings.pop("run.seed", None)
        key = json.dumps(settings, sort_keys=True, default=str)
        points_by_key.setdefault(key, []).append(point)
        settings_by_key[key] = settings
    return [ComparedJob(tuple(points), settings_by_key[key]) for key, points in points_by_key.items()]


def quality_metric(jobs: Sequence[ComparedJob]) -> QualityMetric | None:
    """The metric by which the quality of the jobs is compared; None if there is none.

    It is `evaluation.watch` of the first job, or else the held-out loss. Every job must have it, except jobs that diverged and
    jobs without a run that is done. It is never a metric of the test documents: whoever chooses by them cannot measure the
    choice with them any more.
    """
    if not jobs:
        return None
    first_run = jobs[0].points[0].first_repeat
    configured = str(first_run.config.get("evaluation.watch") or DEFAULT_METRIC)
    for name in (configured, DEFAULT_METRIC):
        if name.startswith("test/"):
            continue
        any_has_it = any(job.values(name) for job in jobs)
        all_have_it = all(job.values(name) or job.has_diverged or not job.done_runs for job in jobs)
        if any_has_it and all_have_it:
            greater_is_better = metric_direction(first_run, name)
            if greater_is_better is not None:
                return QualityMetric(name, greater_is_better)
    return None


def quality_metric_name(points: Sequence[ComparedPoint]) -> str | None:
    """The name of the metric to show first: the one that all jobs have, else the held-out loss if any point has it, else None."""
    metric = quality_metric(jobs_of(points))
    if metric is not None:
        return metric.name
    return DEFAULT_METRIC if any(DEFAULT_METRIC in point.measured.after for point in points) else None


def comparable_jobs(jobs: Sequence[ComparedJob], metric: QualityMetric) -> list[ComparedJob]:
    """The jobs that have the metric and did not diverge, as far as it was measured in the same way as for the first of them."""
    measured = [job for job in jobs if job.values(metric.name) and not job.has_diverged]
    comparable = []
    for job in measured:
        first_run = measured[0].points[0].first_repeat
        if why_measured_differently(first_run, job.points[0].first_repeat, metric.name) is None:
            comparable.append(job)
    return comparable


def pairwise_level(number_of_jobs: int) -> float:
    """The level of each test if all pairs of the jobs are tested: the best was chosen among all, so every pair counts."""
    pairs = number_of_jobs * (number_of_jobs - 1) // 2
    return LEVEL / max(1, pairs)


def rank(jobs: Sequence[ComparedJob], metric: QualityMetric) -> RankedJobs | None:
    """The jobs that can be compared by the metric, the best first; None if fewer than two can be."""
    comparable = comparable_jobs(jobs, metric)
    if len(comparable) < 2:
        return None
    sign = -1 if metric.greater_is_better else 1
    ranked = sorted(comparable, key=lambda job: sign * median(job.values(metric.name)))
    level = pairwise_level(len(ranked))
    differences: list[QualityDifference | None] = [None]
    differences += [quality_difference(ranked[0], job, metric.name, level) for job in ranked[1:]]
    return RankedJobs(metric, ranked, differences)


def quality_difference(baseline: ComparedJob, job: ComparedJob, metric: str, level: float = LEVEL) -> QualityDifference:
    """How a metric of `job` differs from that of `baseline`, with all evidence on whether chance explains it.

    `level` is the significance level of each two-sided test. Both jobs must have the metric.
    """
    baseline_value = median(baseline.values(metric))
    relative = (median(job.values(metric)) - baseline_value) / (abs(baseline_value) or 1.0)
    return QualityDifference(
        relative=relative,
        seeds=max(baseline.seeds, job.seeds),
        seed_interval=_seed_interval(baseline, job, metric, level),
        document_interval=_document_interval(baseline, job, metric, level),
        reports_apart=_reports_apart(baseline, job, metric, relative),
    )


def _seed_interval(baseline: ComparedJob, job: ComparedJob, metric: str, level: float) -> tuple[float, float] | None:
    """Interval of the relative difference of a metric between the means over seeds, by Student's test with equal variances.

    None without two seeds of either job, and if no seed differs by more than rounding: such seeds are like repeats.
    """
    from trainer.monitors.forgetting import student_quantile

    baseline_values = baseline.values(metric)
    values = job.values(metric)
    degrees_of_freedom = len(baseline_values) + len(values) - 2
    if degrees_of_freedom < 1:
        return None
    baseline_mean = fmean(baseline_values)
    mean = fmean(values)
    scale = abs(median(baseline_values)) or 1.0

    # Standard deviation of a seed from the mean of its job, relative like the difference itself.
    deviations = [value - baseline_mean for value in baseline_values]
    deviations += [value - mean for value in values]
    squares = math.fsum(deviation**2 for deviation in deviations)
    standard_deviation = math.sqrt(squares / degrees_of_freedom) / scale
    if standard_deviation <= SAME_LOSS_TOLERANCE:
        return None

    relative = (mean - baseline_mean) / scale
    standard_error = standard_deviation * math.sqrt(1 / len(baseline_values) + 1 / len(values))
    margin = student_quantile(1 - level / 2, degrees_of_freedom) * standard_error
    return relative - margin, relative + margin


def _document_interval(
    baseline: ComparedJob, job: ComparedJob, metric: str, level: float
) -> tuple[float, float] | None:
    """Interval of the relative difference of a metric, from pairs of micro-batches with the same held-out documents.

    None if the runs kept no sums of the metric, if their micro-batches are other ones, or too few.
    """
    from trainer.monitors.forgetting import ratio_error, student_quantile

    baseline_run = baseline.done_runs[0]
    run = job.done_runs[0]
    if differing_keys(baseline_run, run, {"evaluation.batch", "evaluation.max_documents"}) is not None:
        return None
    pairs = _paired_sums(baseline_run, run, metric)
    if pairs is None:
        return None
    baseline_sums = [baseline_sum for baseline_sum, _ in pairs]
    sums = [run_sum for _, run_sum in pairs]
    total = math.fsum(baseline_sums)
    if len(pairs) < MIN_BATCHES or not total:
        return None
    quantile = student_quantile(1 - level / 2, len(pairs) - 1)
    if metric == DEFAULT_METRIC:
        # Micro-batches have different numbers of tokens: the difference is one of sums, and its error that of a ratio.
        relative = (math.fsum(sums) - total) / total
        margin = quantile * ratio_error(baseline_sums, sums)
        return relative - margin, relative + margin
    # Any other metric counts each micro-batch alike: Student's test of the paired changes.
    changes = [run_sum - baseline_sum for baseline_sum, run_sum in pairs]
    scale = abs(total) / len(pairs)
    relative = fmean(changes) / scale
    margin = quantile * stdev(changes) / math.sqrt(len(pairs)) / scale
    return relative - margin, relative + margin


def _paired_sums(baseline: RecordedRun, run: RecordedRun, metric: str) -> list[tuple[float, float]] | None:
    """(sum of the baseline, sum of the run) of a metric over each micro-batch of their last evaluations; None if not kept."""
    baseline_sums = _kept_sums(baseline, metric)
    sums = _kept_sums(run, metric)
    if baseline_sums is None or sums is None:
        return None
    # Another number of ranks has another number of empty micro-batches at the end, which sum to 0.
    common = min(len(baseline_sums), len(sums))
    if any(baseline_sums[common:]) or any(sums[common:]):
        return None
    pairs = []
    for baseline_sum, run_sum in zip(baseline_sums, sums, strict=False):
        if not math.isfinite(baseline_sum) or not math.isfinite(run_sum):
            return None
        if baseline_sum or run_sum:
            pairs.append((baseline_sum, run_sum))
    return pairs


def _kept_sums(run: RecordedRun, metric: str) -> list[float] | None:
    """The sums of a metric over each micro-batch of the run's last evaluation; None if the run did not keep them.

    The file is like `{"step": 40, "batches": {"eval/loss": [81.2, 79.9]}}`.
    """
    try:
        kept = json.loads(atomic_io.read_bytes(run.directory / LAST_HELD_OUT, max_bytes=MOST_BYTES))
        if kept["step"] != max(run.evaluations, default=0):
            return None  # the file is of an evaluation whose row in metrics.jsonl was lost
        return [float(batch_sum) for batch_sum in kept["batches"][metric]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _reports_apart(baseline: ComparedJob, job: ComparedJob, metric: str, relative: float) -> bool | None:
    """Whether the reports of `shardtune evaluate` on both jobs have intervals of a task's metric that do not overlap.

    They must lie as `relative` says: that of the job above the baseline's if it is positive. None if one of them has no report.
    """
    baseline_interval = _reported_interval(baseline.done_runs[0], metric)
    interval = _reported_interval(job.done_runs[0], metric)
    if baseline_interval is None or interval is None:
        return None
    baseline_low, baseline_high = baseline_interval
    low, high = interval
    return baseline_high < low if relative > 0 else high < baseline_low


def _reported_interval(run: RecordedRun, metric: str) -> tuple[float, float] | None:
    """(low, high) of a task's metric in the newest report of `shardtune evaluate` on the run's last weights; None without.

    `metric` is like `eval/qa/accuracy`: of the task `qa`, as in the report's `tasks` and their `metrics`.
    """
    parts = metric.split("/", 2)
    if len(parts) != 3:
        return None
    _, task, name = parts
    for kept in kept_reports(run.directory, EVALUATION):
        try:
            record = kept.report["tasks"][task]["metrics"][name]
            # A report may be of another checkpoint: then its value is another one.
            if math.isclose(record["value"], last_held_out_metrics(run)[metric], rel_tol=1e-6):
                return float(record["low"]), float(record["high"])
        except (KeyError, TypeError, ValueError):
            continue
    return None
