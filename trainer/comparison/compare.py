"""Runs side by side: names, curves against the first run's, differing settings, and a verdict in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.comparison.curves import FIRST_STEPS, SAME, Apart, apart, not_finite, other_curves
from trainer.comparison.naming import Difference, differing, names
from trainer.comparison.reading import Measured, Point, measure, read_point


@dataclass(frozen=True, slots=True)
class Compared:
    """One run of a comparison."""

    name: str
    point: Point
    measured: Measured
    apart: Apart | None
    """From the first run's curve; None for the first, and where the curves cannot be compared."""
    not_comparable: tuple[str, ...]
    """Why not, setting by setting."""
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs in the order they were given; the first is what the others are compared with."""

    runs: tuple[Compared, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What to know before the numbers are used."""


def compare(directories: list[Path]) -> Comparison:
    """Read the runs and compare them with the first. Raises ConfigError where a directory holds no run."""
    points = [read_point(directory) for directory in directories]
    differences = differing(points)
    named = names(points, differences)
    numbers = [measure(point) for point in points]
    runs = []
    for name, point, measured in zip(named, points, numbers, strict=True):
        is_first = point is points[0]
        why_not = () if is_first else tuple(other_curves(points[0], point))
        distance = None if is_first or why_not else apart(points[0], point)
        parts = [] if is_first else [_loss(named[0], distance, why_not)]
        parts += [] if is_first else _ratios(numbers[0], measured)
        parts[:0] = [point.ended] if point.ended else []
        if (broke := not_finite(point)) is not None:
            parts.append(f"its loss is NaN or infinite from step {broke} on")
        verdict = f"{name}: {'; '.join(parts[:-1]) + '; ' + parts[-1] if len(parts) > 1 else ''.join(parts)}"
        if is_first:
            verdict = f"{name} is what the others are compared with{'; ' + '; '.join(parts) if parts else ''}"
        runs.append(Compared(name, point, measured, distance, why_not, verdict))
    return Comparison(tuple(runs), tuple(differences), tuple(_notes(points, numbers)))


def _loss(first: str, distance: Apart | None, why_not: tuple[str, ...]) -> str:
    if why_not:
        settings = [line.split(":")[0] for line in why_not]
        more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
        return f"its losses cannot be compared with those of {first} (other {', '.join(settings[:3])}{more})"
    if distance is None:
        return f"no step to compare with {first}"
    if not distance.early:
        return f"same loss as {first}, to the last digit"
    if distance.same:
        return f"same loss as {first} within {bound(distance.early)}"
    return f"not the loss of {first}: {bound(distance.early)} apart at step {distance.early_step}"


def bound(value: float) -> str:
    """A relative difference, short: 3e-7, or 0 where there is none."""
    return f"{value:.1g}".replace("e-0", "e-") if value else "0"


def _ratios(first: Measured, other: Measured) -> list[str]:
    found = []
    for what, a, b in (
        ("tokens/s", first.tokens_per_s, other.tokens_per_s),
        ("memory", first.memory_gib, other.memory_gib),
    ):
        if a and b:
            found.append(f"{_times(b / a)} x its {what}")
    return [", ".join(found)] if found else []


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 0.1 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def _notes(points: list[Point], numbers: list[Measured]) -> list[str]:
    told = [point.facts for point in points if point.facts]
    found = []
    peaks = [float(facts["reference_tflops"]) for facts in told if facts.get("reference_tflops")]
    if peaks and max(peaks) > 1.01 * min(peaks):
        figures = ", ".join(sorted({f"{peak:.3g}" for peak in peaks}))
        found.append(
            f"MFU is of different peaks ({figures} TFLOP/s a device) and cannot be compared; set "
            "logging.reference_tflops to one figure for all"
        )
    for key, what in (("host", "hosts"), ("device", "devices"), ("git_revision", "revisions of shardtune")):
        values = sorted({str(facts.get(key)) for facts in told})
        if len(values) > 1:
            found.append(f"Speeds are of different {what}: {', '.join(values)}")
    short = [m.steps for m in numbers if 0 < m.steps - m.warmup_steps < FIRST_STEPS or (m.steps and not m.warmup_steps)]
    if short:
        found.append(
            f"Speeds of runs with less than {FIRST_STEPS} steps behind the first logging interval say little; take "
            "more steps, or a smaller logging.every_steps"
        )
    if any(facts.get("device") == "cpu" for facts in told):
        found.append("Memory on a CPU is the process's resident set, libraries included, and of the whole run")
    if len(points) > 1:
        found.append(
            f"Same loss: at most {SAME:g} apart, relatively, over the first {FIRST_STEPS} steps that both runs have"
        )
    return found
