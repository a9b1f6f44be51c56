"""`shardtune logs`: prints the last lines of the right log file; `--follow` goes on until the run ends."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from launch.output import print_json
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.logs import AddedLinesReader, LogsRequest
    from launch.runs.owner import LauncherProcess
    from launch.runs.queue import JobQueue
    from launch.runs.status import RunView


@dataclass(kw_only=True)
class LogsArguments(VerbArguments):
    """What `shardtune logs` takes."""

    run: Path = positional("name one run directory: shardtune logs runs/first")
    rank: int | None = option("show this rank", example="3", least=0)
    job: str | None = option(
        "show what this SLURM job, or this start over ssh, printed on every node; last means the newest", example="last"
    )
    lines: int = option("how many of the last lines of each file to show", default=40, least=0)
    follow: bool = flag("keep printing new lines, also after restarts and requeues, until the run is done")
    as_json: bool = flag(
        "print JSON, for a script: the files with their lines, and failure.json if the run failed; with --follow one object "
        "per line, and a last one that says how the run ended",
        key="--json",
    )


USAGE = f"""usage: shardtune logs <run> [rank=3 | job=last] [lines=40] [--follow] [--json]

  shardtune logs runs/first             if the run failed: the failed rank, the job's output and the cause
  shardtune logs runs/first rank=3
  shardtune logs runs/first --follow

logs prints the last lines of a run's output. Without rank= and job= it shows rank 0. If no rank has written anything
yet, it shows the output of the job.

{help_rows(LogsArguments)}

exit codes: 64 there is no such run, rank or job, 130 Ctrl-C"""
READ_INTERVAL_S = 0.5
"""Seconds between two readings of the log files with --follow."""
STATE_INTERVAL_S = 2.0
"""Seconds between two readings of the run's state."""
QUEUE_INTERVAL_S = 15.0
"""Seconds between two calls of squeue: many users share SLURM's controller."""
RESTART_WAIT_S = 5.0
"""Seconds after the end of a run in which a launcher or job script may still start it again."""


def main(argv: list[str]) -> int:
    """Run `shardtune logs` with the arguments behind it: print the last lines of a run's output, and follow it if asked to.

    Returns the exit code. Raises ConfigError for wrong arguments.
    """
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else ConfigError.exit_code
    arguments = logs_arguments(argv)
    from launch.runs.logs import LogsRequest, choose_log_files

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a log may hold characters that the terminal's encoding lacks
    run_dir = arguments.run
    request = LogsRequest(arguments.rank, arguments.job)
    failure = _current_failure(run_dir)
    failed_rank = failure.get("rank")
    files = choose_log_files(run_dir, request, failed_rank if isinstance(failed_rank, int) else None)
    shows_failure = bool(failure) and request.rank in (None, failed_rank) and request.job is None

    if arguments.as_json:
        printer: LogPrinter = JsonLogPrinter(is_streaming=arguments.follow)
    else:
        printer = LogPrinter(prints_file_names=arguments.follow or len(files) > 1)
    offset_by_file = print_last_lines(files, arguments.lines, printer)
    if arguments.follow:
        FollowedRun(run_dir, request, printer, offset_by_file).print_until_done()
    elif isinstance(printer, JsonLogPrinter):
        print_json({"run": str(run_dir), "files": printer.kept_files, "failure": failure if shows_failure else None})
    else:
        if not files:
            print(f"{run_dir}: nothing was written below {run_dir / 'logs'} yet")
        if shows_failure:
            print(failure_report(run_dir))
    return 0


def _current_failure(run_dir: Path) -> dict[str, Any]:
    """The `failure.json` of a run that has failed or whose last start was refused, {"rank": 3, "message": ..., ...}; else empty.

    The file is out of date if the run was started again since.
    """
    from trainer.reporting.status import RunState, is_refused_start, read_failure, read_status

    status = read_status(run_dir)
    is_current = status.get("state") in (None, RunState.failed) or is_refused_start(status)
    return read_failure(run_dir) if is_current else {}


def logs_arguments(argv: list[str]) -> LogsArguments:
    """Read the arguments behind `shardtune logs`, and check that they name a run.

    Raises ConfigError with every problem at once.
    """
    arguments, problems = read_arguments("logs", LogsArguments, argv)
    if arguments.rank is not None and arguments.job is not None:
        problems.append("rank= and job= name different files; give one of the two")
    if arguments.run is not None and not arguments.run.is_dir():
        problems.append(f"{arguments.run}: there is no such run directory")
    if problems:
        raise ConfigError(problems)
    return arguments


