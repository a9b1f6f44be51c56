"""Signs of life of every rank, in the store of the group: who is silent is the cause where its peers only lost it.

A rank that was stopped or killed can say nothing, and the others see a broken connection or a timeout of their own. Each rank
therefore counts in the store, with its phase and step; whoever fails for a lost peer looks who does not count on. After a timeout
every rank writes down where its threads are: those that live when the store asks them, a stopped one when a peer on its host
wakes it and sends SIGQUIT.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from strategies.errors import ShardtuneError

LOST_PEER = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed out|timeout|gloo|nccl|peer|has ended", re.IGNORECASE
)
"""What the backends say in a rank whose peer has died or hangs."""
STACKS = "shardtune/stacks"
WAITED = re.compile(r"timed out|timeout", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a rank last said of itself."""

    rank: int
    host: str = "?"
    pid: int = 0
    phase: str = "?"
    step: int | None = None
    count: int = -1


class Silent(ShardtuneError):
    """A rank that does not count on: gone, or stopped while the others waited for it."""

    def __init__(self, seen: Seen, *, hung: bool, since_s: float, told: str) -> None:
        self.seen, self.hung = seen, hung
        at = f", step {seen.step}" if seen.step is not None else ""
        what = (
            "is there no more"
            if not hung
            else f"gives no sign of life (none for {since_s:.0f} s): it was stopped, or hangs"
        )
        super().__init__(
            f"rank {seen.rank} (process {seen.pid} on {seen.host}; {seen.phase}{at}) {what}; a peer was told: {told}"
        )


class Heartbeats:
    """This rank's signs of life, and a look at those of the others. Nothing here is collective."""

    def __init__(self, store: Any, rank: int, world: int, state: Callable[[], tuple[str, int | None]]) -> None:
        self._store = store.clone()  # a connection of its own: nothing may wait behind a call of the group's
        self.rank, self.world, self._state = rank, world, state
        self.every_s = max(1.0, world / 200)
        self._stacks: IO[str] | None = None
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def write_stacks_to(self, path: Path) -> None:
        """Where this rank writes its threads' stacks when it is asked to, or is sent SIGQUIT. In the main thread."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("a")
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True)

    def silent(self, look_s: float) -> list[Seen]:
        """Ranks that do not count on in `look_s`, while this one looks."""
        before = self._seen()
        time.sleep(look_s)
        after = self._seen()
        return [
            now for now, then in zip(after, before, strict=True) if now.count == then.count and now.rank != self.rank
        ]

    def cause(self, error: BaseException) -> Silent | None:
        """The silent rank behind an error that says no more than that a peer was lost; None where it is another error.

        Takes a few seconds where it looks.
        """
        told = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if isinstance(error, ShardtuneError) or not LOST_PEER.search(str(error)):
            return None
        hung = WAITED.search(str(error)) is not None
        # Where a process is gone, its launcher ends this one in a few seconds; where one hangs there is time to be sure.
        look_s = (6 if hung else 2.5) * self.every_s
        try:
            silent = self.silent(look_s)
        except RuntimeError:  # the store is gone with the process that had it
            return None
        return Silent(silent[0], hung=hung, since_s=look_s, told=told) if silent else None

    def ask_for_stacks(self, stopped: Seen | None) -> None:
        """Let every rank write its stacks, and wake one that was `stopped` for it; takes two beats. Errors: none."""
        with contextlib.suppress(RuntimeError):
            self._store.set(STACKS, "1")
        if stopped is not None and stopped.host == socket.gethostname() and stopped.pid:
            for number in (signal.SIGCONT, signal.SIGQUIT):  # a stopped process takes no other signal
                with contextlib.suppress(OSError):
                    os.kill(stopped.pid, number)
        time.sleep(2 * self.every_s)

    def _seen(self) -> list[Seen]:
        keys = [f"shardtune/beat/{rank}" for rank in range(self.world)]
        return [
            Seen(rank=rank, **json.loads(self._store.get(key))) if self._store.check([key]) else Seen(rank=rank)
            for rank, key in enumerate(keys)
        ]

    def _beat(self) -> None:
        about: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "count": 0}
        while True:
            phase, step = self._state()
            about |= {"phase": phase, "step": step, "count": about["count"] + 1}
            try:
                self._store.set(f"shardtune/beat/{self.rank}", json.dumps(about))
                if self._stacks is not None and self._store.check([STACKS]):
                    faulthandler.dump_traceback(self._stacks, all_threads=True)
                    self._stacks = None
            except RuntimeError:  # the store is gone, and with it the job
                return
            time.sleep(self.every_s)
