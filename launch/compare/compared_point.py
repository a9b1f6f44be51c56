"""A point of a comparison with its repeats, and how its loss compares with that of its baseline."""

from __future__ import annotations

from dataclasses import dataclass

from launch.compare.curves import IncomparableSetting, LossDifference
from launch.compare.repeats import MeasuredPoint, RepeatsSummary
from launch.compare.run_files import RecordedRun, RunMeasurements
from launch.compare.settings import PointSource


@dataclass(frozen=True, slots=True)
class ComparedPoint:
    """A point (one combination of settings) beside its baseline. What its runs measured is in `measured_point`."""

    name: str
    measured_point: MeasuredPoint
    baseline_name: str | None
    """The point whose loss this one's is compared with; None for the first point, and for a refused one."""
    loss_difference: LossDifference | None
    """How far the losses are from the baseline's; None without a baseline, and if the loss curves cannot be compared."""
    incomparable_settings: tuple[IncomparableSetting, ...]
    """Why the loss curves of the point and its baseline cannot be compared; empty if they can, or without a baseline."""
    should_have_loss_of_baseline: bool = False
    """Whether this point trains the same job as its baseline with the same seed, so that both must have the same loss."""
    verdict: str = ""

    @property
    def source(self) -> PointSource:
        """Where the point was read from: the directories of its repeats, or why it was refused."""
        return self.measured_point.source

    @property
    def repeats(self) -> tuple[RecordedRun, ...]:
        """The runs of the point, one for each repeat that has a directory."""
        return self.measured_point.repeats

    @property
    def run_dirs(self) -> list[str]:
        """The run directory of each repeat; empty for a refused point, which never had one."""
        if not self.source.directories:
            return []
        return [str(repeat.directory) for repeat in self.repeats]

    @property
    def first_repeat(self) -> RecordedRun:
        """The run of the first repeat: its loss curve stands for all repeats."""
        return self.measured_point.first_repeat

    @property
    def state(self) -> str:
        """State of the first repeat that is not done; `done` if all are."""
        return self.measured_point.state

    @property
    def unfinished_state(self) -> str | None:
        """State and last step of the first repeat that is not done, such as `failed at step 3`; None if all are done."""
        return self.measured_point.unfinished_state

    @property
    def reason(self) -> str | None:
        """Like `unfinished_state`, with the reason why the run ended; None if all repeats are done."""
        return self.measured_point.reason

    @property
    def measured(self) -> RunMeasurements:
        """Speed, memory and losses over all repeats."""
        return self.measured_point.measured

    @property
    def summary(self) -> RepeatsSummary:
        """Spread of the repeats, parts of a step, and the price."""
        return self.measured_point.summary