class LogPrinter:
    """Prints lines of log files; with `prints_file_names`, the file's name is printed above them whenever the file changes."""

    def __init__(self, *, prints_file_names: bool) -> None:
        self.prints_file_names = prints_file_names
        self._last_file = Path()
        """The file of the last line that was printed."""

    def print_lines(self, path: Path, lines: list[str]) -> None:
        """Print lines of the file `path`."""
        if not lines:
            return
        if self.prints_file_names and path != self._last_file:
            print(f"==> {path} <==")
        self._last_file = path
        print("\n".join(lines), flush=True)


class JsonLogPrinter(LogPrinter):
    """For --json: keeps the lines of each file in `kept_files` or, if `is_streaming`, prints each line as a JSON object."""

    def __init__(self, *, is_streaming: bool) -> None:
        super().__init__(prints_file_names=False)
        self.is_streaming = is_streaming
        self.kept_files: list[dict[str, Any]] = []

    def print_lines(self, path: Path, lines: list[str]) -> None:
        """Keep or print lines of the file `path`."""
        if not self.is_streaming:
            self.kept_files.append({"file": str(path), "lines": lines})
            return
        for line in lines:
            print(json.dumps({"file": str(path), "line": line}, ensure_ascii=False), flush=True)


def print_last_lines(files: list[Path], num_lines: int, printer: LogPrinter) -> dict[Path, int]:
    """Print the last `num_lines` lines of each log file; returns for each the byte offset behind them, from which to read on.

    For a file that cannot be read, the reason is printed, and it has no offset.
    """
    from launch.runs.logs import read_last_lines

    offset_by_file = {}
    for path in files:
        try:
            lines, offset_by_file[path] = read_last_lines(path, num_lines)
        except OSError as error:
            lines = [f"(cannot be read: {error.strerror or error})"]
        printer.print_lines(path, lines)
    return offset_by_file


def failure_report(run_dir: Path) -> str:
    """Say where and why a run failed, for the end of its logs, from its `failure.json`.

    It names the rank, host and phase, and below them the message, if the error is in the user's settings or data, or a rank was
    lost. Of any other error, the traceback follows, or the message if there is none.
    """
    from trainer.reporting.status import message_suffices, read_failure

    failure = read_failure(run_dir)
    step = f", step {failure['step']}" if failure.get("step") is not None else ""
    heading = f"rank {failure.get('rank')} on {failure.get('host')} failed ({failure.get('phase')}{step}):"
    if message_suffices(failure):
        indented_message = str(failure.get("message")).replace("\n", "\n  ")
        return f"\n{heading}\n  {indented_message}"
    traceback = str(failure.get("traceback") or failure.get("message")).rstrip()
    return f"\n{heading}\n{traceback}"


