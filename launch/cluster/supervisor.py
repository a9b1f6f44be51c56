"""How a run ended, read from its directory because torchrun loses exit codes; and whether it is restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import atomic_io, exit_codes
from strategies.errors import StorageError
from trainer.config.run import RunConfig
from trainer.reporting.status import (
    RESTART_COUNT_VARIABLE,
    RunState,
    clear_failure,
    is_refused_start,
    message_suffices,
    read_failure,
    read_status,
    write_status,
)
from trainer.session.lease import possible_owner_text

if TYPE_CHECKING:
    from launch.cluster.torchrun import RankProgram, RedirectedOutput


@dataclass(frozen=True, slots=True)
class StateBeforeStart:
    """What a run directory held before its ranks started, to tell their records from those of an earlier attempt."""

    directory: atomic_io.OpenDirectory | None
    """Finds the directory after it was renamed; None if it cannot be opened."""
    status: dict[str, Any]
    """`status.json`."""
    failure: dict[str, Any]
    """`failure.json`."""


FINAL_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals after which a run is over; the others ask it to save and to be started again, if `launcher.retry` says so."""
EXPORT_STOPPED_MESSAGE = (
    "export: stopped; files of the model that are complete are kept, and the same command writes the others"
)


def run_supervised(
    config: RunConfig,
    run_dir: Path,
    sha256: str,
    redirected: RedirectedOutput | None = None,
    *,
    program: RankProgram | None = None,
) -> int:
    """Run a run's ranks in processes of their own to the end, and again as often as `launcher.retry` allows.

    The ranks run on this host, or on `launcher.hosts` by ssh. They are started again after a cause in `launcher.retry`: never
    after an error of the user or of shardtune, nor after TERM, HUP or Ctrl-C. After memory ran out, the next start has half of
    `batch.micro`; if that cannot be halved, there is none.

    `sha256`: of the configuration; it names the rendezvous.
    `redirected`: a file for the output instead of the terminal.
    `program`: what the ranks run; None for training.
    Returns the exit code.
    """
    from launch.cluster.torchrun import TRAIN

    if config.launcher.hosts:
        from launch.cluster.ssh import run_ranks_on_hosts as run_ranks
    else:
        from launch.cluster.torchrun import run_ranks_on_this_host as run_ranks
    program = program or TRAIN

    retries_left = dict(config.launcher.retry)
    num_restarts = 0
    try:
        while True:
            # For what the ranks, and this process, write into `status.json`.
            os.environ[RESTART_COUNT_VARIABLE] = str(num_restarts)
            earlier_state = state_before_start(run_dir)
            run_id = f"{sha256[:8]}-{num_restarts}" if num_restarts else sha256[:8]
            ranks_end = run_ranks(config, run_dir, run_id, redirected, program=program)
            verb = program.module.rpartition(".")[2]
            exit_code = record_run_outcome(run_dir, ranks_end.exit_code, earlier_state, verb=verb)

            cause = _retry_cause_key(run_dir, exit_code, ranks_end.received_signals)
            if cause is None or retries_left.get(cause, 0) < 1:
                return exit_code
            change_text = ""
            if cause == "out_of_memory":
                settings_change = _write_smaller_settings(run_dir) if program is TRAIN else None
                if settings_change is None:
                    return exit_code
                change_text = f", {settings_change}"
            retries_left[cause] -= 1
            num_restarts += 1
            print(
                f"{run_dir}: started again ({cause}; {retries_left[cause]} more times){change_text}",
                file=sys.stderr,
                flush=True,
            )
    finally:
        os.environ.pop(RESTART_COUNT_VARIABLE, None)


def state_before_start(run_dir: Path) -> StateBeforeStart:
    """Note what a run directory holds before the ranks start, by which their records are told from those of an earlier attempt.

    Deletes the failure record of an earlier attempt.
    """
    clear_failure(run_dir)
    directory = None
    with contextlib.suppress(OSError):
        directory = atomic_io.OpenDirectory(run_dir)
    return StateBeforeStart(directory, read_status(run_dir), read_failure(run_dir))


