"""Decisions of all ranks before there is a process group, through the store that will form it.

Preparing data may take hours, and no collective may wait that long. If one rank is told to stop meanwhile, the others
must not wait for it until a timeout. So the first decision of any rank, to go on or to stop, holds for all; a signal
that comes after "go on" is handled by the group. If rank 0 stops because it lost the run directory, all learn it with
the decision, and none writes there.
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

DECISION, GO, STOP = "shardtune/decision", "go", "stop"
LOOK_EVERY_S, LEAVE_S = 1.0, 10.0
TELL_S = 15.0
"""Seconds of silence after which rank 0 says how many of the others it waits for."""


class Meeting:
    """The store of this job, where it has several ranks; a job of one decides alone.

    `lost`, asked where this rank decides to stop, says why the directory of the run is not its own, None where it is.
    """

    def __init__(
        self, store: Any, rank: int, world: int, timeout_s: float, lost: Callable[[], str | None] = lambda: None
    ) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._timeout_s, self._looked_at, self._stopped, self._lost = timeout_s, float("-inf"), False, lost

    @classmethod
    def join(cls, timeout_s: float, lost: Callable[[], str | None] = lambda: None) -> Meeting:
        """Meet the ranks of the job that the environment describes. All ranks must call, within `timeout_s`."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls(None, rank, world, timeout_s, lost)
        import torch.distributed as dist

        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            with _saying_that_it_waits(f"rank {rank} of {world} waits for the others to come to {place}"):
                store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except (dist.DistError, ValueError) as error:
            raise ShardtuneError(
                f"rank {rank} of {world} did not meet the others at {place} ({' '.join(str(error).split())[:200]}); do all hosts "
                "reach that place, and are RANK, WORLD_SIZE and MASTER_ADDR those of this job, not left over from another?"
            ) from error
        return cls(store, rank, world, timeout_s, lost)

    def stopping(self, told: bool) -> bool:
        """Whether the ranks stop; `told`: whether this one was asked to. Looks about once a second; waits for nobody."""
        if self.store is None or self._stopped:
            self._stopped |= told
        elif told:
            self._stopped = self._decide_to_stop() != GO
        elif time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._stopped = self._decided() not in (None, GO)
        return self._stopped

    def of_rank_0(self, name: str, choose: Callable[[], str], stop: Callable[[], bool]) -> str:
        """What rank 0 chooses, on every rank. All ranks must call; `stop` says whether the ranks stop, and raises Preempted here.

        Raises ShardtuneError if rank 0 does not come within the run's timeout.
        """
        if self.store is None:
            return choose()
        key = f"shardtune/chosen/{name}"
        if self.rank == 0:
            choice = choose()
            self.store.set(key, choice)
            return choice
        deadline = time.monotonic() + self._timeout_s
        while not self.store.check([key]):
            if stop():
                raise Preempted("asked to stop while preparing data; nothing is lost but the preparation")
            if time.monotonic() > deadline:
                raise ShardtuneError(
                    f"rank 0 has not chosen {name} {self._timeout_s:.0f} s after rank {self.rank} needed it; raise "
                    "run.timeout_s, or prepare the data before (shardtune prepare)"
                )
            time.sleep(0.1)
        return self.store.get(key).decode()

    def go_on(self, told: Callable[[], bool]) -> bool:
        """Wait until every rank is ready to form the group; False where they stop instead. All ranks must call.

        Raises ShardtuneError naming the ranks that did not come within the run's timeout.
        """
        if self.store is None:
            return not told()
        self.store.set(f"shardtune/ready/{self.rank}", "1")
        if self.store.add("shardtune/ready", 1) == self.world:
            return self._decide(GO) == GO
        began = told_at = time.monotonic()
        deadline = began + self._timeout_s
        while (decision := self._decide_to_stop() if told() else self._decided()) is None:
            if time.monotonic() > deadline:
                missing = [r for r in range(self.world) if not self.store.check([f"shardtune/ready/{r}"])]
                raise ShardtuneError(
                    f"rank {', '.join(map(str, missing[:8]))} has not finished preparing the data {self._timeout_s:.0f} s after "
                    f"rank {self.rank} had; raise run.timeout_s, or prepare the data before (shardtune prepare)"
                )
            if self.rank == 0 and time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                ready = self.store.add("shardtune/ready", 0)
                print(f"{told_at - began:.0f} s: {ready} of {self.world} ranks are ready to begin", flush=True)
            time.sleep(max(0.1, self.world / 1000))
        return decision == GO

    def part(self) -> str | None:
        """After the decision to stop: why rank 0 lost the directory of the run, where it stopped for that. All ranks are to call.

        Rank 0, whose process may have the store, leaves last: when all have heard of it, or after `LEAVE_S`.
        """
        if self.store is None:
            return self._lost()
        why = None
        with contextlib.suppress(RuntimeError):  # the store is gone: they heard, or waited in vain
            why = (self._decided() or STOP).removeprefix(STOP) or None
            left = self.store.add("shardtune/left", 1)
            deadline = time.monotonic() + LEAVE_S
            while self.rank == 0 and left < self.world and time.monotonic() < deadline:
                time.sleep(0.1)
                left = self.store.add("shardtune/left", 0)
        return why

    def _decide_to_stop(self) -> str:
        return self._decide(STOP + (self._lost() or ""))

    def _decide(self, wish: str) -> str:
        """The decision, which is `wish` where none was made before."""
        return self.store.compare_set(DECISION, "", wish).decode()

    def _decided(self) -> str | None:
        return self.store.get(DECISION).decode() if self.store.check([DECISION]) else None


@contextlib.contextmanager
def _saying_that_it_waits(what: str) -> Iterator[None]:
    """Say `what` every `TELL_S` seconds while the block runs, which may wait in a library."""
    over = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while int(os.environ.get("LOCAL_RANK", 0)) == 0 and not over.wait(TELL_S):  # once a host
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(f"{time.monotonic() - began:.0f} s: {what}", file=sys.stderr, flush=True)

    threading.Thread(target=tell, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()
