"""`shardtune stop`: makes a run save and end, wherever it runs, and reports what it saved."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.verb_words import VerbWords, asks_for_help, bare_word, flag, help_rows, read_words, word
from launch.output import give, said_to_stderr
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs.stop import Cancel, Signal, Slurm


@dataclass(kw_only=True)
class StopWords(VerbWords):
    """What `shardtune stop` takes."""

    run: Path = bare_word("name one run directory: shardtune stop runs/first")
    wait_s: int = word("seconds to wait; after that, the run keeps saving by itself", default=600, least=0)
    dry_run: bool = flag("show what would be done, and do nothing")
    as_json: bool = flag("print the run's state afterwards as JSON, for a script; messages go to stderr", key="--json")


USAGE = f"""usage: shardtune stop <run> [wait_s=600] [--dry-run] [--json]

  shardtune stop runs/first

stop asks a run to save and to end, and waits until it has. A process on this host gets the signal TERM, and its
launcher does not restart it. A SLURM job saves and is not requeued. A job that is still pending is cancelled. If the
run is on another host and not under SLURM, stop prints the command to type there.

{help_rows(StopWords)}

exit codes:
  0   the run has ended, or was not running
  64  there is no such run
  69  it cannot be stopped from here, has not ended in time, or SLURM's queue does not answer
  70  it failed instead"""
LOOK_S, ASK_S, TELL_S = 0.5, 5.0, 15.0
"""Seconds between looks at the run, questions to SLURM, and words on the screen."""
NOT_IN_TIME, FAILED = 69, 70


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, CannotStop."""
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    words = stop_words(argv)
    with said_to_stderr(words.as_json):
        code, way = stop(words.run, words.wait_s, dry=words.dry_run)
    if words.as_json:
        give(stands(words.run, way))
    return code


def stop_words(argv: list[str]) -> StopWords:
    """What was typed. Errors: ConfigError with every problem."""
    from launch.runs.status import is_frozen

    words, problems = read_words("stop", StopWords, argv)
    run = words.run
    if run is not None and not ((run / "config.yaml").is_file() and is_frozen(run)):
        problems.append(f"{run}: is no run directory (there is no configuration of a run in it)")
    if problems:
        raise ConfigError(problems)
    return words


def stop(run_dir: Path, wait_s: float, *, dry: bool) -> tuple[int, str | None]:
    """(the exit code, by what it was stopped or would be; None where nothing ran). Errors: CannotStop."""
    from launch.runs.queue import ask_twice
    from launch.runs.status import look
    from launch.runs.stop import Nothing, refuse_unknown, way

    queue = ask_twice()
    run = look(run_dir, queue)
    found = way(run_dir, queue, run.job)
    if isinstance(found, Nothing):
        refuse_unknown(run_dir, queue, run.state)
        why = f" ({run.why})" if run.why else ""
        print(f"{run_dir}: is not running: {run.state}{why}; {saved(run_dir, run.step)}")
        return 0, None
    if dry:
        print(f"{run_dir}: {run.state} at step {run.step or 0}; would be stopped by: {found}")
        return 0, str(found)
    if found.send() is False:
        print(f"{run_dir}: ended by itself; {saved(run_dir, run.step)}")
        return 0, None
    print(f"{run_dir}: told to save and to end ({found})", flush=True)
    return Waiting(run_dir, found, wait_s).until_ended(), str(found)


def stands(run_dir: Path, way: str | None) -> dict[str, Any]:
    """How the run stands, for a script; `by`: what ended it, or would."""
    from launch.runs.checkpoints import saved as checkpoints_of
    from launch.runs.queue import ask
    from launch.runs.status import look

    run, newest = look(run_dir, ask()), checkpoints_of(run_dir).newest
    known = None if newest is None else {"step": newest.step, "path": str(newest.path)}
    return {
        "run": str(run_dir),
        "by": way,
        "state": run.state,
        "why": run.why or None,
        "step": run.step,
        "checkpoint": known,
    }


def saved(run_dir: Path, step: int | None) -> str:
    """What there is to go on from."""
    from launch.runs.checkpoints import saved as checkpoints_of

    newest = checkpoints_of(run_dir).newest
    if newest is None:
        return "no checkpoint" if step else "nothing was begun that could be lost"
    return f"saved at step {newest.step}: {newest.path}"


@dataclass(slots=True)
class Waiting:
    """For a run that was told to end."""

    run_dir: Path
    way: Signal | Slurm | Cancel
    wait_s: float
    _asked_at: float = float("-inf")
    _queue_problem: str | None = None
    """Why SLURM's queue could not be asked when it was asked last."""

    def until_ended(self) -> int:
        """Wait, and say what was saved; the exit code."""
        from trainer.reporting.status import read_status

        began = told = time.monotonic()
        try:
            while not self._ended():
                now = time.monotonic()
                if now - began > self.wait_s:
                    return self._late()
                if now - told > TELL_S:
                    told = now
                    step = read_status(self.run_dir).get("step")
                    print(f"  {now - began:.0f} s: not yet ended (step {step})", flush=True)
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            print(f"\n{self.run_dir}: was told to end, and is still saving", file=sys.stderr)
            raise
        return self._tell()

    def _ended(self) -> bool:
        """Whether it has, and nothing will start it again."""
        from launch.runs.queue import ask
        from launch.runs.stop import Cancel, Signal

        if isinstance(self.way, Signal):
            return self.way.gone
        if time.monotonic() - self._asked_at < ASK_S:
            return False
        queue = ask()
        self._asked_at = time.monotonic()
        self._queue_problem = queue.problem
        job = next((job for job in queue.jobs if job.id == self.way.job.id), None)
        if job is not None and job.pends:
            Cancel(job).send()  # also where it was requeued all the same, as by an administrator
        return job is None and queue.problem is None

    def _tell(self) -> int:
        from launch.runs.status import one_line
        from launch.runs.stop import Cancel
        from trainer.reporting.status import State, read_failure, read_status

        status = read_status(self.run_dir)
        step, state = status.get("step"), status.get("state")
        if isinstance(self.way, Cancel):
            print(f"{self.run_dir}: job {self.way.job.id} was taken out of the queue; {saved(self.run_dir, step)}")
        elif state == State.done:
            print(f"{self.run_dir}: was done at step {step} before it could be stopped")
        elif state == State.preempted and step:
            print(f"{self.run_dir}: {saved(self.run_dir, step)}; the same command continues it")
        elif state in (State.preempted, None):
            print(f"{self.run_dir}: stopped before training began; nothing is lost")
        else:
            why = read_failure(self.run_dir).get("message") or status.get("reason")
            why = one_line(why) if why and state == State.failed else "it ended without a word"
            print(f"{self.run_dir}: has not saved: {why}; {saved(self.run_dir, step)}", file=sys.stderr)
            return FAILED
        return 0

    def _late(self) -> int:
        if self._queue_problem is not None:
            print(
                f"{self.run_dir}: was told to end, and whether it has is not known ({self._queue_problem}); "
                f"{saved(self.run_dir, None)}",
                file=sys.stderr,
            )
            return NOT_IN_TIME
        print(
            f"{self.run_dir}: has not ended within {self.wait_s:.0f} s: it still saves, or hangs. `shardtune status "
            f"{self.run_dir}` says when it was last seen, and wait_s= waits longer; {saved(self.run_dir, None)}",
            file=sys.stderr,
        )
        return NOT_IN_TIME
