"""Compares points: their names, loss differences from a baseline, settings that differ, and a verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from launch.compare.compared_axes import ComparedAxis, compared_axes
from launch.compare.compared_point import ComparedPoint as ComparedPoint
from launch.compare.conclusion import Conclusion, conclude
from launch.compare.curves import (
    FIRST_STEPS,
    SAME_LOSS_TOLERANCE,
    baseline_index,
    compare_losses,
    first_step_not_finite,
    rounded,
    step_settings,
    why_not_comparable,
)
from launch.compare.metric_meaning import why_measured_differently
from launch.compare.names import ABSENT, FIRST_IN_NAME, SettingDifference, run_names, setting_differences
from launch.compare.quality import (
    LEVEL,
    ComparedJob,
    comparable_jobs,
    jobs_of,
    pairwise_level,
    quality_difference,
    quality_metric,
)
from launch.compare.repeats import REFUSED, MeasuredPoint, read_repeats
from launch.compare.run_files import RecordedRun, RunMeasurements
from launch.compare.settings import ComparisonRow
from trainer.reporting.numbers import readable
from trainer.reporting.run_record import RunRecord

TEST_DOCUMENTS = "test documents (no answer, verdict or ranking above uses them: choose nothing by them)"
"""Title of the section that a comparison ends with, if a run has test documents."""
MAX_PEAK_RATIO = 1.01
"""Earlier versions measured the peak of a CPU in each run anew: up to a percent is noise."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compared points, in the order in which they were named, and what the comparison concludes."""

    points: tuple[ComparedPoint, ...]
    default_baseline: str
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
    def has_comparable_mfu(self) -> bool:
        """Whether all runs with an MFU divide their speed by the same peak. A peak measured on a busy CPU is that run's alone."""
        runs: list[RecordedRun] = []
        for point in self.points:
            runs += point.repeats
        return _are_one_peak(_mfu_peaks(runs))


def compare(rows: Sequence[ComparisonRow], price_of: Callable[[str], float | None] = lambda name: None) -> Comparison:
    """Read the runs of every point, compare each point with its baseline, and conclude which one to take.

    `rows` say for each point where its runs are. `price_of` maps the driver's name of a card to US dollars an hour, or None if
    its price is not known. Raises ConfigError if a directory holds no run.
    """
    measured_points = [read_repeats(row, price_of) for row in rows]
    first_repeats = [measured.first_repeat for measured in measured_points]
    differences = setting_differences(first_repeats)
    # A name that the row has wins over the one made from the settings that differ.
    generated_names = run_names(first_repeats, differences)
    names = [row.name or generated for row, generated in zip(rows, generated_names, strict=True)]

    # The default baseline is the first point that took a step, or the first of all if none did.
    first_index = 0
    for index, run in enumerate(first_repeats):
        if run.steps:
            first_index = index
            break
    points = [_compared_point(measured_points, names, index, first_index) for index in range(len(rows))]
    context = _VerdictContext.from_points(points)
    judged_points = []
    for point in points:
        verdict = _verdict(point, context, is_default_baseline=point.name == names[first_index])
        judged_points.append(replace(point, verdict=verdict))
    return Comparison(
        points=tuple(judged_points),
        default_baseline=names[first_index],
        differences=tuple(differences),
        notes=tuple(_notes(measured_points, names)),
        axes=tuple(compared_axes(names, differences, rows[0].command_keys)),
        conclusion=conclude(judged_points, differences),
    )


def _compared_point(
    measured_points: list[MeasuredPoint], names: list[str], index: int, first_index: int
) -> ComparedPoint:
    """The point at `index` compared with its baseline, without a verdict yet.

    The baseline is the earliest point that trains the same job, or else the point at `first_index`. The point at `first_index`
    itself has none, and neither has a refused point, because it has no losses.
    """
    measured = measured_points[index]
    baseline = None
    if index != first_index and measured.state != REFUSED:
        baseline = baseline_index([other.first_repeat for other in measured_points], index, first_index)
    if baseline is None:
        return ComparedPoint(names[index], measured, baseline_name=None, loss_difference=None, not_comparable=())

    baseline_run = measured_points[baseline].first_repeat
    run = measured.first_repeat
    not_comparable = tuple(why_not_comparable(baseline_run, run))
    return ComparedPoint(
        names[index],
        measured,
        baseline_name=names[baseline],
        loss_difference=None if not_comparable else compare_losses(baseline_run, run),
        not_comparable=not_comparable,
        is_same_job=not not_comparable and step_settings(baseline_run) == step_settings(run),
    )


