"""Prints the result of a preflight, for people and as JSON."""

from __future__ import annotations

from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest
from launch.cluster.preflight.verdict import NodeReports, PreflightVerdict
from launch.output import Column, TableRow, fold, fold_all, table

COLUMNS = tuple(map(Column, ("node", "host", "python", "torch", "cores", "memory", "run.dir", "GPUs")))


def text(request: PreflightRequest, reports: NodeReports, verdict: PreflightVerdict) -> str:
    """What a person reads: a row for each node, the exchange, what is to be mended and what to know."""
    nodes = f"{request.nodes} node{'s' * (request.nodes > 1)}"
    processes = f"{request.processes} process{'es' * (request.processes > 1)}"
    lines = [f"preflight: {nodes} x {processes}"]
    lines += table(COLUMNS, [TableRow(_row(node, reports)) for node in range(request.nodes)])
    if reports.exchange is not None:
        lines += fold(_exchange(reports), 2)
    for title, sentences in (("to mend", verdict.problems), ("to know", verdict.notes)):
        lines += [f"{title}:", *fold_all(sentences)] if sentences else []
    return "\n".join(lines if verdict.problems else [*lines, "the nodes are fit"])


def _row(node: int, reports: NodeReports) -> tuple[str, ...]:
    facts = reports.facts.get(node)
    if facts is None:
        return (str(node), reports.host_name(node), "no answer", "", "", "", "", "")
    place = facts.get("run_dir") or {}
    memory_gib, free_gib = facts["memory_free_gib"], place.get("free_gib")
    return (
        str(node),
        facts["host"],
        facts["python"],
        facts["packages"].get("torch", "missing"),
        str(facts["cores"]),
        "-" if memory_gib is None else f"{memory_gib:.1f} GiB",
        "-" if free_gib is None else f"{free_gib:.1f} GiB",
        f"{facts['gpu_count']} {facts['gpus'][0]['name']}" if facts["gpus"] else "none",
    )


def _exchange(reports: NodeReports) -> str:
    exchange = reports.exchange or {}
    pairs = [rate for _, _, rate in exchange["pairs"]]
    between = f", between two nodes {min(pairs):.2f} to {max(pairs):.2f}" if pairs else ""
    return (
        f"exchange of {exchange['ranks']} ranks ({exchange['backend']}), GB/s: all-reduce {exchange['all_reduce']:.2f}, all-gather "
        f"{exchange['all_gather']:.2f}{between}"
    )


def as_dict(request: PreflightRequest, reports: NodeReports, verdict: PreflightVerdict) -> dict[str, Any]:
    """Everything that was heard, as JSON has it; rates in GB/s, sizes in GiB."""
    return {
        "fit": not verdict.problems,
        "processes": request.processes,
        "nodes": [
            {
                "node": node,
                "host": reports.host_name(node),
                "answered": node in reports.facts,
                **reports.facts.get(node, {}),
            }
            for node in range(request.nodes)
        ],
        "exchange": reports.exchange,
        "problems": verdict.problems,
        "notes": verdict.notes,
    }
