"""Prints the progress of a comparison on stderr: point, step, and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from launch.runs.metrics_tail import last_rows
from launch.streams import draw
from strategies.errors import ConfigError, ShardtuneError
from trainer.pages.numbers import duration
from trainer.reporting.metric_rows import METRICS
from trainer.reporting.run_record import readable_run_record

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.config.frozen import Composed

UPDATE_INTERVAL_S = 1.0
"""Seconds between two looks at a run's files."""
LINE_INTERVAL_S = 60.0
"""Seconds between two progress lines in a log file. In a terminal, each line replaces the one before it."""
MAX_LINE_LENGTH = 110
"""Characters of a line that is drawn over: one that wraps could not be erased."""


class RunsProgress:
    """Shows on stderr how far a series of runs is that are started one after another: number of the run, step and time left.

    Of `total_runs`, `done` had finished before this command. `pages` are rewritten while the runs train.
    """

    def __init__(self, total_runs: int, done: int, pages: PeriodicPage | None = None) -> None:
        self.total_runs = total_runs
        self.run_number = done
        self.pages = pages
        self._stderr = sys.stderr
        self._is_terminal = self._stderr.isatty()
        self._durations_s: list[float] = []
        self._updated_at = 0.0
        self._printed_at = 0.0
        if done:
            self._print(f"{done} of {total_runs} runs are done already")

    def start_run(self, name: str, run_dir: Path, total_steps: int | None) -> None:
        """The run `name` starts in `run_dir`; `total_steps` is None if its budget is not one of steps."""
        self.run_number += 1
        self._name = name
        self._run_dir = run_dir
        self._total_steps = total_steps
        # A resumed run has steps of an earlier start: they say nothing about its speed now.
        self._step_at_start = _last_step(run_dir)
        self._first_seen: tuple[float, int] | None = None
        """(when a first new step was seen, that step); None before."""
        self._started_at = self._printed_at = time.monotonic()
        if not self._is_terminal:
            self._print(f"{self._heading()} -> {run_dir}")

    def _heading(self) -> str:
        """What each line about the current run begins with, such as `[2/6] ddp`."""
        return f"[{self.run_number}/{self.total_runs}] {self._name}"

    def skip_run(self) -> None:
        """Count a run that is not started, because another repeat of its point failed before."""
        self.run_number += 1

    def update(self) -> None:
        """Print how far the run is, and rewrite the pages, if it is time to; called many times a second."""
        now = time.monotonic()
        if now - self._updated_at < UPDATE_INTERVAL_S:
            return
        self._updated_at = now
        if self.pages is not None:
            self.pages.write_if_due()
        if self._is_terminal or now - self._printed_at >= LINE_INTERVAL_S:
            self._printed_at = now
            self._print(self._state_line(now), replaceable=True)

    def end_run(self, exit_code: int, output: Path) -> None:
        """Print how the current run ended; `output` is the file with what it printed."""
        from launch.compare.run_files import read_recorded_run

        duration_s = time.monotonic() - self._started_at
        outcome = None
        reason = None
        with suppress(ConfigError):  # the comparison at the end reports a file that cannot be read
            run = read_recorded_run(self._run_dir)
            outcome = run.record.outcome
            reason = run.reason
        if exit_code == 0:
            self._durations_s.append(duration_s)
            tokens_per_s = outcome.speed.get("tokens_per_s") if outcome is not None else None
            speed = f", {tokens_per_s:,.0f} tokens/s" if tokens_per_s else ""
            self._print(f"{self._heading()}: done in {duration(duration_s)}{speed}")
        elif exit_code in (75, 130):  # preempted, or stopped by Ctrl-C: the run can be continued
            self._print(f"{self._heading()}: {reason or 'stopped'}")
        else:
            self._print(f"{self._heading()}: {reason or f'ended with {exit_code}'}; what it printed: {output}")

    def _state_line(self, now: float) -> str:
        """The run, its step and the time to the end of all, such as `[2/6] ddp: step 40 of 100, about 9 min left`."""
        step = _last_step(self._run_dir)
        if self._total_steps is None:  # a budget of epochs or tokens: the run itself computes how many steps that is
            self._total_steps = readable_run_record(self._run_dir).total_steps or None
        if not step:
            state = "starting"
        elif self._total_steps:
            state = f"step {step} of {self._total_steps}"
        else:
            state = f"step {step}"
        line = f"{self._heading()}: {state}"
        seconds_left = self._seconds_left(now, step)
        if seconds_left is not None:
            line += f", about {duration(round(seconds_left))} left"
        return line

    def _seconds_left(self, now: float, step: int) -> float | None:
        """Estimated seconds to the end of all runs; None before an estimate is possible.

        Each run is expected to take as long as the mean of the finished ones. While the first one runs, the estimate is its start
        plus its steps at the speed so far.
        """
        if self._first_seen is None and step > self._step_at_start:
            self._first_seen = (now, step)
        if self._durations_s:
            run_s = mean(self._durations_s)
        elif self._first_seen is not None and self._total_steps and step > self._first_seen[1]:
            first_seen_at, first_step = self._first_seen
            step_s = (now - first_seen_at) / (step - first_step)
            start_s = first_seen_at - self._started_at
            run_s = start_s + step_s * (self._total_steps - first_step)
        else:
            return None
        left_of_this_run_s = max(0.0, run_s - (now - self._started_at))
        later_runs = self.total_runs - self.run_number
        return left_of_this_run_s + run_s * later_runs

    def _print(self, line: str, *, replaceable: bool = False) -> None:
        """Print a line; in a terminal, the next one replaces it if it is `replaceable`."""
        with suppress(OSError, ValueError):  # a terminal that has gone away is no reason to end the runs
            if self._is_terminal:
                draw(self._stderr, "\r\033[K")  # to the start of the line, and erase it
            if replaceable and self._is_terminal:
                print(line[:MAX_LINE_LENGTH], end="", file=self._stderr, flush=True)
            else:
                print(line, file=self._stderr, flush=True)


def _last_step(run_dir: Path) -> int:
    """The last step in `metrics.jsonl`; 0 before there is one."""
    rows = last_rows(run_dir / METRICS)
    return int(rows[-1]["step"]) if rows else 0


def run_with_progress(name: str, composed: Composed, run_dir: Path, progress: RunsProgress, *, verb: str) -> int:
    """Start the run that is frozen in `run_dir`, and wait for it; returns its exit code.

    Its output is appended to `logs/output.log` in the run directory, and the screen shows `progress` alone. `verb` is the
    command that started it, for messages.
    """
    from launch.cluster.supervisor import run_supervised
    from launch.cluster.torchrun import RedirectedOutput

    output = run_dir / "logs" / "output.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    progress.start_run(name, run_dir, composed.config.budget.steps)
    # The comparison shows the reason of a failure; the whole output stays in the run's directory.
    with output.open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            redirected = RedirectedOutput(output, progress.update)
            exit_code = run_supervised(composed.config, run_dir, composed.sha256, redirected)
        except ShardtuneError as error:
            print(f"shardtune {verb}: {error}", file=sys.stderr)
            exit_code = error.exit_code
    progress.end_run(exit_code, output)
    return exit_code
