"""Writes down which rank a signal has killed, and what it was doing, as torchrun and heartbeats tell: the rank itself cannot."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.heartbeat import HEARTBEAT_DIRECTORY_VARIABLE, LOST_PEER_REGEX, TIMEOUT_REGEX, read_last_heartbeat

OUT_OF_MEMORY_ENDING = (
    ": out of memory (the kernel counted a kill for it); lower batch.micro or data.max_length, shard more of the model "
    "(strategy=fsdp2 or zero3), or give the job more memory (launcher.mem under SLURM)"
)
"""The end of the message about a rank that the kernel killed for memory. Another start would run out again."""


def only_says_peer_was_lost(failure: dict[str, Any]) -> bool:
    """Whether a recorded failure (`failure.json`) only says that a rank lost its peer, so that the cause may replace it.

    The record says so itself by its key `gone`. A record without the key is judged by its message. What a rank wrote about itself
    is a cause. So is a rank that hung and was stopped: torchrun has killed that one since.
    """
    lost_peer_by_message = LOST_PEER_REGEX.search(failure.get("message", "")) is not None
    return bool(failure.get("gone", lost_peer_by_message))


@dataclass(frozen=True, slots=True)
class _KilledRank:
    """A rank whose process was killed by a signal."""

    rank: int
    pid: int
    signal_name: str
    """Such as "SIGKILL"."""


def _first_killed_rank(failures: dict[int, Any]) -> _KilledRank | None:
    """The rank that was killed first by a signal other than TERM; None if no rank was. The others may have failed because of it.

    `failures`: torchrun's, by rank, each with exit code, process id and time.
    TERM does not count, because torchrun itself ends the peers of a failed rank by it.
    """
    killed_ranks = []
    for rank, failure in failures.items():
        # The exit code of a killed process is the signal's number, negative.
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            killed_ranks.append(rank)
    if not killed_ranks:
        return None
    first_rank = min(killed_ranks, key=lambda rank: failures[rank].timestamp)
    first_failure = failures[first_rank]
    return _KilledRank(first_rank, first_failure.pid, signal.Signals(-first_failure.exitcode).name)


def record_killed_rank(error: BaseException, *, kernel_killed_for_memory: bool) -> None:
    """Write the `failure.json` of a rank that a signal has killed, since the rank itself cannot; nothing if no rank was.

    Called after torchrun has failed. The record replaces a failure that only says that a rank lost its peer, but not a failure of
    another kind. Its `retry` is the key of `launcher.retry` that allows another start: `out_of_memory` or `node_fail`. Under
    SLURM the failure is also printed, and written into `status.json`; elsewhere the process that started torchrun
    (`launch.cluster.supervisor`) does so.

    `error`: torchrun's ChildFailedError.
    `kernel_killed_for_memory`: whether the kernel has killed a process for memory since the ranks started.
    Does nothing without a run directory (SHARDTUNE_RUN_DIR).
    """
    from strategies.errors import ShardtuneError
    from trainer.reporting.status import RunState, read_failure, record_failure, write_status

    # A kill explains more than exits that torchrun noticed at the same time: those may be peers that lost the killed rank.
    killed = _first_killed_rank(error.failures)  # type: ignore[attr-defined]
    if killed is None or "SHARDTUNE_RUN_DIR" not in os.environ:
        return
    is_out_of_memory = kernel_killed_for_memory and killed.signal_name == "SIGKILL"
    explanation = OUT_OF_MEMORY_ENDING if is_out_of_memory else ""
    killed_error = ShardtuneError(
        f"rank {killed.rank} (process {killed.pid}) was killed by {killed.signal_name}{explanation}"
    )

    run_dir = Path(os.environ["SHARDTUNE_RUN_DIR"])
    recorded = read_failure(run_dir)
    last_work = _last_work_of_rank(killed.rank, recorded)
    was_recorded = record_failure(
        run_dir,
        killed.rank,
        killed_error,
        last_work.phase,
        last_work.step,
        replace=_may_be_replaced(recorded, killed),
        pid=killed.pid,
        user_error=is_out_of_memory,
        retry="out_of_memory" if is_out_of_memory else "node_fail",
    )
    runs_under_slurm = "SHARDTUNE_LAUNCHER" not in os.environ  # it names the process that started torchrun elsewhere
    if was_recorded and runs_under_slurm:
        print(killed_error, file=sys.stderr, flush=True)
        with contextlib.suppress(ShardtuneError):
            write_status(run_dir, RunState.failed, step=last_work.step, reason=str(killed_error))


def _may_be_replaced(recorded: dict[str, Any], killed: _KilledRank) -> bool:
    """Whether the recorded failure of a run may be replaced by the one that a rank was killed, which explains more.

    That is so if it only says that a rank lost its peer. But NCCL aborts every rank that waits too long, and each has written
    before what it waited for: that record stays.
    """
    is_abort_after_wait = (
        killed.signal_name == "SIGABRT" and TIMEOUT_REGEX.search(recorded.get("message", "")) is not None
    )
    return only_says_peer_was_lost(recorded) and not is_abort_after_wait


@dataclass(frozen=True, slots=True)
class _LastWork:
    """What a rank was doing before it was killed."""

    phase: str
    """Such as "training"; "killed" if it is not known."""
    step: int | None


def _last_work_of_rank(rank: int, recorded: dict[str, Any]) -> _LastWork:
    """What a killed rank was doing: by the failure that a peer recorded about it, else by its last heartbeat.

    `recorded`: the run's `failure.json`, empty if there is none.
    Heartbeats are files that ranks leave in a temporary directory.
    """
    is_about_rank = recorded.get("rank") == rank and recorded.get("gone")
    if is_about_rank:
        return _LastWork(recorded["phase"], recorded["step"])
    last_heartbeat = read_last_heartbeat(Path(os.environ.get(HEARTBEAT_DIRECTORY_VARIABLE, os.devnull)), rank)
    if last_heartbeat is not None:
        return _LastWork(last_heartbeat.phase, last_heartbeat.step)
    return _LastWork("killed", step=None)
