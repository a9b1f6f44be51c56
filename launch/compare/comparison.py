"""Compares runs: their names, loss differences from the first one, settings that differ, and a verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from launch.compare.compared_axes import ComparedAxis, compared_axes
from launch.compare.compared_run import ComparedRun as ComparedRun
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
from launch.compare.names import ABSENT, FIRST_IN_NAME, SettingDifference, run_names, setting_differences
from launch.compare.quality import (
    LEVEL,
    ComparedJob,
    comparable_jobs,
    jobs_of,
    pairwise_level,
    quality_difference,
    watched_metric,
    why_other_questions,
)
from launch.compare.repeats import REFUSED, RepeatedRun, read_repeats
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
    """Compared runs, in the order in which they were named."""

    runs: tuple[ComparedRun, ...]
    first: str
    """Name of the run that the others are compared with: the first that took a step."""
    differences: tuple[SettingDifference, ...]
    notes: tuple[str, ...]
    """Caveats for the reader, such as speeds of different machines."""
    axes: tuple[ComparedAxis, ...]
    """Settings along which the points differ, the first typed one first."""
    conclusion: Conclusion
    """The answer in a few sentences, and which point to take when."""

    @property
    def begun_runs(self) -> list[ComparedRun]:
        """The runs that took at least one step: the others have no numbers to show."""
        return [run for run in self.runs if run.measured.steps]

    @property
    def has_comparable_mfu(self) -> bool:
        """Whether all runs with an MFU divide their speed by the same peak. A peak measured on a busy CPU is that run's alone."""
        repeats: list[RecordedRun] = []
        for run in self.runs:
            repeats += run.repeated.repeats
        return _are_one_peak(_mfu_peaks(repeats))


def compare(rows: Sequence[ComparisonRow], price_of: Callable[[str], float | None] = lambda name: None) -> Comparison:
    """Read the runs of all rows and compare them with the first. Raises ConfigError where a directory holds no run.

    `price_of` maps the driver's name of a card to US dollars an hour, or None if its price is not known.
    """
    repeated_runs = [read_repeats(row, price_of) for row in rows]
    first_repeats = [repeated.first_repeat for repeated in repeated_runs]
    differences = setting_differences(first_repeats)
    # A name that was typed wins over the one made from the settings that differ.
    generated_names = run_names(first_repeats, differences)
    names = [row.name or generated for row, generated in zip(rows, generated_names, strict=True)]
    first = 0
    for number, run in enumerate(first_repeats):
        if run.steps:
            first = number
            break
    runs = [_compared_run(repeated_runs, names, row_index, first) for row_index in range(len(rows))]
    judged = _JudgedPoints.of(runs)
    runs = [replace(run, verdict=_verdict(run, judged, is_first=run.name == names[first])) for run in runs]
    notes = _notes(repeated_runs, names)
    return Comparison(
        runs=tuple(runs),
        first=names[first],
        differences=tuple(differences),
        notes=tuple(notes),
        axes=tuple(compared_axes(names, differences, rows[0].typed_keys)),
        conclusion=conclude(runs, differences),
    )


def _compared_run(rows: list[RepeatedRun], names: list[str], row_index: int, first: int) -> ComparedRun:
    """Row `row_index` compared with its baseline, without a verdict yet.

    `rows` and `names`: of all rows. `first`: index of the run that the others are compared with by default; the baseline may be
    a later one, with the same settings but for the strategy (see `baseline_index`).
    """
    repeated = rows[row_index]
    # A refused point has no losses, and the first run has nothing to be compared with.
    baseline = None
    if row_index != first and repeated.state != REFUSED:
        baseline = baseline_index([row.first_repeat for row in rows], row_index, first)
    if baseline is None:
        return ComparedRun(names[row_index], repeated, None, None, ())
    baseline_run = rows[baseline].first_repeat
    why_not = why_not_comparable(baseline_run, repeated.first_repeat)
    loss_difference = None
    if not why_not:
        loss_difference = compare_losses(baseline_run, repeated.first_repeat)
    is_same_job = not why_not and step_settings(baseline_run) == step_settings(repeated.first_repeat)
    return ComparedRun(names[row_index], repeated, names[baseline], loss_difference, tuple(why_not), is_same_job)


