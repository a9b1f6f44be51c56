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
from trainer.reporting.metric_rows import METRICS
from trainer.reporting.run_record import readable_run_record

if TYPE_CHECKING:
    from launch.compare.follow import PeriodicPage
    from launch.config.frozen import Composed

UPDATE_INTERVAL_S = 1.0
"""Seconds between two looks at a run's files."""
LINE_INTERVAL_S = 60.0
"""Seconds between two lines where they cannot be written over."""


class RunsProgress:
    """Shows on stderr how far runs are that are started one after another.

    `of` runs in all, of which `done` were done before; `pages` are rewritten meanwhile.
    """

    def __init__(self, of: int, done: int, pages: PeriodicPage | None = None) -> None:
        self.of = of
        self.number = done
        self.pages = pages
        self._out = sys.stderr
        self._terminal = self._out.isatty()
        self._durations_s: list[float] = []
        self._updated_at = 0.0
        self._printed_at = 0.0
        if done:
            self._print(f"{done} of {of} runs are done already")

    def begin(self, name: str, run_dir: Path, steps: int | None) -> None:
        """A run starts."""
        self.number += 1
        self._name = name
        self._run_dir = run_dir
        self._steps = steps
        self._step_before = _last_step(run_dir)
        self._first: tuple[float, int] | None = None
        """When its first step was seen, and which it was."""
        self._started_at = self._printed_at = time.monotonic()
        if not self._terminal:
            self._print(f"{self._heading()} -> {run_dir}")

    def _heading(self) -> str:
        return f"[{self.number}/{self.of}] {self._name}"

    def passed_over(self) -> None:
        """A run is not started, since its point failed before."""
        self.number += 1

    def update(self) -> None:
        """Print how far the run is, if a second has passed since the last time; called often."""
        now = time.monotonic()
        if now - self._updated_at < UPDATE_INTERVAL_S:
            return
        self._updated_at = now
        if self.pages is not None:
            self.pages.write_if_due()
        if self._terminal or now - self._printed_at >= LINE_INTERVAL_S:
            self._printed_at = now
            self._print(self._state_line(now), over=True)

    def end(self, code: int, output: Path) -> None:
        """The run has ended with this exit code; what it printed is in `output`."""
        from launch.compare.run_files import read_point

        duration_s = time.monotonic() - self._started_at
        outcome = None
        reason = None
        with suppress(ConfigError):  # of a file that cannot be read the answer will say so
            point = read_point(self._run_dir)
            outcome = point.record.outcome
            reason = point.reason
        if code == 0:
            self._durations_s.append(duration_s)
            tokens_per_s = outcome.speed.get("tokens_per_s") if outcome is not None else None
            speed = f", {tokens_per_s:,.0f} tokens/s" if tokens_per_s else ""
            self._print(f"{self._heading()}: done in {duration_text(duration_s)}{speed}")
        elif code in (75, 130):
            self._print(f"{self._heading()}: {reason or 'stopped'}")
        else:
            self._print(f"{self._heading()}: {reason or f'ended with {code}'}; what it printed: {output}")

    def _state_line(self, now: float) -> str:
        """The run, its step and the time to the end of all, such as `[2/6] ddp: step 40 of 100, about 9 min left`."""
        step = _last_step(self._run_dir)
        if self._steps is None:
            self._steps = readable_run_record(self._run_dir).total_steps or None
        state = "starting"
        if step:
            state = f"step {step} of {self._steps}" if self._steps else f"step {step}"
        seconds_left = self._seconds_left(now, step)
        left = "" if seconds_left is None else f", about {duration_text(seconds_left)} left"
        return f"{self._heading()}: {state}{left}"

    def _seconds_left(self, now: float, step: int) -> float | None:
        """Seconds to the end of all runs; None before anything is known.

        A run is expected to take as long as those before it. The first one: its start, and its steps at the pace so far.
        """
        if self._first is None and step > self._step_before:
            self._first = (now, step)
        if self._durations_s:
            run_s = mean(self._durations_s)
        elif self._first is not None and self._steps and step > self._first[1]:
            first_at, first_step = self._first
            step_s = (now - first_at) / (step - first_step)
            run_s = first_at - self._started_at + step_s * (self._steps - first_step)
        else:
            return None
        left_of_this_run = max(0.0, run_s - (now - self._started_at))
        return left_of_this_run + run_s * (self.of - self.number)

    def _print(self, text: str, *, over: bool = False) -> None:
        """A line; in a terminal the next one takes its place where it is `over`."""
        stays_open = over and self._terminal
        with suppress(OSError, ValueError):  # a terminal that has gone away is no reason to end the runs
            if self._terminal:
                draw(self._out, "\r\033[K")
            if stays_open:  # cut, so that it stays on one line: the next one is drawn over it
                print(text[:110], end="", file=self._out, flush=True)
            else:
                print(text, file=self._out, flush=True)


def duration_text(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _last_step(run_dir: Path) -> int:
    """The last step in `metrics.jsonl`; 0 before there is one."""
    rows = last_rows(run_dir / METRICS)
    return int(rows[-1]["step"]) if rows else 0


def run_with_progress(name: str, composed: Composed, run_dir: Path, progress: RunsProgress, *, verb: str) -> int:
    """Start the run that is frozen in `run_dir`, and wait for it; returns its exit code.

    It is one of several: its output goes into `logs/output.log` of the run, and the screen shows `progress` alone.
    """
    from launch.cluster.supervisor import run_supervised
    from launch.cluster.torchrun import RedirectedOutput

    output = run_dir / "logs" / "output.log"
    output.parent.mkdir(parents=True, exist_ok=True)
    progress.begin(name, run_dir, composed.config.budget.steps)
    # The reason of a failure is shown with the others; what led to it stays beside the run.
    with output.open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        try:
            code = run_supervised(composed.config, run_dir, composed.sha256, RedirectedOutput(output, progress.update))
        except ShardtuneError as error:
            print(f"shardtune {verb}: {error}", file=sys.stderr)
            code = error.exit_code
    progress.end(code, output)
    return code
