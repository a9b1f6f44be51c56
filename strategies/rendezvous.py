"""Decisions of all ranks before there is a process group, made through the store that will form the group.

Preparing data may take hours, and no collective may wait that long. If one rank gets a signal to stop in that time, the others
must not wait for it until a timeout. So the first decision of any rank, to continue or to stop, holds for all. A signal that
comes after the decision to continue is handled by the process group. If rank 0 stops because it lost the run directory, the
decision says so, and no rank writes there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from strategies.errors import Preempted, ShardtuneError

DECISION_KEY = "shardtune/decision"
GO_DECISION = "go"
STOP_DECISION_PREFIX = "stop"
"""The key of the decision, and its two values: to continue, or to stop, followed by why rank 0 lost the run directory, if it
did."""
NUM_READY_KEY, NUM_LEFT_KEY = "shardtune/ready", "shardtune/left"
"""Keys that count the ranks which are ready to form the group, and which have left after a decision to stop."""
READ_INTERVAL_S = 1.0
CHOICE_READ_INTERVAL_S = 0.1
MAX_LEAVE_S = 10.0
"""Longest time that rank 0 keeps the store for the others after the decision to stop."""
REPORT_INTERVAL_S = 15.0
"""How often a waiting rank says what it waits for."""


class Rendezvous:
    """Lets the ranks of a job decide together through the job's store. A job of one rank has no store and decides alone.

    `why_lost` is called when this rank decides to stop. It returns why the run directory belongs to another attempt; None if
    it does not.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout_s: float,
        why_lost: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Let this rank take part in the decisions of the job before there is a process group.

        `store`: torch's store of the job; None for a job of one rank. `timeout_s`: longest wait for the other ranks. `why_lost`:
        returns why the run directory belongs to another attempt; None if it does not.
        """
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self._timeout_s = timeout_s
        self._last_look_at = float("-inf")
        self._stopped = False
        self._why_lost = why_lost

    @classmethod
    def join(cls, timeout_s: float, why_lost: Callable[[], str | None] = lambda: None) -> Rendezvous:
        """Connect to the store of the job that the environment describes, through which its ranks decide whether to go on.

        `why_lost`: asked when this rank decides to stop; returns why the run directory belongs to another attempt, None if it
        does not. Raises ShardtuneError if the ranks do not meet. All ranks must call, within `timeout_s`.
        """
        rank = int(os.environ.get("RANK", 0))
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size == 1:
            return cls(None, rank, world_size, timeout_s, why_lost)
        import torch.distributed as dist

        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            with _printing_while_waiting(f"rank {rank} of {world_size} waits for the others to come to {address}"):
                store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except (dist.DistError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ShardtuneError(
                f"rank {rank} of {world_size} did not meet the others at {address} ({reason}); do all hosts "
                "reach that place, and are RANK, WORLD_SIZE and MASTER_ADDR those of this job, not left over from another?"
            ) from error
        return cls(store, rank, world_size, timeout_s, why_lost)

    def poll_stop_decision(self, asked_to_stop: bool) -> bool:
        """Whether the job stops, by the first decision of any rank. Call it often while data is prepared.

        `asked_to_stop`: whether this rank got a signal to stop. If so, this call makes the decision, unless there is one
        already, which may be to go on. Otherwise it reads the store about once a second. It does not wait for other ranks.
        """
        # A decision to stop stands; a job of one rank decides alone.
        if self.store is None or self._stopped:
            self._stopped |= asked_to_stop
        elif asked_to_stop:
            self._stopped = self._decide_to_stop() != GO_DECISION
        elif time.monotonic() - self._last_look_at > READ_INTERVAL_S:
            self._last_look_at = time.monotonic()
            self._stopped = self._current_decision() not in (None, GO_DECISION)
        return self._stopped

    def chosen_by_rank_0(self, what_is_chosen: str, choose: Callable[[], str], should_stop: Callable[[], bool]) -> str:
        """Let rank 0 choose for all before there is a process group: the result of `choose` on rank 0, on every rank.

        `what_is_chosen`: a name in words, for the store's key and for messages; different for each choice. Raises Preempted if
        `should_stop()` becomes true on a waiting rank, ShardtuneError if rank 0 does not come within the run's timeout. All ranks
        must call.
        """
        if self.store is None:
            return choose()
        key = f"shardtune/chosen/{what_is_chosen}"
        if self.rank == 0:
            choice = choose()
            self.store.set(key, choice)
            return choice
        deadline = time.monotonic() + self._timeout_s
        while not self.store.check([key]):
            if should_stop():
                raise Preempted("asked to stop while preparing data; nothing is lost but the preparation")
            if time.monotonic() > deadline:
                raise ShardtuneError(
                    f"rank 0 has not chosen {what_is_chosen} {self._timeout_s:.0f} s after rank {self.rank} needed it; raise "
                    "run.timeout_s, or prepare the data before (shardtune prepare)"
                )
            time.sleep(CHOICE_READ_INTERVAL_S)
        return self.store.get(key).decode()

    def wait_for_all(self, asked_to_stop: Callable[[], bool]) -> bool:
        """Wait until every rank has prepared its data and can form the process group. Returns False if the job stops instead.

        The first decision of any rank holds for all: the last rank to come decides to go on, one that got a signal decides to
        stop. `asked_to_stop`: whether this rank got one. Raises ShardtuneError, with the ranks that did not come, after the
        run's timeout. All ranks must call.
        """
        if self.store is None:
            return not asked_to_stop()
        # The last rank that gets here decides that all continue.
        self.store.set(f"shardtune/ready/{self.rank}", "1")
        if self.store.add(NUM_READY_KEY, 1) == self.world_size:
            return self._decide(GO_DECISION) == GO_DECISION
        # The others wait for that decision, or for one to stop.
        began_at = time.monotonic()
        reported_at = began_at
        while True:
            decision = self._decide_to_stop() if asked_to_stop() else self._current_decision()
            if decision is not None:
                return decision == GO_DECISION
            now = time.monotonic()
            if now > began_at + self._timeout_s:
                raise self._not_ready_error()
            if self.rank == 0 and now - reported_at > REPORT_INTERVAL_S:
                reported_at = now
                num_ready = self.store.add(NUM_READY_KEY, 0)  # adding 0 reads the count
                print(f"{now - began_at:.0f} s: {num_ready} of {self.world_size} ranks are ready to begin", flush=True)
            time.sleep(max(0.1, self.world_size / 1000))

    def _not_ready_error(self) -> ShardtuneError:
        """The error that names the ranks which have not come to `wait_for_all` within the run's timeout."""
        missing_ranks = [r for r in range(self.world_size) if not self.store.check([f"shardtune/ready/{r}"])]
        return ShardtuneError(
            f"rank {', '.join(map(str, missing_ranks[:8]))} has not finished preparing the data {self._timeout_s:.0f} s after "
            f"rank {self.rank} had; raise run.timeout_s, or prepare the data before (shardtune prepare)"
        )

    def leave(self) -> str | None:
        """Leave the job after the decision to stop; returns why rank 0 lost the run directory to another attempt, None if not.

        If it did, this rank must not write there. All ranks should call. Rank 0, whose process may host the store, waits until
        all others have left, or for `MAX_LEAVE_S`.
        """
        if self.store is None:
            return self._why_lost()
        why_lost = None
        # RuntimeError: the store is gone with its process. Nobody is left to wait for.
        with contextlib.suppress(RuntimeError):
            decision = self._current_decision() or ""  # "stop", followed by the reason if there is one
            why_lost = decision.removeprefix(STOP_DECISION_PREFIX) or None
            num_left = self.store.add(NUM_LEFT_KEY, 1)
            deadline = time.monotonic() + MAX_LEAVE_S
            while self.rank == 0 and num_left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                num_left = self.store.add(NUM_LEFT_KEY, 0)  # adding 0 reads the count
        return why_lost

    def _decide_to_stop(self) -> str:
        """Decide to stop, with the reason if this rank lost the run directory. Returns the decision that holds.

        That may be to continue, if all ranks were ready first.
        """
        return self._decide(STOP_DECISION_PREFIX + (self._why_lost() or ""))

    def _decide(self, proposal: str) -> str:
        """Make `proposal` the decision of all ranks, unless there is one already. Returns the decision that holds."""
        return self.store.compare_set(DECISION_KEY, "", proposal).decode()

    def _current_decision(self) -> str | None:
        """The decision of all ranks; None if there is none yet."""
        if not self.store.check([DECISION_KEY]):
            return None
        return self.store.get(DECISION_KEY).decode()


@contextlib.contextmanager
def _printing_while_waiting(message: str) -> Iterator[None]:
    """Tell the user every `REPORT_INTERVAL_S` seconds what the code inside the context waits for, which may be in a library.

    A thread prints `message` on stderr, on the first rank of each host alone.
    """
    is_over = threading.Event()
    began_at = time.monotonic()
    is_first_of_host = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def report() -> None:
        while is_first_of_host and not is_over.wait(REPORT_INTERVAL_S):
            with contextlib.suppress(OSError, ValueError):  # the terminal is closed
                print(f"{time.monotonic() - began_at:.0f} s: {message}", file=sys.stderr, flush=True)

    threading.Thread(target=report, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