@dataclass(frozen=True, slots=True)
class _VerdictContext:
    """What the verdict on one point needs to know of all points of the comparison."""

    point_by_name: dict[str, ComparedPoint]
    job_by_point: dict[str, ComparedJob]
    """By name of a point that took a step: its job, with all points and seeds of it."""
    level: float
    """Significance level of the test of one pair of jobs. The conclusion uses the same, so that both say the same."""

    @classmethod
    def from_points(cls, points: Sequence[ComparedPoint]) -> _VerdictContext:
        """The context of points that have no verdict yet."""
        jobs = jobs_of(points)
        job_by_point: dict[str, ComparedJob] = {}
        for job in jobs:
            for point in job.points:
                job_by_point[point.name] = job
        metric = quality_metric(jobs)
        level = LEVEL if metric is None else pairwise_level(len(comparable_jobs(jobs, metric)))
        return cls({point.name: point for point in points}, job_by_point, level)


def _verdict(point: ComparedPoint, context: _VerdictContext, *, is_default_baseline: bool) -> str:
    """The verdict on a point as one sentence: how it ended, its loss or quality, speed and memory.

    - The only point of a comparison: its own losses and metrics.
    - The default baseline: its own numbers.
    - A point of the same job as its baseline: whether it has the baseline's loss, as it must.
    - Any other point: how its held-out metric compares with the baseline's.

    A refused point has no baseline: the sentence says only that it was refused.
    """
    clauses = [point.unfinished_state] if point.unfinished_state else []
    if len(context.point_by_name) == 1:
        clauses = [_single_point_verdict(point)]
    elif is_default_baseline:
        clauses += _own_numbers(point)
    elif point.baseline_name is not None:
        baseline = context.point_by_name[point.baseline_name]
        clauses.append(_loss_verdict(point) if point.is_same_job else _quality_verdict(baseline, point, context))
        clauses += _speed_and_memory_clauses(baseline, point)
    broken_step = first_step_not_finite(point.first_repeat)
    if broken_step is not None:
        clauses.append(f"its loss is NaN or infinite from step {broken_step} on")
    return f"{point.name}: {'; '.join(clauses)}"


def _own_numbers(point: ComparedPoint) -> list[str]:
    """Clauses on the default baseline: its last held-out metric, speed and memory, as far as they are known."""
    measured = point.measured
    metric = quality_metric([_single_point_job(point)])
    numbers = []
    if metric is not None and metric.name in measured.after:
        numbers.append(f"{metric.name} {readable(measured.after[metric.name])}")
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
    pair = [_single_point_job(baseline), _single_point_job(point)]
    metric = quality_metric(pair)
    if metric is None or not all(job.values(metric.name) for job in pair):
        return _verdict_without_metric(baseline, point)
    measured_differently = why_measured_differently(baseline.first_repeat, point.first_repeat, metric.name)
    if measured_differently is not None:
        return f"its {metric.name} cannot be compared with that of {baseline.name} (other {measured_differently})"

    baseline_value = readable(median(pair[0].values(metric.name)))
    value = readable(median(pair[1].values(metric.name)))
    # A point whose first repeat never began is in no job, and stands for itself.
    jobs = [context.job_by_point.get(job.points[0].name, job) for job in pair]
    if jobs[0] is jobs[1]:
        if baseline.first_repeat.config.get("run.seed") != point.first_repeat.config.get("run.seed"):
            return f"{metric.name} {value}, with another seed than {baseline.name} ({baseline_value})"
        jobs = pair  # the settings are the same, but their data is not
    difference = quality_difference(jobs[0], jobs[1], metric.name, context.level)
    if not difference.is_shown:
        judgement = "no difference shown from"
    elif (difference.relative > 0) == metric.greater_is_better:
        judgement = "better than"
    else:
        judgement = "worse than"
    evidence = difference.evidence_text or _no_evidence_text((baseline, point), difference.seeds)
    return f"{metric.name} {value}, {judgement} {baseline.name} ({baseline_value}; {evidence})"


