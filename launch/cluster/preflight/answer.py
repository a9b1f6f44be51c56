"""Prints the result of a preflight, for people and as JSON."""

from __future__ import annotations

from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest
from launch.cluster.preflight.verdict import NodeReports, PreflightVerdict
from launch.output import Column, TableRow, fold, fold_all, table

COLUMNS = tuple(map(Column, ("node", "host", "python", "torch", "cores", "memory", "run.dir", "GPUs")))


def report_text(request: PreflightRequest, reports: NodeReports, verdict: PreflightVerdict) -> str:
    """The result of a preflight as text for people: a row for each node, the rates between ranks, problems and notes."""
    nodes = f"{request.nodes} node{'s' * (request.nodes > 1)}"
    processes = f"{request.processes} process{'es' * (request.processes > 1)}"
    lines = [f"preflight: {nodes} x {processes}"]
    lines += table(COLUMNS, [TableRow(_node_cells(node, reports)) for node in range(request.nodes)])
    if reports.exchange is not None:
        lines += fold(_exchange_rates(reports.exchange), 2)
    if verdict.problems:
        lines += ["problems:", *fold_all(verdict.problems)]
    if verdict.notes:
        lines += ["notes:", *fold_all(verdict.notes)]
    if not verdict.problems:
        lines.append("no problems: the nodes can run the job")
    return "\n".join(lines)


def _node_cells(node: int, reports: NodeReports) -> tuple[str, ...]:
    """The table cells of one node, in the order of `COLUMNS`; mostly empty for a node that gave no answer."""
    facts = reports.facts.get(node)
    if facts is None:
        return (str(node), reports.host_name(node), "no answer", "", "", "", "", "")
    gpus = "none"
    if facts["gpus"]:
        gpus = f"{facts['gpu_count']} {facts['gpus'][0]['name']}"
    return (
        str(node),
        facts["host"],
        facts["python"],
        facts["packages"].get("torch", "missing"),
        str(facts["cores"]),
        _gib(facts["memory_free_gib"]),
        _gib((facts.get("run_dir") or {}).get("free_gib")),
        gpus,
    )


def _gib(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.1f} GiB"


def _exchange_rates(exchange: dict[str, Any]) -> str:
    """The rates of the communication test between ranks (`exchange.measure_communication`), in one line."""
    line = (
        f"communication of {exchange['ranks']} ranks ({exchange['backend']}), GB/s: "
        f"all-reduce {exchange['all_reduce']:.2f}, all-gather {exchange['all_gather']:.2f}"
    )
    rates = [rate for _, _, rate in exchange["pairs"]]
    if rates:
        line += f", between two nodes {min(rates):.2f} to {max(rates):.2f}"
    return line


def as_dict(request: PreflightRequest, reports: NodeReports, verdict: PreflightVerdict) -> dict[str, Any]:
    """The result of a preflight for `--json`, with everything that the nodes reported; rates in GB/s, sizes in GiB."""
    nodes = []
    for node in range(request.nodes):
        answered = node in reports.facts
        row = {"node": node, "host": reports.host_name(node), "answered": answered}
        nodes.append(row | reports.facts.get(node, {}))
    return {
        "fit": not verdict.problems,
        "processes": request.processes,
        "nodes": nodes,
        "exchange": reports.exchange,
        "problems": verdict.problems,
        "notes": verdict.notes,
    }
