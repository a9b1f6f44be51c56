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


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One row of a comparison."""

    name: str
    repeated: RepeatedRun
    against: str | None
    """Whose curve its own is set beside: the first run's, or that of the first one whose loss is promised to be the same."""
    loss_difference: LossDifference | None
    """From that curve; None for the first, and where the curves cannot be compared."""
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
    found = [read_row(row, price_of) for row in rows]
    points = [each.point for each in found]
    differences = setting_differences(points)
    made = run_names(points, differences)
    named = [row.name or name for row, name in zip(rows, made, strict=True)]
    first = next((number for number, point in enumerate(points) if point.steps), 0)
    runs = []
    for number, each in enumerate(found):
        against = None if number == first or each.state == REFUSED else baseline_index(points, number, first)
        why_not: tuple[str, ...] = ()
        distance = None
        if against is not None:
            why_not = tuple(why_not_comparable(points[against], each.point))
            distance = None if why_not else compare_losses(points[against], each.point)
        name = None if against is None else named[against]
        parts = [each.ended] if each.ended else []
        parts += [] if name is None else [_loss_verdict(name, distance, why_not)]
        # The sentence has one yardstick: speed and memory are beside the run whose loss is compared.
        parts += [] if against is None else _ratios(found[against], each)
        if (broke := first_step_not_finite(each.point)) is not None:
            parts.append(f"its loss is NaN or infinite from step {broke} on")
        verdict = f"{named[number]}: {'; '.join(parts)}"
        if len(found) == 1:
            verdict = "; ".join([f"{named[0]}: {_outcome_of_single_run(each)}", *parts[bool(each.ended) :]])
        elif number == first:
            verdict = "; ".join([f"{named[number]} is what the others are compared with", *parts])
        runs.append(ComparedRun(named[number], each, name, distance, why_not, verdict))
    return Comparison(tuple(runs), named[first], tuple(differences), tuple(_notes(found, named)))


def _outcome_of_single_run(run: RepeatedRun) -> str:
    """What came of a run beside which there is none."""
    m, losses = run.measured, [row["loss"] for row in run.point.steps.values() if row["loss"] is not None]
    said = [run.ended or "done"]
    said += [f"{m.steps} step{'s' if m.steps != 1 else ''}"] if m.steps else []
    said += [f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"] if len(losses) > 1 else []
    shown = [key for key in m.after if key in m.before and key != "eval/perplexity"]  # which follows from the loss
    said += [f"{key} {m.before[key]:.4f} -> {m.after[key]:.4f}" for key in shown]
    return ", ".join(said)


def _loss_verdict(first: str, distance: LossDifference | None, why_not: tuple[str, ...]) -> str:
    if why_not:
        settings = [line.split(":")[0] for line in why_not]
        more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
        return f"its losses cannot be compared with those of {first} (other {', '.join(settings[:3])}{more})"
    if distance is None:
        return f"no step to compare with {first}"
    few = f" over {distance.steps} step{'s' if distance.steps > 1 else ''}" if distance.steps < FIRST_STEPS else ""
    if not distance.early:
        return f"same loss as {first}, to the last digit{few}"
    if distance.same:
        return f"same loss as {first} within {rounded(distance.early)}{few}"
    return f"not the loss of {first}: {rounded(distance.early)} apart at step {distance.early_step}"


def rounded(value: float) -> str:
    """A relative difference, short: 3e-7, or 0 where there is none."""
    return f"{value:.1g}".replace("e-0", "e-") if value else "0"


def _ratios(yardstick: RepeatedRun, other: RepeatedRun) -> list[str]:
    """Speed and memory beside those of the run that the sentence has named."""
    ratios = []
    for what, a, b in (
        ("tokens/s", yardstick.measured.tokens_per_s, other.measured.tokens_per_s),
        ("memory", yardstick.measured.memory_gib, other.measured.memory_gib),
    ):
        if a and b:
            is_noise = what == "tokens/s" and _overlap(yardstick.summary.spread, other.summary.spread)
            noise = " (less than the repeats differ)" if is_noise else ""
            ratios.append(f"{_ratio_text(b / a)} x its {what}{noise}")
    return [", ".join(ratios)] if ratios else []


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 0.1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def _notes(rows: list[RepeatedRun], named: list[str]) -> list[str]:
    points = [point for row in rows for point in row.points]
    numbers = [row.measured for row in rows]
    records = [point.record for point in points if not point.record.is_empty]
    found = []
    peaks = [record.reference_tflops for record in records if record.reference_tflops]
    if peaks and max(peaks) > 1.01 * min(peaks):
        figures = ", ".join(sorted({f"{peak:.3g}" for peak in peaks}))
        found.append(
            f"MFU is of different peaks ({figures} TFLOP/s a device) and cannot be compared; set "
            "logging.reference_tflops to one figure for all"
        )
    for key, what in (("host", "hosts"), ("device", "devices"), ("git_revision", "revisions of shardtune")):
        values = sorted({str(getattr(record, key)) for record in records if getattr(record, key)})
        if len(values) > 1:
            found.append(f"Speeds are of different {what}: {', '.join(values)}")
    short = [m.steps for m in numbers if 0 < m.steps - m.warmup_steps < FIRST_STEPS or (m.steps and not m.warmup_steps)]
    if short:
        found.append(
            f"Speeds of runs with less than {FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )
    if any(record.device == "cpu" for record in records):
        found.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    found += [f"Planned memory: {by}" for by in sorted({m.planned_by for m in numbers if m.planned_by})]
    if len(points) > 1:
        found.append(
            f"Same loss: at most {SAME:g} apart, relatively, over the first {FIRST_STEPS} steps that both runs have"
        )
    found += [
        f"{point.directory}: {point.unreadable_lines} lines of its metrics or events cannot be read and are left out"
        for point in points
        if point.unreadable_lines
    ]
    for row, name in zip(rows, named, strict=True):
        distances = [distance for other in row.points[1:] if (distance := compare_losses(row.point, other))]
        if drift := max((distance.drift for distance in distances), default=0.0):
            found.append(f"The repeats of {name} are up to {rounded(drift)} apart in their losses")
    return found
