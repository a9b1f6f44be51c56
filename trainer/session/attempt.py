"""One attempt at a run: it owns the run directory, knows its phase, and records how it ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from strategies import exit_codes
from strategies import runtime as processes
from strategies.compat.python import end_process
from strategies.errors import (
    ConfigError,
    DataError,
    NotRunOwner,
    Preempted,
    ShardtuneError,
    StorageError,
    is_panic,
    tokenizer_panic,
)
from strategies.flight_recorder import CollectiveCall
from strategies.heartbeat import LOST_PEER_REGEX, TIMEOUT_REGEX, CutOffRank, HeartbeatMonitor, LaggingRank, SilentRank
from strategies.redaction import redact
from strategies.rendezvous import Rendezvous
from strategies.runtime import Runtime, broadcast_object
from trainer.reporting.status import (
    CONFIG_SHA256_REGEX,
    RESUMED_STEP_KEY,
    RunState,
    clear_failure,
    is_error_of_run,
    is_refused_start,
    job_start_fields,
    read_failure,
    read_status,
    record_failure,
    resumable_step,
    write_status,
)
from trainer.session.lease import Lease, LeaseLost
from trainer.stopping.signals import StopRequest

MAX_SHOWN_FILES = 8
"""Files that are named in a message."""


@dataclass(slots=True)
class Attempt:
    """One attempt at a run, from the start of its processes to their end: its phase and step, and its run directory."""

    phase: str = "data preparation"
    step: int | None = None
    note: str | None = None
    """What the detectors found in a run that continues or is done, for `status.json`."""
    run_dir: Path | None = None
    lease: Lease | None = None
    """Ownership of the run directory; on rank 0 alone."""
    heartbeat_monitor: HeartbeatMonitor | None = None
    """Heartbeats between the ranks; None for a single rank, and before the ranks have met."""
    renamed_from: Path | None = None
    """The path of the directory before somebody renamed it while the run was under way."""
    on_run_dir_renamed: list[Callable[[Path], None]] = field(default_factory=list)
    """Called with the new path of the directory after it was renamed."""
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What is closed when the attempt ends, however it ends: processes of this rank."""
    on_collective_timeout: Callable[[CollectiveCall], None] | None = None
    """Called with a collective for which NCCL is about to end this process."""
    on_cut_off: Callable[[CutOffRank], None] | None = None
    """Called when this process has lost its connection to the host of rank 0, which has the ranks' store: ends the process."""

    @contextlib.contextmanager
    def join_ranks(self, timeout_s: float) -> Iterator[Rendezvous]:
        """A context in which the ranks have met in a common store, and send heartbeats, but have no process group yet.

        So hours of preparation time out no collective. All ranks must call, within `timeout_s`. Raises Preempted on every rank if
        one was asked to stop, LeaseLost on every rank if rank 0 found that the run directory is not this attempt's any more.
        """
        rendezvous = Rendezvous.join(timeout_s, self.reason_run_dir_was_lost)
        if rendezvous.store is not None:  # several ranks
            self.heartbeat_monitor = HeartbeatMonitor(
                rendezvous.store, rendezvous.rank, rendezvous.world_size, lambda: (self.phase, self.step), timeout_s
            )
            self.heartbeat_monitor.on_collective_timeout = self.on_collective_timeout
            self.heartbeat_monitor.on_cut_off = self.on_cut_off
        try:
            yield rendezvous
        except Preempted as stop:
            # A lost directory reaches the other ranks as a request to stop: rank 0 left its reason in the store, which `leave`
            # returns; None if rank 0 found the directory its own.
            reason_lost = rendezvous.leave()
            if reason_lost is not None:
                raise LeaseLost(reason_lost) from stop
            raise

    def set_phase(self, phase: str) -> None:
        """Note what the attempt is doing now, such as `data preparation`, for the record of a failure."""
        self.phase = phase

    def at_step(self, step: int) -> None:
        """Note the step that is being taken, for the record of a failure."""
        self.step = step

    def set_run_dir(self, run_dir: Path, rank: int) -> Path:
        """Note the directory of the run, and return it. Stacks of this rank's threads are written there on request."""
        self.run_dir = run_dir
        if self.heartbeat_monitor is not None:
            self.heartbeat_monitor.write_stacks_to(run_dir / "logs" / f"rank-{rank}.stacks")
        return run_dir

    def reason_run_dir_was_lost(self) -> str | None:
        """Why the directory is no longer this attempt's, such as another start; None if it is, and on ranks other than 0."""
        if self.lease is not None:
            try:
                self.lease.check()
            except LeaseLost as caught:
                return str(caught)
        return None

    def require_run_dir_ownership(self, runtime: Runtime) -> None:
        """Check that the run directory is still this attempt's, before anything is written there under a final name.

        All ranks must call. If somebody renamed the directory, all ranks use its new path from now on. Raises LeaseLost on every
        rank if another attempt owns the directory, or if it was deleted.
        """
        reason_lost = self.reason_run_dir_was_lost()
        current_run_dir = None
        if reason_lost is None and self.lease is not None:
            current_run_dir = self.lease.run_dir
        reason_lost, current_run_dir = broadcast_object((reason_lost, current_run_dir), runtime)
        if reason_lost is not None:
            raise LeaseLost(reason_lost)
        if current_run_dir is not None:
            self.follow_renamed_run_dir(current_run_dir)

    def follow_renamed_run_dir(self, current_run_dir: Path) -> None:
        """Use `current_run_dir` from now on, if somebody renamed the directory, and call those who must know. No collective."""
        if self.run_dir is None or current_run_dir == self.run_dir:
            return
        if self.renamed_from is None:  # the first name is what the user typed
            self.renamed_from = self.run_dir
        self.run_dir = current_run_dir
        for notify in self.on_run_dir_renamed:
            notify(current_run_dir)


