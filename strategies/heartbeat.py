"""Signs of life of every rank, in the store of the group: who is silent is the cause where its peers only lost it.

A rank that was stopped or killed can say nothing, and the others see a broken connection or a timeout of their own. Each rank
therefore counts in the store, with its phase and step; whoever fails for a lost peer looks who does not count on. After a timeout
every rank writes down where its threads are, and says which exchange it was in last: those that live when the store asks, or by
themselves when an exchange has lasted for most of the timeout, a stopped one when a peer on its host wakes it with SIGQUIT.
A launcher that gives its ranks a directory (`LAST_WORDS`) finds in it what each said last, also of one that was killed.
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
from typing import IO, Any

from strategies.bounded_store import BoundedStore, Unanswered
from strategies.errors import ShardtuneError
from strategies.flight_recorder import Exchange, last_exchange

LOST_PEER = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed out|timeout|gloo|nccl|peer|has ended", re.IGNORECASE
)
"""What the backends say in a rank whose peer has died or hangs."""
AWAITED_PEER = re.compile(r"waited \d+ s for its peer (\d+)")
"""How the exchange through shared memory (`strategies/host_memory.py`) says who did not come."""
STACKS_KEY = "shardtune/stacks"
LAST_WORDS = "SHARDTUNE_LAST_WORDS"
"""The variable that names a directory of this host, in which each rank keeps what it last said of itself."""
LATE_SHARE = 0.8
"""Share of the timeout after which a rank tells of an exchange that is not over, before the backend may end the process."""
WARNING_BEATS = 15
"""Beats before the timeout at which a rank that waits under NCCL says why: what NCCL then does to it, nobody can catch."""
ANSWER_BEATS = 5
"""Beats for which ranks that were asked where they are may keep the one that asks waiting; a busy host lets them wait, too."""
ANSWER_S = 10.0
"""Seconds, or beats if those are longer, that the ranks' store may take for an answer before its host counts as unreachable."""
CUT_OFF_S = 30.0
"""Seconds beyond the timeout after which a rank ends that is cut off from the others and has not ended by an error."""
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class SignOfLife:
    """What a rank last said of itself."""

    rank: int
    host: str = "?"
    pid: int = 0
    phase: str = "?"
    step: int | None = None
    count: int = -1


class SilentRank(ShardtuneError):
    """A rank that does not count on: gone, or stopped while the others waited for it."""

    retry = "node_fail"

    def __init__(self, sign: SignOfLife, *, hung: bool, since_s: float, error_line: str) -> None:
        self.sign, self.hung = sign, hung
        at = f", step {sign.step}" if sign.step is not None else ""
        what = (
            "is there no more"
            if not hung
            else f"gives no sign of life (none for {since_s:.0f} s): it was stopped, or hangs"
        )
        super().__init__(
            f"rank {sign.rank} (process {sign.pid} on {sign.host}; {sign.phase}{at}) {what}; a peer was told: {error_line}"
        )


class LaggingRank(ShardtuneError):
    """A rank that lives, and does not come to the exchange in which the others wait for it."""

    retry = "node_fail"

    def __init__(self, sign: SignOfLife, last: Exchange | None, awaited: Exchange | str, error_line: str) -> None:
        self.sign, self.hung = sign, True
        at = f", step {sign.step}" if sign.step is not None else ""
        super().__init__(
            f"rank {sign.rank} (process {sign.pid} on {sign.host}; {sign.phase}{at}) lives and does not come to {awaited}, where "
            f"others wait for it; its last was {last or 'none'}; a peer was told: {error_line}"
        )


class CutOffRank(ShardtuneError):
    """The host that has the ranks' store cannot be reached: the link to it is down, or that host hangs."""

    retry = "node_fail"

    def __init__(self, sign: SignOfLife, *, since_s: float, error_line: str) -> None:
        """`sign`: this rank. `error_line`: the first line of the error that it met."""
        self.sign, self.hung = sign, True
        super().__init__(
            f"rank {sign.rank} on {sign.host} is cut off: {store_place()}, where the ranks meet, has not answered for "
            f"{since_s:.0f} s; look at the link between the hosts and at that host; this rank met: {error_line}"
        )


