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

from strategies import runtime as processes
from strategies.compat.python import end_process
from strategies.errors import ConfigError, NotOurs, Preempted, ShardtuneError, StorageError, is_panic, tokenizer_panic
from strategies.flight_recorder import Exchange
from strategies.heartbeat import LOST_PEER, TIMED_OUT, CutOffRank, Heartbeats, LaggingRank, SilentRank
from strategies.redaction import redacted
from strategies.rendezvous import Meeting
from strategies.runtime import Runtime, broadcast_object
from trainer.reporting.status import (
    FROZEN,
    State,
    clear_failure,
    read_failure,
    read_status,
    record_failure,
    write_status,
)
from trainer.session.lease import Lease, LeaseLost
from trainer.stopping.signals import StopRequest

SHOWN = 8
"""Files that are named in a message."""


@dataclass(slots=True)
class Where:
    """How far the run is, for the record of a failure."""

    phase: str = "data preparation"
    step: int | None = None
    note: str | None = None
    """What is wrong with a run that goes on or is done, for `status.json`: findings of the detectors."""
    run_dir: Path | None = None
    lease: Lease | None = None
    """Rank 0's."""
    heartbeats: Heartbeats | None = None
    """Signs of life of the ranks, where there are several and they have met."""
    renamed_from: Path | None = None
    """Where the directory was before somebody renamed it while the run was under way."""
    on_move: list[Callable[[Path], None]] = field(default_factory=list)
    """Told the new path of the directory after it was renamed."""
    at_timeout: Callable[[Exchange], None] | None = None
    """Told of an exchange for which NCCL is about to end this process."""
    when_cut_off: Callable[[CutOffRank], None] | None = None
    """Ends this process, which is cut off from the host of the ranks' store."""

    @contextlib.contextmanager
    def meet(self, timeout_s: float) -> Iterator[Meeting]:
        """Until there is a process group: this rank is heard of through the ranks' store, and hears of the others.

        All ranks must call, within `timeout_s`. Where they stop (Preempted) since rank 0 lost the directory, all raise LeaseLost.
        """
        meeting = Meeting.join(timeout_s, self.lost)
        if meeting.store is not None:
            self.heartbeats = Heartbeats(
                meeting.store, meeting.rank, meeting.world, lambda: (self.phase, self.step), timeout_s
            )
            self.heartbeats.at_timeout = self.at_timeout
            self.heartbeats.when_cut_off = self.when_cut_off
        try:
            yield meeting
        except Preempted as stop:
            if (lost := meeting.leave()) is not None:
                raise LeaseLost(lost) from stop
            raise

    def at_step(self, step: int) -> None:
        """Note the step that is being taken."""
        self.step = step

    def settle(self, run_dir: Path, rank: int) -> Path:
        """The directory of the run, now that this rank knows it; stacks of its threads go there when they are asked for."""
        self.run_dir = run_dir
        if self.heartbeats is not None:
            self.heartbeats.write_stacks_to(run_dir / "logs" / f"rank-{rank}.stacks")
        return run_dir

    def lost(self) -> str | None:
        """Why the directory is no longer this attempt's; None where it is, and on all ranks but 0."""
        if self.lease is not None:
            try:
                self.lease.check()
            except LeaseLost as caught:
                return str(caught)
        return None

    def still_ours(self, runtime: Runtime) -> None:
        """Before anything is published: follow a directory that was renamed; all ranks must call.

        Raises LeaseLost on every rank where another attempt owns the directory, or it was deleted.
        """
        lost = self.lost()
        home = None if lost is not None or self.lease is None else self.lease.home
        lost, home = broadcast_object((lost, home), runtime)
        if lost is not None:
            raise LeaseLost(lost)
        if home is not None:
            self.move(home)

    def move(self, home: Path) -> None:
        """Note that the directory of the run is `home`. No collective."""
        if self.run_dir is None or home == self.run_dir:
            return
        self.renamed_from = self.renamed_from or self.run_dir
        self.run_dir = home
        for tell in self.on_move:
            tell(home)


