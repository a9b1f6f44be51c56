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
    is_alive: bool | None
    """Whether it is a process of this host that lives; None if this host cannot tell."""
    silent_s: float | None
    """Seconds since its last sign of life; None if there is none."""

    @property
    def patience_s(self) -> float:
        """Seconds of silence after which another attempt may take its place."""
        return BEATS_PER_PATIENCE * self.owner.beat_s if self.owner is not None else 0.0

    @property
    def is_silent(self) -> bool:
        """Whether it has been silent for too long."""
        return self.silent_s is None or self.silent_s > self.patience_s

    @property
    def is_working(self) -> bool:
        """Whether an attempt seems to be at work: not over, not gone, not silent."""
        return self.owner is not None and self.is_alive is not False and not self.is_silent


def holder(run_dir: Path) -> Holder:
    """Look at the lease of a run. Errors: OSError where it cannot be read."""
    number, owner = latest(run_dir / "lease")
    if owner is None:
        return Holder(number, None, None, None)
    return Holder(number, owner, is_alive_here(owner, _this_process()), _silent_s(run_dir / "lease", number))


def launcher_of(owner: Owner) -> tuple[int, str] | None:
    """(number, identity) of the process of this host that started the owner's ranks and waits for them; None without one."""
    if is_alive_here(owner, _this_process()) is not True:
        return None
    try:
        environment = Path(f"/proc/{owner.pid}/environ").read_bytes().split(b"\0")
        variable = next(entry for entry in environment if entry.startswith(LAUNCHER))
        launcher_pid = int(variable.removeprefix(LAUNCHER))
        if not _is_ancestor(launcher_pid, owner.pid):  # the variable is an older run's, handed down by a shell
            return None
    except (OSError, StopIteration, ValueError):
        return None
    identity = process_identity(launcher_pid)
    return (launcher_pid, identity) if identity else None


def _is_ancestor(pid: int, of_pid: int) -> bool:
    """Whether a process has started another one, or one of those that started it. Errors: OSError if one has ended."""
    while of_pid > 1 and of_pid != pid:
        stat = Path(f"/proc/{of_pid}/stat").read_text(encoding="utf-8")
        # Behind the name in parentheses, which may hold blanks and parentheses: the state, then the parent's number.
        of_pid = int(stat.rpartition(")")[2].split()[1])
    return of_pid == pid


@cache
def _this_process() -> Owner:
    return this_process(1.0)


def _silent_s(directory: Path, number: int) -> float | None:
    for name in (f"{number:06d}.beat", f"{number:06d}.json"):
        try:
            return max(0.0, time.time() - (directory / name).stat().st_mtime)
        except FileNotFoundError:
            continue
    return None
