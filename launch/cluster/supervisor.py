"""How a run ended, read from its directory because torchrun loses exit codes; and whether it is restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import atomic_io
from strategies.errors import StorageError
from trainer.config.run import RunConfig
from trainer.reporting.status import STARTED_AGAIN, State, clear_failure, read_failure, read_status, write_status
from trainer.session.lease import other_owner

if TYPE_CHECKING:
    from launch.cluster.torchrun import Aside, What


@dataclass(frozen=True, slots=True)
class RunBefore:
    """A run directory as it was before its ranks start."""

    directory: atomic_io.OpenDirectory | None
    """Finds it after it was renamed; None where it cannot be opened."""
    status: dict[str, Any]
    failure: dict[str, Any]


FINAL = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals after which a run is over; the others ask it to save and to be started again, where `launcher.retry` says so."""


def supervised(
    config: RunConfig, run_dir: Path, sha256: str, aside: Aside | None = None, *, what: What | None = None
) -> int:
    """Run in processes of their own to the end, and again as often as `launcher.retry` allows; returns the exit code.

    Never again after an error of the user's or of ours, nor after TERM, HUP or Ctrl-C; where memory ran out, with half of
    `batch.micro`.
    """
    from launch.cluster.torchrun import TRAIN, start

    if config.launcher.hosts:
        from launch.cluster.ssh import start
    what = what or TRAIN

    left, number = dict(config.launcher.retry), 0
    try:
        while True:
            os.environ[STARTED_AGAIN] = str(number)  # for what the ranks, and this process, write into `status.json`
            before = begin(run_dir)
            run_id = f"{sha256[:8]}-{number}" if number else sha256[:8]
            ended, signals = start(config, run_dir, run_id, aside, what=what)
            code = outcome(run_dir, ended, before, verb=what.module.rpartition(".")[2])
            cause = _cause(run_dir, code, signals)
            if cause is None or left.get(cause, 0) < 1:
                return code
            changed = ""
            if cause == "out_of_memory":
                lowered = _lower(run_dir) if what is TRAIN else None
                if lowered is None:
                    return code
                changed = f", {lowered}"
            left[cause] -= 1
            number += 1
            print(f"{run_dir}: started again ({cause}; {left[cause]} more times){changed}", file=sys.stderr, flush=True)
    finally:
        os.environ.pop(STARTED_AGAIN, None)


def begin(run_dir: Path) -> RunBefore:
    """Forget an earlier attempt's failure; what is known of the run before the ranks start."""
    clear_failure(run_dir)
    directory = None
    with contextlib.suppress(OSError):
        directory = atomic_io.OpenDirectory(run_dir)
    return RunBefore(directory, read_status(run_dir), read_failure(run_dir))


def outcome(run_dir: Path, code: int, before: RunBefore, *, verb: str = "train") -> int:
    """The exit code of a run that has ended, after showing why. Settles `status.json` where the ranks could not.

    `code` is torchrun's: 0, 130 for Ctrl-C, or a failure about which the directory says more. `before` is what `begin` returned:
    what still says the same is of an earlier attempt.
    """
    home = found(run_dir, before)
    if home is None:
        print(
            f"{run_dir}: the directory was deleted while the run was under way; nothing of it is left", file=sys.stderr
        )
        return 130 if code == 130 else StorageError.exit_code
    renamed, run_dir = home != run_dir, home
    status, failure = read_status(run_dir), read_failure(run_dir)
    status = {} if status == before.status else status
    failure = {} if failure == before.failure else failure
    if status.get("state") == State.done:
        return 0
    step = status.get("step")
    # Before training a rank that was killed is the cause: torchrun has asked its peers to stop since.
    was_killed = bool(failure) and not step
    if status.get("state") == State.preempted and not was_killed:
        reached = f"stopped at step {step}, saved" if step else "stopped before training began, nothing lost"
        said = f"{reached}; the same command continues it"
        if renamed:
            said = f"{reached}; the directory was renamed while the run was under way: run.dir={run_dir} continues it"
        if verb == "evaluate":
            said = "stopped; an evaluation keeps nothing, the same command begins it again"
        print(f"{run_dir}: {said}", file=sys.stderr)
        return 130 if code == 130 else 75
    owner = None
    with contextlib.suppress(OSError):  # a directory that cannot be read must not hide the failure
        owner = other_owner(run_dir)
    if owner is not None:
        print(f"{run_dir}: ended here; its records are left to {owner}", file=sys.stderr)
        return 130 if code == 130 else 70
    reason, shown = "interrupted", f"{run_dir}: interrupted; the same command continues from the last checkpoint"
    if code != 130:
        # A run of which nobody reports an end has failed, also where torchrun is content.
        code, reason = failure.get("exit_code", 70), failure.get("message") or "the ranks ended without a report"
        shown = _explain(run_dir, failure, verb) if failure else f"{run_dir}: {reason}; see the output above"
    write_status(run_dir, State.failed, reason=reason, step=failure.get("step") or status.get("step"))
    print(shown, file=sys.stderr, flush=True)
    return code


def found(run_dir: Path, before: RunBefore) -> Path | None:
    """Where the run's directory is now; None if it was deleted."""
    if before.directory is None:
        return run_dir
    home = None
    with contextlib.suppress(OSError):  # a directory that cannot be read must not hide how the run ended
        home = before.directory.find()
    # A file system may number a directory anew: what lies under the name is the run then.
    return run_dir if home is None and (run_dir / "config.yaml").exists() else home


def _lower(run_dir: Path) -> str | None:
    from launch.cluster.oom_retry import lower_micro

    if (lowered := lower_micro(run_dir)) is None:
        print(f"{run_dir}: not started again: batch.micro cannot be halved", file=sys.stderr, flush=True)
    return lowered


def _cause(run_dir: Path, code: int, signals: set[int]) -> str | None:
    """Why a run may be started again: a key of `launcher.retry`; None where it may not."""
    if code == 130 or signals & FINAL:  # also where a rank was lost meanwhile
        return None
    if code == 75:
        return "preempted" if signals else None
    return read_failure(run_dir).get("retry") if code else None


def _explain(run_dir: Path, failure: dict[str, Any], verb: str) -> str:
    at = f", step {failure['step']}" if failure.get("step") is not None else ""
    where = f"rank {failure['rank']} on {failure['host']} failed ({failure['phase']}{at})"
    if failure["user_error"]:
        return f"shardtune {verb}: {where}:\n  " + failure["message"].replace("\n", "\n  ")
    return f"{failure['traceback'].rstrip()}\nshardtune {verb}: {where}; see {run_dir / 'failure.json'}"
