"""The verdict on a point of a comparison in one sentence: its loss or held-out metric beside the baseline's, and its costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from launch.compare.compared_job import ComparedJob, group_points_into_jobs
from launch.compare.compared_point import ComparedPoint
from launch.compare.curves import NUM_FIRST_STEPS, first_non_finite_loss_step, format_difference, loss_relevant_settings
from launch.compare.exported_step import earlier_export_text
from launch.compare.metric_meaning import keys_measured_differently
from launch.compare.names import ABSENT_VALUE, KEYS_FIRST_IN_NAME
from launch.compare.quality import bonferroni_level, comparable_jobs, quality_metric
from launch.compare.quality_evidence import SIGNIFICANCE_LEVEL, QualityDifference, quality_difference
from trainer.reporting.numbers import format_metric

MAX_NAMED_SETTINGS = 3
"""Settings that a verdict names as the reason of a difference."""


@dataclass(frozen=True, slots=True)
class VerdictContext:
    """What the verdict on one point needs to know of all points of the comparison."""

    point_by_name: dict[str, ComparedPoint]
    job_by_point: dict[str, ComparedJob]
    """By name of a point that took a step: the job that the point belongs to, with all of the job's points."""
    significance_level: float
    """Significance level of the test of one pair of jobs. The conclusion uses the same, so that both say the same."""

    @classmethod
    def from_points(cls, points: Sequence[ComparedPoint]) -> VerdictContext:
        """Collect what verdicts need from all points.

        A job is all points that train the same: they differ in strategy and seed alone. The more pairs of jobs are tested,
        the smaller the level of each test (Bonferroni), so that chance rarely makes any pair look different.
        """
        jobs = group_points_into_jobs(points)
        job_by_point: dict[str, ComparedJob] = {}
        for job in jobs:
            for point in job.points:
                job_by_point[point.name] = job
        metric = quality_metric(jobs)
        significance_level = (
            SIGNIFICANCE_LEVEL if metric is None else bonferroni_level(len(comparable_jobs(jobs, metric)))
        )
        return cls(
            point_by_name={point.name: point for point in points},
            job_by_point=job_by_point,
            significance_level=significance_level,
        )


def point_verdict(point: ComparedPoint, context: VerdictContext, *, is_default_baseline: bool) -> str:
    """Write the verdict on a point in one sentence: `fsdp2: same loss as ddp within 3e-7; 1.2 x its tokens/s, 0.6 x its memory`.

    A point is one combination of settings, a job all points that train the same with other strategies or seeds. The
    baseline of a point is an earlier point, of the same job if there is one. The sentence begins with how the point ended,
    unless it is done. Then, the first case that applies:

    - The only point of a comparison: its own losses and metrics.
    - The default baseline: its own numbers.
    - A point without a baseline, such as a refused one: nothing more.
    - A point of the same job as its baseline: whether it has the baseline's loss, as it must; speed and memory.
    - Any other point: how its held-out metric compares with the baseline's; speed and memory.
    """
    clauses = [point.unfinished_state] if point.unfinished_state else []
    if len(context.point_by_name) == 1:
        clauses = [_single_point_verdict(point)]  # it says itself how the point ended
    elif is_default_baseline:
        clauses += _default_baseline_clauses(point)
    elif point.baseline_name is not None:
        baseline = context.point_by_name[point.baseline_name]
        clauses.append(
            _loss_verdict(point) if point.should_have_loss_of_baseline else _quality_verdict(baseline, point, context)
        )
        cost_clause = _speed_and_memory_clause(baseline, point)
        if cost_clause is not None:
            clauses.append(cost_clause)
    non_finite_step = first_non_finite_loss_step(point.first_repeat)
    if non_finite_step is not None:
        clauses.append(f"its loss is NaN or infinite from step {non_finite_step} on")
    return f"{point.name}: {'; '.join(clauses)}"


def _default_baseline_clauses(point: ComparedPoint) -> list[str]:
    """Clauses on the point that others are compared with: last held-out metric, speed and memory, as far as they are known."""
    measured = point.measured
    metric = quality_metric([_single_point_job(point)])
    numbers = []
    if metric is not None and metric.name in measured.metrics_at_end:
        numbers.append(f"{metric.name} {format_metric(measured.metrics_at_end[metric.name])}")
    if measured.tokens_per_s:
        numbers.append(f"{measured.tokens_per_s:,.0f} tokens/s")
    if measured.memory_gib:
        numbers.append(f"{measured.memory_gib:.3g} GiB")
    clauses = [", ".join(numbers)] if numbers else []
    return [*clauses, "the others are compared with it"]


