"""Prints the result of a preflight, for people and as JSON."""

from __future__ import annotations

from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest
from launch.cluster.preflight.verdict import Heard, PreflightVerdict
from launch.output import Column, TableRow, fold, fold_all, table

COLUMNS = tuple(map(Column, ("node", "host", "python", "torch", "cores", "memory", "run.dir", "GPUs")))


def text(asked: PreflightRequest, heard: Heard, verdict: PreflightVerdict) -> str:
    """What a person reads: a row for each node, the exchange, what is to be mended and what to know."""
    nodes = f"{asked.nodes} node{'s' * (asked.nodes > 1)}"
    processes = f"{asked.processes} process{'es' * (asked.processes > 1)}"
    lines = [f"preflight: {nodes} x {processes}"]
    lines += table(COLUMNS, [TableRow(_row(node, heard)) for node in range(asked.nodes)])
    if heard.exchange is not None:
        lines += fold(_exchange(heard), 2)
    for title, sentences in (("to mend", verdict.problems), ("to know", verdict.notes)):
        lines += [f"{title}:", *fold_all(sentences)] if sentences else []
    return "\n".join(lines if verdict.problems else [*lines, "the nodes are fit"])


def _row(node: int, heard: Heard) -> tuple[str, ...]:
    seen = heard.looks.get(node)
    if seen is None:
        return (str(node), heard.name(node), "no answer", "", "", "", "", "")
    place = seen.get("run_dir") or {}
    memory, free = seen["memory_free_gib"], place.get("free_gib")
    return (
        str(node),
        seen["host"],
        seen["python"],
        seen["packages"].get("torch", "missing"),
        str(seen["cores"]),
        "-" if memory is None else f"{memory:.1f} GiB",
        "-" if free is None else f"{free:.1f} GiB",
        f"{seen['gpu_count']} {seen['gpus'][0]['name']}" if seen["gpus"] else "none",
    )


def _exchange(heard: Heard) -> str:
    found = heard.exchange or {}
    pairs = [rate for _, _, rate in found["pairs"]]
    between = f", between two nodes {min(pairs):.2f} to {max(pairs):.2f}" if pairs else ""
    return (
        f"exchange of {found['ranks']} ranks ({found['backend']}), GB/s: all-reduce {found['all_reduce']:.2f}, all-gather "
        f"{found['all_gather']:.2f}{between}"
    )


def as_dict(asked: PreflightRequest, heard: Heard, verdict: PreflightVerdict) -> dict[str, Any]:
    """Everything that was heard, as JSON has it; rates in GB/s, sizes in GiB."""
    return {
        "fit": not verdict.problems,
        "processes": asked.processes,
        "nodes": [
            {"node": node, "host": heard.name(node), "answered": node in heard.looks, **heard.looks.get(node, {})}
            for node in range(asked.nodes)
        ],
        "exchange": heard.exchange,
        "problems": verdict.problems,
        "notes": verdict.notes,
    }