class Heartbeats:
    """This rank's signs of life, and a look at those of the others. Nothing here is collective."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        state: Callable[[], tuple[str, int | None]],
        timeout_s: float = float("inf"),
    ) -> None:
        """`timeout_s` is that of the exchanges."""
        self.rank, self.world, self._state, self._timeout_s = rank, world, state, timeout_s
        self._last_state, self._last_change = state(), time.monotonic()
        self.every_s = max(1.0, world / 200)
        self._store = BoundedStore(store, max(ANSWER_S, ANSWER_S * self.every_s))
        self._reported_unanswered = False
        self._stacks: IO[str] | None = None
        self._report_lock = threading.Lock()
        self.at_timeout: Callable[[Exchange], None] | None = None
        """Told once, in a thread of its own, of an exchange for which NCCL is about to end this process."""
        self.when_cut_off: Callable[[CutOffRank], None] | None = None
        """Ends this process, which is cut off from the others and did not end by the error of an exchange."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def write_stacks_to(self, path: Path) -> None:
        """Where this rank writes its threads' stacks when it is asked to, and its main one when it is sent SIGQUIT.

        In the main thread.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("a", encoding="utf-8")
        # A handler does not hold the lock of the interpreter: another thread's frames change while it reads them, and it dies.
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=False)

    def silent_ranks(self, look_s: float) -> list[SignOfLife]:
        """Ranks that do not count on in `look_s`, while this one looks."""
        signs_before = self._signs_of_life()
        time.sleep(look_s)
        signs_after = self._signs_of_life()
        return [
            sign
            for sign, earlier in zip(signs_after, signs_before, strict=True)
            if sign.count == earlier.count and sign.rank != self.rank
        ]

    def cause(self, error: BaseException) -> SilentRank | CutOffRank | None:
        """What is behind an error that says no more than that a peer was lost: a silent rank, or the link; else None.

        Takes a few seconds where it looks.
        """
        error_line = _first_line(error)
        if isinstance(error, ShardtuneError) or not LOST_PEER.search(str(error)):
            return None
        timed_out = TIMED_OUT.search(str(error)) is not None
        # Where a process is gone, its launcher ends this one in a few seconds; where one hangs there is time to be sure.
        look_s = (6 if timed_out else 2.5) * self.every_s
        try:
            silent = self.silent_ranks(look_s)
        except Unanswered:
            return self._cut_off(error_line)
        except RuntimeError:  # the store is gone with the process that had it
            return None
        return SilentRank(silent[0], hung=timed_out, since_s=look_s, error_line=error_line) if silent else None

    def collect_exchanges(self, stopped: SignOfLife | None) -> dict[int, Exchange]:
        """Let every rank write its stacks, and wake one that was `stopped` for it. Errors: none.

        The last exchange of each rank that answers. It is back when all have, which takes a beat, or after `ANSWER_BEATS`.
        """
        with contextlib.suppress(RuntimeError):
            self._store.set(STACKS_KEY, "1")
        if stopped is not None and stopped.host == socket.gethostname() and stopped.pid:
            # Held back until it goes on, the first is then taken before it can leave the place where it was stopped.
            with contextlib.suppress(OSError):
                _signal_main_thread(stopped.pid, signal.SIGQUIT)
                os.kill(stopped.pid, signal.SIGCONT)
        keys = {rank: f"shardtune/exchange/{rank}" for rank in range(self.world)}
        deadline = time.monotonic() + ANSWER_BEATS * self.every_s
        try:
            self._report_position()  # its own beat may be late
            while not self._store.check([*keys.values()]) and time.monotonic() < deadline:
                time.sleep(self.every_s / 4)
            return {
                rank: Exchange(**json.loads(self._store.get(key)))
                for rank, key in keys.items()
                if self._store.check([key])
            }
        except RuntimeError:
            return {}

    def lagging_rank(self, error: BaseException, exchanges: dict[int, Exchange]) -> LaggingRank | None:
        """The rank that lives and is not where this one, which `error` ended, has waited for it; None where nobody can say."""
        if (peer := AWAITED_PEER.search(str(error))) is not None and (rank := int(peer[1])) < self.world:
            try:
                awaited = "an exchange through shared memory"
                return LaggingRank(self._signs_of_life()[rank], exchanges.get(rank), awaited, _first_line(error))
            except RuntimeError:
                return None
        own_exchange = exchanges.get(self.rank)
        other_exchanges = {rank: exchange for rank, exchange in exchanges.items() if rank != self.rank}
        if own_exchange is None or not other_exchanges:
            return None
        absent = [
            rank
            for rank, exchange in other_exchanges.items()
            if exchange.waits_s is None
            and not (exchange.counter == own_exchange.counter and exchange.number >= own_exchange.number)
        ]
        try:
            return (
                LaggingRank(
                    self._signs_of_life()[absent[0]], other_exchanges[absent[0]], own_exchange, _first_line(error)
                )
                if absent
                else None
            )
        except RuntimeError:
            return None

    def _signs_of_life(self) -> list[SignOfLife]:
        keys = [f"shardtune/beat/{rank}" for rank in range(self.world)]
        return [
            SignOfLife(rank=rank, **json.loads(self._store.get(key)))
            if self._store.check([key])
            else SignOfLife(rank=rank)
            for rank, key in enumerate(keys)
        ]

    def _beat(self) -> None:
        sign: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "count": 0}
        while True:
            phase, step = self._state()
            sign |= {"phase": phase, "step": step, "count": sign["count"] + 1}
            self._write_last_words(sign)
            try:
                self._store.set(f"shardtune/beat/{self.rank}", json.dumps(sign))
                self._note_answered()
                late = self._late_exchange((phase, step))
                if self._stacks is not None and (late is not None or self._store.check([STACKS_KEY])):
                    self._report_position()
                self._warn(late)
            except Unanswered:
                self._note_unanswered((phase, step))
            except RuntimeError:  # the store is gone, and with it the job
                return
            time.sleep(self.every_s)

    def _cut_off(self, error_line: str) -> CutOffRank:
        phase, step = self._state()
        sign = SignOfLife(rank=self.rank, host=socket.gethostname(), pid=os.getpid(), phase=phase, step=step)
        return CutOffRank(sign, since_s=self._store.unanswered_s(), error_line=error_line)

    def _note_unanswered(self, state: tuple[str, int | None]) -> None:
        """Say once that the store does not answer; end the process if it stood still all the while and beyond the timeout."""
        if not self._reported_unanswered:
            self._reported_unanswered = True
            limit = f"; this rank ends after {self._timeout_s:.0f} s without progress (run.timeout_s)"
            _print_error(
                f"rank {self.rank} on {socket.gethostname()}: {store_place()}, where the ranks meet, has not answered for "
                f"{self._store.unanswered_s():.0f} s: the link is down, or that host hangs{limit}"
            )
        self._note_progress(state)
        standstill_s = min(time.monotonic() - self._last_change, self._store.unanswered_s())
        if standstill_s > self._timeout_s + CUT_OFF_S and self.when_cut_off is not None:
            self.when_cut_off(self._cut_off("no error"))

    def _note_answered(self) -> None:
        if self._reported_unanswered:
            self._reported_unanswered = False
            _print_error(f"rank {self.rank} on {socket.gethostname()}: {store_place()} answers again")

    def _report_position(self) -> None:
        """Write where the threads of this rank are, and tell its last exchange; once. Errors: RuntimeError of the store."""
        with self._report_lock:
            stacks, self._stacks = self._stacks, None
            if stacks is None:
                return
            faulthandler.dump_traceback(stacks, all_threads=True)
            if (last := last_exchange()) is not None:
                self._store.set(f"shardtune/exchange/{self.rank}", json.dumps(asdict(last)))
                over = "over" if last.waits_s is None else "not over"
                with contextlib.suppress(OSError):  # a full disk makes no rank that lives a silent one
                    print(f"\nlast exchange: {last}, {over}", file=stacks, flush=True)

    def _late_exchange(self, state: tuple[str, int | None]) -> Exchange | None:
        """The exchange in which this rank stands still, where it will soon have lasted too long."""
        self._note_progress(state)
        if time.monotonic() - self._last_change < LATE_SHARE * self._timeout_s:
            return None
        last = last_exchange()
        is_late = last is not None and last.waits_s is not None and last.waits_s > LATE_SHARE * self._timeout_s
        return last if is_late else None

    def _note_progress(self, state: tuple[str, int | None]) -> None:
        if state != self._last_state:
            self._last_state = state
            self._last_change = time.monotonic()

    def _warn(self, late: Exchange | None) -> None:
        """Hand on what is late under NCCL, whose watchdog aborts the process; gloo raises an error where it is waited for."""
        handler = self.at_timeout
        if late is None or handler is None or not late.what.startswith("nccl"):
            return
        if (late.waits_s or 0.0) > self._timeout_s - WARNING_BEATS * self.every_s:
            self.at_timeout = None
            # Another thread, which may take its time: without beats this rank would seem stopped itself.
            threading.Thread(target=handler, args=(late,), name="timeout", daemon=True).start()

    def _write_last_words(self, sign: dict[str, Any]) -> None:
        if (directory := os.environ.get(LAST_WORDS)) is not None:
            with contextlib.suppress(OSError):
                temporary = Path(directory) / f".{self.rank}"
                temporary.write_text(json.dumps(sign), encoding="utf-8")
                temporary.replace(Path(directory) / str(self.rank))


def store_place() -> str:
    """Where the ranks' store is, as the environment has it."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)


def _signal_main_thread(pid: int, number: int) -> None:
    """To no other thread of the process: the kernel gives a stopped one's signal to whichever wakes first."""
    send = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc before 2.30 has none
    os.kill(pid, number) if send is None else send(pid, pid, number)


def last_words(directory: Path, rank: int) -> SignOfLife | None:
    """What a rank of this host last said of itself, for the launcher that gave it the directory; None where it said nothing."""
    try:
        return SignOfLife(rank=rank, **json.loads((directory / str(rank)).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
