"""Prints the progress of a comparison on stderr: point, step, and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from launch.runs.metrics_tail import read_last_rows
from launch.streams import write_control_sequence
from strategies import exit_codes
from strategies.errors import ConfigError, ShardtuneError
from trainer.pages.numbers import format_duration
from trainer.reporting.metric_rows import METRICS_FILE
from trainer.reporting.run_record import readable_run_record

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.config.frozen import ComposedConfig

UPDATE_INTERVAL_S = 1.0
"""Seconds between two looks at a run's files."""
LINE_INTERVAL_S = 60.0
"""Seconds between two progress lines in a log file. In a terminal, each line replaces the one before it."""
MAX_LINE_LENGTH = 110
"""Characters of a line that is drawn over: one that wraps could not be erased."""


@dataclass(frozen=True, slots=True)
class SeenStep:
    """A step of a run, and when this process first saw it, by `time.monotonic`."""

    step: int
    seen_at: float


@dataclass(slots=True)
class StartedRun:
    """The run that is under way: how it was started, and what is known of its speed. Times are those of `time.monotonic`."""

    name: str
    run_dir: Path
    total_steps: int | None
    """None until the run has recorded it, for a budget of epochs or tokens."""
    started_at: float
    step_at_start: int
    """A resumed run has steps of an earlier start: they say nothing about its speed now."""
    first_new_step: SeenStep | None = None
    """The first step after the start that was seen."""

    def note_step(self, step: int, now: float) -> None:
        """Take note of the run's last step, to estimate the time left: its first new step, and how many steps it will take."""
        if self.total_steps is None:
            # It is in `run.json`, once the run has written that file.
            self.total_steps = readable_run_record(self.run_dir).total_steps or None
        if self.first_new_step is None and step > self.step_at_start:
            self.first_new_step = SeenStep(step, seen_at=now)

    def step_text(self, step: int) -> str:
        """How far the run is, by its last step: `step 40 of 100`."""
        if not step:
            return "starting"
        return f"step {step} of {self.total_steps}" if self.total_steps else f"step {step}"

    def expected_duration_s(self, step: int, now: float) -> float | None:
        """Estimate how many seconds the run takes in all: its start, and all its steps at the speed so far.

        None before it has made two new steps, or if its number of steps is not known. `step`: its last one.
        """
        if self.first_new_step is None or not self.total_steps or step <= self.first_new_step.step:
            return None
        # Over the steps after the first new one, so that the start does not count as speed.
        step_s = (now - self.first_new_step.seen_at) / (step - self.first_new_step.step)
        start_s = self.first_new_step.seen_at - self.started_at
        return start_s + step_s * (self.total_steps - self.first_new_step.step)


