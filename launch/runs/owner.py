"""Reads which process holds the lease of a run, and whether that process is alive.

For a process on another host, the age of its last heartbeat decides, as measured by the clocks of the file system and
of this host. That suffices for display. Before acting on it, watch the heartbeat as `trainer/session/lease.py` does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trainer.session.lease import latest_claim
from trainer.session.lease_owner import (
    HEARTBEATS_PER_TIMEOUT,
    LeaseOwner,
    is_alive_here,
    owner_of_this_process,
    process_identity,
)

LAUNCHER_VARIABLE = b"SHARDTUNE_LAUNCHER="
"""Environment variable by which a launcher tells its ranks its process id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseHolder:
    """The newest attempt at a run, and the process that makes it.

    A process that trains holds the run's lease: it claims the run directory, and shows by heartbeats that it lives.
    """

    attempt_number: int
    """How often the run was started, this attempt counted; 0 if nobody has started it."""
    owner: LeaseOwner | None
    """The process that holds the lease; None if the attempt is over."""
    is_alive: bool | None
    """Whether the owner is a process of this host that lives; None if this host cannot tell."""
    heartbeat_age_s: float | None
    """Seconds since the owner's last heartbeat; None if there was none."""

    @property
    def lease_timeout_s(self) -> float:
        """Seconds without a heartbeat after which another attempt may take the lease over."""
        return HEARTBEATS_PER_TIMEOUT * self.owner.beat_s if self.owner is not None else 0.0

    @property
    def is_heartbeat_late(self) -> bool:
        """Whether the last heartbeat is too long ago, so that another attempt may take the lease over."""
        return self.heartbeat_age_s is None or self.heartbeat_age_s > self.lease_timeout_s

    @property
    def seems_to_be_running(self) -> bool:
        """Whether the attempt seems to be running: not over, its process not ended, its heartbeat recent."""
        return self.owner is not None and self.is_alive is not False and not self.is_heartbeat_late


def read_lease_holder(run_dir: Path) -> LeaseHolder:
    """Find out who runs a run: its newest attempt, and whether the process that makes it is alive.

    A process that trains holds the run's lease: a file in the directory `lease` by which it claims the run, with its
    heartbeats beside it. Raises OSError if the lease cannot be read.
    """
    attempt_number, owner = latest_claim(run_dir / "lease")  # attempts are numbered from 1
    if owner is None:
        return LeaseHolder(attempt_number=attempt_number, owner=None, is_alive=None, heartbeat_age_s=None)
    return LeaseHolder(
        attempt_number=attempt_number,
        owner=owner,
        is_alive=is_alive_here(owner, _this_process()),
        heartbeat_age_s=_seconds_since_heartbeat(run_dir / "lease", attempt_number),
    )


class LauncherProcess(NamedTuple):
    """A launcher on this host, which starts the ranks of a run and waits for them."""

    pid: int
    identity: str
    """`process_identity` of the process: its pid may be another process's later."""


def launcher_process(owner: LeaseOwner) -> LauncherProcess | None:
    """Find the launcher on this host that started the owner's ranks and would start them again. None if the owner

    - is on another host,
    - has ended,
    - or was started without a launcher.

    `owner`: the process that holds the run's lease.
    """
    if is_alive_here(owner, _this_process()) is not True:
        return None
    try:
        # A launcher tells its ranks its process id by an environment variable.
        environment = Path(f"/proc/{owner.pid}/environ").read_bytes().split(b"\0")
        variable = next(entry for entry in environment if entry.startswith(LAUNCHER_VARIABLE))
        launcher_pid = int(variable.removeprefix(LAUNCHER_VARIABLE))
        if not _is_same_or_ancestor(launcher_pid, owner.pid):  # the variable is an older run's, handed down by a shell
            return None
    except (OSError, StopIteration, ValueError):
        return None
    identity = process_identity(launcher_pid)
    return LauncherProcess(launcher_pid, identity) if identity else None


def _is_same_or_ancestor(pid: int, descendant_pid: int) -> bool:
    """Whether process `pid` is process `descendant_pid` or one of its ancestors. Raises OSError if one of these has ended."""
    ancestor_pid = descendant_pid
    while ancestor_pid > 1 and ancestor_pid != pid:  # process 1 has no parent
        stat_line = Path(f"/proc/{ancestor_pid}/stat").read_text(encoding="utf-8")
        # Behind the name in parentheses, which may hold blanks and parentheses: the state, then the parent's number.
        _, parent_pid = stat_line.rpartition(")")[2].split()[:2]
        ancestor_pid = int(parent_pid)
    return ancestor_pid == pid


@cache
def _this_process() -> LeaseOwner:
    """This process as if it owned a lease, by which `is_alive_here` tells whether another owner is of the same host.

    It never takes a lease.
    """
    return owner_of_this_process(1.0)  # any interval of heartbeats: it sends none


def _seconds_since_heartbeat(lease_dir: Path, attempt_number: int) -> float | None:
    """Seconds since an attempt last wrote its heartbeat file or, if there is none yet, its claim; None if it wrote neither."""
    for file_name in (f"{attempt_number:06d}.beat", f"{attempt_number:06d}.json"):
        try:
            return max(0.0, time.time() - (lease_dir / file_name).stat().st_mtime)
        except FileNotFoundError:
            continue
    return None
