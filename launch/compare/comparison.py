"""Compares points: their names, loss differences from a baseline, settings that differ, and a verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from launch.compare.compared_axes import ComparedAxis, compared_axes
from launch.compare.compared_point import ComparedPoint as ComparedPoint
from launch.compare.conclusion import Conclusion, conclude_comparison
from launch.compare.curves import (
    FIRST_STEPS,
    SAME_LOSS_TOLERANCE,
    baseline_index,
    compare_losses,
    first_non_finite_loss_step,
    format_difference,
    identity_differences,
    loss_relevant_settings,
)
from launch.compare.metric_meaning import keys_measured_differently
from launch.compare.names import ABSENT_VALUE, KEYS_FIRST_IN_NAME, SettingDifference, names_of_runs, setting_differences
from launch.compare.quality import (
    SIGNIFICANCE_LEVEL,
    ComparedJob,
    bonferroni_level,
    comparable_jobs,
    group_points_into_jobs,
    quality_difference,
    quality_metric,
)
from launch.compare.recommendation import ranges_overlap
from launch.compare.repeats import REFUSED, MeasuredPoint, read_measured_point
from launch.compare.run_files import RecordedRun, RunMeasurements
from launch.compare.settings import PointSource
from trainer.reporting.numbers import format_metric
from trainer.reporting.run_record import RunRecord

TEST_DOCUMENTS = "test documents (no answer, verdict or ranking above uses them: choose nothing by them)"
"""Title of the section that a comparison ends with, if a run has test documents."""
MAX_NAMED_SETTINGS = 3
"""Settings that a verdict names as the reason of a difference."""
MAX_PEAK_RATIO = 1.01
"""Earlier versions measured the peak of a CPU in each run anew: up to a percent is noise."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compared points, in the order in which they were named, and what the comparison concludes."""

    points: tuple[ComparedPoint, ...]
    default_baseline_name: str
    """Name of the first point that took a step. Others are compared with it unless an earlier point trains the same job."""
    differences: tuple[SettingDifference, ...]
    notes: tuple[str, ...]
    """Caveats for the reader, such as speeds of different machines."""
    axes: tuple[ComparedAxis, ...]
    """Settings along which the points differ, in the order of the command."""
    conclusion: Conclusion
    """The answer in a few sentences, and which point to take when."""

    @property
    def begun_points(self) -> list[ComparedPoint]:
        """The points that took at least one step: the others have no numbers to show."""
        return [point for point in self.points if point.measured.steps]

    @property
    def held_out_metrics(self) -> list[str]:
        """Names of the held-out metrics that any point has, each once, in the order of the points."""
        names: dict[str, None] = {}
        for point in self.points:
            names |= dict.fromkeys(point.measured.before) | dict.fromkeys(point.measured.after)
        return list(names)

    @property
    def has_comparable_mfu(self) -> bool:
        """Whether all runs with an MFU divide their speed by the same peak. A peak measured on a busy CPU is that run's alone."""
        runs: list[RecordedRun] = []
        for point in self.points:
            runs += point.repeats
        return _are_one_peak(_mfu_peaks(runs))


def compare_points(
    sources: Sequence[PointSource], gpu_hour_price: Callable[[str], float | None] = lambda name: None
) -> Comparison:
    """Read the runs of every point, compare each point with its baseline, and conclude which one to take.

    A point is one combination of settings; its repeats are its runs. `sources` say for each point where its runs are.
    `gpu_hour_price` maps the driver's name of a card to US dollars an hour, or None if its price is not known. Raises
    ConfigError if a directory holds no run.
    """
    measured_points = [read_measured_point(source, gpu_hour_price) for source in sources]
    first_repeats = [measured.first_repeat for measured in measured_points]
    differences = setting_differences(first_repeats)
    # The name that a source has wins over the one made from the settings that differ.
    generated_names = names_of_runs(first_repeats, differences)
    names = [source.name or generated for source, generated in zip(sources, generated_names, strict=True)]

    # The default baseline is the first point that took a step, or the first of all if none did.
    default_index = next((index for index, run in enumerate(first_repeats) if run.steps), 0)
    default_name = names[default_index]
    points = [_compared_point(measured_points, names, index, default_index) for index in range(len(sources))]
    context = _VerdictContext.from_points(points)
    points_with_verdict = []
    for point in points:
        verdict = _point_verdict(point, context, is_default_baseline=point.name == default_name)
        points_with_verdict.append(replace(point, verdict=verdict))
    return Comparison(
        points=tuple(points_with_verdict),
        default_baseline_name=default_name,
        differences=tuple(differences),
        notes=tuple(_comparison_notes(measured_points, names)),
        axes=tuple(compared_axes(names, differences, sources[0].command_keys)),
        conclusion=conclude_comparison(points_with_verdict, differences),
    )