def refuse_replaced(run_dir: Path, sha256: str) -> None:
    """For the owner of the directory: raise ConfigError where the configuration frozen there is not that of this attempt.

    Two starts in the same moment may both freeze theirs before either owns the directory.
    """
    try:
        frozen = FROZEN.search((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return  # nothing was frozen there
    if frozen is not None and frozen[1] != sha256:
        raise ConfigError(
            f"run.dir={run_dir}: another start has frozen another configuration there meanwhile; start one of the two again, "
            "or give each a run.dir of its own"
        )


@contextlib.contextmanager
def rank_of_job(run_dir: Path | None, lease_s: int) -> Iterator[tuple[StopRequest, Where]]:
    """This process as one rank of the job that its environment describes, from before the first record to after the last.

    Signals become a request to stop, the directory is owned and told how it ended (`attempt`), and the groups of processes end
    with it: in order, or at once where this rank failed. Raises what ended it.
    """
    failed = False
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # a terminal's Ctrl-C goes to the launcher of several
    with StopRequest(interrupts=alone) as request:  # over when everything is written down
        try:
            with attempt(run_dir, lease_s, request) as where:
                yield request, where
        except Preempted as stop:
            stop.signal_name = request.signal_name
            raise
        except BaseException:
            failed = True
            raise
        finally:
            processes.stop(failed=failed)


@contextlib.contextmanager
def attempt(run_dir: Path | None, lease_s: int, request: StopRequest) -> Iterator[Where]:
    """The life of this rank's attempt; `run_dir` is needed on rank 0 only, which owns it from here to the end.

    The first failing rank leaves `failure.json`, which a success and the next attempt remove; rank 0 keeps `status.json`. Nothing
    is written into a directory that is another attempt's. Raises what ended the run, InUse where it could not begin.
    """
    where = Where(run_dir=run_dir)
    rank = int(os.environ.get("RANK", 0))
    # Each host's first rank tells its own launcher; where the disk is shared, that is one directory and rank 0's word.
    tells = run_dir is not None and int(os.environ.get("LOCAL_RANK", 0)) == 0
    with _owned(run_dir if rank == 0 else None, lease_s, request) as where.lease:
        try:
            if where.lease is not None and run_dir is not None:
                clear_failure(run_dir)
                write_status(run_dir, State.running, reason="starting")
            where.at_timeout = partial(_before_nccl_aborts, where, rank)
            where.when_cut_off = partial(_end_cut_off, where, rank)
            request.leave_when_stuck(partial(_leave, where))
            yield where
            if tells and where.run_dir is not None:
                write_status(where.run_dir, State.done, step=where.step, reason=where.note)
                clear_failure(where.run_dir)
        except NotOurs:
            raise
        except BaseException as caught:
            error: BaseException = caught
            if is_panic(caught):  # no Exception: nobody further out would take it for an error
                error = tokenizer_panic(caught, "a tokenizer of this run")
            request.must_save()  # this thread writes down how it ended
            if where.lease is not None:
                where.lease.check()
                where.move(where.lease.home)
            if isinstance(error, Preempted | KeyboardInterrupt):
                if tells and where.run_dir is not None:
                    state = State.preempted if isinstance(error, Preempted) else State.failed
                    reason = str(error) or "interrupted"
                    if where.renamed_from is not None:
                        reason = (
                            f"the directory was renamed from {where.renamed_from} while the run was under way; {reason}"
                        )
                    write_status(where.run_dir, state, step=where.step, reason=reason)
            else:
                _record(where, rank, error)
            if error is caught:
                raise
            raise error from caught


def _record(where: Where, rank: int, error: BaseException) -> None:
    """The first cause into `failure.json` and `status.json`: the silent rank, where this one only lost its peer."""
    if where.run_dir is None or read_failure(where.run_dir):
        return
    if LOST_PEER.search(str(error)) and read_status(where.run_dir).get("state") == State.preempted:
        return  # a peer was asked to stop and has ended, which this rank met as a lost connection
    cause: SilentRank | CutOffRank | LaggingRank | None = (
        None if where.heartbeats is None else where.heartbeats.cause(error)
    )
    waited = not isinstance(error, ShardtuneError) and TIMED_OUT.search(str(error)) is not None
    exchanges: dict[int, Exchange] | None = None
    if waited and cause is None and where.heartbeats is not None:  # all give signs of life
        exchanges = where.heartbeats.collect_exchanges(None)
        cause = where.heartbeats.lagging_rank(error, exchanges)
    phase, step = where.phase, where.step
    about: dict[str, Any] = {}
    if cause is not None:
        cause.__cause__ = error  # so that the record has where this rank waited
        seen, error = cause.sign, cause
        rank, phase, step = seen.rank, seen.phase, seen.step
        about = {"host": seen.host, "pid": seen.pid, "gone": not cause.hung}
    if not record_failure(where.run_dir, rank, error, phase, step, **about) and read_failure(where.run_dir):
        return  # another rank was first; else the disk has no room for it
    first = first_sentence(str(error)) or type(error).__name__
    with contextlib.suppress(StorageError):  # which would hide what ended the run
        write_status(where.run_dir, State.failed, step=step, reason=f"rank {rank}, {phase}: {first}")
    if waited and where.heartbeats is not None:
        if exchanges is None:
            exchanges = where.heartbeats.collect_exchanges(cause.sign if cause else None)
        about |= _where_all_were(where.run_dir, error, exchanges)
        record_failure(where.run_dir, rank, error, phase, step, replace=True, **about)


def _leave(where: Where, signal_name: str) -> None:
    """End this process, whose main thread does not look at a request to stop before training. Nothing is lost by it.

    Several ranks: the exit code makes torchrun or srun end the others, whatever they wait in. In a thread of its own.
    """
    run_dir = where.run_dir
    code = Preempted.exit_code
    if signal_name == "SIGINT":
        code = 130
    with contextlib.suppress(ShardtuneError, OSError):  # a directory that is not ours any more, or a full disk
        if where.lease is not None:
            where.lease.check()
        # torchrun sends TERM as well, to the peers of a rank that failed: that rank's record stays the cause.
        if run_dir is not None and not read_failure(run_dir):
            write_status(run_dir, State.preempted, reason=f"{signal_name} during: {where.phase}")
        if where.lease is not None:
            where.lease.release()
    if "SHARDTUNE_LAUNCHER" not in os.environ:  # else the launcher says it
        place = "" if run_dir is None else f"{run_dir}: "
        text = f"{place}stopped during {where.phase}, nothing lost; the same command begins again"
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, f"{text}\n".encode())
    end_process(code)


class TimedOut(RuntimeError):
    """An exchange that others did not come to, under NCCL: its watchdog aborts the process, which raises nothing."""

    retry = "node_fail"


def _before_nccl_aborts(where: Where, rank: int, waited: Exchange) -> None:
    """Record the exchange as the failure, and forget it again where the run goes on after all. In a thread of its own."""
    here = where.phase, where.step
    _record(where, rank, TimedOut(f"timed out: {waited} is not over after {waited.waits_s or 0:.0f} s (run.timeout_s)"))
    while (where.phase, where.step) == here:
        time.sleep(1)
    if where.run_dir is not None:
        clear_failure(where.run_dir)


def _end_cut_off(where: Where, rank: int, error: CutOffRank) -> None:
    """Record that this rank is cut off, and end its process, whose main thread may wait for a library without a limit."""
    if where.run_dir is not None:
        record_failure(where.run_dir, rank, error, where.phase, where.step)
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{error}\n".encode())
    end_process(error.exit_code)


def first_sentence(text: str) -> str:
    """The first line of a message, with what it announces by a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ends = next((n for n, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:ends])


def _where_all_were(run_dir: Path, error: BaseException, exchanges: dict[int, Exchange]) -> dict[str, Any]:
    """What `failure.json` has of a hang beside its cause: the last exchange of each rank, the files of their stacks."""
    logs = run_dir / "logs"
    stacks = [str(path.relative_to(run_dir)) for path in sorted(logs.glob("rank-*.stacks")) if path.stat().st_size]
    said = [
        f"rank {rank}: {'last exchange' if last.waits_s is None else 'waits in'} {last}"
        for rank, last in sorted(exchanges.items())
    ]
    if stacks:
        said.append(f"where the threads of ranks were: {', '.join(stacks[:SHOWN])}{' ...' * (len(stacks) > SHOWN)}")
    message = "\n".join([redacted(str(error)), *(f"  {line}" for line in said)])
    return {"message": message, "exchanges": {rank: str(last) for rank, last in exchanges.items()}, "stacks": stacks}


@contextlib.contextmanager
def _owned(run_dir: Path | None, lease_s: int, request: StopRequest) -> Iterator[Lease | None]:
    if run_dir is None:
        yield None
        return
    with Lease.acquire(
        run_dir,
        lease_s,
        stop=lambda: request.signal_name is not None,
        on_loss=lambda: request.ask("the directory was taken over"),
        on_move=lambda home: request.ask(f"the directory was renamed to {home}"),
    ) as lease:
        yield lease
