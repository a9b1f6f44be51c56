"""Reports which hosts of a run have not come to `launcher.rdzv` yet."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cluster.hosts import ThisHost
from trainer.reporting.status import read_failure

if TYPE_CHECKING:
    import psutil

    from trainer.config.run import LauncherConfig

FIRST_REPORT_S = 20.0
"""Seconds after which the first line says which host has not come; the pause to the next one doubles."""
LONGEST_PAUSE_S = 60.0
STUCK_S = 20.0
"""Seconds that torchrun may live on after all of its ranks have ended."""
CHECK_EVERY_S = 5.0


def rdzv_port(launcher: LauncherConfig) -> int:
    """The port of `launcher.rdzv`."""
    return int((launcher.rdzv or "").rpartition(":")[2])


class MissingHostsReport:
    """Prints which hosts of a run have not come to `launcher.rdzv`, where ranks meet, until this host's ranks run."""

    def __init__(self, launcher: LauncherConfig, this_host: ThisHost) -> None:
        self._launcher = launcher
        self._this_host = this_host
        self._began_at = time.monotonic()
        self._pause_s = FIRST_REPORT_S
        self._next_report_at = self._began_at + self._pause_s
        self._all_have_come = False

    def poll(self, agent: psutil.Process) -> None:
        """Print which hosts are missing, at growing intervals until all have come; called a few times a second.

        `agent`: torchrun's process on this host.
        """
        now = time.monotonic()
        if self._all_have_come or now < self._next_report_at:
            return
        # torchrun starts ranks only once all hosts have come.
        if rank_processes(agent):
            self._all_have_come = True
            return
        print(f"{now - self._began_at:.0f} s: {self._describe_missing(agent)}", file=sys.stderr, flush=True)
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._next_report_at = now + self._pause_s

    def _describe_missing(self, agent: psutil.Process) -> str:
        """Write the message on which hosts have not come to the rendezvous, and what to do about it.

        `agent`: torchrun's process on this host. Only the first host, at which all meet, can see who has come:

        - any other host: says that it waits for the others there;
        - the first of two hosts: the other one is missing;
        - the first of more hosts: how many have come, by the connections to torchrun, and their addresses.
        """
        nodes = self._launcher.nodes
        rdzv = self._launcher.rdzv
        if not self._this_host.is_first:
            rank = self._this_host.node_rank
            own_name = self._this_host.address if rank is None else rank
            return (
                f"host {own_name} of {nodes} waits for the others at {rdzv}, the first host; does the same command run there, "
                "and does this host reach it?"
            )
        remedy = "start the same command there, or see whether it reaches this host"
        if nodes == 2:
            return f"host 1 of 2 has not come to {rdzv}; {remedy}"
        peers = sorted(_connected_peers(agent, rdzv_port(self._launcher)))
        peer_list = f" ({', '.join(peers)})" if peers else ""
        arrived = f"{len(peers) + 1} of {nodes} hosts have come to {rdzv}"
        return f"{arrived}, this one and {len(peers)} more{peer_list}; on the others {remedy}"


class StuckTorchrunGuard:
    """Kills torchrun if this host's ranks have failed and ended and torchrun does not: it may wait for another host for ever."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._next_check_at = time.monotonic()
        self._had_ranks = False
        self._without_ranks_since: float | None = None

    def poll(self, agent: psutil.Process) -> None:
        """Kill torchrun once it has lived for `STUCK_S` seconds after its ranks ended, if the run has failed; called often.

        `agent`: torchrun's process on this host. Without a failure it rightly waits: other hosts may still be writing the export.
        """
        import psutil

        now = time.monotonic()
        if now < self._next_check_at:  # listing a process's children is not cheap
            return
        self._next_check_at = now + CHECK_EVERY_S
        if rank_processes(agent):
            self._had_ranks = True
            self._without_ranks_since = None
            return
        has_failed = self._had_ranks and bool(read_failure(self._run_dir))
        if not has_failed:
            return
        if self._without_ranks_since is None:
            self._without_ranks_since = now
        if now - self._without_ranks_since > STUCK_S:
            with suppress(psutil.Error):
                agent.kill()


def rank_processes(agent: psutil.Process) -> list[psutil.Process]:
    """The processes of the ranks that torchrun (`agent`) runs on this host."""
    import psutil

    ranks = []
    with suppress(psutil.Error):
        for child in agent.children():
            with suppress(psutil.Error):
                if "RANK" in child.environ():  # else a helper of a library
                    ranks.append(child)
    return ranks


def _connected_peers(agent: psutil.Process, port: int) -> set[str]:
    """IP addresses of the other hosts that have come to the rendezvous: they are connected to torchrun's `port` on this host.

    `agent`: torchrun's process.
    """
    import psutil

    peers: set[str] = set()
    with suppress(psutil.Error):
        connections = agent.net_connections()
        own_addresses = {connection.laddr.ip for connection in connections if connection.laddr}
        for connection in connections:
            is_to_port = connection.raddr and connection.laddr.port == port
            if is_to_port and connection.raddr.ip not in own_addresses:
                # A socket that takes both IPv4 and IPv6 writes IPv4 addresses with this prefix.
                peers.add(connection.raddr.ip.removeprefix("::ffff:"))
    return peers
