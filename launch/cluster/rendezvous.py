"""Reports which hosts of a run have not come to `launcher.rdzv` yet."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.hosts import HostPlace
from trainer.reporting.status import read_failure

if TYPE_CHECKING:
    import psutil

    from trainer.config.run import LauncherConfig

WAITING_S = 20.0
"""Seconds after which the first line says which host has not come; the pause to the next one doubles."""
LONGEST_PAUSE_S = 60.0
LEFT_BEHIND_S = 20.0
"""Seconds that torchrun may live on after all of its ranks have ended."""
LOOK_EVERY_S = 5.0


def port_of(launcher: LauncherConfig) -> int:
    """The port of `launcher.rdzv`."""
    return int((launcher.rdzv or "").rpartition(":")[2])


class WaitingForHosts:
    """Says which hosts have not come, until this host's ranks run."""

    def __init__(self, launcher: LauncherConfig, place: HostPlace) -> None:
        self._launcher = launcher
        self._place = place
        self._began = time.monotonic()
        self._pause_s = WAITING_S
        self._next_report = self._began + self._pause_s
        self._all_came = False

    def poll(self, agent: psutil.Process) -> None:
        """Say what is missing if it is time to; `agent`: torchrun's process on this host."""
        now = time.monotonic()
        if self._all_came or now < self._next_report:
            return
        if ranks_of(agent):
            self._all_came = True
            return
        print(f"{now - self._began:.0f} s: {self._missing(agent)}", file=sys.stderr, flush=True)
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._next_report = now + self._pause_s

    def _missing(self, agent: psutil.Process) -> str:
        """Which hosts have not come, and what to do about it."""
        nodes = self._launcher.nodes
        address = self._launcher.rdzv
        if not self._place.first:
            here = self._place.address if self._place.rank is None else self._place.rank
            return (
                f"host {here} of {nodes} waits for the others at {address}, the first host; does the same command run there, and "
                "does this host reach it?"
            )
        remedy = "start the same command there, or see whether it reaches this host"
        if nodes == 2:
            return f"host 1 of 2 has not come to {address}; {remedy}"
        peers = sorted(_peers(agent, port_of(self._launcher)))
        listed = f" ({', '.join(peers)})" if peers else ""
        come = f"{len(peers) + 1} of {nodes} hosts have come to {address}"
        return f"{come}, this one and {len(peers)} more{listed}; on the others {remedy}"


class AgentLeftBehind:
    """Ends torchrun if this host's ranks have failed and are gone, and it does not end: it may wait for another host."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._next_check = time.monotonic()
        self._had_ranks = False
        self._alone_since: float | None = None

    def poll(self, agent: psutil.Process) -> None:
        """Kill torchrun if that has lasted for `LEFT_BEHIND_S`; it is looked at seldom."""
        import psutil

        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + LOOK_EVERY_S
        if ranks_of(agent):
            self._had_ranks = True
            self._alone_since = None
            return
        # Without a failure it rightly waits: other hosts may still be writing the export.
        if not self._had_ranks or not read_failure(self._run_dir):
            return
        if self._alone_since is None:
            self._alone_since = now
        if now - self._alone_since > LEFT_BEHIND_S:
            with suppress(psutil.Error):
                agent.kill()


def ranks_of(agent: psutil.Process) -> list[psutil.Process]:
    """The ranks that torchrun's process runs on this host."""
    import psutil

    ranks = []
    with suppress(psutil.Error):
        for child in agent.children():
            with suppress(psutil.Error):
                if "RANK" in child.environ():  # else a helper of a library
                    ranks.append(child)
    return ranks


def _peers(agent: psutil.Process, port: int) -> set[str]:
    """Addresses of other hosts that are connected to torchrun's port on this one."""
    import psutil

    peers: set[str] = set()
    with suppress(psutil.Error):
        own_addresses = {connection.laddr.ip for connection in agent.net_connections() if connection.laddr}
        for connection in agent.net_connections():
            if connection.raddr and connection.laddr.port == port and connection.raddr.ip not in own_addresses:
                peers.add(connection.raddr.ip.removeprefix("::ffff:"))  # of IPv4, by a socket that takes both
    return peers