def _compared_point(
    measured_points: list[MeasuredPoint], names: list[str], index: int, default_index: int
) -> ComparedPoint:
    """The point at `index` beside its baseline, without a verdict yet.

    The baseline is the earliest point that trains the same job, or else the default baseline, which is at `default_index`. These
    have no baseline: the default baseline itself, points before it, and refused points, because they have no losses.
    """
    measured_point = measured_points[index]
    baseline_position = None
    if index != default_index and measured_point.state != REFUSED:
        first_repeats = [any_point.first_repeat for any_point in measured_points]
        baseline_position = baseline_index(first_repeats, index, default_index)
    if baseline_position is None:
        return ComparedPoint(
            names[index], measured_point, baseline_name=None, loss_difference=None, identity_differences=()
        )

    baseline_run = measured_points[baseline_position].first_repeat
    run = measured_point.first_repeat
    differences = tuple(identity_differences(baseline_run, run))
    has_equal_settings = loss_relevant_settings(baseline_run) == loss_relevant_settings(run)
    return ComparedPoint(
        names[index],
        measured_point,
        baseline_name=names[baseline_position],
        loss_difference=None if differences else compare_losses(baseline_run, run),
        identity_differences=differences,
        is_same_job_as_baseline=has_equal_settings and not differences,
    )


@dataclass(frozen=True, slots=True)
class _VerdictContext:
    """What the verdict on one point needs to know of all points of the comparison."""

    point_by_name: dict[str, ComparedPoint]
    job_by_point: dict[str, ComparedJob]
    """By name of a point that took a step: the job that the point belongs to, with all of the job's points."""
    significance_level: float
    """Significance level of the test of one pair of jobs. The conclusion uses the same, so that both say the same."""

    @classmethod
    def from_points(cls, points: Sequence[ComparedPoint]) -> _VerdictContext:
        """The context of points that have no verdict yet."""
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


def _point_verdict(point: ComparedPoint, context: _VerdictContext, *, is_default_baseline: bool) -> str:
    """The verdict on a point as one sentence, such as `fsdp2: same loss as ddp within 3e-7; 1.2 x its tokens/s`.

    It begins with how the point ended, unless it is done. Then, the first case that applies:

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
            _loss_verdict(point) if point.is_same_job_as_baseline else _quality_verdict(baseline, point, context)
        )
        cost_clause = _speed_and_memory_clause(baseline, point)
        if cost_clause is not None:
            clauses.append(cost_clause)
    non_finite_step = first_non_finite_loss_step(point.first_repeat)
    if non_finite_step is not None:
        clauses.append(f"its loss is NaN or infinite from step {non_finite_step} on")
    return f"{point.name}: {'; '.join(clauses)}"


def _default_baseline_clauses(point: ComparedPoint) -> list[str]:
    """Clauses on the default baseline: its last held-out metric, speed and memory, as far as they are known."""
    measured = point.measured
    metric = quality_metric([_single_point_job(point)])
    numbers = []
    if metric is not None and metric.name in measured.after:
        numbers.append(f"{metric.name} {format_metric(measured.after[metric.name])}")
    if measured.tokens_per_s:
        numbers.append(f"{measured.tokens_per_s:,.0f} tokens/s")
    if measured.memory_gib:
        numbers.append(f"{measured.memory_gib:.3g} GiB")
    clauses = [", ".join(numbers)] if numbers else []
    return [*clauses, "the others are compared with it"]


def _single_point_job(point: ComparedPoint) -> ComparedJob:
    """A job of this point alone, to read the metrics of its repeats."""
    return ComparedJob(points=(point,), settings={})


def _quality_verdict(baseline: ComparedPoint, point: ComparedPoint, context: _VerdictContext) -> str:
    """A clause on how the held-out metric of a point compares with that of a baseline of another job, seed or data.

    The first case that applies:

    - The two have no held-out metric in common: what keeps them from being compared.
    - The metric was measured in two ways (other documents, another loss): its values are not compared.
    - The two are one job with two seeds: both values, without a judgement.
    - Otherwise: both values, and whether the point is better, worse, or not shown to differ. The values are those of the two
      points. The judgement is about their two jobs, with all seeds of these.
    """
    baseline_alone = _single_point_job(baseline)
    point_alone = _single_point_job(point)
    metric = quality_metric([baseline_alone, point_alone])
    if metric is None or not baseline_alone.values(metric.name) or not point_alone.values(metric.name):
        return _verdict_without_metric(baseline, point)
    keys = keys_measured_differently(baseline.first_repeat, point.first_repeat, metric.name)
    if keys:
        return f"its {metric.name} cannot be compared with that of {baseline.name} (other {', '.join(keys)})"

    baseline_value = format_metric(median(baseline_alone.values(metric.name)))
    point_value = format_metric(median(point_alone.values(metric.name)))
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
    if not difference.is_significant:
        judgement = "no difference shown from"
    elif (difference.relative_difference > 0) == metric.greater_is_better:
        judgement = "better than"
    else:
        judgement = "worse than"
    evidence = difference.evidence_text or _no_evidence_text((baseline, point), difference.num_seeds)
    return f"{metric.name} {point_value}, {judgement} {baseline.name} ({baseline_value}; {evidence})"


def _verdict_without_metric(baseline: ComparedPoint, point: ComparedPoint) -> str:
    """A clause on two points without a common held-out metric: why their losses cannot be compared, or how they differ."""
    if point.identity_differences:
        return _loss_verdict(point)
    differing_settings = _differing_settings_text(baseline, point)
    return f"trains another job than {baseline.name}{differing_settings}; no held-out metric of both to compare"


def _no_evidence_text(points: Sequence[ComparedPoint], num_seeds: int) -> str:
    """Why nothing says what chance does to the metric, such as `one run each`.

    `num_seeds`: the number of seeds of the job that has more of them.
    """
    if num_seeds > 1:
        return f"{num_seeds} seeds differ by rounding alone"
    if all(point.summary.repeats == 1 for point in points):
        return "one run each"
    return "one seed each: repeats of a seed say nothing of quality"


def _differing_settings_text(baseline: ComparedPoint, point: ComparedPoint) -> str:
    """The settings in which the jobs of two points differ, such as ` (other optim.lr, tuning.name)`; at most three are named.

    Empty if none differs.
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
    """The verdict on the only point of a comparison: how it ended, its losses and its held-out metrics.

    Such as `done, 40 steps, loss 2.9 -> 2.3, eval/loss 2.87 -> 2.34`.
    """
    measured = point.measured
    metrics_before_training = measured.before
    metrics_after_training = measured.after
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
    return ", ".join(clauses)


