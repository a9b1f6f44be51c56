"""Runs on one node of a preflight, and as one of its ranks: `python -m launch.cluster.preflight.node node`.

It reports the facts of the node, starts the ranks, and prints lines that `coordinator.py` reads. srun carries these
lines, so no shared disk and no network connection of ours is needed.
"""

import json
import os
import subprocess
import sys
from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest, node_facts
from strategies.compat.python import end_process

REPORT_MARK = "preflight"
NODE_ITSELF = -1
"""The rank of a report that comes from the node, and not from one of its ranks."""
PIECE_CHARACTERS = 700
"""Characters of a line; srun breaks those above a thousand."""


def report_lines(node: int, rank: int, report: dict[str, Any]) -> str:
    """Write a report as lines that the coordinator of a preflight puts together again, since srun breaks long lines.

    Each line is `preflight <node> <rank> <number>/<pieces> <part of the JSON>`. `rank`: -1 for a report of the node itself.
    """
    json_text = json.dumps(report)
    pieces = [json_text[start : start + PIECE_CHARACTERS] for start in range(0, len(json_text), PIECE_CHARACTERS)]
    lines = []
    for number, piece in enumerate(pieces, 1):
        lines.append(f"{REPORT_MARK} {node} {rank} {number}/{len(pieces)} {piece}\n")
    return "".join(lines)


def run_node() -> int:
    """Check this node for a preflight: print its facts, and run its ranks, which measure their communication.

    A preflight asks all nodes of a job whether they can run it. The request is in the environment. Returns the exit code. By the
    request:

    - No communication test: no rank runs.
    - One rank on each node: this process becomes the rank.
    - Several ranks: a process for each; the exit code is the largest of theirs.
    """
    request = PreflightRequest.from_environment()
    node_number = int(os.environ.get("SHARDTUNE_NODE") or os.environ.get("SLURM_NODEID") or 0)
    _print_report(node_number, NODE_ITSELF, {"node_facts": node_facts(request, node_number)})
    if not request.tests_communication:
        return 0
    host, _, port = (request.rendezvous or _rendezvous_by_slurm()).rpartition(":")
    env = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(request.num_nodes * request.ranks_per_node),
        "LOCAL_WORLD_SIZE": str(request.ranks_per_node),
        "SHARDTUNE_NODE": str(node_number),
    }
    rank_processes = []
    for local_rank in range(request.ranks_per_node):
        rank = node_number * request.ranks_per_node + local_rank
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        if request.ranks_per_node == 1:
            os.environ.update(env | rank_env)
            return measure_as_rank()  # reads these variables
        command = [sys.executable, "-m", "launch.cluster.preflight.node", "rank"]
        rank_processes.append(subprocess.Popen(command, env={**os.environ, **env, **rank_env}))
    return max(process.wait() for process in rank_processes)


def measure_as_rank() -> int:
    """Measure the communication of a preflight as one rank; returns the exit code.

    Rank 0 reports the rates, any rank reports its error. After an error the process ends here, with code 1: its process group may
    wait for a peer that is lost.
    """
    from launch.cluster.preflight.exchange import measure_communication

    request = PreflightRequest.from_environment()
    rank = int(os.environ["RANK"])
    node_number = int(os.environ["SHARDTUNE_NODE"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        rates = measure_communication(request.device, request.timeout_s)
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is to be reported
        message = f"{type(error).__name__}: {error}"[:2000]
        _print_report(node_number, rank, {"error": message})
        end_process(1)
    if rank == 0:
        _print_report(node_number, rank, {"communication_rates": rates})
    return 0


def _print_report(node: int, rank: int, report: dict[str, Any]) -> None:
    """Print a report for the coordinator at once, in lines that srun does not break."""
    sys.stdout.write(report_lines(node, rank, report))
    sys.stdout.flush()


def _rendezvous_by_slurm() -> str:
    """The host:port at which the ranks meet, from SLURM's variables."""
    from launch.config.process_role import first_host, master_port

    node_list = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    return f"{first_host(node_list)}:{master_port(os.environ)}"


if __name__ == "__main__":
    sys.exit({"node": run_node, "rank": measure_as_rank}[sys.argv[1]]())
