"""The comparison itself: names of the runs, loss differences from the first one, differing settings, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.compare.curves import (
    FIRST_STEPS,
    SAME,
    LossDifference,
    baseline_index,
    compare_losses,
    first_step_not_finite,
    why_not_comparable,
)
from launch.compare.names import SettingDifference, run_names, setting_differences
from launch.compare.repeats import REFUSED, RepeatedRun, RepeatsSummary, read_row
from launch.compare.run_files import Point, RunMeasurements
from launch.compare.settings import ComparisonRow
from trainer.reporting.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One row of a comparison."""

    name: str
    repeated: RepeatedRun
    against: str | None
    """Name of the run whose loss its own is compared with: the first, or the first one that takes the same steps."""
    loss_difference: LossDifference | None
    """From that run's; None for the first run, and if the curves cannot be compared."""
    not_comparable: tuple[str, ...]
    """Why not, setting by setting."""
    verdict: str

    @property
    def point(self) -> Point:
        """Its first repeat."""
        return self.repeated.point

    @property
    def measured(self) -> RunMeasurements:
        """Its numbers, over all repeats."""
        return self.repeated.measured

    @property
    def summary(self) -> RepeatsSummary:
        """What else it took."""
        return self.repeated.summary


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows in the order they were given."""

    runs: tuple[ComparedRun, ...]
    first: str
    """What the others are compared with: the first that took a step."""
    differences: tuple[SettingDifference, ...]
    notes: tuple[str, ...]
    """What to know before the numbers are used."""


def compare(rows: Sequence[ComparisonRow], price_of: Callable[[str], float | None] = lambda name: None) -> Comparison:
    """Read the rows and compare them with the first. Raises ConfigError where a directory holds no run.

    `price_of` a card, by its driver's name: US dollars an hour, or None.
    """
    read_rows = [read_row(row, price_of) for row in rows]
    points = [repeated.point for repeated in read_rows]
    differences = setting_differences(points)
    generated_names = run_names(points, differences)
    names = [row.name or name for row, name in zip(rows, generated_names, strict=True)]
    first = next((number for number, point in enumerate(points) if point.steps), 0)
    runs = [_compared_run(read_rows, names, number, first) for number in range(len(rows))]
    return Comparison(tuple(runs), names[first], tuple(differences), tuple(_notes(read_rows, names)))


def _compared_run(rows: list[RepeatedRun], names: list[str], number: int, first: int) -> ComparedRun:
    """The row `number` beside the run that its loss is compared with; `first` is the row that all are compared with."""
    repeated = rows[number]
    points = [row.point for row in rows]
    # A refused point has no losses, and the first run is what the others are compared with.
    baseline = None
    if number != first and repeated.state != REFUSED:
        baseline = baseline_index(points, number, first)

    clauses: list[str] = []
    why_not: tuple[str, ...] = ()
    difference = None
    if baseline is not None:
        why_not = tuple(why_not_comparable(points[baseline], repeated.point))
        difference = None if why_not else compare_losses(points[baseline], repeated.point)
        clauses.append(_loss_verdict(names[baseline], difference, why_not))
        # The sentence has one yardstick: speed and memory are beside the run whose loss is compared.
        clauses += _ratios(rows[baseline], repeated)
    broken_step = first_step_not_finite(repeated.point)
    if broken_step is not None:
        clauses.append(f"its loss is NaN or infinite from step {broken_step} on")

    ended = [repeated.ended] if repeated.ended else []
    if len(rows) == 1:
        verdict = "; ".join([f"{names[0]}: {_outcome_of_single_run(repeated)}", *clauses])
    elif number == first:
        verdict = "; ".join([f"{names[number]} is what the others are compared with", *ended, *clauses])
    else:
        verdict = f"{names[number]}: {'; '.join([*ended, *clauses])}"
    return ComparedRun(
        name=names[number],
        repeated=repeated,
        against=None if baseline is None else names[baseline],
        loss_difference=difference,
        not_comparable=why_not,
        verdict=verdict,
    )


def _outcome_of_single_run(run: RepeatedRun) -> str:
    """How it ended, its losses and its held-out metrics: the verdict on a run that is compared with no other."""
    measured = run.measured
    losses = [row["loss"] for row in run.point.steps.values() if row["loss"] is not None]
    clauses = [run.ended or "done"]
    if measured.steps:
        clauses.append(f"{measured.steps} step{'s' if measured.steps != 1 else ''}")
    if len(losses) > 1:
        clauses.append(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    for metric, after in measured.after.items():
        # The perplexity follows from the loss.
        if metric in measured.before and metric != "eval/perplexity":
            clauses.append(f"{metric} {measured.before[metric]:.4f} -> {after:.4f}")
    return ", ".join(clauses)


def _loss_verdict(baseline: str, difference: LossDifference | None, why_not: tuple[str, ...]) -> str:
    """The loss beside that of the run named `baseline`, as a clause."""
    if why_not:
        settings = [line.split(":")[0] for line in why_not]
        more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
        return f"its losses cannot be compared with those of {baseline} (other {', '.join(settings[:3])}{more})"
    if difference is None:
        return f"no step to compare with {baseline}"
    over_steps = ""
    if difference.steps < FIRST_STEPS:
        over_steps = f" over {difference.steps} step{'s' if difference.steps > 1 else ''}"
    if not difference.early:
        return f"same loss as {baseline}, to the last digit{over_steps}"
    if difference.same:
        return f"same loss as {baseline} within {rounded(difference.early)}{over_steps}"
    return f"not the loss of {baseline}: it differs by {rounded(difference.early)} at step {difference.early_step}"


def rounded(difference: float) -> str:
    """A relative difference, short: 3e-7, or 0 where there is none."""
    return f"{difference:.1g}".replace("e-0", "e-") if difference else "0"


def _ratios(baseline: RepeatedRun, run: RepeatedRun) -> list[str]:
    """Speed and memory beside those of the baseline, as one clause; none if neither is known of both."""
    ratios = []
    if baseline.measured.tokens_per_s and run.measured.tokens_per_s:
        ratio = _ratio_text(run.measured.tokens_per_s / baseline.measured.tokens_per_s)
        is_noise = _overlap(baseline.summary.spread, run.summary.spread)
        ratios.append(f"{ratio} x its tokens/s{' (less than the repeats differ)' if is_noise else ''}")
    if baseline.measured.memory_gib and run.measured.memory_gib:
        ratios.append(f"{_ratio_text(run.measured.memory_gib / baseline.measured.memory_gib)} x its memory")
    return [", ".join(ratios)] if ratios else []


def _overlap(spread: tuple[float, float] | None, other_spread: tuple[float, float] | None) -> bool:
    if spread is None or other_spread is None:
        return False
    return spread[0] <= other_spread[1] and other_spread[0] <= spread[1]


def _ratio_text(ratio: float) -> str:
    if ratio < 0.1:
        return f"{ratio:.2f}"
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def _notes(rows: list[RepeatedRun], names: list[str]) -> list[str]:
    """What to know before the numbers are used."""
    points: list[Point] = []
    for row in rows:
        points += row.points
    notes = _notes_on_machines([point.record for point in points if not point.record.is_empty])
    if any(_has_few_steps(row.measured) for row in rows):
        notes.append(
            f"Speeds of runs with less than {FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )
    if any(point.record.device == "cpu" for point in points):
        notes.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    methods = {row.measured.planned_by for row in rows if row.measured.planned_by}
    notes += [f"Planned memory: {method}" for method in sorted(methods)]
    if len(points) > 1:
        notes.append(
            f"Same loss: a relative difference of at most {SAME:g} over the first {FIRST_STEPS} steps that both runs have"
        )
    for point in points:
        if point.unreadable_lines:
            notes.append(
                f"{point.directory}: {point.unreadable_lines} lines of its metrics or events cannot be read and are left out"
            )
    for row, name in zip(rows, names, strict=True):
        if drift := _drift_of_repeats(row):
            notes.append(f"The losses of the repeats of {name} differ by up to {rounded(drift)}")
    return notes


def _notes_on_machines(records: list[RunRecord]) -> list[str]:
    """What makes figures of different machines or revisions hard to compare."""
    notes = []
    peaks = [record.reference_tflops for record in records if record.reference_tflops]
    # On CPUs each run measures the peak anew: up to a percent is noise.
    if peaks and max(peaks) > 1.01 * min(peaks):
        figures = ", ".join(sorted({f"{peak:.3g}" for peak in peaks}))
        notes.append(
            f"MFU is of different peaks ({figures} TFLOP/s a device) and cannot be compared; set "
            "logging.reference_tflops to one figure for all"
        )
    machines: dict[str, set[str | None]] = {
        "hosts": {record.host for record in records},
        "devices": {record.device for record in records},
        "revisions of shardtune": {record.git_revision for record in records},
    }
    for what, values in machines.items():
        known = sorted(filter(None, values))
        if len(known) > 1:
            notes.append(f"Speeds are of different {what}: {', '.join(known)}")
    return notes


def _has_few_steps(measured: RunMeasurements) -> bool:
    """Whether its medians are of so few steps that they say little; a run without any step is not meant."""
    if not measured.steps:
        return False
    # No warm-up was left out: there was nothing behind it, so the medians are of the first interval itself.
    return not measured.warmup_steps or 0 < measured.steps - measured.warmup_steps < FIRST_STEPS


def _drift_of_repeats(row: RepeatedRun) -> float:
    """The largest relative loss difference of a repeat from the first one; 0 if there are no others."""
    differences = [compare_losses(row.point, repeat) for repeat in row.points[1:]]
    return max((difference.drift for difference in differences if difference is not None), default=0.0)
