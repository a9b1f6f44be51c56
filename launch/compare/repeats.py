"""Makes one row from the repeats of a point: medians with their spread, measured beside planned values, and price."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from launch.compare.profiles import exposed_s
from launch.compare.run_files import RATES, Point, RunMeasurements, is_run, measure, read_point, rows_after_warmup
from launch.compare.settings import ComparisonRow
from launch.compare.wandb_files import is_server, is_wandb, read_server, read_wandb
from trainer.reporting.run_record import RunRecord

REFUSED = "refused"
MEDIANS = (*RATES, "start_s", "evaluation_before_s", "checkpoint_s", "exposed_s")
"""What is a median over the repeats; memory is the largest."""
STEP_PARTS = {"data": "data_wait_s", "forward": "forward_s", "backward": "backward_s", "optimizer": "optimizer_s"}
"""Parts of a step, and what rows call them."""


@dataclass(frozen=True, slots=True)
class RepeatsSummary:
    """Figures of a point over all its repeats; None if its runs did not record them."""

    repeats: int
    """Runs that took a step."""
    tokens_per_s_repeats: tuple[float, ...]
    """Each repeat's median."""
    parts_s: dict[str, float]
    """Seconds of the parts of a step, medians: data, forward, backward, optimizer, and what is left; empty where not timed."""
    dollars_per_million: float | None
    """US dollars for a million tokens at the median speed, all devices together."""

    @property
    def spread(self) -> tuple[float, float] | None:
        """The slowest and the fastest repeat, tokens/s; None for a single one."""
        speeds = self.tokens_per_s_repeats
        return (min(speeds), max(speeds)) if len(speeds) > 1 else None


@dataclass(frozen=True, slots=True)
class RepeatedRun:
    """A row with what its repeats left."""

    row: ComparisonRow
    points: tuple[Point, ...]
    """The repeats that were frozen; of a refused row one without a step."""
    measured: RunMeasurements
    summary: RepeatsSummary

    @property
    def point(self) -> Point:
        """The first repeat, whose curve is compared."""
        return self.points[0]

    @property
    def state(self) -> str:
        """That of the first repeat that is not done, else `done`."""
        return next((point.state for point in self.points if point.ended), "done")

    @property
    def ended(self) -> str | None:
        """How far the first repeat came that is not done."""
        return self._of_first(point.ended for point in self.points)

    @property
    def reason(self) -> str | None:
        """How far the first repeat came that is not done, and why it ended."""
        return self._of_first(point.reason for point in self.points)

    def _of_first(self, texts: Iterable[str | None]) -> str | None:
        """The text of the first repeat that has one."""
        for number, text in enumerate(texts, 1):
            if text:
                return f"repeat {number}: {text}" if number > 1 else text
        return None


def read_row(row: ComparisonRow, price_of: Callable[[str], float | None]) -> RepeatedRun:
    """Read a row's directories; `price_of` a card by its driver's name. Raises ConfigError as `read_point` does."""
    points = _points_of(row)
    per_repeat = [measure(point, row.warmup) for point in points]
    # A repeat that failed before its first step has no numbers; without any other the first one is shown empty.
    begun = [repeat for repeat in per_repeat if repeat.steps] or per_repeat[:1]
    exposed = _median([exposed_s(point.directory) for point in points])
    measured = _over_repeats(per_repeat[0], begun)
    if exposed is not None:
        measured = replace(measured, exposed_s=exposed)  # of traced steps: truer than that of the counted step
    speeds = [repeat.tokens_per_s for repeat in begun if repeat.tokens_per_s is not None]
    summary = RepeatsSummary(
        repeats=sum(repeat.steps > 0 for repeat in per_repeat),
        tokens_per_s_repeats=tuple(speeds),
        parts_s=_step_parts_s(points, row.warmup, measured.step_s),
        dollars_per_million=_dollars_per_million(row, points[0].record, measured.tokens_per_s, price_of),
    )
    return RepeatedRun(row, points, measured, summary)


def _points_of(row: ComparisonRow) -> tuple[Point, ...]:
    """The repeats of a row that were frozen, always with the first."""
    if row.refused:
        return (_refused_point(row),)
    # The first is always read, so that its error is shown; a repeat that was not frozen yet is just not there.
    first, *others = row.directories
    return tuple(_read(directory) for directory in [first, *filter(is_run, others)])


def _over_repeats(first: RunMeasurements, begun: list[RunMeasurements]) -> RunMeasurements:
    """The numbers of the first repeat, with medians over the repeats in `MEDIANS`, and the largest of their memory."""
    over: dict[str, float | None] = {}
    # A rate is that of a usual repeat. Memory is what a run must have room for: the worst repeat counts.
    for name in MEDIANS:
        over[name] = _median([getattr(measured, name) for measured in begun])
    for name in ("memory_gib", "memory_reserved_gib"):
        over[name] = max(_numbers([getattr(measured, name) for measured in begun]), default=None)
    return replace(first, **over)  # type: ignore[arg-type]  # no other fields are among the names


def _read(path: Path) -> Point:
    if is_server(path):
        return read_server(path)
    return read_wandb(path) if is_wandb(path) else read_point(path)


def _refused_point(row: ComparisonRow) -> Point:
    """The point of a row that was never run: it has a configuration and the reasons, and neither steps nor a record."""
    return Point(
        directory=row.directories[0] if row.directories else Path(row.name or REFUSED),
        config=row.config,
        identity={},
        record=RunRecord(),
        status={"state": REFUSED, "reason": "; ".join(row.refused)},
        failure={},
        steps={},
        evaluations={},
    )


def _step_parts_s(points: tuple[Point, ...], warmup: int, step_s: float | None) -> dict[str, float]:
    """Seconds of each part of a step, medians over all repeats; empty where parts were not timed."""
    timed_rows = []
    for point in points:
        rows = rows_after_warmup(point, warmup) or point.steps.values()
        timed_rows += [row for row in rows if "forward_s" in row]
    parts: dict[str, float] = {}
    for name, key in STEP_PARTS.items():
        seconds = _median([row.get(key) for row in timed_rows])
        if seconds is not None:
            parts[name] = seconds
    if not parts:
        return {}
    # Medians of parts need not add up to the median step, so that the rest could be below zero.
    rest = max(0.0, (step_s or 0.0) - sum(parts.values()))
    return {**parts, "rest": rest}


def _dollars_per_million(
    row: ComparisonRow, record: RunRecord, tokens_per_s: float | None, price_of: Callable[[str], float | None]
) -> float | None:
    """US dollars for a million tokens; None if the card's price, the speed or the number of devices is not known."""
    price_per_hour = row.price_per_hour
    if price_per_hour is None and record.device_name:
        price_per_hour = price_of(record.device_name)
    if price_per_hour is None or not tokens_per_s or not record.world_size:
        return None
    return price_per_hour * record.world_size / 3600 / tokens_per_s * 1e6


def _median(values: list[Any]) -> float | None:
    numbers = _numbers(values)
    return median(numbers) if numbers else None


def _numbers(values: list[Any]) -> list[float]:
    """The known numbers. None is left out, also that of a number that is not finite."""
    return [value for value in values if isinstance(value, int | float)]
