"""Prints the result of a preflight, for people and as JSON."""

from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest
from launch.cluster.preflight.verdict import NodeReports, PreflightVerdict
from launch.output import TableColumn, TableRow, format_table, wrap_sentences, wrap_text

NODE_COLUMN_NAMES = ("node", "host", "python", "torch", "cores", "memory", "run.dir", "GPUs")
NODE_COLUMNS = tuple(map(TableColumn, NODE_COLUMN_NAMES))


def report_text(request: PreflightRequest, reports: NodeReports, verdict: PreflightVerdict) -> str:
    """Write the result of a preflight for people: a row for each node, the rates between ranks, problems and notes.

    A preflight asks all nodes of a job, before its ranks start, whether they can run it.
    """
    nodes = f"{request.num_nodes} node{'s' * (request.num_nodes > 1)}"
    processes = f"{request.ranks_per_node} process{'es' * (request.ranks_per_node > 1)}"
    lines = [f"preflight: {nodes} x {processes}"]
    lines += format_table(NODE_COLUMNS, [_node_row(node, reports) for node in range(request.num_nodes)])
    if reports.communication_rates is not None:
        lines += wrap_text(_communication_line(reports.communication_rates), indent=2)
    if verdict.problems:
        lines += ["problems:", *wrap_sentences(verdict.problems)]
    if verdict.notes:
        lines += ["notes:", *wrap_sentences(verdict.notes)]
    if not verdict.problems:
        lines.append("no problems: the nodes can run the job")
    return "\n".join(lines)


def _node_row(node: int, reports: NodeReports) -> TableRow:
    """The table row of one node of a preflight; for a node that gave no answer, only its number and name.

    `node`: its number. `reports`: what all nodes have reported.
    """
    cell_by_column = {"node": str(node), "host": reports.host_name(node), "python": "no answer"}
    facts = reports.facts.get(node)
    if facts is not None:
        run_dir_facts = facts.get("run_dir") or {}
        gpus = facts["gpus"]
        cell_by_column |= {
            "python": facts["python"],
            "torch": facts["packages"].get("torch", "missing"),
            "cores": str(facts["cores"]),
            "memory": _gib_text(facts["memory_free_gib"]),
            "run.dir": _gib_text(run_dir_facts.get("free_gib")),
            "GPUs": f"{facts['gpu_count']} {gpus[0]['name']}" if gpus else "none",
        }
    return TableRow(tuple(cell_by_column.get(column, "") for column in NODE_COLUMN_NAMES))


def _gib_text(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.1f} GiB"


def _communication_line(rates: dict[str, Any]) -> str:
    """The line about the communication test of a preflight: how fast the ranks exchange data, in GB/s.

    `rates`: {"ranks": 16, "backend": "nccl", "all_reduce": 80.0, "all_gather": 75.0, "pairs": [(node, node, GB/s), ...], ...}, by
        `exchange.measure_communication`.
    """
    line = (
        f"communication of {rates['ranks']} ranks ({rates['backend']}), GB/s: "
        f"all-reduce {rates['all_reduce']:.2f}, all-gather {rates['all_gather']:.2f}"
    )
    pair_rates = [rate for _, _, rate in rates["pairs"]]
    if pair_rates:
        line += f", between two nodes {min(pair_rates):.2f} to {max(pair_rates):.2f}"
    return line


def preflight_json(request: PreflightRequest, reports: NodeReports, verdict: PreflightVerdict) -> dict[str, Any]:
    """The result of a preflight for `--json`, with everything that the nodes reported; rates in GB/s, sizes in GiB."""
    node_rows: list[dict[str, Any]] = []
    for node in range(request.num_nodes):
        has_answered = node in reports.facts
        row: dict[str, Any] = {"node": node, "host": reports.host_name(node), "answered": has_answered}
        if has_answered:
            row |= reports.facts[node]
        node_rows.append(row)
    return {
        "fit": not verdict.problems,
        "processes": request.ranks_per_node,
        "nodes": node_rows,
        "exchange": reports.communication_rates,
        "problems": verdict.problems,
        "notes": verdict.notes,
    }
