"""Reads the repeats of a point and combines their numbers: medians with their spread, the largest memory, and the price."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from launch.compare.interval import Interval
from launch.compare.profiles import exposed_communication_s
from launch.compare.run_files import (
    RecordedRun,
    RunMeasurements,
    is_run_directory,
    measure_run,
    read_recorded_run,
    rows_after_warmup,
)
from launch.compare.settings import PointSource
from launch.compare.wandb_files import (
    is_wandb_address,
    is_wandb_directory,
    read_from_wandb_server,
    read_wandb_directory,
)
from trainer.reporting.run_record import RunRecord

REFUSED_STATE = "refused"
MEDIAN_FIELDS = (
    *("tokens_per_s", "supervised_tokens_per_s", "mfu", "step_s"),
    *("start_s", "evaluation_before_s", "checkpoint_s", "exposed_s"),
)
"""Measurements of which a point has the median over its repeats; of memory it has the largest."""
STEP_PARTS = {"data": "data_wait_s", "forward": "forward_s", "backward": "backward_s", "optimizer": "optimizer_s"}
"""Key in `metrics.jsonl` of each part of a step that is timed."""


@dataclass(frozen=True, slots=True)
class RepeatsSummary:
    """Figures of a point over all its repeats; None if its runs did not record them."""

    repeats: int
    """Runs that took a step."""
    tokens_per_s_repeats: tuple[float, ...]
    """Each repeat's median."""
    memory_gib_repeats: tuple[float, ...]
    """Each repeat's largest peak of all ranks and steps."""
    parts_s: dict[str, float]
    """Seconds of the parts of a step, medians: data, forward, backward, optimizer, and what is left; empty where not timed."""
    dollars_per_million: float | None
    """US dollars for a million tokens at the median speed, all devices together."""

    @property
    def spread(self) -> Interval | None:
        """From the slowest to the fastest repeat, in tokens/s; None for a single one."""
        speeds = self.tokens_per_s_repeats
        return Interval(min(speeds), max(speeds)) if len(speeds) > 1 else None


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """A point as its runs measured it: the run of each repeat, and their numbers combined."""

    source: PointSource
    repeats: tuple[RecordedRun, ...]
    """The runs that have a directory; for a refused point, one run without steps that holds the reasons."""
    measured: RunMeasurements
    summary: RepeatsSummary

    @property
    def first_repeat(self) -> RecordedRun:
        """The first repeat, whose loss curve is compared."""
        return self.repeats[0]

    @property
    def state(self) -> str:
        """State of the first repeat that is not done; `done` if all are."""
        for run in self.repeats:
            if run.unfinished_state:
                return run.state
        return "done"

    @property
    def unfinished_state(self) -> str | None:
        """State and last step of the first repeat that is not done, such as `repeat 2: failed at step 3`; None if all are."""
        return self._first_known(run.unfinished_state for run in self.repeats)

    @property
    def reason(self) -> str | None:
        """State, last step and reason of the first repeat that is not done; None if all are done."""
        return self._first_known(run.reason for run in self.repeats)

    def _first_known(self, texts_of_repeats: Iterable[str | None]) -> str | None:
        """The first text that is not None; one of a later repeat names it: `repeat 2: failed at step 3`. None if all are None."""
        for repeat_number, text in enumerate(texts_of_repeats, 1):
            if text:
                return f"repeat {repeat_number}: {text}" if repeat_number > 1 else text
        return None


def read_measured_point(source: PointSource, gpu_hour_price: Callable[[str], float | None]) -> MeasuredPoint:
    """Read the runs of one point of a comparison and combine their numbers into speed, memory, losses and price of the point.

    A point is one combination of settings; it is run once for each repeat. `source`: where the runs are, or why the point
    was refused. `gpu_hour_price`: maps the driver's name of a card to US dollars an hour, or to None if its price is not
    known.

    Raises ConfigError if a directory holds no run, or one of its files is damaged.
    """
    runs = _read_runs(source)  # one at least: for a refused point a run that never started
    measurements = [measure_run(run, source.warmup) for run in runs]
    # A repeat that failed before its first step has no numbers. If no repeat has any, the first stands for all.
    begun_measurements = [measured for measured in measurements if measured.steps] or measurements[:1]
    # The first repeat gives what is not combined, such as its held-out metrics, even if it never took a step.
    combined = _combine_repeats(measurements[0], begun_measurements)
    # Exposed communication is time in which a rank only waits for other ranks. A profiler trace measures it; without one it is an
    # estimate from a single step.
    traced_exposed_s = _median_of_known([exposed_communication_s(run.directory) for run in runs])
    if traced_exposed_s is not None:
        combined = replace(combined, exposed_s=traced_exposed_s)
    summary = RepeatsSummary(
        repeats=sum(measured.steps > 0 for measured in begun_measurements),
        tokens_per_s_repeats=_known_values_of_field("tokens_per_s", begun_measurements),
        memory_gib_repeats=_known_values_of_field("memory_gib", begun_measurements),
        parts_s=_step_parts_s(runs, source.warmup, combined.step_s),
        dollars_per_million=_dollars_per_million(source, runs[0].record, combined.tokens_per_s, gpu_hour_price),
    )
    return MeasuredPoint(source, runs, combined, summary)


