"""Tests whether two jobs of a comparison differ in a held-out metric, by all evidence on how much chance explains.

A job is all points that train the same: they differ in strategy and seed alone. Two jobs differ for certain only if their
difference is larger than what chance explains:

- points or repeats that differ in `run.seed` alone say by how much one job differs from itself;
- held-out documents, micro-batch by micro-batch in pairs, say how far the result depends on the documents chosen;
- intervals of `shardtune evaluate` say the same of a task's metric.

Of those that are known, all must agree. If none is known, no difference is shown. Repeats of one seed are no evidence: on a
deterministic machine they agree to the last digits, however much another seed would change.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import fmean, median, stdev

from launch.compare.compared_job import ComparedJob
from launch.compare.curves import SAME_LOSS_TOLERANCE
from launch.compare.interval import Interval
from launch.compare.metric_meaning import HELD_OUT_LOSS, differing_keys
from launch.compare.run_files import RecordedRun, last_held_out_metrics
from strategies import atomic_io
from trainer.reporting.results import EVALUATION_REPORT, LAST_HELD_OUT, kept_reports
from trainer.reporting.run_record import MAX_RECORD_BYTES

SIGNIFICANCE_LEVEL = 0.05
"""How often, at most, equal jobs are said to differ, over all pairs of a comparison together."""
MIN_BATCHES = 4
"""Micro-batches of held-out documents below which there is no interval.

With four of them, equal models are said to differ as rarely as with eight: 5 to 6 % of 6,000 made-up pairs at a level of 5 %.
"""


@dataclass(frozen=True, slots=True)
class QualityDifference:
    """How the metric of one job differs from that of a baseline job, and whether chance may explain it."""

    relative_difference: float
    """(value - baseline value) / |baseline value|: positive if the value is larger than the baseline's."""
    num_seeds: int
    """How many seeds the job with more seeds has."""
    seed_interval: Interval | None = None
    """Confidence interval of the relative difference over seeds; None for one seed each, or if seeds differ by rounding alone."""
    document_interval: Interval | None = None
    """Confidence interval of the relative difference over held-out documents; None if it is not known."""
    report_intervals_disjoint: bool | None = None
    """Whether the intervals that `shardtune evaluate` reported do not overlap; None unless it reported on both jobs."""

    @property
    def is_significant(self) -> bool:
        """Whether the difference between two jobs counts: chance does not explain it.

        It must be larger than rounding. At least one kind of evidence (seeds, documents, reports) must be known, and every
        known one must exclude chance.
        """
        excludes_chance: list[bool] = []  # for each kind of evidence that is known
        for interval in (self.seed_interval, self.document_interval):
            if interval is not None:
                # An interval on the other side of zero is evidence for the opposite.
                excludes_chance.append(interval.low > 0 if self.relative_difference > 0 else interval.high < 0)
        if self.report_intervals_disjoint is not None:
            excludes_chance.append(self.report_intervals_disjoint)
        is_more_than_rounding = abs(self.relative_difference) > SAME_LOSS_TOLERANCE
        return is_more_than_rounding and bool(excludes_chance) and all(excludes_chance)

    @property
    def evidence_sources(self) -> list[str]:
        """The kinds of evidence that are known, as nouns for a sentence, such as `["seeds"]`; empty if none is."""
        nouns = []
        if self.document_interval is not None:
            nouns.append("held-out documents")
        if self.seed_interval is not None:
            nouns.append("seeds")
        if self.report_intervals_disjoint is not None:
            nouns.append("intervals of shardtune evaluate")
        return nouns

    @property
    def evidence_text(self) -> str:
        """The known evidence with its numbers, for a sentence: `95 % interval over 3 seeds +1.20% to +2.10%`.

        Empty if none is known.
        """
        clauses = []
        if self.document_interval is not None:
            clauses.append(f"95 % interval over held-out documents {_percent_text(self.document_interval)}")
        if self.seed_interval is not None:
            clauses.append(f"95 % interval over {self.num_seeds} seeds {_percent_text(self.seed_interval)}")
        if self.report_intervals_disjoint is not None:
            apart_or_overlap = "apart" if self.report_intervals_disjoint else "overlap"
            clauses.append(f"intervals of shardtune evaluate {apart_or_overlap}")
        return "; ".join(clauses)