def raise_if_config_was_replaced(run_dir: Path, config_sha256: str) -> None:
    """Raise ConfigError if another start has replaced the `config.yaml` that this attempt wrote into the directory.

    Two starts at the same moment may both write their configurations before one of them owns the directory. So the owner calls
    this when it has the lease. `config_sha256`: hash of this attempt's configuration. A `config.yaml` that is missing or has no
    hash in it passes.
    """
    try:
        recorded_hash = CONFIG_SHA256_REGEX.search((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return  # no configuration was written there
    if recorded_hash is not None and recorded_hash[1] != config_sha256:
        raise ConfigError(
            f"run.dir={run_dir}: another start has frozen another configuration there meanwhile; start one of the two again, "
            "or give each a run.dir of its own"
        )


@contextlib.contextmanager
def open_rank_of_job(run_dir: Path | None, lease_timeout_s: int) -> Iterator[tuple[StopRequest, Attempt]]:
    """A context for this process as one rank of the job that its environment describes, around everything that it does.

    Within it, signals become a request to stop, and this attempt owns the run directory. At its end, the process groups end too:
    in order, or at once if this rank failed. Raises what ended the run.

    `run_dir`: needed on rank 0 only. `lease_timeout_s`: seconds without heartbeats after which another owner of the directory
    counts as dead.
    """
    failed = False
    is_single_rank = int(os.environ.get("WORLD_SIZE", 1)) == 1  # a terminal's Ctrl-C goes to the launcher of several
    # The outermost context, so that signals are handled until the end of the attempt is recorded.
    with StopRequest(interrupts=is_single_rank) as request:
        try:
            with run_attempt(run_dir, lease_timeout_s, request) as attempt:
                yield request, attempt
        except Preempted as stop:
            stop.signal_name = request.signal_name
            raise
        except BaseException:
            failed = True
            raise
        finally:
            processes.leave_job(failed=failed)


@contextlib.contextmanager
def run_attempt(run_dir: Path | None, lease_timeout_s: int, request: StopRequest) -> Iterator[Attempt]:
    """A context around this rank's attempt at a run: it owns the run directory, and records how the attempt ends.

    `run_dir` is needed on rank 0 only. The first failing rank leaves `failure.json`, which a success and the next attempt remove.
    `status.json` says how it ended; a preempted run whose restart is refused before it trains is preempted as before. Nothing is
    written into a directory that is another attempt's.

    Raises what ended the run, or NotRunOwner: RunDirInUse if another attempt owns the directory at the start, LeaseLost if it
    does later.
    """
    attempt = Attempt(run_dir=run_dir)
    rank = int(os.environ.get("RANK", 0))
    # The first rank of each host reports to that host's launcher. On a shared disk, all of these ranks write the same file.
    writes_status = run_dir is not None and int(os.environ.get("LOCAL_RANK", 0)) == 0
    with _owning_run_dir(run_dir if rank == 0 else None, lease_timeout_s, request) as attempt.lease:
        try:
            if attempt.lease is not None and run_dir is not None:
                clear_failure(run_dir)
                _write_starting_status(run_dir)
            _set_hooks_of_other_threads(attempt, rank, request)
            yield attempt
            if writes_status and attempt.run_dir is not None:
                write_status(attempt.run_dir, RunState.done, step=attempt.step, reason=attempt.note)
                clear_failure(attempt.run_dir)
        except NotRunOwner:
            raise  # and write nothing
        except BaseException as caught:
            error: BaseException = caught
            if is_panic(caught):  # a BaseException, which no handler further out takes for an error
                error = tokenizer_panic(caught, "a tokenizer of this run")
            request.disarm_end_of_stuck_process()  # from here on, only this thread ends the process
            if attempt.lease is not None:
                attempt.lease.check()  # raises LeaseLost if nothing may be written
                attempt.follow_renamed_run_dir(attempt.lease.run_dir)
            if not isinstance(error, Preempted | KeyboardInterrupt):
                _record_failure(attempt, rank, error)
            elif writes_status:
                _write_stopped_status(attempt, error)
            if error is caught:
                raise
            raise error from caught
        finally:
            attempt.at_end.close()


def _write_starting_status(run_dir: Path) -> None:
    """Write into `status.json` that an attempt starts and, if the run was preempted, the step that it had saved.

    The first status of the training replaces both, so the step is there as long as the attempt has not begun to train.
    """
    saved_step = resumable_step(read_status(run_dir))
    resumed = {} if saved_step is None else {RESUMED_STEP_KEY: saved_step}
    write_status(run_dir, RunState.running, reason="starting", **resumed)


def _set_hooks_of_other_threads(attempt: Attempt, rank: int, request: StopRequest) -> None:
    """Set what other threads do while the main thread may be stuck in a library: record a timeout, or end this process."""
    attempt.on_collective_timeout = partial(_record_timeout_before_nccl_aborts, attempt, rank)
    attempt.on_cut_off = partial(_end_cut_off_process, attempt, rank)
    request.arm_end_of_stuck_process(partial(_end_process_before_training, attempt))


def _write_stopped_status(attempt: Attempt, error: BaseException) -> None:
    """Write into `status.json` that a signal (Preempted) or Ctrl-C (which counts as failed) stopped the run."""
    if attempt.run_dir is None:
        return
    recorded = read_status(attempt.run_dir)
    failure = read_failure(attempt.run_dir)
    was_refused = is_refused_start(recorded) and job_start_fields().items() <= recorded.items()
    has_failed = is_error_of_run(failure) and job_start_fields().items() <= failure.items()
    if was_refused or (has_failed and not attempt.step):
        return  # another rank met an error in this start, and the launcher has asked this one to stop since
    state = RunState.preempted if isinstance(error, Preempted) else RunState.failed
    reason = str(error) or "interrupted"
    if attempt.renamed_from is not None:
        reason = f"the directory was renamed from {attempt.renamed_from} while the run was under way; {reason}"
    write_status(attempt.run_dir, state, step=attempt.step, reason=reason, **_resumed_step_field(recorded, attempt))


def _resumed_step_field(status: dict[str, Any], attempt: Attempt) -> dict[str, int]:
    """The step that an earlier start had saved (`RESUMED_STEP_KEY`), for the end of one that has not trained; else empty."""
    saved_step = resumable_step(status)
    return {} if saved_step is None or attempt.step is not None else {RESUMED_STEP_KEY: saved_step}


def _record_failure(attempt: Attempt, rank: int, error: BaseException) -> None:
    """Write what made the run fail, on whichever rank, into `failure.json` and `status.json`; the first rank to write wins.

    The error of this rank may only be a consequence. If it lost its connection to another rank, the cause is the rank that sends
    no heartbeats any more. If a collective timed out, it is the rank that is behind the others.
    """
    if attempt.run_dir is None or read_failure(attempt.run_dir):
        return
    if LOST_PEER_REGEX.search(str(error)) and read_status(attempt.run_dir).get("state") == RunState.preempted:
        return  # a peer was asked to stop and has ended, and this rank lost the connection to it

    # Find the rank that caused the failure, if it is another one.
    cause: SilentRank | CutOffRank | LaggingRank | None = None
    if attempt.heartbeat_monitor is not None:
        cause = attempt.heartbeat_monitor.lost_peer_error(error)
    timed_out = not isinstance(error, ShardtuneError) and TIMEOUT_REGEX.search(str(error)) is not None
    last_collectives: dict[int, CollectiveCall] | None = None
    if timed_out and cause is None and attempt.heartbeat_monitor is not None:
        # All ranks send heartbeats: the cause is the rank whose last collective comes first in their common order.
        last_collectives = attempt.heartbeat_monitor.collect_last_collectives(None)
        cause = attempt.heartbeat_monitor.lagging_rank_error(error, last_collectives)

    # Record that rank with its phase and step, or else this rank.
    phase = attempt.phase
    step = attempt.step
    details: dict[str, Any] = {}
    if cause is not None:
        cause.__cause__ = error  # so that the record also says where this rank waited
        error = cause
        last_heartbeat = cause.heartbeat
        rank = last_heartbeat.rank
        phase = last_heartbeat.phase
        step = last_heartbeat.step
        details = {"host": last_heartbeat.host, "pid": last_heartbeat.pid, "gone": not cause.hung}
    if not record_failure(attempt.run_dir, rank, error, phase, step, **details) and read_failure(attempt.run_dir):
        return  # another rank was first
    # If there is no failure.json even so, the disk has no room for it: try the status.
    with contextlib.suppress(StorageError):  # it would hide what ended the run
        _write_failed_status(attempt.run_dir, rank, error, phase, step)
    # The record exists now, so collecting the state of every rank, which takes seconds, can only add to it.
    if timed_out and attempt.heartbeat_monitor is not None:
        if last_collectives is None:
            last_collectives = attempt.heartbeat_monitor.collect_last_collectives(cause.heartbeat if cause else None)
        details |= _hang_details(attempt.run_dir, error, last_collectives)
        record_failure(attempt.run_dir, rank, error, phase, step, replace=True, **details)


def _write_failed_status(run_dir: Path, rank: int, error: BaseException, phase: str, step: int | None) -> None:
    """Write into `status.json` that an error of `rank` ended the attempt, in this phase and step. Raises StorageError.

    - A preempted run that was started again, and refused for a wrong setting or wrong data before it trained, has lost nothing:
      it stays preempted at the step that it had saved, and the reason says why the start was refused.
    - In any other case the run has failed.
    """
    # Without a word of this start, if the rank met the error before rank 0 owned the directory.
    saved_step = resumable_step(read_status(run_dir))
    is_refusal = isinstance(error, ConfigError | DataError)
    if is_refusal and step is None and saved_step is not None:
        reason = f"the last start was refused ({phase}): {' '.join(str(error).split())}"
        write_status(run_dir, RunState.preempted, step=saved_step, reason=reason, refused=True)
        return
    summary = first_line_of_message(str(error)) or type(error).__name__
    write_status(run_dir, RunState.failed, step=step, reason=f"rank {rank}, {phase}: {summary}")


def _end_process_before_training(attempt: Attempt, signal_name: str) -> None:
    """End this process because its main thread, stuck before training, ignores a request to stop. Nothing is lost.

    Runs in a thread of its own. With several ranks, the exit code makes torchrun or srun end the others, whatever they wait in.
    `signal_name`: such as "SIGTERM".
    """
    run_dir = attempt.run_dir
    exit_code = Preempted.exit_code
    if signal_name == "SIGINT":
        exit_code = exit_codes.INTERRUPTED
    with contextlib.suppress(ShardtuneError, OSError):  # the directory is another attempt's, or the disk is full
        if attempt.lease is not None:
            attempt.lease.check()  # raises if it is another attempt's, so that nothing is written
        # torchrun also sends SIGTERM to the peers of a rank that failed. That rank's record stays the cause.
        if run_dir is not None and not read_failure(run_dir):
            resumed = _resumed_step_field(read_status(run_dir), attempt)
            write_status(run_dir, RunState.preempted, reason=f"{signal_name} during: {attempt.phase}", **resumed)
        if attempt.lease is not None:
            attempt.lease.release()
    if "SHARDTUNE_LAUNCHER" not in os.environ:  # a launcher prints this itself
        directory = "" if run_dir is None else f"{run_dir}: "
        text = f"{directory}stopped during {attempt.phase}, nothing is lost; run the same command to start again"
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, f"{text}\n".encode())
    end_process(exit_code)


class TimedOut(RuntimeError):
    """A collective under NCCL that other ranks did not join. NCCL's watchdog aborts the process, so nothing is raised."""

    retry = "node_fail"


def _record_timeout_before_nccl_aborts(attempt: Attempt, rank: int, collective: CollectiveCall) -> None:
    """Record that a collective timed out, shortly before NCCL's watchdog aborts the process without a word.

    `collective`: the one that `rank` waits in. Runs in a thread of its own. If phase or step change afterwards, the run continues
    after all, and the record is removed.
    """
    position = (attempt.phase, attempt.step)
    _record_failure(
        attempt,
        rank,
        TimedOut(f"timed out: {collective} is not over after {collective.waiting_s or 0:.0f} s (run.timeout_s)"),
    )
    while (attempt.phase, attempt.step) == position:
        time.sleep(1)
    if attempt.run_dir is not None:
        clear_failure(attempt.run_dir)


def _end_cut_off_process(attempt: Attempt, rank: int, error: CutOffRank) -> None:
    """Record that this rank has lost its connection to the ranks' store, and end it: its main thread may hang."""
    if attempt.run_dir is not None:
        record_failure(attempt.run_dir, rank, error, attempt.phase, attempt.step)
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{error}\n".encode())
    end_process(error.exit_code)


def first_line_of_message(text: str) -> str:
    """The first line of a message that is not blank, for a summary in `status.json`.

    A line that ends with a colon takes the next along. "no room\\nat step 3" -> "no room". "bad rows:\\na.jsonl:1\\nb.jsonl:2" ->
    "bad rows: a.jsonl:1".
    """
    sentence_lines = []
    for line in text.splitlines():
        line = line.strip()
        if not line:
            continue
        sentence_lines.append(line)
        if not line.endswith(":"):
            break
    return " ".join(sentence_lines)


def _hang_details(run_dir: Path, error: BaseException, last_collectives: dict[int, CollectiveCall]) -> dict[str, Any]:
    """Fields of `failure.json` for a hang: the last collective of each rank, and the files with the stacks of their threads.

    `last_collectives`: by rank. `message` of the result is the error with both added as lines. The file and its readers call a
    collective an exchange.
    """
    stack_files = []
    # A rank writes the stacks of its threads into its file when it is asked to; an empty file has none.
    for path in sorted((run_dir / "logs").glob("rank-*.stacks")):
        if path.stat().st_size:
            stack_files.append(str(path.relative_to(run_dir)))
    lines = [redact(str(error))]
    for rank, collective in sorted(last_collectives.items()):
        relation = "last exchange" if collective.is_complete else "waits in"
        lines.append(f"  rank {rank}: {relation} {collective}")
    if stack_files:
        more = " ..." if len(stack_files) > MAX_SHOWN_FILES else ""
        lines.append(f"  where the threads of ranks were: {', '.join(stack_files[:MAX_SHOWN_FILES])}{more}")
    return {
        "message": "\n".join(lines),
        "exchanges": {rank: str(collective) for rank, collective in last_collectives.items()},
        "stacks": stack_files,
    }


@contextlib.contextmanager
def _owning_run_dir(run_dir: Path | None, lease_timeout_s: int, stop_request: StopRequest) -> Iterator[Lease | None]:
    """A context in which this process owns the run directory, so that no other attempt writes there. Yields the lease.

    A loss or a rename of the directory asks `stop_request` to end the run. Without a directory (on ranks other than 0) it yields
    None. `lease_timeout_s`: seconds without heartbeats after which an owner counts as dead. Raises the errors of `Lease.acquire`.
    """
    if run_dir is None:
        yield None
        return
    with Lease.acquire(
        run_dir,
        lease_timeout_s,
        stop=lambda: stop_request.signal_name is not None,
        on_loss=lambda: stop_request.ask("the directory was taken over"),
        on_run_dir_renamed=lambda run_dir: stop_request.ask(f"the directory was renamed to {run_dir}"),
    ) as lease:
        yield lease
