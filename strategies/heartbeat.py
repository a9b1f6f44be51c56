"""Heartbeats of every rank, in the ranks' store: they tell which rank is the cause when others only lost a peer.

A rank that was stopped or killed can say nothing. The others see a broken connection, or a timeout of their own. So each rank
counts up in the store, together with its phase and step. A rank that fails because of a lost peer looks who has stopped counting.

After a timeout every rank writes the stacks of its threads, and says which collective it was in last. Living ranks do so when
they are asked through the store, or by themselves when a collective has lasted for most of the timeout. A stopped rank does so
when a peer on its host wakes it with SIGQUIT.

A launcher may give its ranks a directory (`HEARTBEAT_DIRECTORY_VARIABLE`). It then finds there the last heartbeat of each, also
of a killed one.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from strategies.bounded_store import BoundedStore, Unanswered
from strategies.errors import ShardtuneError
from strategies.flight_recorder import CollectiveCall, last_collective

LOST_PEER_REGEX = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed out|timeout|gloo|nccl|peer|has ended", re.IGNORECASE
)
"""Texts in the errors of a rank whose peer has died or hangs, from gloo, NCCL and sockets."""
AWAITED_PEER_REGEX = re.compile(r"waited \d+ s for its peer (\d+)")
"""How an error of `strategies/host_memory.py` names the rank that did not come."""
STACKS_KEY = "shardtune/stacks"
LAST_COLLECTIVE_KEY_FORMAT = "shardtune/exchange/{}"
HEARTBEAT_KEY_FORMAT = "shardtune/beat/{}"
WATCHED_BEATS_AFTER_TIMEOUT = 6
WATCHED_BEATS = 2.5
"""Heartbeats for which the other ranks are watched after a lost connection. If a process has ended, its launcher will end this
one in a few seconds; if one hangs, so that a timeout was met, there is more time to watch."""
HEARTBEAT_DIRECTORY_VARIABLE = "SHARDTUNE_LAST_WORDS"
"""Environment variable: a directory of this host, given by the launcher, in which each rank writes its last heartbeat."""
LATE_SHARE = 0.8
"""Share of the timeout after which a rank reports a collective that is not over: soon the backend may end the process."""
WARNING_BEATS = 15
"""Beats before the timeout at which a rank that waits under NCCL says why: NCCL then ends the process at once."""
ANSWER_BEATS = 5
"""Beats that a rank waits for the answers of the others. More than one, because a busy host delays them."""
ANSWER_S = 10.0
"""Seconds (or beats, if those are longer) for an answer of the ranks' store. After them its host counts as unreachable."""
CUT_OFF_S = 30.0
"""A rank that is cut off from the others ends this many seconds after the timeout, unless an error has ended it before."""
TIMEOUT_REGEX = re.compile(r"timed out|timeout", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """The last heartbeat of a rank; the defaults stand for a rank that has given none."""

    rank: int
    host: str = "?"
    pid: int = 0
    phase: str = "?"
    step: int | None = None
    count: int = -1


class RunPosition(NamedTuple):
    """Where a rank is in its run. A change of either shows that the rank makes progress."""

    phase: str
    """Such as `training`."""
    step: int | None
    """None outside training."""


class SilentRank(ShardtuneError):
    """A rank has stopped counting: its process has ended, or was stopped, while the others waited for it."""

    retry = "node_fail"
    is_user_error = False
    recorded_name = "Silent"

    def __init__(self, heartbeat: Heartbeat, *, hung: bool, since_s: float, error_line: str) -> None:
        self.heartbeat = heartbeat
        self.hung = hung
        if hung:
            finding = f"sends no heartbeat (none for {since_s:.0f} s): it was stopped, or hangs"
        else:
            finding = (
                "has ended and recorded no error of its own: it was probably killed (out of memory, or kill -9); look for a kill "
                f"in the kernel log of {heartbeat.host} (dmesg -T), at the memory limit of the job, and at the last lines of "
                f"logs/rank-{heartbeat.rank}.log"
            )
        super().__init__(f"{_rank_description(heartbeat)} {finding}; the error of a peer: {error_line}")


class LaggingRank(ShardtuneError):
    """A rank is alive, but does not come to the collective in which the others wait for it."""

    retry = "node_fail"
    is_user_error = False
    recorded_name = "Behind"

    def __init__(
        self, heartbeat: Heartbeat, last_collective: CollectiveCall | None, awaited_text: str, error_line: str
    ) -> None:
        """The error that ends a job in which one rank does not come to a collective.

        `heartbeat`: the last one of the rank that lags. `last_collective`: the last one that it joined; None if not known.
        `awaited_text`: in words, the collective in which others wait. `error_line`: the first line of the error of one of them.
        """
        self.heartbeat = heartbeat
        self.hung = True
        super().__init__(
            f"{_rank_description(heartbeat)} lives and does not come to {awaited_text}, where others wait for it; its last "
            f"exchange was {last_collective or 'none'}; the error of a peer: {error_line}"
        )


class CutOffRank(ShardtuneError):
    """The host that has the ranks' store cannot be reached: the link to it is down, or that host hangs."""

    retry = "node_fail"
    is_user_error = False
    recorded_name = "CutOff"

    def __init__(self, heartbeat: Heartbeat, *, since_s: float, error_line: str) -> None:
        """`heartbeat`: this rank. `error_line`: the first line of the error that it met."""
        self.heartbeat = heartbeat
        self.hung = True
        super().__init__(
            f"rank {heartbeat.rank} on {heartbeat.host} is cut off: {store_address()}, where the ranks meet, has not answered "
            f"for {since_s:.0f} s; look at the link between the hosts and at that host; the error of this rank: {error_line}"
        )


def _rank_description(heartbeat: Heartbeat) -> str:
    step = "" if heartbeat.step is None else f", step {heartbeat.step}"
    return f"rank {heartbeat.rank} (process {heartbeat.pid} on {heartbeat.host}; {heartbeat.phase}{step})"


class HeartbeatMonitor:
    """Sends this rank's heartbeats in a thread, and looks at those of the other ranks. Nothing here is collective."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        position: Callable[[], tuple[str, int | None]],
        timeout_s: float = float("inf"),
    ) -> None:
        """Start the thread that sends this rank's heartbeats into the ranks' store.

        `store`: torch's store of the job. `position`: returns the phase and step of this rank now, such as ("training", 40); a
        change is progress. `timeout_s`: the timeout of the collectives.
        """
        self.rank = rank
        self.world_size = world_size
        self._position = position
        self._timeout_s = timeout_s
        self._last_position = RunPosition(*position())
        self._last_progress_at = time.monotonic()
        # The more ranks there are, the more the store has to answer: fewer beats each.
        self.interval_s = max(1.0, world_size / 200)
        self._store = BoundedStore(store, max(ANSWER_S, ANSWER_S * self.interval_s))
        self._reported_unanswered = False
        self._stack_dump_file: IO[str] | None = None
        self._report_lock = threading.Lock()
        self.on_collective_timeout: Callable[[CollectiveCall], None] | None = None
        """Called once, in a thread of its own, with the collective for which NCCL is about to end this process."""
        self.on_cut_off: Callable[[CutOffRank], None] | None = None
        """Must end this process. Called if it is cut off from the others, and no error of a collective has ended it."""
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def write_stacks_to(self, path: Path) -> None:
        """Set the file for the stacks of this rank's threads; on SIGQUIT the stack of its main thread goes there too.

        Must be called in the main thread.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stack_dump_file = path.open("a", encoding="utf-8")
        # Only the main thread: the handler does not hold the interpreter's lock. Frames of another thread would change while it
        # reads them, and the process would crash.
        faulthandler.register(signal.SIGQUIT, file=self._stack_dump_file, all_threads=False)

    def ranks_without_heartbeat(self, wait_s: float) -> list[Heartbeat]:
        """Find the other ranks that were stopped or have ended: those that send no heartbeat for `wait_s` seconds.

        Waits that long, and returns their last heartbeats. A heartbeat has a count, which each rank's thread raises in the ranks'
        store every `interval_s` seconds. Raises RuntimeError if the store has ended.
        """
        heartbeats_before = self._last_heartbeats()
        time.sleep(wait_s)
        silent_ranks = []
        for before, after in zip(heartbeats_before, self._last_heartbeats(), strict=True):
            if after.count == before.count and after.rank != self.rank:
                silent_ranks.append(after)
        return silent_ranks

    def lost_peer_error(self, error: BaseException) -> SilentRank | CutOffRank | None:
        """Find the rank that is to blame for `error`, by which this rank lost its connection to a peer, and say so in an error.

        Any peer of a dead rank may fail first, so the error itself does not tell. Watches the heartbeats of all ranks for a few
        seconds. Returns

        - None if `error` is not about a lost peer, if all ranks are alive, or if the store has ended too;
        - a CutOffRank, which names this rank, if this rank cannot reach the store;
        - a SilentRank for the first rank that sends no heartbeats any more.
        """
        error_line = _first_line(error)
        if isinstance(error, ShardtuneError) or not LOST_PEER_REGEX.search(str(error)):
            return None
        timed_out = TIMEOUT_REGEX.search(str(error)) is not None
        wait_s = (WATCHED_BEATS_AFTER_TIMEOUT if timed_out else WATCHED_BEATS) * self.interval_s
        try:
            silent_ranks = self.ranks_without_heartbeat(wait_s)
        except Unanswered:
            return self._cut_off_error(error_line)
        except RuntimeError:  # the store is gone with the process that had it
            return None
        if not silent_ranks:
            return None
        return SilentRank(silent_ranks[0], hung=timed_out, since_s=wait_s, error_line=error_line)

    def collect_last_collectives(self, silent_rank: Heartbeat | None) -> dict[int, CollectiveCall]:
        """Collect evidence after a timeout: every rank writes the stacks of its threads, and reports its last collective.

        Returns the last collective by rank, of the ranks that answer within `ANSWER_BEATS`; mostly all do within one beat.
        `silent_rank`: a rank that sends no heartbeats. If it is on this host, it is woken by signals. Raises nothing; empty if
        the store, through which the ranks are asked, has ended.
        """
        with contextlib.suppress(RuntimeError):
            self._store.set(STACKS_KEY, "1")  # asks every rank, whose heartbeat thread looks for the key
        if silent_rank is not None and silent_rank.host == socket.gethostname() and silent_rank.pid:
            _wake_to_dump_stack(silent_rank.pid)
        keys = {rank: LAST_COLLECTIVE_KEY_FORMAT.format(rank) for rank in range(self.world_size)}
        deadline = time.monotonic() + ANSWER_BEATS * self.interval_s
        try:
            self._dump_stacks_and_last_collective()  # this rank's own, without waiting for its next heartbeat
            while not self._store.check([*keys.values()]) and time.monotonic() < deadline:
                time.sleep(self.interval_s / 4)
            last_collectives = {}
            for rank, key in keys.items():
                if self._store.check([key]):
                    last_collectives[rank] = CollectiveCall(**json.loads(self._store.get(key)))
            return last_collectives
        except RuntimeError:
            return {}

    def lagging_rank_error(
        self, error: BaseException, last_collectives: dict[int, CollectiveCall]
    ) -> LaggingRank | None:
        """Find the living rank that did not join the collective in which this rank failed; returns the error that names it.

        `error`: what this rank failed with; one of a collective through shared memory names the rank. `last_collectives`: for
        others, the last collective of each rank, from `collect_last_collectives`: it is the first rank, by number, that is behind
        and does not wait itself. None if no rank lags, or if the store has ended.
        """
        lagging_rank = self._rank_named_in(error)
        awaited_text = "an exchange through shared memory"
        if lagging_rank is None:
            own_collective = last_collectives.get(self.rank)
            if own_collective is None:
                return None
            lagging_ranks = self._lagging_ranks(own_collective, last_collectives)
            if not lagging_ranks:
                return None
            lagging_rank = lagging_ranks[0]  # the message has room for one, and the others may wait for it
            awaited_text = str(own_collective)
        try:
            heartbeat = self._last_heartbeats()[lagging_rank]
        except RuntimeError:  # the store has ended with its process
            return None
        return LaggingRank(heartbeat, last_collectives.get(lagging_rank), awaited_text, _first_line(error))

    def _rank_named_in(self, error: BaseException) -> int | None:
        """The rank that the `error` of a collective through shared memory names as missing; None if it names none."""
        match = AWAITED_PEER_REGEX.search(str(error))
        if match is None or int(match[1]) >= self.world_size:
            return None
        return int(match[1])

    def _lagging_ranks(self, own_collective: CollectiveCall, last_collectives: dict[int, CollectiveCall]) -> list[int]:
        """Find the ranks for which this one waits: they have not joined its collective, and wait in none themselves.

        `own_collective`: the one in which this rank waits. `last_collectives`: the last one of each rank. Within one numbering
        (group and backend), a collective has the same number on every rank, so a rank whose last number is lower has not joined.
        """
        lagging_ranks = []
        for rank, collective in last_collectives.items():
            is_same_numbering = collective.numbering == own_collective.numbering
            has_joined = is_same_numbering and collective.number >= own_collective.number
            if rank != self.rank and not collective.is_waiting and not has_joined:
                lagging_ranks.append(rank)
        return lagging_ranks

    def _last_heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of every rank, in rank order. Raises RuntimeError if the store has ended."""
        last_heartbeats = []
        for rank in range(self.world_size):
            key = HEARTBEAT_KEY_FORMAT.format(rank)
            heartbeat = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            last_heartbeats.append(Heartbeat(rank=rank, **heartbeat))
        return last_heartbeats

    def _send_heartbeats(self) -> None:
        """Send a heartbeat every `interval_s` seconds, by which other ranks know that this one lives. The body of a thread.

        Between them, it dumps stacks if a collective takes too long or another rank asks, and ends the process if it is cut off.
        Returns when the store has ended.
        """
        heartbeat: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "count": 0}
        while True:
            position = RunPosition(*self._position())
            heartbeat |= {"phase": position.phase, "step": position.step, "count": heartbeat["count"] + 1}
            self._write_for_launcher(heartbeat)
            try:
                self._store.set(HEARTBEAT_KEY_FORMAT.format(self.rank), json.dumps(heartbeat))
                self._report_answer_after_silence()
                self._report_late_collective(position)
            except Unanswered:
                self._report_unanswered_once()
                self._end_if_stalled(position)
            except RuntimeError:  # the store is gone, and with it the job
                return
            time.sleep(self.interval_s)

    def _report_late_collective(self, position: RunPosition) -> None:
        """Dump the stacks of all threads, as evidence, if a collective of this rank takes too long, or another rank asks for it.

        That happens once. Shortly before NCCL aborts the process, it also calls `on_collective_timeout`. `position`: phase and
        step of this rank. Raises RuntimeError if the store has ended, Unanswered if it does not answer.
        """
        late_collective = self._late_collective(position)
        if self._stack_dump_file is not None and (late_collective is not None or self._store.check([STACKS_KEY])):
            self._dump_stacks_and_last_collective()
        self._warn_before_abort(late_collective)

    def _cut_off_error(self, error_line: str) -> CutOffRank:
        """The error of this rank if it cannot reach the store, with its own phase and step. `error_line`: what it met."""
        phase, step = self._position()
        heartbeat = Heartbeat(rank=self.rank, host=socket.gethostname(), pid=os.getpid(), phase=phase, step=step)
        return CutOffRank(heartbeat, since_s=self._store.unanswered_s(), error_line=error_line)

    def _report_unanswered_once(self) -> None:
        """Print that the ranks' store does not answer: once, until it has answered again."""
        if self._reported_unanswered:
            return
        self._reported_unanswered = True
        _print_error(
            f"rank {self.rank} on {socket.gethostname()}: {store_address()}, where the ranks meet, has not answered for "
            f"{self._store.unanswered_s():.0f} s: the link is down, or that host hangs; this rank ends after "
            f"{self._timeout_s:.0f} s without progress (run.timeout_s)"
        )

    def _end_if_stalled(self, position: RunPosition) -> None:
        """End the process if it is cut off: the store was silent, and this rank stood still, for longer than the timeout.

        `position`: phase and step of this rank; a change of them is progress, so that it is not ended.
        """
        self._record_progress(position)
        standstill_s = min(time.monotonic() - self._last_progress_at, self._store.unanswered_s())
        if standstill_s > self._timeout_s + CUT_OFF_S and self.on_cut_off is not None:
            self.on_cut_off(self._cut_off_error("no error"))

    def _report_answer_after_silence(self) -> None:
        """Print that the store answers again, if it was reported that it does not."""
        if self._reported_unanswered:
            self._reported_unanswered = False
            _print_error(f"rank {self.rank} on {socket.gethostname()}: {store_address()} answers again")

    def _dump_stacks_and_last_collective(self) -> None:
        """Write where this rank hangs into its stack file, the stacks of its threads and its last collective, for the user.

        Also puts the collective into the store, for the rank that looks for the cause. Only the first call does so; later ones do
        nothing. Raises RuntimeError if the store has ended.
        """
        with self._report_lock:
            stack_dump_file = self._stack_dump_file
            if stack_dump_file is None:
                return
            self._stack_dump_file = None
            faulthandler.dump_traceback(stack_dump_file, all_threads=True)
            collective = last_collective()
            if collective is not None:
                self._store.set(LAST_COLLECTIVE_KEY_FORMAT.format(self.rank), json.dumps(asdict(collective)))
                completion = "over" if collective.is_complete else "not over"
                with contextlib.suppress(OSError):  # a full disk must not end this thread, or the rank would seem dead
                    print(f"\nlast exchange: {collective}, {completion}", file=stack_dump_file, flush=True)

    def _late_collective(self, position: RunPosition) -> CollectiveCall | None:
        """The collective in which this rank has waited, without progress, for most of the timeout; None if there is none.

        `position`: phase and step of this rank now. A change since the last call is progress, which is noted.
        """
        late_s = LATE_SHARE * self._timeout_s
        self._record_progress(position)
        if time.monotonic() - self._last_progress_at < late_s:
            return None
        collective = last_collective()
        # A complete one, in which this rank does not wait, has no `waiting_s`.
        if collective is None or collective.waiting_s is None or collective.waiting_s <= late_s:
            return None
        return collective

    def _record_progress(self, position: RunPosition) -> None:
        """Note the time at which the phase or step of this rank last changed."""
        if position != self._last_position:
            self._last_position = position
            self._last_progress_at = time.monotonic()

    def _warn_before_abort(self, late_collective: CollectiveCall | None) -> None:
        """Call `on_collective_timeout`, once, shortly before NCCL aborts this process because `late_collective` takes too long.

        After the abort the process could say nothing. gloo does not abort: it raises an error in the thread that waits.
        `late_collective`: None if none takes too long.
        """
        handler = self.on_collective_timeout
        if late_collective is None or handler is None or not late_collective.operation.startswith("nccl"):
            return
        abort_warning_s = self._timeout_s - WARNING_BEATS * self.interval_s
        is_about_to_abort = (late_collective.waiting_s or 0.0) > abort_warning_s
        if is_about_to_abort:
            self.on_collective_timeout = None
            # In another thread, because it may take long: without heartbeats this rank would itself seem stopped.
            threading.Thread(target=handler, args=(late_collective,), name="timeout", daemon=True).start()

    def _write_for_launcher(self, heartbeat: dict[str, Any]) -> None:
        """Write the heartbeat into the launcher's directory, if it has given one; it reads there where a rank was that ended."""
        directory = os.environ.get(HEARTBEAT_DIRECTORY_VARIABLE)
        if directory is None:
            return
        with contextlib.suppress(OSError):
            temporary = Path(directory) / f".{self.rank}"
            temporary.write_text(json.dumps(heartbeat), encoding="utf-8")
            temporary.replace(Path(directory) / str(self.rank))


def store_address() -> str:
    """Address and port of the ranks' store, from the environment."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal is closed
        print(text, file=sys.stderr, flush=True)


def _wake_to_dump_stack(pid: int) -> None:
    """Let a stopped process of this host write the stack of its main thread, and run on. Raises nothing."""
    # A stopped process handles signals only when SIGCONT wakes it. SIGQUIT, sent before, then writes its stack, which is still
    # the one at which it was stopped.
    with contextlib.suppress(OSError):
        _signal_main_thread(pid, signal.SIGQUIT)
        os.kill(pid, signal.SIGCONT)


def _signal_main_thread(pid: int, number: int) -> None:
    """Send a signal to the main thread. A signal to the whole process may go to any thread that wakes first."""
    send = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc before 2.30 has none
    os.kill(pid, number) if send is None else send(pid, pid, number)


def read_last_heartbeat(directory: Path, rank: int) -> Heartbeat | None:
    """The last heartbeat of a rank of this host, for the launcher that gave it the directory; None if there is none."""
    try:
        return Heartbeat(rank=rank, **json.loads((directory / str(rank)).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