def _loss_verdict(point: ComparedPoint) -> str:
    """A clause on how a point's loss compares with its baseline's. The first case that applies:

    - The losses are of different data, order or objective: that they cannot be compared, with at most three of the settings.
    - No step has a loss in both: that there is none to compare.
    - The losses of the first `FIRST_STEPS` common steps are equal, or nearly: `same loss as ddp within 3e-7`. If there are fewer
      common steps, the clause says how many.
    - Otherwise: how far they differ, and at which of these steps.
    """
    baseline_name = point.baseline_name
    if point.identity_differences:
        settings = [difference.setting for difference in point.identity_differences]
        named_settings = ", ".join(settings[:MAX_NAMED_SETTINGS])
        more = ""
        if len(settings) > MAX_NAMED_SETTINGS:
            more = f" and {len(settings) - MAX_NAMED_SETTINGS} more"
        return f"its losses cannot be compared with those of {baseline_name} (other {named_settings}{more})"
    difference = point.loss_difference
    if difference is None:
        return f"no step to compare with {baseline_name}"
    over_steps = ""
    if difference.num_common_steps < FIRST_STEPS:
        over_steps = f" over {difference.num_common_steps} step{'s' if difference.num_common_steps > 1 else ''}"
    largest_difference = format_difference(difference.largest_early)
    if difference.largest_early == 0:
        return f"same loss as {baseline_name}, to the last digit{over_steps}"
    if difference.is_same_loss:
        return f"same loss as {baseline_name} within {largest_difference}{over_steps}"
    return (
        f"not the loss of {baseline_name}: it differs by {largest_difference} at step {difference.largest_early_step}"
    )


def _speed_and_memory_clause(baseline: ComparedPoint, point: ComparedPoint) -> str | None:
    """Speed and memory as multiples of the baseline's, such as `1.2 x its tokens/s, 0.6 x its memory`.

    What is not known of both points is left out; None if neither is known.
    """
    ratios = []
    if baseline.measured.tokens_per_s and point.measured.tokens_per_s:
        speed = f"{_ratio_text(point.measured.tokens_per_s / baseline.measured.tokens_per_s)} x its tokens/s"
        # If the repeats of the two points overlap in speed, they cannot tell which point is the faster.
        baseline_spread = baseline.summary.spread
        point_spread = point.summary.spread
        if baseline_spread is not None and point_spread is not None and ranges_overlap(baseline_spread, point_spread):
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


