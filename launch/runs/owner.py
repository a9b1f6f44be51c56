"""Which process owns a run, by its lease, and whether that process is alive.

For a process on another host, the age of its last heartbeat decides, as measured by the clocks of the file system and
of this host. That suffices for display. Before acting on it, watch the heartbeat as `trainer/session/lease.py` does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.session.lease import BEATS_PER_PATIENCE, Owner, is_alive_here, latest, process_identity, this_process

LAUNCHER = b"SHARDTUNE_LAUNCHER="
"""The variable that a launcher gives its ranks."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The newest attempt at a run."""

    starts: int
    """How often the run was started, this attempt counted; 0 where nobody has begun it."""
    owner: Owner | None
    """None where the attempt is over."""
    lives: bool | None
    """Whether it is a process of this host that lives; None where this host cannot tell."""
    silent_s: float | None
    """Seconds since its last sign of life; None where there is none."""

    @property
    def patience_s(self) -> float:
        """Seconds of silence after which another attempt may take its place."""
        return BEATS_PER_PATIENCE * self.owner.beat_s if self.owner is not None else 0.0

    @property
    def silent(self) -> bool:
        """Whether it has been silent for too long."""
        return self.silent_s is None or self.silent_s > self.patience_s

    @property
    def works(self) -> bool:
        """Whether an attempt seems to be at work: not over, not gone, not silent."""
        return self.owner is not None and self.lives is not False and not self.silent


def holder(run_dir: Path) -> Holder:
    """Look at the lease of a run. Errors: OSError where it cannot be read."""
    number, owner = latest(run_dir / "lease")
    if owner is None:
        return Holder(number, None, None, None)
    return Holder(number, owner, is_alive_here(owner, _here()), _silent_s(run_dir / "lease", number))


def launcher(owner: Owner) -> tuple[int, str] | None:
    """(number, identity) of the process of this host that started the owner's ranks and waits for them; None without one."""
    if is_alive_here(owner, _here()) is not True:
        return None
    try:
        words = Path(f"/proc/{owner.pid}/environ").read_bytes().split(b"\0")
        told = next(word for word in words if word.startswith(LAUNCHER))
        pid, above = int(told.removeprefix(LAUNCHER)), owner.pid
        while above > 1 and above != pid:  # the variable may be an older run's, handed down by a shell
            above = int(Path(f"/proc/{above}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, StopIteration, ValueError):
        return None
    identity = process_identity(pid) if above == pid else ""
    return (pid, identity) if identity else None


@cache
def _here() -> Owner:
    return this_process(1.0)


def _silent_s(directory: Path, number: int) -> float | None:
    for name in (f"{number:06d}.beat", f"{number:06d}.json"):
        try:
            return max(0.0, time.time() - (directory / name).stat().st_mtime)
        except FileNotFoundError:
            continue
    return None
