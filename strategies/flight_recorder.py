"""The last collective of this rank, from the flight recorders that torch keeps for NCCL and for gloo.

They are read as JSON inside the process: the files that NCCL's watchdog can write are pickles, which nothing here
reads. Ranks that exchange through shared memory on one host (`strategies/host_memory.py`) appear only when they use
their process group.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

RECORDED_EXCHANGES = 512
"""Exchanges that each recorder keeps, unless the environment says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One exchange, as a rank saw it."""

    number: int
    """Which one of its group it is; ranks that wait for each other have the same."""
    what: str
    """Such as `nccl:all_reduce`."""
    group: str
    sizes: list[list[int]]
    waits_s: float | None
    """Seconds since it was begun; None where it is over."""

    @property
    def counter(self) -> tuple[str, str]:
        """Whose numbers it has: NCCL and gloo each count the exchanges of a group for themselves."""
        return self.group, self.what.partition(":")[0]

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, size)) or "1" for size in self.sizes[:3])
        return f"{self.what} number {self.number} of {self.group} ({sizes})"


def enable_recorder() -> None:
    """Before the first group is formed: let torch keep the last exchanges."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_EXCHANGES))


def last_exchange() -> Exchange | None:
    """What this rank waits for, the oldest where it is several; else what it did last. None where nothing is recorded.

    For any thread; communicates with nobody.
    """
    from strategies.compat.process_groups import recorded_exchanges

    entries = recorded_exchanges()
    if not entries:
        return None
    waiting = [recorded for recorded in entries if not recorded.get("retired")]
    entry = waiting[0] if waiting else entries[-1]
    return Exchange(
        number=entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id", 0),
        what=str(entry.get("profiling_name")),
        group=str((entry.get("process_group") or ["?"])[-1]),
        sizes=entry.get("input_sizes") or [],
        waits_s=(time.time_ns() - entry.get("time_created_ns", 0)) / 1e9 if waiting else None,
    )
