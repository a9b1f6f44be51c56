"""The last collective of this rank, from the flight recorders that torch keeps for NCCL and for gloo.

They are read as JSON inside the process, because the files that NCCL's watchdog can write are pickles, and nothing here reads
pickles. Collectives through shared memory on one host (`strategies/host_memory.py`) is not recorded.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

NUM_RECORDED_COLLECTIVES = 512
"""How many collectives each recorder keeps, unless the environment says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCall:
    """One collective, or one message between two ranks, as a rank recorded it. The fields are sent to other ranks as JSON."""

    number: int
    """Its number in its group: ranks that wait for each other have the same."""
    operation: str
    """Backend and operation, such as `nccl:all_reduce`."""
    group: str
    sizes: list[list[int]]
    waiting_s: float | None
    """Seconds since it began; None if it is complete."""

    @property
    def is_complete(self) -> bool:
        """Whether all ranks have taken part, so that this rank does not wait in it any more."""
        return self.waiting_s is None

    @property
    def is_waiting(self) -> bool:
        """Whether the rank waits in this collective for another rank."""
        return not self.is_complete

    @property
    def numbering(self) -> tuple[str, str]:
        """(group, backend), within which `number` counts: NCCL and gloo each number the collectives of a group by themselves."""
        return self.group, self.operation.partition(":")[0]

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, size)) or "1" for size in self.sizes[:3])
        return f"{self.operation} number {self.number} of {self.group} ({sizes})"


def enable_recorder() -> None:
    """Let torch record the last collectives. Call it before the first group is formed."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NUM_RECORDED_COLLECTIVES))


def last_collective() -> CollectiveCall | None:
    """The collective in which this rank waits, the oldest if there are several; otherwise its last one, to find why a run hangs.

    Read from torch's flight recorder, which keeps the last collectives of NCCL and gloo. None if nothing is recorded. Any thread
    may call it. It does not communicate.
    """
    from strategies.compat.process_groups import recorded_collectives

    entries = recorded_collectives()
    if not entries:
        return None
    incomplete_entries = [entry for entry in entries if not entry.get("retired")]  # torch retires an entry at its end
    if incomplete_entries:
        entry = incomplete_entries[0]
        waiting_s = (time.time_ns() - entry.get("time_created_ns", 0)) / 1e9
    else:
        entry = entries[-1]
        waiting_s = None  # complete
    # torch numbers messages between two ranks separately from collectives.
    number_key = "p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id"
    group_names = entry.get("process_group") or ["?"]
    return CollectiveCall(
        number=entry.get(number_key, 0),
        operation=str(entry.get("profiling_name")),
        group=str(group_names[-1]),
        sizes=entry.get("input_sizes") or [],
        waiting_s=waiting_s,
    )