class RunsProgress:
    """Shows on stderr how far a series of runs is that are started one after another: number of the run, step and time left.

    `total_runs`: all runs of the command, of which `num_done` had finished before. `periodic_page`: a page that is
    rewritten while the runs train; None for none.
    """

    def __init__(self, total_runs: int, num_done: int, periodic_page: PeriodicPage | None = None) -> None:
        self.total_runs = total_runs
        self.run_number = num_done
        """Number of the current run, from 1; before the first one starts, how many runs had finished."""
        self.periodic_page = periodic_page
        self._stderr = sys.stderr
        self._is_terminal = self._stderr.isatty()
        self._durations_s: list[float] = []
        """How long each run took that finished under this command."""
        self._updated_at = 0.0
        self._printed_at = 0.0
        if num_done:
            self._print(f"{num_done} of {total_runs} runs are done already")

    def start_run(self, name: str, run_dir: Path, total_steps: int | None) -> None:
        """Begin to show a run that starts in `run_dir`; called before each run.

        `total_steps` is None if the budget of the run is not one of steps. Prints a line unless stderr is a terminal, where
        the progress line soon follows.
        """
        self.run_number += 1
        now = time.monotonic()
        self._run = StartedRun(name, run_dir, total_steps, started_at=now, step_at_start=_last_step(run_dir))
        self._printed_at = now
        if not self._is_terminal:
            self._print(f"{self._heading()} -> {run_dir}")

    def _heading(self) -> str:
        """What each line about the current run begins with, such as `[2/6] ddp`."""
        return f"[{self.run_number}/{self.total_runs}] {self._run.name}"

    def skip_run(self) -> None:
        """Count a run that is not started, because another repeat of its point failed before."""
        self.run_number += 1

    def update(self) -> None:
        """Show how far the current run is, and rewrite the page, if it is time to.

        Called many times a second while the run trains.
        """
        now = time.monotonic()
        if now - self._updated_at < UPDATE_INTERVAL_S:
            return
        self._updated_at = now
        if self.periodic_page is not None:
            self.periodic_page.write_if_due()
        # In a terminal each line overwrites the one before it; a log file would grow.
        if self._is_terminal or now - self._printed_at >= LINE_INTERVAL_S:
            self._printed_at = now
            step = _last_step(self._run.run_dir)
            self._run.note_step(step, now)
            self._print(self._progress_line(step, now), replaceable=True)

    def end_run(self, exit_code: int, output_file: Path) -> None:
        """Print how the current run ended: its duration and speed, or why it failed or stopped.

        A successful run's duration is kept to estimate the time left. `output_file`: has what the run printed, for the user
        to look into.
        """
        from launch.compare.run_files import read_recorded_run

        duration_s = time.monotonic() - self._run.started_at
        outcome = None
        reason = None
        with suppress(ConfigError):  # the comparison at the end reports a file that cannot be read
            run = read_recorded_run(self._run.run_dir)
            outcome = run.record.outcome
            reason = run.reason
        if exit_code == 0:
            self._durations_s.append(duration_s)
            tokens_per_s = outcome.speed.get("tokens_per_s") if outcome is not None else None
            speed = f", {tokens_per_s:,.0f} tokens/s" if tokens_per_s else ""
            self._print(f"{self._heading()}: done in {format_duration(duration_s)}{speed}")
        elif exit_code in exit_codes.STOPPED_CODES:  # preempted, or stopped by Ctrl-C: the run can be continued
            self._print(f"{self._heading()}: {reason or 'stopped'}")
        else:
            self._print(f"{self._heading()}: {reason or f'ended with {exit_code}'}; what it printed: {output_file}")

    def _progress_line(self, step: int, now: float) -> str:
        """The line on the current run: its last step and the time to the end, `[2/6] ddp: step 40 of 100, about 9 min left`."""
        line = f"{self._heading()}: {self._run.step_text(step)}"
        seconds_left = self._seconds_left(step, now)
        if seconds_left is not None:
            line += f", about {format_duration(round(seconds_left))} left"
        return line

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Estimate the seconds to the end of all runs; None before an estimate is possible.

        `step`: the last one of the current run.
        Each run is expected to take as long as the finished ones did in the mean; before one has finished, as its own speed
        says.
        """
        run_s = mean(self._durations_s) if self._durations_s else self._run.expected_duration_s(step, now)
        if run_s is None:
            return None
        left_of_this_run_s = max(0.0, run_s - (now - self._run.started_at))
        num_later_runs = self.total_runs - self.run_number
        return left_of_this_run_s + run_s * num_later_runs

    def _print(self, line: str, *, replaceable: bool = False) -> None:
        """Print a line on stderr. In a terminal, a `replaceable` line is overwritten by the next."""
        with suppress(OSError, ValueError):  # a terminal that is closed is no reason to end the runs
            if self._is_terminal:
                write_control_sequence(self._stderr, "\r\033[K")  # to the start of the line, and erase it
            if replaceable and self._is_terminal:
                print(line[:MAX_LINE_LENGTH], end="", file=self._stderr, flush=True)
            else:
                print(line, file=self._stderr, flush=True)


def _last_step(run_dir: Path) -> int:
    """The last step in `metrics.jsonl`; 0 before there is one."""
    rows = read_last_rows(run_dir / METRICS_FILE)
    return int(rows[-1]["step"]) if rows else 0


def run_with_progress(name: str, composed: ComposedConfig, run_dir: Path, progress: RunsProgress, *, verb: str) -> int:
    """Start the run whose `config.yaml` is in `run_dir`, and wait for it while `progress` shows how far it is.

    Returns its exit code. The output of the run is appended to `logs/output.log` in the run directory, so that the screen
    shows the progress alone. `verb`: the command that started the run, for messages in that file.
    """
    from launch.cluster.supervisor import run_supervised
    from launch.cluster.torchrun import RedirectedOutput

    output_file = run_dir / "logs" / "output.log"
    output_file.parent.mkdir(parents=True, exist_ok=True)
    progress.start_run(name, run_dir, composed.config.budget.steps)
    # This process's own stderr goes there too: lines of the launcher would break the progress line.
    with output_file.open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            redirected = RedirectedOutput(output_file, progress.update)
            exit_code = run_supervised(composed.config, run_dir, composed.sha256, redirected)
        except ShardtuneError as error:
            print(f"shardtune {verb}: {error}", file=sys.stderr)  # into the log
            exit_code = error.exit_code
    progress.end_run(exit_code, output_file)
    return exit_code
