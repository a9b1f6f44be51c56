"""trackio: rows go to its local database, or to TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

from __future__ import annotations

import contextlib
import io
import shlex
from typing import Any

from trainer.reporting.status import RunState
from trainer.reporting.trackers.base import LoggedTable, RunEnding, TrackedRun


class TrackioRun:
    """A run in trackio. It has no summary and no state of a run: both are a last row."""

    def __init__(self, tracked_run: TrackedRun) -> None:
        """Begin the run in trackio, a local store of runs, or continue it after a resume."""
        import trackio

        self._tracked_run = tracked_run
        self._step = tracked_run.resumed_at
        with contextlib.redirect_stdout(io.StringIO()):  # how to show the runs, which `hint` says
            self._run = trackio.init(
                project=tracked_run.project,
                # trackio knows runs by their names: two runs of one name would be one.
                name=f"{tracked_run.name}-{tracked_run.run_id[:6]}",
                group=tracked_run.config.group,
                config={**tracked_run.settings, "notes": tracked_run.config.notes, "tags": tracked_run.config.tags},
                resume="allow" if tracked_run.resumed_at else "never",
                embed=False,
            )
        self.hint: tuple[str, str] | None = ("trackio", f"trackio show --project {shlex.quote(tracked_run.project)}")

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self._step = step
        self._run.log({name: number for name, number in metrics.items() if name != "step"}, step=step)

    def log_table(self, name: str, table: LoggedTable, *, step: int) -> None:
        """Left out: it keeps numbers."""

    def summarise(self, values: dict[str, Any]) -> None:
        self._run.log(values, step=self._step)

    def close(self, ending: RunEnding) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            self._run.log({"state": ending.tracked_state}, step=self._step)
            if ending.alert in self._tracked_run.config.alerts:
                level = trackio.AlertLevel.WARN if ending.state is RunState.preempted else trackio.AlertLevel.ERROR
                self._run.alert(f"{self._tracked_run.name}: {ending.alert}", ending.reason, level=level)
            trackio.finish()  # of this run: its own `finish` would be called once more at the end of the process
