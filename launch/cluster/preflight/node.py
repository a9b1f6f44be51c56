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
    """Look, say it, and let the ranks of this node exchange; returns the exit code."""
    request = PreflightRequest.from_environment()
    node_number = int(os.environ.get("SHARDTUNE_NODE") or os.environ.get("SLURM_NODEID") or 0)
    sys.stdout.write(report_lines(node_number, -1, {"look": node_facts(request, node_number)}))
    sys.stdout.flush()
    if not request.exchange or request.nodes * request.processes == 1:
        return 0
    host, _, port = (request.master or _master()).rpartition(":")
    env = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(request.nodes * request.processes)}
    env |= {"LOCAL_WORLD_SIZE": str(request.processes), "SHARDTUNE_NODE": str(node_number)}
    ranks = []
    for local in range(request.processes):
        rank_env = {"RANK": str(node_number * request.processes + local), "LOCAL_RANK": str(local)}
        if request.processes == 1:
            os.environ.update(env | rank_env)
            return rank()
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "launch.cluster.preflight.node", "rank"], env={**os.environ, **env, **rank_env}
            )
        )
    return max(process.wait() for process in ranks)


def rank() -> int:
    """Exchange as one rank; the first one says how it went, and every one that could not says why. Returns the exit code."""
    from launch.cluster.preflight.exchange import exchange

    request, own_rank, node_number = (
        PreflightRequest.from_environment(),
        int(os.environ["RANK"]),
        int(os.environ["SHARDTUNE_NODE"]),
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        rates = exchange(request.device, request.timeout_s)
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is what is to be told
        sys.stdout.write(report_lines(node_number, own_rank, {"error": f"{type(error).__name__}: {error}"[:2000]}))
        sys.stdout.flush()
        end_process(1)  # the groups of a peer that has gone may wait
    if own_rank == 0:
        sys.stdout.write(report_lines(node_number, own_rank, {"exchange": rates}))
        sys.stdout.flush()
    return 0


def _master() -> str:
    from launch.config.process_role import first_host, port

    return f"{first_host(os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_JOB_NODELIST') or '')}:{port(os.environ)}"


if __name__ == "__main__":
    sys.exit({"node": node, "rank": rank}[sys.argv[1]]())