@dataclass(slots=True)
class FollowedRun:
    """Prints what is added to the logs of a run, across restarts and requeues, for --follow."""

    run_dir: Path
    request: LogsRequest
    printer: LogPrinter
    offset_by_file: dict[Path, int]
    """Byte offset in each log file up to which it was printed."""
    _launcher: LauncherProcess | None = None
    """The process on this host that would start the ranks again; None if there is none."""
    _queue: JobQueue | None = None
    """SLURM's queue as it was last read; None before that."""
    _queue_read_at: float = float("-inf")
    """When it was read, by `time.monotonic`."""
    _reported_wait: str = ""
    """What the run was last reported to wait for; empty if it did not wait then."""

    def print_until_done(self) -> None:
        """Print what is added to the logs until the run is done, or has ended and nothing will start it again.

        The state of the run is read every `STATE_INTERVAL_S` seconds, at once in the first turn.
        """
        from launch.runs.logs import AddedLinesReader
        from trainer.reporting.status import RunState

        lines_reader = AddedLinesReader(self.offset_by_file)
        state_read_at = float("-inf")
        over_since: float | None = None  # None while the run is not over
        while True:
            now = time.monotonic()
            if now - state_read_at >= STATE_INTERVAL_S:
                state_read_at = now
                run = self._read_run(now)
                self._print_waiting_reason(run)
                if not self._is_over(run):
                    over_since = None
                elif over_since is None:
                    over_since = now
            # Print before the end is reported, so that the last lines are shown.
            self._print_added_lines(lines_reader)
            # A run that has not succeeded may still be started again, for a moment.
            if over_since is not None and (run.state == RunState.done or now - over_since > RESTART_WAIT_S):
                self._print_end(run)
                return
            time.sleep(READ_INTERVAL_S)

    def _read_run(self, now: float) -> RunView:
        """Read the state of the run and, every `QUEUE_INTERVAL_S` seconds while it does not train, SLURM's queue.

        While the run trains, nothing depends on the queue. `now`: by `time.monotonic`.
        """
        from launch.runs.queue import JobQueue, read_queue
        from trainer.reporting.status import RunState

        run = self._find_launcher_and_read_run(self._queue or JobQueue())
        if run.state == RunState.running or now - self._queue_read_at < QUEUE_INTERVAL_S:
            return run
        self._queue = read_queue()
        self._queue_read_at = now
        return self._find_launcher_and_read_run(self._queue)

    def _print_added_lines(self, lines_reader: AddedLinesReader) -> None:
        """Print the lines that were added to the log files since the last call."""
        from launch.runs.logs import choose_log_files

        with suppress(ConfigError):  # the requested rank has no log yet
            for path in choose_log_files(self.run_dir, self.request, failed_rank=None):
                while lines := lines_reader.read_new_lines(path):
                    self.printer.print_lines(path, lines)

    def _find_launcher_and_read_run(self, queue: JobQueue) -> RunView:
        """Read the state of the run now, and note its launcher, which cannot be found any more once the run has ended.

        A launcher starts the ranks, and starts them again after a failure. The lease, a file in the run directory, names
        the process that trains the run; from there its launcher is found. Sets `_launcher`.
        """
        from launch.runs.owner import launcher_process, read_lease_holder
        from launch.runs.status import read_run_view

        try:
            owner = read_lease_holder(self.run_dir).owner
        except OSError:
            owner = None
        if owner is not None:
            self._launcher = launcher_process(owner) or self._launcher
        return read_run_view(self.run_dir, queue)

    def _is_over(self, run: RunView) -> bool:
        """Whether the run has ended, and neither a job nor a launcher is known that would start it again.

        `run`: its state now.
        """
        from launch.runs.status import LOST
        from trainer.reporting.status import RunState
        from trainer.session.lease_owner import process_identity

        if run.state == RunState.done:
            return True
        if run.state not in (RunState.failed, RunState.preempted, LOST) or run.job is not None:
            return False
        may_be_queued = run.job_id is not None and self._queue is not None and self._queue.problem is not None
        if may_be_queued:
            return False
        if self._launcher is None:  # nobody on this host restarts the run, and no job is in the queue
            return True
        is_launcher_alive = process_identity(self._launcher.pid) == self._launcher.identity
        return not is_launcher_alive

    def _print_waiting_reason(self, run: RunView) -> None:
        """Print on stderr what a run that does not train yet waits for, if that differs from what was reported last.

        `run`: its state now. If it is queued, `run.state_reason` says what its job waits for.
        """
        from launch.runs.status import NOT_STARTED, QUEUED

        what_it_waits_for = ""
        if run.state == QUEUED:
            what_it_waits_for = run.state_reason or ""
        elif run.state == NOT_STARTED:
            what_it_waits_for = "it has not begun yet"
        if what_it_waits_for and what_it_waits_for != self._reported_wait:
            print(f"waiting: {what_it_waits_for}", file=sys.stderr, flush=True)
        self._reported_wait = what_it_waits_for

    def _print_end(self, run: RunView) -> None:
        """Print how the followed run ended: with --json a last object, else a line on stderr, after the report of a failure."""
        from trainer.reporting.status import RunState

        if isinstance(self.printer, JsonLogPrinter):
            summary = {"run": str(self.run_dir), "state": run.state, "step": run.step, "why": run.state_reason or None}
            print(json.dumps(summary, ensure_ascii=False), flush=True)
            return
        reason_clause = f": {run.state_reason}" if run.state_reason else ""
        if run.state == RunState.failed:
            print(failure_report(self.run_dir), flush=True)
            reason_clause = ""  # `failure_report` says it
        print(f"{self.run_dir}: {run.state} at step {run.step or 0}{reason_clause}", file=sys.stderr, flush=True)
