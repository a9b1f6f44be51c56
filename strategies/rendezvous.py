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
REPORT_EVERY_S = 15.0
"""Seconds of silence after which rank 0 says how many of the others it waits for."""


class Meeting:
    """The store of this job, where it has several ranks; a job of one decides alone.

    `lost`, asked where this rank decides to stop, says why the directory of the run is not its own, None where it is.
    """

    def __init__(
        self, store: Any, rank: int, world: int, timeout_s: float, lost: Callable[[], str | None] = lambda: None
    ) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._timeout_s, self._looked_at, self._stopped, self._why_lost = timeout_s, float("-inf"), False, lost

    @classmethod
    def join(cls, timeout_s: float, lost: Callable[[], str | None] = lambda: None) -> Meeting:
        """Meet the ranks of the job that the environment describes. All ranks must call, within `timeout_s`."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls(None, rank, world, timeout_s, lost)
        import torch.distributed as dist

        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            with _reported_wait(f"rank {rank} of {world} waits for the others to come to {address}"):
                store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except (dist.DistError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ShardtuneError(
                f"rank {rank} of {world} did not meet the others at {address} ({reason}); do all hosts "
                "reach that place, and are RANK, WORLD_SIZE and MASTER_ADDR those of this job, not left over from another?"
            ) from error
        return cls(store, rank, world, timeout_s, lost)

    def stop_decided(self, asked_to_stop: bool) -> bool:
        """Whether the ranks stop; `asked_to_stop`: whether this one was asked to. Looks about once a second; waits for nobody."""
        if self.store is None or self._stopped:
            self._stopped |= asked_to_stop
        elif asked_to_stop:
            self._stopped = self._decide_to_stop() != GO
        elif time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._stopped = self._decided() not in (None, GO)
        return self._stopped

    def chosen_by_rank_0(self, name: str, choose: Callable[[], str], stop: Callable[[], bool]) -> str:
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

    def wait_for_all(self, asked_to_stop: Callable[[], bool]) -> bool:
        """Wait until every rank is ready to form the group; False where they stop instead. All ranks must call.

        Raises ShardtuneError naming the ranks that did not come within the run's timeout.
        """
        if self.store is None:
            return not asked_to_stop()
        self.store.set(f"shardtune/ready/{self.rank}", "1")
        if self.store.add("shardtune/ready", 1) == self.world:
            return self._decide(GO) == GO
        began = reported_at = time.monotonic()
        deadline = began + self._timeout_s
        while (decision := self._decide_to_stop() if asked_to_stop() else self._decided()) is None:
            if time.monotonic() > deadline:
                missing = [r for r in range(self.world) if not self.store.check([f"shardtune/ready/{r}"])]
                raise ShardtuneError(
                    f"rank {', '.join(map(str, missing[:8]))} has not finished preparing the data {self._timeout_s:.0f} s after "
                    f"rank {self.rank} had; raise run.timeout_s, or prepare the data before (shardtune prepare)"
                )
            if self.rank == 0 and time.monotonic() - reported_at > REPORT_EVERY_S:
                reported_at = time.monotonic()
                ready = self.store.add("shardtune/ready", 0)
                print(f"{reported_at - began:.0f} s: {ready} of {self.world} ranks are ready to begin", flush=True)
            time.sleep(max(0.1, self.world / 1000))
        return decision == GO

    def leave(self) -> str | None:
        """After the decision to stop: why rank 0 lost the directory of the run, where it stopped for that. All ranks are to call.

        Rank 0, whose process may have the store, leaves last: when all have heard of it, or after `LEAVE_S`.
        """
        if self.store is None:
            return self._why_lost()
        why_lost = None
        with contextlib.suppress(RuntimeError):  # the store is gone: they heard, or waited in vain
            why_lost = (self._decided() or STOP).removeprefix(STOP) or None
            ranks_gone = self.store.add("shardtune/left", 1)
            deadline = time.monotonic() + LEAVE_S
            while self.rank == 0 and ranks_gone < self.world and time.monotonic() < deadline:
                time.sleep(0.1)
                ranks_gone = self.store.add("shardtune/left", 0)
        return why_lost

    def _decide_to_stop(self) -> str:
        return self._decide(STOP + (self._why_lost() or ""))

    def _decide(self, wish: str) -> str:
        """The decision, which is `wish` where none was made before."""
        return self.store.compare_set(DECISION, "", wish).decode()

    def _decided(self) -> str | None:
        return self.store.get(DECISION).decode() if self.store.check([DECISION]) else None


@contextlib.contextmanager
def _reported_wait(message: str) -> Iterator[None]:
    """Say `message` every `REPORT_EVERY_S` seconds while the block runs, which may wait in a library."""
    over = threading.Event()
    began = time.monotonic()

    def report() -> None:
        while int(os.environ.get("LOCAL_RANK", 0)) == 0 and not over.wait(REPORT_EVERY_S):  # once a host
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(f"{time.monotonic() - began:.0f} s: {message}", file=sys.stderr, flush=True)

    threading.Thread(target=report, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()
