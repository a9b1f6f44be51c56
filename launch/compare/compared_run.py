"""One row of a comparison: a point with its repeats, and how its loss compares with that of its baseline."""

from __future__ import annotations

from dataclasses import dataclass

from launch.compare.curves import LossDifference
from launch.compare.repeats import RepeatedRun, RepeatsSummary
from launch.compare.run_files import RecordedRun, RunMeasurements


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One row of a comparison."""

    name: str
    repeated: RepeatedRun
    against: str | None
    """Name of the baseline, whose loss this run's is compared with: the first run, or the first with the same steps."""
    loss_difference: LossDifference | None
    """Of this run's loss curve from the baseline's; None for the first run, and if the curves cannot be compared."""
    not_comparable: tuple[str, ...]
    """Why the loss curves cannot be compared: `key: value and value` for each setting; empty if they can."""
    is_same_job: bool = False
    """Whether the baseline trains the same job, so that both must have the same loss: they differ in strategy alone."""
    verdict: str = ""

    @property
    def first_repeat(self) -> RecordedRun:
        """The run of the first repeat: its loss curve stands for all repeats."""
        return self.repeated.first_repeat

    @property
    def measured(self) -> RunMeasurements:
        """Speed, memory and losses over all repeats."""
        return self.repeated.measured

    @property
    def summary(self) -> RepeatsSummary:
        """Spread of the repeats, parts of a step, and the price."""
        return self.repeated.summary