def _comparison_notes(points: list[MeasuredPoint], names: list[str]) -> list[str]:
    """Caveats for the reader: what limits how far speeds, memory and losses of these points can be trusted."""
    runs: list[RecordedRun] = []
    for point in points:
        runs += point.repeats
    return [
        *_notes_on_peaks(runs),
        *_notes_on_machines([run.record for run in runs if not run.record.is_empty]),
        *_notes_on_measuring(points, runs),
        *_notes_on_unreadable_lines(runs),
        *_notes_on_repeats(points, names),
    ]


def _notes_on_measuring(points: list[MeasuredPoint], runs: list[RecordedRun]) -> list[str]:
    """Caveats on how speeds and memory were measured, and on when losses count as the same. `runs`: all repeats of the points."""
    notes = []
    if any(_has_few_steps(point.measured) for point in points):
        notes.append(
            f"Speeds of runs with less than {FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )
    if any(run.record.device == "cpu" for run in runs):
        notes.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    planning_methods = {point.measured.planned_by for point in points if point.measured.planned_by}
    notes += [f"Planned memory: {method}" for method in sorted(planning_methods)]
    if len(runs) > 1:
        notes.append(
            f"Same loss: a relative difference of at most {SAME_LOSS_TOLERANCE:g} over the first {FIRST_STEPS} steps "
            "that both runs have"
        )
    return notes


def _notes_on_unreadable_lines(runs: list[RecordedRun]) -> list[str]:
    """A caveat for each run with lines in its metrics or events that cannot be read."""
    notes = []
    for run in runs:
        if run.unreadable_lines == 1:
            notes.append(f"{run.directory}: 1 line of its metrics or events cannot be read and is left out")
        elif run.unreadable_lines:
            notes.append(
                f"{run.directory}: {run.unreadable_lines} lines of its metrics or events cannot be read and are left out"
            )
    return notes


def _notes_on_repeats(points: list[MeasuredPoint], names: list[str]) -> list[str]:
    """A caveat for each point whose repeats have different losses. `names`: the name of each point."""
    notes = []
    for point, name in zip(points, names, strict=True):
        difference = _largest_difference_of_repeats(point)
        if difference:
            notes.append(f"The losses of the repeats of {name} differ by up to {format_difference(difference)}")
    return notes


def _mfu_peaks(runs: list[RecordedRun]) -> list[float]:
    """The peak in TFLOP/s a device that each run measured its MFU against; a run without an MFU, as on CPUs, has none."""
    peaks = []
    for run in runs:
        has_mfu = any("mfu" in row for row in run.steps.values())
        if has_mfu and run.record.reference_tflops:
            peaks.append(run.record.reference_tflops)
    return peaks


def _are_one_peak(peaks: list[float]) -> bool:
    """Whether the peaks are equal, apart from noise; True for an empty list."""
    return not peaks or max(peaks) <= MAX_PEAK_RATIO * min(peaks)


def _notes_on_peaks(runs: list[RecordedRun]) -> list[str]:
    """A caveat if runs measured their MFU against different peaks; empty if not."""
    peaks = _mfu_peaks(runs)
    if _are_one_peak(peaks):
        return []
    peaks_text = ", ".join(sorted({f"{peak:.3g}" for peak in peaks}))
    return [
        f"MFU is of different peaks ({peaks_text} TFLOP/s a device) and cannot be compared; set logging.reference_tflops to one "
        "figure for all"
    ]


def _notes_on_machines(records: list[RunRecord]) -> list[str]:
    """Caveats if the runs were on different hosts, devices or revisions of shardtune, so that their speeds are not comparable."""
    notes = []
    recorded_values: dict[str, set[str | None]] = {
        "hosts": {record.host for record in records},
        "devices": {record.device for record in records},
        "revisions of shardtune": {record.git_revision for record in records},
    }
    for title, values in recorded_values.items():
        known_values = sorted(filter(None, values))
        if len(known_values) > 1:
            notes.append(f"Speeds are of different {title}: {', '.join(known_values)}")
    return notes


def _has_few_steps(measured: RunMeasurements) -> bool:
    """Whether a run's median speeds are of fewer than `FIRST_STEPS` steps; False for a run that took no step at all."""
    if not measured.steps:
        return False
    # No step counts as warm-up if the run ended within its first logging interval: the medians are of that interval.
    if not measured.warmup_steps:
        return True
    measured_steps = measured.steps - measured.warmup_steps
    return 0 < measured_steps < FIRST_STEPS


def _largest_difference_of_repeats(point: MeasuredPoint) -> float:
    """The largest relative difference of a loss of any later repeat from that of the first repeat; 0 for a single repeat."""
    differences = [compare_losses(point.first_repeat, repeat) for repeat in point.repeats[1:]]
    return max((difference.largest_overall for difference in differences if difference is not None), default=0.0)
