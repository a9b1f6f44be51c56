"""`shardtune stop`: makes a run save and end, wherever it runs, and reports what it saved."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.config.help_text import show_help
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    help_rows,
    option,
    positional,
    read_arguments,
)
from launch.output import print_json, stdout_to_stderr
from strategies import exit_codes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.stop import CancelJob, SignalJob, SignalProcess


@dataclass(kw_only=True)
class StopArguments(VerbArguments):
    """What `shardtune stop` takes."""

    run: Path = positional("name one run directory: shardtune stop runs/first")
    wait_s: int = option("seconds to wait; after that, the run keeps saving by itself", default=600, least=0)
    dry_run: bool = flag("show what would be done, and do nothing")
    as_json: bool = flag("print the run's state afterwards as JSON, for a script; messages go to stderr", key="--json")


USAGE = f"""usage: shardtune stop <run> [wait_s=600] [--dry-run] [--json]

  shardtune stop runs/first

stop asks a run to save and to end, and waits until it has. A process on this host gets the signal TERM, and its
launcher does not restart it. A SLURM job saves and is not requeued. A job that is still pending is cancelled. If the
run is on another host and not under SLURM, stop prints the command to type there.

{help_rows(StopArguments)}

exit codes:
  0   the run has ended, or was not running
  64  there is no such run
  69  it cannot be stopped from here, has not ended in time, or SLURM's queue does not answer
  70  it failed instead"""
POLL_INTERVAL_S = 0.5
"""Seconds between two checks whether the run has ended."""
QUEUE_INTERVAL_S = 5.0
"""Seconds between two calls of squeue: many users share SLURM's controller."""
REPORT_INTERVAL_S = 15.0
"""Seconds between two lines on the screen while the run saves."""


def main(argv: list[str]) -> int:
    """Run `shardtune stop` with the arguments behind it; returns the exit code.

    Raises ConfigError for wrong arguments, CannotStopError if the run cannot be stopped from here.
    """
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else ConfigError.exit_code
    arguments = stop_arguments(argv)
    with stdout_to_stderr(arguments.as_json):
        result = stop_run(arguments.run, arguments.wait_s, dry_run=arguments.dry_run)
    if arguments.as_json:
        print_json(stopped_run_summary(arguments.run, result.shell_command))
    return result.exit_code


def stop_arguments(argv: list[str]) -> StopArguments:
    """Read the arguments behind `shardtune stop`. Raises ConfigError with every problem at once."""
    from launch.runs.status import has_shardtune_config

    arguments, problems = read_arguments("stop", StopArguments, argv)
    run = arguments.run
    if run is not None and not ((run / "config.yaml").is_file() and has_shardtune_config(run)):
        problems.append(f"{run}: is no run directory (there is no configuration of a run in it)")
    if problems:
        raise ConfigError(problems)
    return arguments


class StopResult(NamedTuple):
    """What came of asking a run to end."""

    exit_code: int
    """That of `shardtune stop`."""
    shell_command: str | None
    """The command that ends the run in the same way; None if nothing was running."""


def stop_run(run_dir: Path, wait_s: float, *, dry_run: bool) -> StopResult:
    """Ask a run to save and to end, and wait up to `wait_s` seconds until it has; with `dry_run`, only print how.

    A run that nobody runs is left alone. Raises CannotStopError if it cannot be stopped from here.
    """
    from launch.runs.queue import read_queue_twice
    from launch.runs.status import read_run_view
    from launch.runs.stop import NotRunning, raise_if_job_state_unknown, stop_method

    queue = read_queue_twice()  # a controller may be busy for a moment, and without the queue nothing is stopped
    run = read_run_view(run_dir, queue)
    method = stop_method(run_dir, queue, run.job)
    if isinstance(method, NotRunning):
        raise_if_job_state_unknown(run_dir, queue, run.state)
        reason = f" ({run.state_reason})" if run.state_reason else ""
        print(f"{run_dir}: is not running: {run.state}{reason}; {saved_checkpoint_text(run_dir, run.step)}")
        return StopResult(exit_code=0, shell_command=None)
    if dry_run:
        print(f"{run_dir}: {run.state} at step {run.step or 0}; would be stopped by: {method}")
        return StopResult(exit_code=0, shell_command=str(method))
    was_still_running = method.send()
    if not was_still_running:
        print(f"{run_dir}: ended by itself; {saved_checkpoint_text(run_dir, run.step)}")
        return StopResult(exit_code=0, shell_command=None)
    print(f"{run_dir}: asked to save and to end ({method})", flush=True)
    exit_code = StoppingRun(run_dir, method, wait_s).wait_until_ended()
    return StopResult(exit_code, str(method))


def stopped_run_summary(run_dir: Path, shell_command: str | None) -> dict[str, Any]:
    """The JSON value that `stop --json` prints: the state of the run now, and its newest checkpoint.

    `shell_command`: the command that ends the run in the same way (`by` in the value); None if nothing was running.
    """
    from launch.runs.checkpoints import list_checkpoints
    from launch.runs.queue import read_queue
    from launch.runs.status import read_run_view

    run = read_run_view(run_dir, read_queue())
    newest = list_checkpoints(run_dir).newest
    checkpoint = None if newest is None else {"step": newest.step, "path": str(newest.path)}
    return {
        "run": str(run_dir),
        "by": shell_command,
        "state": run.state,
        "why": run.state_reason or None,
        "step": run.step,
        "checkpoint": checkpoint,
    }


