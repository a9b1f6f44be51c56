"""The interface of a tracker: it takes rows, a summary, and how the run ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from strategies import exit_codes
from strategies.errors import Diverged, NotRunOwner, Preempted, ShardtuneError
from trainer.reporting.config import Alert, LoggingConfig
from trainer.reporting.metric_names import CURRENT_NAMES_EDITION
from trainer.reporting.status import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """The run, as a tracker gets to know it before its first row."""

    config: LoggingConfig
    """The settings of `logging`, completed by environment variables such as WANDB_PROJECT."""
    run_dir: Path
    run_id: str
    """Id of the run in trackers; it stays the same after a resume."""
    name: str
    resumed_at: int
    """Step that a resumed run continues from; 0 at a start."""
    settings: dict[str, Any]
    """Flat columns of the run table, and under `config` the whole configuration."""
    data: Path | None = None
    """Directory of the prepared data."""
    trained_by_run: str = ""
    """Id of the run that trained the exported model, for the name of its artifact; empty: this one."""
    print_line: Callable[[str], None]
    """Prints a line that the user should see."""
    metric_names: int = CURRENT_NAMES_EDITION
    """Edition of the names of metrics (`trainer/reporting/metric_names.py`)."""

    @property
    def project(self) -> str:
        """Name of the project in trackers; never empty."""
        return self.config.project or "shardtune"


@dataclass(frozen=True, slots=True)
class RunEnding:
    """How a run ended."""

    state: RunState
    exit_code: int = 0
    """Exit code of the command."""
    reason: str = ""
    diverged: bool = False
    """Whether the run diverged: it broke off for that, or went on to its end and its losses are worse than at its start."""
    exported: Path | None = None
    """Directory of the export that was written."""

    @property
    def alert(self) -> Alert | None:
        """The kind of alert that `logging.alerts` may ask for at this end; None for a run that is done and did not diverge."""
        if self.diverged:
            return Alert.diverged
        return None if self.state is RunState.done else Alert(str(self.state))

    @property
    def tracked_state(self) -> str:
        """The state that trackers show: `done`, `failed`, `preempted` or `diverged`."""
        return str(self.alert or self.state)

    @classmethod
    def from_error(cls, error: BaseException) -> RunEnding:
        """Tell trackers how a run ended that an exception broke off.

        - Preempted or NotRunOwner: preempted. A run that was stopped, or taken over by another attempt, continues elsewhere.
        - KeyboardInterrupt: failed, with the exit code that shells report for a SIGINT.
        - Any other: failed, with the exception's `exit_code`; `diverged` is set for Diverged.
        """
        reason = str(error) or type(error).__name__
        if isinstance(error, Preempted | NotRunOwner):
            return cls(RunState.preempted, exit_code=Preempted.exit_code, reason=reason)
        exit_code = getattr(error, "exit_code", ShardtuneError.exit_code)
        if isinstance(error, KeyboardInterrupt):
            exit_code = exit_codes.INTERRUPTED
        return cls(RunState.failed, exit_code=exit_code, reason=reason, diverged=isinstance(error, Diverged))


@dataclass(frozen=True, slots=True)
class LoggedTable:
    """Rows of texts and numbers under headings."""

    columns: list[str]
    rows: list[list[Any]]


class Tracker(Protocol):
    """Where rows of numbers go. Every call may raise: the run then continues without the tracker."""

    hint: tuple[str, str] | None
    """(name of the tracker, the command or address that shows this run)."""

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Record numbers of one step."""

    def log_table(self, name: str, table: LoggedTable, *, step: int) -> None:
        """Show a table of one step, where the tracker has a place for one."""

    def summarise(self, values: dict[str, Any]) -> None:
        """Set numbers of the whole run."""

    def close(self, ending: RunEnding) -> None:
        """Finish; nothing is lost if it is never called but how the run ended."""
