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

from launch.cluster.preflight.node_facts import PreflightRequest, look
from strategies.compat.python import end_process

MARK = "preflight"
PIECE = 700
"""Characters of a line; srun breaks those above a thousand."""


def lines_of(node: int, rank: int, value: dict[str, Any]) -> str:
    """The lines that carry a value."""
    text = json.dumps(value)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    return "".join(f"{MARK} {node} {rank} {number}/{len(pieces)} {piece}\n" for number, piece in enumerate(pieces, 1))


def node() -> int:
    """Look, say it, and let the ranks of this node exchange; returns the exit code."""
    asked = PreflightRequest.told()
    number = int(os.environ.get("SHARDTUNE_NODE") or os.environ.get("SLURM_NODEID") or 0)
    sys.stdout.write(lines_of(number, -1, {"look": look(asked, number)}))
    sys.stdout.flush()
    if not asked.exchange or asked.nodes * asked.processes == 1:
        return 0
    host, _, at = (asked.master or _master()).rpartition(":")
    env = {"MASTER_ADDR": host, "MASTER_PORT": at, "WORLD_SIZE": str(asked.nodes * asked.processes)}
    env |= {"LOCAL_WORLD_SIZE": str(asked.processes), "SHARDTUNE_NODE": str(number)}
    ranks = []
    for local in range(asked.processes):
        own = {"RANK": str(number * asked.processes + local), "LOCAL_RANK": str(local)}
        if asked.processes == 1:
            os.environ.update(env | own)
            return rank()
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "launch.cluster.preflight.node", "rank"], env={**os.environ, **env, **own}
            )
        )
    return max(process.wait() for process in ranks)


def rank() -> int:
    """Exchange as one rank; the first one says how it went, and every one that could not says why. Returns the exit code."""
    from launch.cluster.preflight.exchange import exchange

    asked, own, number = PreflightRequest.told(), int(os.environ["RANK"]), int(os.environ["SHARDTUNE_NODE"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        found = exchange(asked.device, asked.timeout_s)
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is what is to be told
        sys.stdout.write(lines_of(number, own, {"error": f"{type(error).__name__}: {error}"[:2000]}))
        sys.stdout.flush()
        end_process(1)  # the groups of a peer that has gone may wait
    if own == 0:
        sys.stdout.write(lines_of(number, own, {"exchange": found}))
        sys.stdout.flush()
    return 0


def _master() -> str:
    from launch.config.process_role import first_host, port

    return f"{first_host(os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_JOB_NODELIST') or '')}:{port(os.environ)}"


if __name__ == "__main__":
    sys.exit({"node": node, "rank": rank}[sys.argv[1]]())