def _single_point_job(point: ComparedPoint) -> ComparedJob:
    """A job of this point alone, through which the metrics of its repeats can be read."""
    return ComparedJob(points=(point,), settings={})


def _quality_verdict(baseline: ComparedPoint, point: ComparedPoint, context: VerdictContext) -> str:
    """A clause on whether a held-out metric is better than the baseline's: `eval/loss 2.3100, better than ddp (2.4000; ...)`.

    The two are of different jobs, seeds or data. The first case that applies:

    - They have no held-out metric in common: what keeps them from being compared.
    - The metric was measured in two ways (other documents, another loss): its values are not compared.
    - They are one job with two seeds: both values, without a judgement.
    - Otherwise: both values, and whether the point is better, worse, or not shown to differ. The values are those of the
      two points. The judgement is about their two jobs, with all seeds of these.
    """
    baseline_alone = _single_point_job(baseline)
    point_alone = _single_point_job(point)
    metric = quality_metric([baseline_alone, point_alone])
    if metric is None:
        return _verdict_without_metric(baseline, point)
    baseline_values = baseline_alone.value_of_each_seed(metric.name)
    point_values = point_alone.value_of_each_seed(metric.name)
    if not baseline_values or not point_values:
        return _verdict_without_metric(baseline, point)
    keys = keys_measured_differently(baseline.first_repeat, point.first_repeat, metric.name)
    if keys:
        return f"its {metric.name} cannot be compared with that of {baseline.name} (other {', '.join(keys)})"

    baseline_value = format_metric(median(baseline_values))
    point_value = format_metric(median(point_values))
    # A point whose first repeat never began is in no job, and stands for itself.
    baseline_job = context.job_by_point.get(baseline.name, baseline_alone)
    point_job = context.job_by_point.get(point.name, point_alone)
    if baseline_job is point_job:
        if baseline.first_repeat.config.get("run.seed") != point.first_repeat.config.get("run.seed"):
            return f"{metric.name} {point_value}, with another seed than {baseline.name} ({baseline_value})"
        # Their settings and seeds are the same, but their data is not: a job with both would compare with itself.
        baseline_job = baseline_alone
        point_job = point_alone
    difference = quality_difference(baseline_job, point_job, metric.name, context.significance_level)
    judgement = _judgement_text(difference, greater_is_better=metric.greater_is_better)
    evidence = difference.evidence_text or _no_evidence_text((baseline, point), difference.num_seeds)
    return f"{metric.name} {point_value}, {judgement} {baseline.name} ({baseline_value}; {evidence})"


def _judgement_text(difference: QualityDifference, *, greater_is_better: bool) -> str:
    """What a difference from a baseline says about quality, to be followed by the baseline's name: `better than`."""
    if not difference.is_significant:
        return "no difference shown from"
    is_larger = difference.relative_difference > 0
    return "better than" if is_larger == greater_is_better else "worse than"


def _verdict_without_metric(baseline: ComparedPoint, point: ComparedPoint) -> str:
    """A clause on two points without a common held-out metric: why their losses cannot be compared, or how their jobs differ."""
    if point.incomparable_settings:
        return _loss_verdict(point)
    differing_settings = _differing_settings_text(baseline, point)
    return f"trains another job than {baseline.name}{differing_settings}; no held-out metric of both to compare"


def _no_evidence_text(points: Sequence[ComparedPoint], num_seeds: int) -> str:
    """Say why no evidence tells what chance does to a metric: `one run each`.

    `points`: the two that are compared. `num_seeds`: the number of seeds of the job that has more of them.
    """
    if num_seeds > 1:
        return f"{num_seeds} seeds differ by rounding alone"
    if all(point.summary.repeats == 1 for point in points):
        return "one run each"
    return "one seed each: repeats of a seed say nothing of quality"


def _differing_settings_text(baseline: ComparedPoint, point: ComparedPoint) -> str:
    """Name the settings in which two points train different jobs: ` (other optim.lr, tuning.name)`.

    At most three, empty if none differs.
    """
    baseline_settings = loss_relevant_settings(baseline.first_repeat)
    point_settings = loss_relevant_settings(point.first_repeat)
    differing_keys = []
    for key in baseline_settings | point_settings:
        if baseline_settings.get(key, ABSENT_VALUE) != point_settings.get(key, ABSENT_VALUE):
            differing_keys.append(key)
    differing_keys.sort(key=lambda key: key not in KEYS_FIRST_IN_NAME)  # the most telling ones first
    return f" (other {', '.join(differing_keys[:MAX_NAMED_SETTINGS])})" if differing_keys else ""


