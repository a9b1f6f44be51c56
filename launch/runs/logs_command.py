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
from launch.config.verb_words import VerbWords, asks_for_help, bare_word, flag, help_rows, read_words, word
from launch.output import give
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.logs import LogsRequest
    from launch.runs.queue import Queue
    from launch.runs.status import RunView


@dataclass(kw_only=True)
class LogsWords(VerbWords):
    """What `shardtune logs` takes."""

    run: Path = bare_word("name one run directory: shardtune logs runs/first")
    rank: int | None = word("show this rank", like="3", least=0)
    job: str | None = word(
        "show what this SLURM job, or this start over ssh, printed on every node; last means the newest", like="last"
    )
    lines: int = word("how many of the last lines of each file to show", default=40, least=0)
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

{help_rows(LogsWords)}

exit codes: 64 there is no such run, rank or job, 130 Ctrl-C"""
EVERY_S = 0.5
LOOK_S = 2.0
"""Seconds between looks at how the run stands."""
ASK_S = 15.0
"""Seconds between questions to SLURM's controller, which many users share."""
AGAIN_S = 5.0
"""Seconds after its end in which a run may be started again by what started it."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError."""
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    words = logs_words(argv)
    from launch.runs.logs import LogsRequest, choose
    from trainer.reporting.status import State, read_failure, read_status

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    run_dir, wanted = words.run, LogsRequest(words.rank, words.job)
    failed = read_status(run_dir).get("state") in (None, State.failed) and read_failure(run_dir)
    rank = failed.get("rank") if failed else None
    files = choose(run_dir, wanted, rank if isinstance(rank, int) else None)
    ours = failed and wanted.rank in (None, rank) and wanted.job is None
    headed = words.follow or len(files) > 1
    printer = Collected(at_once=words.follow) if words.as_json else Printer(headed=headed)
    places = show(files, words.lines, printer)
    if words.follow:
        Follow(run_dir, wanted, printer, places).until_done()
    elif isinstance(printer, Collected):
        give({"run": str(run_dir), "files": printer.files, "failure": failed if ours else None})
    else:
        if not files:
            print(f"{run_dir}: nothing was written below {run_dir / 'logs'} yet")
        if ours:
            print(cause(run_dir))
    return 0


def logs_words(argv: list[str]) -> LogsWords:
    """What was typed. Errors: ConfigError with every problem."""
    words, problems = read_words("logs", LogsWords, argv)
    if words.rank is not None and words.job is not None:
        problems.append("rank= and job= name different files; give one of the two")
    if words.run is not None and not words.run.is_dir():
        problems.append(f"{words.run}: there is no such run directory")
    if problems:
        raise ConfigError(problems)
    return words


class Printer:
    """Lines on the screen, below the name of their file where there may be several."""

    def __init__(self, *, headed: bool) -> None:
        self.headed, self._file = headed, Path()

    def __call__(self, path: Path, lines: list[str]) -> None:
        if not lines:
            return
        if self.headed and path != self._file:
            print(f"==> {path} <==")
        self._file = path
        print("\n".join(lines), flush=True)


class Collected(Printer):
    """Lines for a script: kept by file, or printed as they come, an object each."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__(headed=False)
        self.at_once = at_once
        self.files: list[dict[str, Any]] = []

    def __call__(self, path: Path, lines: list[str]) -> None:
        if not self.at_once:
            self.files.append({"file": str(path), "lines": lines})
            return
        for line in lines:
            print(json.dumps({"file": str(path), "line": line}, ensure_ascii=False), flush=True)


def show(files: list[Path], count: int, printer: Printer) -> dict[Path, int]:
    """Print the last lines of each; returns up to which byte each was shown."""
    from launch.runs.logs import last_lines

    places = {}
    for path in files:
        try:
            lines, places[path] = last_lines(path, count)
        except OSError as error:
            lines = [f"(cannot be read: {error.strerror or error})"]
        printer(path, lines)
    return places


def cause(run_dir: Path) -> str:
    """Why the run failed, with the traceback where it is a defect."""
    from trainer.reporting.status import read_failure

    failure = read_failure(run_dir)
    at = f", step {failure['step']}" if failure.get("step") is not None else ""
    where = f"rank {failure.get('rank')} on {failure.get('host')} failed ({failure.get('phase')}{at}):"
    if failure.get("user_error"):
        return f"\n{where}\n  " + str(failure.get("message")).replace("\n", "\n  ")
    return f"\n{where}\n{str(failure.get('traceback') or failure.get('message')).rstrip()}"


@dataclass(slots=True)
class Follow:
    """A run that is followed, from one attempt at it to the next."""

    run_dir: Path
    wanted: LogsRequest
    printer: Printer
    places: dict[Path, int]
    _launcher: tuple[int, str] | None = None
    """The process of this host that starts its ranks again."""
    _said: str = ""

    def until_done(self) -> None:
        """Print what is added until the run is done, or has ended and nothing will start it again."""
        from launch.runs.logs import AddedText, choose
        from launch.runs.queue import Queue, ask

        added = AddedText(self.places)
        queue, asked_at, looked_at = Queue(), float("-inf"), float("-inf")
        ended_at: float | None = None
        while True:
            now = time.monotonic()
            if now - looked_at >= LOOK_S:
                looked_at = now
                run = self._look(queue)
                if run.state != "running" and now - asked_at >= ASK_S:
                    queue, asked_at = ask(), now
                    run = self._look(queue)
                self._tell(run)
                over = self._over(run, queue)
                ended_at = (now if ended_at is None else ended_at) if over else None
            with suppress(ConfigError):  # a rank that has not said anything yet
                for path in choose(self.run_dir, self.wanted, None):
                    while lines := added.lines(path):
                        self.printer(path, lines)
            if ended_at is not None and (run.state == "done" or now - ended_at > AGAIN_S):
                self._end(run)
                return
            time.sleep(EVERY_S)

    def _look(self, queue: Queue) -> RunView:
        from launch.runs.owner import holder, launcher
        from launch.runs.status import look

        try:
            owner = holder(self.run_dir).owner
        except OSError:
            owner = None
        self._launcher = (launcher(owner) if owner is not None else None) or self._launcher
        return look(self.run_dir, queue)

    def _over(self, run: RunView, queue: Queue) -> bool:
        """Whether nothing is known that would go on with the run."""
        from trainer.session.lease import process_identity

        if run.state == "done":
            return True
        if run.state not in ("failed", "preempted", "lost") or run.job is not None:
            return False
        if run.job_id is not None and queue.problem is not None:  # its job may be waiting there
            return False
        return self._launcher is None or process_identity(self._launcher[0]) != self._launcher[1]

    def _tell(self, run: RunView) -> None:
        """What there is to wait for, once."""
        waits = run.why if run.state == "queued" else "it has not begun yet" if run.state == "not started" else None
        if waits and waits != self._said:
            print(f"waiting: {waits}", file=sys.stderr, flush=True)
        self._said = waits or ""

    def _end(self, run: RunView) -> None:
        if isinstance(self.printer, Collected):
            ended = {"run": str(self.run_dir), "state": run.state, "step": run.step, "why": run.why or None}
            print(json.dumps(ended, ensure_ascii=False), flush=True)
            return
        if run.state == "failed":
            print(cause(self.run_dir), flush=True)
        told = f": {run.why}" if run.why and run.state != "failed" else ""
        print(f"{self.run_dir}: {run.state} at step {run.step or 0}{told}", file=sys.stderr, flush=True)
