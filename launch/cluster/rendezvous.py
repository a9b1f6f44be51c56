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
        self._num_hosts = launcher.nodes
        self._rendezvous = launcher.rdzv
        self._rendezvous_port = rdzv_port(launcher)
        self._this_host = this_host
        self._began_at = time.monotonic()
        self._pause_s = FIRST_REPORT_S
        self._next_report_at = self._began_at + self._pause_s
        self._all_have_come = False

    def poll(self, torchrun_process: psutil.Process) -> None:
        """Print which hosts are missing, at growing intervals until all have come; called a few times a second."""
        now = time.monotonic()
        if self._all_have_come or now < self._next_report_at:
            return
        # torchrun starts ranks only once all hosts have come.
        if rank_processes(torchrun_process):
            self._all_have_come = True
            return
        print(f"{now - self._began_at:.0f} s: {self._describe_missing(torchrun_process)}", file=sys.stderr, flush=True)
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._next_report_at = now + self._pause_s

    def _describe_missing(self, torchrun_process: psutil.Process) -> str:
        """Write the message on which hosts have not come to the rendezvous, and what to do about it.

        Only the first host, at which all meet, can see who has come:

        - any other host: says that it waits for the others there;
        - the first of two hosts: the other one is missing;
        - the first of more hosts: how many have come, by the connections to its torchrun, and their addresses.
        """
        if not self._this_host.is_first:
            node_rank = self._this_host.node_rank  # None if the hosts find out among themselves
            own_name = self._this_host.address if node_rank is None else node_rank
            return (
                f"host {own_name} of {self._num_hosts} waits for the others at {self._rendezvous}, the first host; does the same "
                "command run there, and does this host reach it?"
            )
        remedy = "start the same command there, or see whether it reaches this host"
        if self._num_hosts == 2:
            return f"host 1 of 2 has not come to {self._rendezvous}; {remedy}"
        peers = sorted(_connected_peers(torchrun_process, self._rendezvous_port))
        peer_list = f" ({', '.join(peers)})" if peers else ""
        arrived = f"{len(peers) + 1} of {self._num_hosts} hosts have come to {self._rendezvous}"
        return f"{arrived}, this one and {len(peers)} more{peer_list}; on the others {remedy}"


class StuckTorchrunGuard:
    """Kills torchrun if this host's ranks have failed and ended and torchrun does not: it may wait for another host for ever."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._next_check_at = time.monotonic()
        self._had_ranks = False
        self._without_ranks_since: float | None = None

    def poll(self, torchrun_process: psutil.Process) -> None:
        """Kill torchrun once it has lived for `STUCK_S` seconds after its ranks ended, if the run has failed; called often.

        Without a failure it rightly waits: other hosts may still be writing the export.
        """
        import psutil

        now = time.monotonic()
        if now < self._next_check_at:  # listing a process's children is not cheap
            return
        self._next_check_at = now + CHECK_EVERY_S
        if rank_processes(torchrun_process):
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
                torchrun_process.kill()


def rank_processes(torchrun_process: psutil.Process) -> list[psutil.Process]:
    """The processes of the ranks that torchrun runs on this host."""
    import psutil

    ranks = []
    with suppress(psutil.Error):
        for child in torchrun_process.children():
            with suppress(psutil.Error):
                if "RANK" in child.environ():  # else a helper of a library
                    ranks.append(child)
    return ranks


def _connected_peers(torchrun_process: psutil.Process, port: int) -> set[str]:
    """IP addresses of the other hosts that have come to the rendezvous: they are connected to torchrun's `port` on this host."""
    import psutil

    peers: set[str] = set()
    with suppress(psutil.Error):
        connections = torchrun_process.net_connections()
        own_addresses = {connection.laddr.ip for connection in connections if connection.laddr}
        for connection in connections:
            is_to_port = connection.raddr and connection.laddr.port == port
            if is_to_port and connection.raddr.ip not in own_addresses:
                # A socket that takes both IPv4 and IPv6 writes IPv4 addresses with this prefix.
                peers.add(connection.raddr.ip.removeprefix("::ffff:"))
    return peers
