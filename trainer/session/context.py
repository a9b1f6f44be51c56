"""What the parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from strategies.runtime import Runtime
from trainer.reporting.console import Console
from trainer.session.attempt import Attempt
from trainer.stopping.preempt import RankStopAgreement


@dataclass(slots=True)
class RunContext:
    """What the parts of a run share: its ranks, its console, its agreement on stopping, and the attempt that it is."""

    config_sha256: str
    """SHA-256 of the settings that decide the result of the run, as 64 hexadecimal digits: the identity of the run."""
    runtime: Runtime
    console: Console
    stop_agreement: RankStopAgreement
    attempt: Attempt

    @property
    def run_dir(self) -> Path:
        """The current path of the run directory; somebody may rename it while the run is under way."""
        assert self.attempt.run_dir is not None
        return self.attempt.run_dir
