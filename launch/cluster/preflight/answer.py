"""The answer of a preflight: a table of 80 columns, and JSON."""

from __future__ import annotations

import textwrap
from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest
from launch.cluster.preflight.verdict import Heard, PreflightVerdict

WIDTH = 80


def text(asked: PreflightRequest, heard: Heard, verdict: PreflightVerdict) -> str:
    """What a person reads: a row for each node, the exchange, what is to be mended and what to know."""
    many = [f"{asked.nodes} node{'s' * (asked.nodes > 1)}", f"{asked.processes} process{'es' * (asked.processes > 1)}"]
    rows: list[tuple[str, ...]] = [("node", "host", "python", "torch", "cores", "memory", "run.dir", "GPUs")]
    rows += [_row(node, heard) for node in range(asked.nodes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"preflight: {' x '.join(many)}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if heard.exchange is not None:
        lines += _folded(_exchange(heard), 2)
    for title, said in (("to mend", verdict.problems), ("to know", verdict.notes)):
        lines += [f"{title}:", *(line for each in said for line in _folded(f"  {each}", 4))] if said else []
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


def _folded(said: str, indent: int) -> list[str]:
    return textwrap.wrap(said, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