def _known_values_of_field(name: str, measurements: list[RunMeasurements]) -> tuple[float, ...]:
    """The values of a field of `RunMeasurements`, such as `memory_gib`, in several runs; runs without it are left out."""
    return tuple(_known_numbers([getattr(measured, name) for measured in measurements]))


def _read_runs(source: PointSource) -> tuple[RecordedRun, ...]:
    """Read the runs of a point, at least one. The first case that applies:

    - The point was refused: one run without steps stands for it, so that it has a place in the tables.
    - Otherwise: the run of the first repeat, and of each later repeat that has a run directory already.

    Raises ConfigError if a run cannot be read.
    """
    if source.refused:
        return (_never_started_run(source),)
    # The first is always read, so that its error is shown. Later repeats may not have been started yet.
    first_dir, *later_dirs = source.directories
    return tuple(_read_run(directory) for directory in [first_dir, *filter(is_run_directory, later_dirs)])


def _combine_repeats(first: RunMeasurements, begun_measurements: list[RunMeasurements]) -> RunMeasurements:
    """Combine the measurements of a point's repeats into those of the point.

    - `MEDIAN_FIELDS`, which are speeds and times: the median over the repeats.
    - Memory: the largest.
    - All other fields, such as losses: those of the first repeat.

    `first`: of the first repeat. `begun_measurements`: of all repeats that took a step.
    """
    combined: dict[str, float | None] = {}
    for name in MEDIAN_FIELDS:
        combined[name] = _median_of_known(list(_known_values_of_field(name, begun_measurements)))
    # Memory is what a run must have room for: the worst repeat counts.
    for name in ("memory_gib", "memory_reserved_gib"):
        combined[name] = max(_known_values_of_field(name, begun_measurements), default=None)
    return replace(first, **combined)  # type: ignore[arg-type]  # no other fields are among the names


def _read_run(path: Path) -> RecordedRun:
    """Read a run from W&B's server, from W&B's own directory, or from its run directory, as `path` names it."""
    if is_wandb_address(path):
        return read_from_wandb_server(path)
    if is_wandb_directory(path):
        return read_wandb_directory(path)
    return read_recorded_run(path)


def _never_started_run(source: PointSource) -> RecordedRun:
    """Make a run without steps that stands for a refused point, which was never run, so that tables can show it with the reasons.

    It has the point's configuration, and the state `refused`. The point's name takes the place of the directory that it
    never had.
    """
    return RecordedRun(
        directory=source.directories[0] if source.directories else Path(source.name or REFUSED_STATE),
        config=source.config,
        identity={},
        record=RunRecord(),
        status={"state": REFUSED_STATE, "reason": "; ".join(source.refused)},
        failure={},
        steps={},
        evaluations={},
    )


def _step_parts_s(runs: tuple[RecordedRun, ...], warmup_steps: int, step_s: float | None) -> dict[str, float]:
    """Where the time of a step goes: {"data": 0.01, "forward": 0.2, "backward": 0.4, "optimizer": 0.1, "rest": 0.05}, in seconds.

    Each part is the median over the steps of all repeats, without those of the warm-up unless a run has no others.
    `step_s`: the median time of a whole step, from which the rest follows. Empty if the runs did not time the parts.
    """
    timed_rows = []
    for run in runs:
        rows = rows_after_warmup(run, warmup_steps) or run.steps.values()
        timed_rows += [row for row in rows if "forward_s" in row]
    parts_s: dict[str, float] = {}
    for part, metric in STEP_PARTS.items():  # such as `forward`, whose metric is `forward_s`
        median_s = _median_of_known([row.get(metric) for row in timed_rows])
        if median_s is not None:
            parts_s[part] = median_s
    if not parts_s:
        return {}
    # Medians of parts need not add up to the median step, so that the rest could be below zero.
    rest_s = max(0.0, (step_s or 0.0) - sum(parts_s.values()))
    return {**parts_s, "rest": rest_s}


def _dollars_per_million(
    source: PointSource, record: RunRecord, tokens_per_s: float | None, gpu_hour_price: Callable[[str], float | None]
) -> float | None:
    """What a million tokens cost in US dollars; None if the card's price, the speed or the number of devices is not known.

    `source.price_per_hour`, which the user set, wins over the price list `gpu_hour_price`. `tokens_per_s`: of all ranks
    together.
    """
    price_per_hour = source.price_per_hour
    if price_per_hour is None and record.device_name:
        price_per_hour = gpu_hour_price(record.device_name)
    if price_per_hour is None or not tokens_per_s or not record.world_size:
        return None
    dollars_per_second = price_per_hour * record.world_size / 3600
    return dollars_per_second / tokens_per_s * 1e6


def _median_of_known(values: list[Any]) -> float | None:
    """The median of the numbers among the values; None if there are none."""
    numbers = _known_numbers(values)
    return median(numbers) if numbers else None


def _known_numbers(values: list[Any]) -> list[float]:
    """The numbers among the values, without None: a file has null for an unknown number, and for one that is not finite."""
    return [value for value in values if isinstance(value, int | float)]
