"""Runs on one node of a preflight, and as one of its ranks: `python -m launch.cluster.preflight.node node`.

It reports the facts of the node, starts the ranks, and prints lines that `coordinator.py` reads. srun carries these
lines, so no shared disk and no network connection of ours is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest, node_facts
from strategies.compat.python import end_process

MARK = "preflight"
PIECE = 700
"""Characters of a line; srun breaks those above a thousand."""


def report_lines(node: int, rank: int, report: dict[str, Any]) -> str:
    """The lines that carry a value."""
    text = json.dumps(report)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    return "".join(f"{MARK} {node} {rank} {number}/{len(pieces)} {piece}\n" for number, piece in enumerate(pieces, 1))


def node() -> int:
    """Report the facts of this node, and let its ranks measure their communication; returns the exit code."""
    request = PreflightRequest.from_environment()
    node_number = int(os.environ.get("SHARDTUNE_NODE") or os.environ.get("SLURM_NODEID") or 0)
    sys.stdout.write(report_lines(node_number, -1, {"look": node_facts(request, node_number)}))
    sys.stdout.flush()
    world = request.nodes * request.processes
    if not request.exchange or world == 1:
        return 0
    host, _, port = (request.master or _master()).rpartition(":")
    env = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(request.processes),
        "SHARDTUNE_NODE": str(node_number),
    }
    ranks = []
    for local_rank in range(request.processes):
        rank_env = {"RANK": str(node_number * request.processes + local_rank), "LOCAL_RANK": str(local_rank)}
        if request.processes == 1:  # this process is the rank
            os.environ.update(env | rank_env)
            return rank()
        command = [sys.executable, "-m", "launch.cluster.preflight.node", "rank"]
        ranks.append(subprocess.Popen(command, env={**os.environ, **env, **rank_env}))
    return max(process.wait() for process in ranks)


def rank() -> int:
    """Exchange as one rank; returns the exit code. Rank 0 reports the rates, any rank reports its error."""
    from launch.cluster.preflight.exchange import exchange

    request = PreflightRequest.from_environment()
    own_rank = int(os.environ["RANK"])
    node_number = int(os.environ["SHARDTUNE_NODE"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        rates = exchange(request.device, request.timeout_s)
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is what is to be told
        sys.stdout.write(report_lines(node_number, own_rank, {"error": f"{type(error).__name__}: {error}"[:2000]}))
        sys.stdout.flush()
        end_process(1)  # the process group may wait for a peer that has gone
    if own_rank == 0:
        sys.stdout.write(report_lines(node_number, own_rank, {"exchange": rates}))
        sys.stdout.flush()
    return 0


def _master() -> str:
    from launch.config.process_role import first_host, port

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    return f"{first_host(nodes)}:{port(os.environ)}"


if __name__ == "__main__":
    sys.exit({"node": node, "rank": rank}[sys.argv[1]]())