def _percent_text(interval: Interval) -> str:
    return f"{interval.low:+.2%} to {interval.high:+.2%}"


def quality_difference(
    baseline: ComparedJob, job: ComparedJob, metric: str, significance_level: float = SIGNIFICANCE_LEVEL
) -> QualityDifference:
    """Test whether two jobs differ in a held-out metric, with all evidence on whether chance explains the difference.

    A job is all points that train the same: they differ in strategy and seed alone. `metric`: such as `eval/loss`; both
    jobs must have it. `significance_level`: of each two-sided test.
    """
    baseline_value = median(baseline.value_of_each_seed(metric))
    scale = abs(baseline_value) or 1.0  # if the baseline is 0, the difference is absolute
    relative_difference = (median(job.value_of_each_seed(metric)) - baseline_value) / scale
    return QualityDifference(
        relative_difference=relative_difference,
        num_seeds=max(baseline.num_seeds, job.num_seeds),
        seed_interval=_seed_interval(baseline, job, metric, significance_level),
        document_interval=_document_interval(baseline, job, metric, significance_level),
        report_intervals_disjoint=_report_intervals_disjoint(
            baseline, job, metric, job_is_larger=relative_difference > 0
        ),
    )


def _seed_interval(baseline: ComparedJob, job: ComparedJob, metric: str, significance_level: float) -> Interval | None:
    """How far the difference of two jobs depends on the seed: a confidence interval.

    It is that of the relative difference of the metric, by Student's t-test with equal variances, on the means over the
    seeds. None if both jobs have one seed, or if the seeds of a job differ by rounding alone: such seeds are like repeats.
    """
    from trainer.monitors.forgetting import student_t_quantile

    baseline_values = baseline.value_of_each_seed(metric)
    values = job.value_of_each_seed(metric)
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

    relative_difference = (mean - baseline_mean) / scale
    standard_error = standard_deviation * math.sqrt(1 / len(baseline_values) + 1 / len(values))
    margin = student_t_quantile(1 - significance_level / 2, degrees_of_freedom) * standard_error
    return Interval(relative_difference - margin, relative_difference + margin)


def _document_interval(
    baseline: ComparedJob, job: ComparedJob, metric: str, significance_level: float
) -> Interval | None:
    """How far the difference of two jobs depends on the held-out documents: a confidence interval.

    It is that of the relative difference of the metric. Both jobs evaluated the same micro-batches of documents, so these
    are compared in pairs. None if

    - the settings of the two evaluations differ in batch size or number of documents,
    - a run kept no sums of the metric, or their micro-batches do not correspond,
    - there are fewer than `MIN_BATCHES` micro-batches, or the baseline's sums add up to 0.
    """
    from trainer.monitors.forgetting import standard_error_of_ratio, student_t_quantile

    # One run of each job, because its runs evaluated the same documents: several would be no further evidence.
    baseline_run = baseline.done_runs[0]
    run = job.done_runs[0]
    if differing_keys(baseline_run, run, {"evaluation.batch", "evaluation.max_documents"}):
        return None
    pairs = _paired_batch_sums(baseline_run, run, metric)
    if pairs is None:
        return None
    baseline_sums = [baseline_sum for baseline_sum, _ in pairs]
    run_sums = [run_sum for _, run_sum in pairs]
    baseline_total = math.fsum(baseline_sums)
    if len(pairs) < MIN_BATCHES or not baseline_total:
        return None
    quantile = student_t_quantile(1 - significance_level / 2, len(pairs) - 1)
    if metric == HELD_OUT_LOSS:
        # The loss is one per token, and micro-batches have different numbers of tokens: so the difference is one of sums, and its
        # error that of a ratio.
        relative_difference = (math.fsum(run_sums) - baseline_total) / baseline_total
        margin = quantile * standard_error_of_ratio(baseline_sums, run_sums)
        return Interval(relative_difference - margin, relative_difference + margin)
    # Any other metric counts each micro-batch alike: Student's test of the paired changes.
    changes = [run_sum - baseline_sum for baseline_sum, run_sum in pairs]
    scale = abs(baseline_total) / len(pairs)
    relative_difference = fmean(changes) / scale
    margin = quantile * stdev(changes) / math.sqrt(len(pairs)) / scale
    return Interval(relative_difference - margin, relative_difference + margin)