def record_run_outcome(run_dir: Path, exit_code: int, earlier_state: StateBeforeStart, *, verb: str = "train") -> int:
    """Print how a run ended, and write `status.json` if the ranks could not; returns the exit code of the command.

    The ranks' own exit codes are lost by torchrun, so what they recorded in the run directory decides. The first case that holds:

    - the run directory was deleted: the code of a StorageError;
    - done: 0;
    - saved after a signal (`preempted`), unless a rank was killed before the first step: 75;
    - another process owns the run now: 70, and its records are left alone;
    - a preempted run whose start was refused: the code of the recorded failure; its status is left as the ranks wrote it;
    - Ctrl-C: 130, written as failed;
    - failed: the code of the recorded failure, else 70, written as failed.

    After Ctrl-C the code is 130 in every case but `done`.

    `exit_code`: torchrun's, which is 0, 130 for Ctrl-C, or a failure about which the run directory says more.
    `earlier_state`: from `state_before_start`; a record that has not changed since is of an earlier attempt.
    `verb`: for messages.
    """
    was_interrupted = exit_code == exit_codes.INTERRUPTED
    directory = find_run_directory(run_dir, earlier_state)
    if directory is None:
        print(
            f"{run_dir}: the directory was deleted while the run was under way; nothing of it is left", file=sys.stderr
        )
        return exit_codes.INTERRUPTED if was_interrupted else StorageError.exit_code
    status = read_status(directory)
    if status == earlier_state.status:
        status = {}
    failure = read_failure(directory)
    if failure == earlier_state.failure:
        failure = {}
    if status.get("state") == RunState.done:
        return 0

    step = status.get("step")
    # If a rank was killed before the first step, that is the cause: torchrun has asked its peers to stop since.
    was_killed = bool(failure) and not step
    was_refused = is_refused_start(status)
    if status.get("state") == RunState.preempted and not was_killed and not was_refused:
        print(_stopped_message(directory, run_dir, step, verb), file=sys.stderr)
        return exit_codes.INTERRUPTED if was_interrupted else exit_codes.PREEMPTED
    owner = None
    with contextlib.suppress(OSError):  # a directory that cannot be read must not hide the failure
        owner = possible_owner_text(directory)
    if owner is not None:
        print(f"{directory}: ended here; its records are left to {owner}", file=sys.stderr)
        return exit_codes.INTERRUPTED if was_interrupted else exit_codes.FAILED

    if was_refused:
        print(_failure_message(directory, failure, verb) if failure else status["reason"], file=sys.stderr, flush=True)
        return exit_codes.INTERRUPTED if was_interrupted else failure.get("exit_code", exit_codes.FAILED)
    if was_interrupted:
        reason = "interrupted"
        message = f"{directory}: interrupted; the same command continues from the last checkpoint"
        if verb == "export":
            message = EXPORT_STOPPED_MESSAGE
    else:
        # A run that nobody reports as ended has failed, even if torchrun returned 0.
        exit_code = failure.get("exit_code", exit_codes.FAILED)
        reason = failure.get("message") or "the ranks ended without a report"
        message = (
            _failure_message(directory, failure, verb) if failure else f"{directory}: {reason}; see the output above"
        )
    write_status(directory, RunState.failed, reason=reason, step=failure.get("step") or step)
    print(message, file=sys.stderr, flush=True)
    return exit_code


def _stopped_message(directory: Path, former_dir: Path, step: int | None, verb: str) -> str:
    """Write the message about a run that was asked to stop: what is saved, and how it continues.

    `directory`: where the run directory is now.
    `former_dir`: where it was when the run started; another one if it was renamed.
    `step`: the step that was saved; None or 0 if training had not begun.
    `verb`: the command that was stopped, such as train.
    """
    if verb == "export":  # the directory is a temporary one
        return EXPORT_STOPPED_MESSAGE
    if verb == "evaluate":
        return f"{directory}: stopped; an evaluation keeps nothing, the same command begins it again"
    reached = f"stopped at step {step}, saved" if step else "stopped before training began, nothing is lost"
    if directory != former_dir:
        return f"{directory}: {reached}; the directory was renamed while the run was under way: run.dir={directory} continues it"
    return f"{directory}: {reached}; the same command continues it"


def find_run_directory(run_dir: Path, earlier_state: StateBeforeStart) -> Path | None:
    """Where the run directory is now, which may have been renamed while the run was under way; None if it was deleted.

    `run_dir`: where it was when the run started.
    `earlier_state`: has that directory open, so that it is found under another name.
    `run_dir` is returned too if the directory could not be opened then.
    """
    if earlier_state.directory is None:
        return run_dir
    found_dir = None
    with contextlib.suppress(OSError):  # a directory that cannot be read must not hide how the run ended
        found_dir = earlier_state.directory.find_directory()
    # A file system may give a directory another inode number: then the directory under its name is the run's.
    if found_dir is None and (run_dir / "config.yaml").exists():
        return run_dir
    return found_dir


def _write_smaller_settings(run_dir: Path) -> str | None:
    """Make a run that ran out of memory smaller before it is started again; returns the change, such as "batch.micro: 8 -> 4".

    None, and a message on stderr, if the micro-batch cannot be halved.
    """
    from launch.cluster.oom_retry import write_smaller_settings

    settings_change = write_smaller_settings(run_dir)
    if settings_change is None:
        print(f"{run_dir}: not started again: batch.micro cannot be halved", file=sys.stderr, flush=True)
    return settings_change


def _retry_cause_key(run_dir: Path, exit_code: int, received_signals: set[int]) -> str | None:
    """Why a run may be started again, as a key of `launcher.retry` such as "node_fail"; None if it may not.

    - Ctrl-C, or a signal that ends the run for good: None, also if a rank was lost meanwhile;
    - the run has saved after a signal: "preempted";
    - done: None;
    - failed: the cause that the record of the failure names, if any: an error of the user names none.

    `exit_code`: of the run. `received_signals`: numbers of those that this process received.
    """
    if exit_code == exit_codes.INTERRUPTED or received_signals & FINAL_SIGNALS:
        return None
    if exit_code == exit_codes.PREEMPTED:
        return "preempted" if received_signals else None
    if exit_code == 0:
        return None
    return read_failure(run_dir).get("retry")


def _failure_message(run_dir: Path, failure: dict[str, Any], verb: str) -> str:
    """Write the message about a failed run from its `failure.json`: which rank failed, where and why.

    `failure`: the record. An error of the user, or a lost rank, has its message below that; any other error has its traceback
    before it.
    `verb`: the command, such as train.
    """
    step_text = f", step {failure['step']}" if failure.get("step") is not None else ""
    summary = f"rank {failure['rank']} on {failure['host']} failed ({failure['phase']}{step_text})"
    if message_suffices(failure):
        indented_message = failure["message"].replace("\n", "\n  ")
        return f"shardtune {verb}: {summary}:\n  {indented_message}"
    return f"{failure['traceback'].rstrip()}\nshardtune {verb}: {summary}; see {run_dir / 'failure.json'}"
