"""Compares points: their names, loss differences from a baseline, settings that differ, a verdict on each, and caveats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launch.compare.compared_axes import ComparedAxis, compared_axes
from launch.compare.compared_point import ComparedPoint as ComparedPoint
from launch.compare.conclusion import Conclusion, conclude_comparison
from launch.compare.curves import (
    NUM_FIRST_STEPS,
    SAME_LOSS_TOLERANCE,
    baseline_index,
    compare_losses,
    find_incomparable_settings,
    format_difference,
    loss_relevant_settings,
)
from launch.compare.names import SettingDifference, names_of_runs, setting_differences
from launch.compare.point_verdict import VerdictContext, point_verdict
from launch.compare.repeats import REFUSED_STATE, MeasuredPoint, read_measured_point
from launch.compare.run_files import RecordedRun, RunMeasurements
from launch.compare.settings import PointSource
from trainer.reporting.run_record import RunRecord

TEST_DOCUMENTS_TITLE = "test documents (no answer, verdict or ranking above uses them: choose nothing by them)"
"""Title of the section that a comparison ends with, if a run has test documents."""
MAX_PEAK_RATIO = 1.01
"""Earlier versions measured the peak of a CPU in each run anew: up to a percent is noise."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compared points, in the order in which they were named, and what the comparison concludes.

    A point is one combination of settings, with a run for each repeat.
    """

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
            names |= dict.fromkeys(point.measured.metrics_before_training) | dict.fromkeys(
                point.measured.metrics_at_end
            )
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
    """Make a comparison: read the runs of every point, compare each point with its baseline, and conclude which one to take.

    A point is one combination of settings; its repeats are its runs. Its baseline is an earlier point, whose loss it is
    compared with.

    `sources`: where the runs of each point are. `gpu_hour_price`: maps the driver's name of a card to US dollars an hour,
    or to None if its price is not known. Raises ConfigError if a directory holds no run.
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
    context = VerdictContext.from_points(points)  # such as how many jobs are compared
    points_with_verdict = []
    for point in points:
        verdict = point_verdict(point, context, is_default_baseline=point.name == default_name)
        points_with_verdict.append(replace(point, verdict=verdict))
    return Comparison(
        points=tuple(points_with_verdict),
        default_baseline_name=default_name,
        differences=tuple(differences),
        notes=tuple(_comparison_notes(measured_points, names)),
        # All points of one command have the same `command_keys`.
        axes=tuple(compared_axes(names, differences, sources[0].command_keys)),
        conclusion=conclude_comparison(points_with_verdict, differences),
    )


def _compared_point(
    measured_points: list[MeasuredPoint], names: list[str], index: int, default_index: int
) -> ComparedPoint:
    """Put the point at `index` beside its baseline: how far its losses are from the baseline's, or why they cannot be compared.

    The baseline is the earliest point that trains the same job, or else the default baseline at `default_index`. The
    default baseline itself has none, nor has a point before it, or a refused point, which has no losses. The verdict is
    added later.

    `measured_points` and `names`: of all points of the comparison.
    """
    measured_point = measured_points[index]
    baseline_position = None
    if index != default_index and measured_point.state != REFUSED_STATE:
        first_repeats = [any_point.first_repeat for any_point in measured_points]
        baseline_position = baseline_index(first_repeats, index, default_index)
    if baseline_position is None:
        return ComparedPoint(
            name=names[index],
            measured_point=measured_point,
            baseline_name=None,
            loss_difference=None,
            incomparable_settings=(),
        )

    baseline_run = measured_points[baseline_position].first_repeat
    run = measured_point.first_repeat
    incomparable_settings = tuple(find_incomparable_settings(baseline_run, run))
    has_equal_settings = loss_relevant_settings(baseline_run) == loss_relevant_settings(run)
    return ComparedPoint(
        name=names[index],
        measured_point=measured_point,
        baseline_name=names[baseline_position],
        loss_difference=None if incomparable_settings else compare_losses(baseline_run, run),
        incomparable_settings=incomparable_settings,
        should_have_loss_of_baseline=has_equal_settings and not incomparable_settings,
    )


def _comparison_notes(points: list[MeasuredPoint], names: list[str]) -> list[str]:
    """Caveats for the reader: what limits how far speeds, memory and losses of these points can be trusted.

    Empty if nothing does.
    """
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
    """Tell the reader how speeds and memory were measured where that limits their use, and when losses count as the same.

    `runs`: all repeats of the points.
    """
    notes = []
    if any(_has_few_steps(point.measured) for point in points):
        notes.append(
            f"Speeds of runs with less than {NUM_FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )
    if any(run.record.device == "cpu" for run in runs):
        notes.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    planning_methods = {point.measured.planned_by for point in points if point.measured.planned_by}
    notes += [f"Planned memory: {method}" for method in sorted(planning_methods)]
    if len(runs) > 1:
        notes.append(
            f"Same loss: a relative difference of at most {SAME_LOSS_TOLERANCE:g} over the first {NUM_FIRST_STEPS} steps "
            "that both runs have"
        )
    return notes


def _notes_on_unreadable_lines(runs: list[RecordedRun]) -> list[str]:
    """Warn the reader of each run with lines in its metrics or events that cannot be read."""
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
    """Warn the reader of each point whose repeats have different losses. `names`: the name of each point."""
    notes = []
    for point, name in zip(points, names, strict=True):
        difference = _largest_difference_of_repeats(point)
        if difference:
            notes.append(f"The losses of the repeats of {name} differ by up to {format_difference(difference)}")
    return notes


def _mfu_peaks(runs: list[RecordedRun]) -> list[float]:
    """The peak in TFLOP/s a device that each run divided its speed by for the MFU; runs without an MFU are left out."""
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
    """Warn the reader if runs measured their MFU against different peaks, so that MFUs cannot be compared; empty if not."""
    peaks = _mfu_peaks(runs)
    if _are_one_peak(peaks):
        return []
    peaks_text = ", ".join(sorted({f"{peak:.3g}" for peak in peaks}))
    return [
        f"MFU is of different peaks ({peaks_text} TFLOP/s a device) and cannot be compared; set logging.reference_tflops to one "
        "figure for all"
    ]


def _notes_on_machines(records: list[RunRecord]) -> list[str]:
    """Warn the reader if the runs were on different hosts, devices or revisions of shardtune: their speeds are not comparable.

    `records`: the `run.json` of each run that has one.
    """
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
    """Whether a run's median speeds rest on fewer than `NUM_FIRST_STEPS` steps; False for a run that took no step at all."""
    if not measured.steps:
        return False
    # No step counts as warm-up if the run ended within its first logging interval: the medians are of that interval.
    if not measured.warmup_steps:
        return True
    measured_steps = measured.steps - measured.warmup_steps
    return 0 < measured_steps < NUM_FIRST_STEPS


def _largest_difference_of_repeats(point: MeasuredPoint) -> float:
    """How far repeats of the same point differ: the largest relative difference of a loss from that of the first repeat, or 0."""
    differences = [compare_losses(point.first_repeat, repeat) for repeat in point.repeats[1:]]
    return max((difference.all_steps_difference for difference in differences if difference is not None), default=0.0)