def saved_checkpoint_text(run_dir: Path, last_step: int | None) -> str:
    """Say from which checkpoint a run can continue: `saved at step 40: <path>`.

    `last_step` is None or 0 for a run that made no step: then a missing checkpoint is no loss.
    """
    from launch.runs.checkpoints import list_checkpoints

    newest = list_checkpoints(run_dir).newest
    if newest is not None:
        return f"saved at step {newest.step}: {newest.path}"
    return "no checkpoint" if last_step else "no step was made, so nothing is lost"


@dataclass(slots=True)
class StoppingRun:
    """A run that was asked to end: waits until it has ended, and reports what it saved."""

    run_dir: Path
    method: SignalProcess | SignalJob | CancelJob
    """How it was asked to end."""
    wait_s: float
    """Seconds after which the command waits no longer."""
    _queue_read_at: float = float("-inf")
    """When squeue was last called, by `time.monotonic`."""
    _queue_problem: str | None = None
    """Why the last call of squeue failed; None if it succeeded."""

    def wait_until_ended(self) -> int:
        """Wait up to `wait_s` seconds until the run has ended, print what was saved, and return the command's exit code."""
        from launch.runs.metrics_tail import last_step

        began_at = reported_at = time.monotonic()
        try:
            while not self._has_ended():
                now = time.monotonic()
                if now - began_at > self.wait_s:
                    return self._print_timeout()
                if now - reported_at > REPORT_INTERVAL_S:
                    reported_at = now
                    step = last_step(self.run_dir)
                    print(f"  {now - began_at:.0f} s: not yet ended (step {step})", flush=True)
                time.sleep(POLL_INTERVAL_S)
        except KeyboardInterrupt:
            print(f"\n{self.run_dir}: was asked to end; it continues saving", file=sys.stderr)
            raise
        return self._print_end()

    def _has_ended(self) -> bool:
        """Whether the run has ended and nothing will start it again: its process ended, or its job left the queue.

        squeue is called every `QUEUE_INTERVAL_S` seconds at most; in between, the answer for a job is False.
        """
        from launch.runs.stop import SignalProcess

        if isinstance(self.method, SignalProcess):
            return self.method.has_ended
        if time.monotonic() - self._queue_read_at < QUEUE_INTERVAL_S:
            return False
        return self._look_for_job_in_queue(self.method.job.id)

    def _look_for_job_in_queue(self, job_id: str) -> bool:
        """Call squeue to see whether the run's job has left the queue. False if squeue fails, since nobody knows.

        A job that waits in the queue was requeued nevertheless, for example by an administrator: it is cancelled.
        """
        from launch.runs.queue import read_queue
        from launch.runs.stop import CancelJob

        queue = read_queue()
        self._queue_read_at = time.monotonic()
        self._queue_problem = queue.problem
        for job in queue.jobs:
            if job.id == job_id:
                if job.is_pending:
                    CancelJob(job).send()
                return False
        return queue.problem is None

    def _print_end(self) -> int:
        """Print how the run ended and what it saved; returns the exit code: 70 if it failed, else 0."""
        from launch.runs.status import one_line
        from launch.runs.stop import CancelJob
        from trainer.reporting.status import RunState, read_failure, read_status

        status = read_status(self.run_dir)
        step = status.get("step")
        state = status.get("state")
        saved = saved_checkpoint_text(self.run_dir, step)
        if isinstance(self.method, CancelJob):
            print(f"{self.run_dir}: job {self.method.job.id} was taken out of the queue; {saved}")
        elif state == RunState.done:
            print(f"{self.run_dir}: was done at step {step} before it could be stopped")
        elif state == RunState.preempted and step:
            print(f"{self.run_dir}: {saved}; the same command continues it")
        elif state in (RunState.preempted, None):
            print(f"{self.run_dir}: stopped before training began; nothing is lost")
        else:
            message = read_failure(self.run_dir).get("message") or status.get("reason")
            if message and state == RunState.failed:
                reason = one_line(message)
            else:
                reason = "it ended without a message"
            print(f"{self.run_dir}: has not saved: {reason}; {saved}", file=sys.stderr)
            return exit_codes.FAILED
        return 0

    def _print_timeout(self) -> int:
        """Print that the run has not ended within `wait_s` seconds, or that this cannot be told.

        Returns the exit code `CHECK_FAILED`.
        """
        saved = saved_checkpoint_text(self.run_dir, last_step=None)
        if self._queue_problem is not None:
            print(
                f"{self.run_dir}: was asked to end; whether it has ended is not known ({self._queue_problem}); {saved}",
                file=sys.stderr,
            )
            return exit_codes.CHECK_FAILED
        print(
            f"{self.run_dir}: has not ended within {self.wait_s:.0f} s: it is still saving, or hangs. `shardtune status "
            f"{self.run_dir}` shows when it was last seen, and wait_s= waits longer; {saved}",
            file=sys.stderr,
        )
        return exit_codes.CHECK_FAILED