@dataclass(frozen=True, slots=True)
class _JudgedPoints:
    """All points of a comparison, by name, as the verdict on one of them needs them."""

    run_by_name: dict[str, ComparedRun]
    job_by_name: dict[str, ComparedJob]
    """The job of each point that took a step, with all its seeds."""
    level: float
    """Of the test of one pair of jobs: that of the answer, so that both say the same."""

    @classmethod
    def of(cls, runs: Sequence[ComparedRun]) -> _JudgedPoints:
        """Of points without a verdict yet."""
        jobs = jobs_of(runs)
        job_by_name: dict[str, ComparedJob] = {}
        for job in jobs:
            job_by_name |= {point.name: job for point in job.points}
        metric = watched_metric(jobs)
        level = LEVEL if metric is None else pairwise_level(len(comparable_jobs(jobs, metric)))
        return cls({run.name: run for run in runs}, job_by_name, level)


def _verdict(run: ComparedRun, judged: _JudgedPoints, *, is_first: bool) -> str:
    """The verdict on a run as one sentence: how it ended, its loss or quality, speed and memory.

    All of it is against one baseline, `run.against`. A run that trains the same job (it differs in strategy alone) must have
    the baseline's loss; others are compared by their held-out metric. `judged`: all runs, and their jobs by name.
    """
    clauses = [run.repeated.ended] if run.repeated.ended else []
    if len(judged.run_by_name) == 1:
        clauses = [_single_run_verdict(run.repeated)]
    elif is_first:
        clauses += _own_numbers(run)
    elif run.against is not None:
        baseline = judged.run_by_name[run.against]
        clauses.append(_loss_verdict(run) if run.is_same_job else _quality_verdict(baseline, run, judged))
        clauses += _speed_and_memory_clauses(baseline.repeated, run.repeated)
    broken_step = first_step_not_finite(run.first_repeat)
    if broken_step is not None:
        clauses.append(f"its loss is NaN or infinite from step {broken_step} on")
    return f"{run.name}: {'; '.join(clauses)}"


def _own_numbers(run: ComparedRun) -> list[str]:
    """Clauses on the run that the others are compared with: its last held-out metric, speed and memory."""
    numbers = []
    metric = watched_metric([ComparedJob((run,), {})])
    if metric is not None and metric.name in run.measured.after:
        numbers.append(f"{metric.name} {readable(run.measured.after[metric.name])}")
    if run.measured.tokens_per_s:
        numbers.append(f"{run.measured.tokens_per_s:,.0f} tokens/s")
    if run.measured.memory_gib:
        numbers.append(f"{run.measured.memory_gib:.3g} GiB")
    clauses = [", ".join(numbers)] if numbers else []
    return [*clauses, "the others are compared with it"]


def _quality_verdict(baseline: ComparedRun, run: ComparedRun, judged: _JudgedPoints) -> str:
    """A clause on how the held-out metric of a run compares with that of a baseline that trains another job.

    It shows the values of the two runs. Whether chance explains the difference is judged by all seeds of their jobs: a job is
    all runs of the comparison that differ in seed and strategy alone.
    """
    pair = [ComparedJob((baseline,), {}), ComparedJob((run,), {})]
    metric = watched_metric(pair)
    if metric is None or not all(job.values(metric.name) for job in pair):
        if run.not_comparable:
            return _loss_verdict(run)
        return f"trains another job than {baseline.name}{_other_settings(baseline, run)}; no held-out metric of both to compare"
    other_questions = why_other_questions(baseline.first_repeat, run.first_repeat, metric.name)
    if other_questions is not None:
        return f"its {metric.name} cannot be compared with that of {baseline.name} (other {other_questions})"
    baseline_value = readable(median(pair[0].values(metric.name)))
    value = readable(median(pair[1].values(metric.name)))
    # A point whose first repeat never began is in no job, and stands for itself.
    jobs = [judged.job_by_name.get(job.points[0].name, job) for job in pair]
    if jobs[0] is jobs[1]:
        if baseline.first_repeat.config.get("run.seed") != run.first_repeat.config.get("run.seed"):
            return f"{metric.name} {value}, with another seed than {baseline.name} ({baseline_value})"
        jobs = pair  # the settings are the same, but their data is not
    quality = quality_difference(jobs[0], jobs[1], metric.name, judged.level)
    if not quality.is_shown:
        judgement = "no difference shown from"
    elif (quality.relative > 0) == metric.greater_is_better:
        judgement = "better than"
    else:
        judgement = "worse than"
    evidence = quality.evidence_text or _no_evidence_text((baseline, run), quality.seeds)
    return f"{metric.name} {value}, {judgement} {baseline.name} ({baseline_value}; {evidence})"


def _no_evidence_text(points: Sequence[ComparedRun], seeds: int) -> str:
    """Why nothing is known of chance: `one run each`, or runs that say nothing of quality. `seeds`: of a point's job."""
    if seeds > 1:
        return f"{seeds} seeds differ by rounding alone"
    if all(point.summary.repeats == 1 for point in points):
        return "one run each"
    return "one seed each: repeats of a seed say nothing of quality"