def _paired_batch_sums(baseline: RecordedRun, run: RecordedRun, metric: str) -> list[tuple[float, float]] | None:
    """Pair what two runs measured in each micro-batch of the last evaluation: (the baseline's sum of a metric, the run's sum).

    Empty micro-batches are left out. None if a run did not keep its sums, if one evaluated more documents than the other,
    or if a sum is not finite.
    """
    baseline_sums = _kept_batch_sums(baseline, metric)
    run_sums = _kept_batch_sums(run, metric)
    if baseline_sums is None or run_sums is None:
        return None
    # Another number of ranks has another number of empty micro-batches at the end, whose sums are exactly 0.
    num_common = min(len(baseline_sums), len(run_sums))
    if any(baseline_sums[num_common:]) or any(run_sums[num_common:]):
        return None
    pairs = []
    for baseline_sum, run_sum in zip(baseline_sums, run_sums, strict=False):
        if not math.isfinite(baseline_sum) or not math.isfinite(run_sum):
            return None
        if baseline_sum or run_sum:
            pairs.append((baseline_sum, run_sum))
    return pairs


def _kept_batch_sums(run: RecordedRun, metric: str) -> list[float] | None:
    """What a run kept of its last evaluation: the sum of a metric over each micro-batch; None if it kept none.

    The file is like `{"step": 40, "batches": {"eval/loss": [81.2, 79.9]}}`.
    """
    try:
        last_evaluation = json.loads(atomic_io.read_bytes(run.directory / LAST_HELD_OUT, max_bytes=MAX_RECORD_BYTES))
        if last_evaluation["step"] != max(run.evaluations, default=0):
            return None  # the file is of an evaluation whose row in metrics.jsonl was lost
        return [float(batch_sum) for batch_sum in last_evaluation["batches"][metric]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _report_intervals_disjoint(
    baseline: ComparedJob, job: ComparedJob, metric: str, *, job_is_larger: bool
) -> bool | None:
    """Whether reports of `shardtune evaluate` show that two jobs differ in a task's metric: their intervals do not overlap.

    The interval of `job` must lie above the baseline's if `job_is_larger`, else below it. The report is that on the first
    run of a job, whose other runs have nearly the same weights. None if a job has no such report.
    """
    # None if `shardtune evaluate` did not report on the run's last weights.
    baseline_interval = _reported_interval(baseline.done_runs[0], metric)
    job_interval = _reported_interval(job.done_runs[0], metric)
    if baseline_interval is None or job_interval is None:
        return None
    if job_is_larger:
        return baseline_interval.high < job_interval.low
    return job_interval.high < baseline_interval.low


def _reported_interval(run: RecordedRun, metric: str) -> Interval | None:
    """The confidence interval of a task's metric in the newest report of `shardtune evaluate` on a run.

    `metric`: such as `eval/qa/accuracy`, the metric `accuracy` of the task `qa`. The report must be on the run's last
    weights. None if there is no such report, or if no task has the metric.
    """
    parts = metric.split("/", 2)
    if len(parts) != 3:
        return None
    _, task, task_metric = parts
    for kept_report in kept_reports(run.directory, EVALUATION_REPORT):  # the newest first
        try:
            reported = kept_report.report["tasks"][task]["metrics"][task_metric]
            # A report does not say of which step the weights are: that of another checkpoint has another value than the run's
            # last evaluation.
            if math.isclose(reported["value"], last_held_out_metrics(run)[metric], rel_tol=1e-6):
                return Interval(float(reported["low"]), float(reported["high"]))
        except (KeyError, TypeError, ValueError):
            continue
    return None