def _verdict_without_metric(baseline: ComparedPoint, point: ComparedPoint) -> str:
    """A clause on two points without a common held-out metric: why their losses cannot be compared, or how they differ."""
    if point.not_comparable:
        return _loss_verdict(point)
    settings = _other_settings(baseline, point)
    return f"trains another job than {baseline.name}{settings}; no held-out metric of both to compare"


def _no_evidence_text(points: Sequence[ComparedPoint], seeds: int) -> str:
    """Why nothing is known of chance, such as `one run each`. `seeds`: how many the job with more seeds has."""
    if seeds > 1:
        return f"{seeds} seeds differ by rounding alone"
    if all(point.summary.repeats == 1 for point in points):
        return "one run each"
    return "one seed each: repeats of a seed say nothing of quality"


def _other_settings(baseline: ComparedPoint, point: ComparedPoint) -> str:
    """The settings in which the jobs of two points differ, such as ` (other optim.lr, tuning.name)`; at most three are named."""
    baseline_settings = step_settings(baseline.first_repeat)
    settings = step_settings(point.first_repeat)
    differing_keys = []
    for key in baseline_settings | settings:
        if baseline_settings.get(key, ABSENT) != settings.get(key, ABSENT):
            differing_keys.append(key)
    most_telling_first = sorted(differing_keys, key=lambda key: key not in FIRST_IN_NAME)
    return f" (other {', '.join(most_telling_first[:3])})" if differing_keys else ""