def _single_point_verdict(point: ComparedPoint) -> str:
    """The verdict on the only point of a comparison: how it ended, its losses, and its held-out metrics before and after.

    Such as `done, 40 steps, loss 2.9 -> 2.3, eval/loss 2.87 -> 2.34`. If it exports an earlier step, that step and its value
    follow.
    """
    measured = point.measured
    metrics_before_training = measured.metrics_before_training
    metrics_after_training = measured.metrics_at_end
    step_rows = point.first_repeat.steps.values()
    losses = [row["loss"] for row in step_rows if row["loss"] is not None]
    clauses = [point.unfinished_state or "done"]
    if measured.steps == 1:
        clauses.append("1 step")
    elif measured.steps:
        clauses.append(f"{measured.steps} steps")
    if len(losses) > 1:
        clauses.append(f"loss {format_metric(losses[0])} -> {format_metric(losses[-1])}")
    for metric, value_after in metrics_after_training.items():
        # The perplexity is exp(loss): it would say the same twice.
        if metric in metrics_before_training and metric != "eval/perplexity":
            value_before = metrics_before_training[metric]
            clauses.append(f"{metric} {format_metric(value_before)} -> {format_metric(value_after)}")
    export_text = earlier_export_text(point.first_repeat)
    export_clause = f"; it exports {export_text}" if export_text else ""
    return ", ".join(clauses) + export_clause


def _loss_verdict(point: ComparedPoint) -> str:
    """A clause on whether a point has the loss of its baseline, as points of one job must. The first case that applies:

    - The losses are of different data, order or objective: that they cannot be compared, with at most three of the
      settings.
    - No step has a loss in both: that there is none to compare.
    - The losses of the first `NUM_FIRST_STEPS` common steps are equal, or nearly (`SAME_LOSS_TOLERANCE`): `same loss as ddp
      within 3e-7`. If there are fewer common steps, the clause says how many.
    - Otherwise: how far they differ, and at which of these steps.
    """
    baseline_name = point.baseline_name
    if point.incomparable_settings:
        settings = [difference.setting for difference in point.incomparable_settings]
        named_settings = ", ".join(settings[:MAX_NAMED_SETTINGS])
        more = ""
        if len(settings) > MAX_NAMED_SETTINGS:
            more = f" and {len(settings) - MAX_NAMED_SETTINGS} more"
        return f"its losses cannot be compared with those of {baseline_name} (other {named_settings}{more})"
    difference = point.loss_difference
    if difference is None:
        return f"no step to compare with {baseline_name}"
    over_steps = ""
    if difference.num_common_steps < NUM_FIRST_STEPS:
        over_steps = f" over {difference.num_common_steps} step{'s' if difference.num_common_steps > 1 else ''}"
    largest_difference = format_difference(difference.first_steps_difference)
    if difference.first_steps_difference == 0:
        return f"same loss as {baseline_name}, to the last digit{over_steps}"
    if difference.is_same_loss:
        return f"same loss as {baseline_name} within {largest_difference}{over_steps}"
    step = difference.step_of_first_steps_difference
    return f"not the loss of {baseline_name}: it differs by {largest_difference} at step {step}"


def _speed_and_memory_clause(baseline: ComparedPoint, point: ComparedPoint) -> str | None:
    """What a point costs in multiples of its baseline: `1.2 x its tokens/s, 0.6 x its memory`.

    What is not known of both points is left out; None if neither is known.
    """
    ratios = []
    if baseline.measured.tokens_per_s and point.measured.tokens_per_s:
        speed = f"{_ratio_text(point.measured.tokens_per_s / baseline.measured.tokens_per_s)} x its tokens/s"
        # From the slowest to the fastest repeat. If these overlap, nobody knows which point is the faster.
        baseline_spread = baseline.summary.spread
        point_spread = point.summary.spread
        if baseline_spread is not None and point_spread is not None and baseline_spread.overlaps(point_spread):
            speed += " (less than the repeats differ)"
        ratios.append(speed)
    if baseline.measured.memory_gib and point.measured.memory_gib:
        ratios.append(f"{_ratio_text(point.measured.memory_gib / baseline.measured.memory_gib)} x its memory")
    return ", ".join(ratios) or None


def _ratio_text(ratio: float) -> str:
    """A ratio with about two digits: 0.07, 1.3, 12."""
    if ratio < 0.1:
        return f"{ratio:.2f}"
    if ratio < 10:
        return f"{ratio:.1f}"
    return f"{ratio:.0f}"