def _other_settings(baseline: ComparedRun, run: ComparedRun) -> str:
    """The first settings in which the steps of two runs differ, in parentheses."""
    settings = step_settings(baseline.first_repeat)
    other_settings = step_settings(run.first_repeat)
    keys = [key for key in settings | other_settings if settings.get(key, ABSENT) != other_settings.get(key, ABSENT)]
    telling = sorted(keys, key=lambda key: key not in FIRST_IN_NAME)
    return f" (other {', '.join(telling[:3])})" if keys else ""


def _single_run_verdict(run: RepeatedRun) -> str:
    """The verdict on a run that is compared with no other: how it ended, its losses and its held-out metrics."""
    measured = run.measured
    losses = [row["loss"] for row in run.first_repeat.steps.values() if row["loss"] is not None]
    clauses = [run.ended or "done"]
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


def _loss_verdict(run: ComparedRun) -> str:
    """A clause on how the run's loss compares with its baseline's, such as `same loss as ddp within 3e-7`."""
    if run.not_comparable:
        settings = [line.split(":")[0] for line in run.not_comparable]
        more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
        return f"its losses cannot be compared with those of {run.against} (other {', '.join(settings[:3])}{more})"
    difference = run.loss_difference
    if difference is None:
        return f"no step to compare with {run.against}"
    over_steps = ""
    if difference.steps < FIRST_STEPS:
        over_steps = f" over {difference.steps} step{'s' if difference.steps > 1 else ''}"
    if difference.early == 0:
        return f"same loss as {run.against}, to the last digit{over_steps}"
    if difference.same:
        return f"same loss as {run.against} within {rounded(difference.early)}{over_steps}"
    return f"not the loss of {run.against}: it differs by {rounded(difference.early)} at step {difference.early_step}"


def _speed_and_memory_clauses(baseline: RepeatedRun, run: RepeatedRun) -> list[str]:
    """Speed and memory as multiples of the baseline's, in one clause; an empty list if no figure is known of both runs."""
    ratios = []
    if baseline.measured.tokens_per_s and run.measured.tokens_per_s:
        ratio = _ratio_text(run.measured.tokens_per_s / baseline.measured.tokens_per_s)
        ratios.append(f"{ratio} x its tokens/s")
        # Repeats of the two runs that overlap in speed cannot tell which of them is the faster.
        if _spreads_overlap(baseline.summary.spread, run.summary.spread):
            ratios[-1] += " (less than the repeats differ)"
    if baseline.measured.memory_gib and run.measured.memory_gib:
        ratio = _ratio_text(run.measured.memory_gib / baseline.measured.memory_gib)
        ratios.append(f"{ratio} x its memory")
    return [", ".join(ratios)] if ratios else []


def _spreads_overlap(spread: tuple[float, float] | None, other_spread: tuple[float, float] | None) -> bool:
    """Whether two (slowest, fastest) ranges overlap; False if either run had no repeats."""
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


def _notes(rows: list[RepeatedRun], names: list[str]) -> list[str]:
    """Caveats for the reader: what limits how far speeds, memory and losses of these runs can be trusted."""
    runs: list[RecordedRun] = []
    for row in rows:
        runs += row.repeats
    notes = _note_on_peaks(runs)
    notes += _notes_on_machines([run.record for run in runs if not run.record.is_empty])
    if any(_has_few_steps(row.measured) for row in rows):
        notes.append(
            f"Speeds of runs with less than {FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )

    if any(run.record.device == "cpu" for run in runs):
        notes.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    planning_methods = {row.measured.planned_by for row in rows if row.measured.planned_by}
    notes += [f"Planned memory: {method}" for method in sorted(planning_methods)]
    if len(runs) > 1:
        notes.append(
            f"Same loss: a relative difference of at most {SAME_LOSS_TOLERANCE:g} over the first {FIRST_STEPS} steps "
            "that both runs have"
        )

    for run in runs:
        if run.unreadable_lines:
            notes.append(
                f"{run.directory}: {run.unreadable_lines} lines of its metrics or events cannot be read and are left out"
            )
    for row, name in zip(rows, names, strict=True):
        if drift := _drift_of_repeats(row):
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


def _drift_of_repeats(row: RepeatedRun) -> float:
    """The largest relative loss difference of any repeat from the first one; 0 without repeats."""
    differences = [compare_losses(row.first_repeat, repeat) for repeat in row.repeats[1:]]
    return max((difference.drift for difference in differences if difference is not None), default=0.0)