def _single_point_verdict(point: ComparedPoint) -> str:
    """The verdict on the only point of a comparison: how it ended, its losses and its held-out metrics."""
    measured = point.measured
    losses = [row["loss"] for row in point.first_repeat.steps.values() if row["loss"] is not None]
    clauses = [point.unfinished_state or "done"]
    if measured.steps == 1:
        clauses.append("1 step")
    elif measured.steps:
        clauses.append(f"{measured.steps} steps")
    if len(losses) > 1:
        clauses.append(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    for metric, after in measured.after.items():
        # The perplexity is exp(loss): it would say the same twice.
        if metric in measured.before and metric != "eval/perplexity":
            clauses.append(f"{metric} {measured.before[metric]:.4f} -> {after:.4f}")
    return ", ".join(clauses)


def _loss_verdict(point: ComparedPoint) -> str:
    """A clause on how a point's loss compares with its baseline's, such as `same loss as ddp within 3e-7`."""
    baseline = point.baseline_name
    if point.not_comparable:
        settings = [line.split(":")[0] for line in point.not_comparable]
        more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
        return f"its losses cannot be compared with those of {baseline} (other {', '.join(settings[:3])}{more})"
    difference = point.loss_difference
    if difference is None:
        return f"no step to compare with {baseline}"
    over_steps = ""
    if difference.steps < FIRST_STEPS:
        over_steps = f" over {difference.steps} step{'s' if difference.steps > 1 else ''}"
    if difference.early == 0:
        return f"same loss as {baseline}, to the last digit{over_steps}"
    if difference.same:
        return f"same loss as {baseline} within {rounded(difference.early)}{over_steps}"
    return f"not the loss of {baseline}: it differs by {rounded(difference.early)} at step {difference.early_step}"


def _speed_and_memory_clauses(baseline: ComparedPoint, point: ComparedPoint) -> list[str]:
    """Speed and memory as multiples of the baseline's, in one clause; an empty list if neither is known of both points."""
    ratios = []
    if baseline.measured.tokens_per_s and point.measured.tokens_per_s:
        speed = f"{_ratio_text(point.measured.tokens_per_s / baseline.measured.tokens_per_s)} x its tokens/s"
        # If the repeats of the two points overlap in speed, they cannot tell which point is the faster.
        if _spreads_overlap(baseline.summary.spread, point.summary.spread):
            speed += " (less than the repeats differ)"
        ratios.append(speed)
    if baseline.measured.memory_gib and point.measured.memory_gib:
        ratios.append(f"{_ratio_text(point.measured.memory_gib / baseline.measured.memory_gib)} x its memory")
    return [", ".join(ratios)] if ratios else []


def _spreads_overlap(spread: tuple[float, float] | None, other_spread: tuple[float, float] | None) -> bool:
    """Whether two (slowest, fastest) ranges overlap; False if either point has no repeats."""
    if spread is None or other_spread is None:
        return False
    slowest, fastest = spread
    other_slowest, other_fastest = other_spread
    return slowest <= other_fastest and other_slowest <= fastest


def _ratio_text(ratio: float) -> str:
    """A ratio with about two digits: 0.07, 1.3, 12."""
    if ratio < 0.1:
        return f"{ratio:.2f}"
    if ratio < 10:
        return f"{ratio:.1f}"
    return f"{ratio:.0f}"


def _notes(points: list[MeasuredPoint], names: list[str]) -> list[str]:
    """Caveats for the reader: what limits how far speeds, memory and losses of these points can be trusted."""
    runs: list[RecordedRun] = []
    for point in points:
        runs += point.repeats
    notes = _note_on_peaks(runs)
    notes += _notes_on_machines([run.record for run in runs if not run.record.is_empty])
    if any(_has_few_steps(point.measured) for point in points):
        notes.append(
            f"Speeds of runs with less than {FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )

    # How numbers were measured, and when losses count as the same.
    if any(run.record.device == "cpu" for run in runs):
        notes.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    planning_methods = {point.measured.planned_by for point in points if point.measured.planned_by}
    notes += [f"Planned memory: {method}" for method in sorted(planning_methods)]
    if len(runs) > 1:
        notes.append(
            f"Same loss: a relative difference of at most {SAME_LOSS_TOLERANCE:g} over the first {FIRST_STEPS} steps "
            "that both runs have"
        )

    # What is wrong with single runs and points.
    for run in runs:
        if run.unreadable_lines == 1:
            notes.append(f"{run.directory}: 1 line of its metrics or events cannot be read and is left out")
        elif run.unreadable_lines:
            notes.append(
                f"{run.directory}: {run.unreadable_lines} lines of its metrics or events cannot be read and are left out"
            )
    for point, name in zip(points, names, strict=True):
        if drift := _drift_of_repeats(point):
            notes.append(f"The losses of the repeats of {name} differ by up to {rounded(drift)}")
    return notes


def _mfu_peaks(runs: list[RecordedRun]) -> list[float]:
    """The peaks in TFLOP/s a device that runs measured their MFU against; runs without an MFU, as on CPUs, have none."""
    peaks = []
    for run in runs:
        has_mfu = any("mfu" in row for row in run.steps.values())
        if has_mfu and run.record.reference_tflops:
            peaks.append(run.record.reference_tflops)
    return peaks


def _are_one_peak(peaks: list[float]) -> bool:
    """Whether peaks are the same but for noise; no peaks are."""
    return not peaks or max(peaks) <= MAX_PEAK_RATIO * min(peaks)


def _note_on_peaks(runs: list[RecordedRun]) -> list[str]:
    """A caveat if runs measured their MFU against different peaks."""
    peaks = _mfu_peaks(runs)
    if _are_one_peak(peaks):
        return []
    figures = ", ".join(sorted({f"{peak:.3g}" for peak in peaks}))
    return [
        f"MFU is of different peaks ({figures} TFLOP/s a device) and cannot be compared; set logging.reference_tflops to one "
        "figure for all"
    ]


def _notes_on_machines(records: list[RunRecord]) -> list[str]:
    """Caveats about runs of different machines or revisions, whose speeds cannot be compared as they are."""
    notes = []
    values_by_fact: dict[str, set[str | None]] = {
        "hosts": {record.host for record in records},
        "devices": {record.device for record in records},
        "revisions of shardtune": {record.git_revision for record in records},
    }
    for fact, values in values_by_fact.items():
        known_values = sorted(filter(None, values))
        if len(known_values) > 1:
            notes.append(f"Speeds are of different {fact}: {', '.join(known_values)}")
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


def _drift_of_repeats(point: MeasuredPoint) -> float:
    """The largest relative loss difference of any later repeat of a point from its first one; 0 for a single repeat."""
    differences = [compare_losses(point.first_repeat, repeat) for repeat in point.repeats[1:]]
    return max((difference.drift for difference in differences if difference is not None), default=0.0)
