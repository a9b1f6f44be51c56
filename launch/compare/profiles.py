"""Reads the profiler summaries of a run (`trainer/reporting/profile.py`)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = 12
"""Operators that are shown."""
RANKS = ["rank", "window ms", "communication", "exposed", "idle", "peak GiB"]
OPERATORS = ["operator", "ms", "share", "calls"]


@dataclass(frozen=True, slots=True)
class ProfiledSteps:
    """The traced steps of one run."""

    steps: tuple[int, int]
    measured_on: str
    """`device` or `operators`: what was looked at."""
    ranks: list[list[str]]
    """A row a rank, as `RANKS` names its cells."""
    operators: list[list[str]]
    """Of all ranks together, as `OPERATORS` does; a rank tells those that took longest on it."""
    memory: list[dict[str, Any]]
    """Points of the memory's course: rank, ms, GiB."""
    traces: str
    """Where they are."""


def read_profile(directory: Path) -> ProfiledSteps | None:
    """None where no steps were traced; a file that cannot be read, as of a rank that writes it, is left out."""
    found = sorted(
        filter(None, map(_read_summary, (directory / "profile").glob("rank-*.summary.json"))), key=lambda e: e["rank"]
    )
    if not found:
        return None
    first, last = found[0]["steps"]
    seconds, calls = Counter[str](), Counter[str]()
    for each in (operator for rank in found for operator in rank["operators"]):
        seconds[each["name"]] += each["self_s"]
        calls[each["name"]] += each["calls"]
    whole = seconds.total() or 1.0
    return ProfiledSteps(
        steps=(first, last),
        measured_on=found[0]["of"],
        ranks=[_rank_row(each) for each in found],
        operators=[
            [name, f"{1e3 * took:.2f}", f"{took / whole:.0%}", str(calls[name])]
            for name, took in seconds.most_common(TOP)
        ],
        memory=[
            {"rank": str(each["rank"]), "ms": 1e3 * point["s"], "GiB": point["gib"]}
            for each in found
            for point in each["memory"]
        ],
        traces=str(directory / "profile" / "rank-*.json.gz"),
    )


def exposed_s(directory: Path) -> float | None:
    """Seconds of a traced step of GPUs in which there was exchange and nothing was computed, mean over the ranks; else None."""
    summaries = filter(None, map(_read_summary, (directory / "profile").glob("rank-*.summary.json")))
    seconds_per_step = [
        summary["exposed_s"] / (summary["steps"][1] - summary["steps"][0] + 1)
        for summary in summaries
        if summary["of"] == "device"
    ]
    return sum(seconds_per_step) / len(seconds_per_step) if seconds_per_step else None


def _rank_row(summary: dict[str, Any]) -> list[str]:
    window = summary["window_s"] or 1.0
    shares = [f"{summary[key] / window:.0%}" for key in ("communication_s", "exposed_s", "idle_s")]
    peak = max((point["gib"] for point in summary["memory"]), default=None)
    return [str(summary["rank"]), f"{1e3 * summary['window_s']:.1f}", *shares, "-" if peak is None else f"{peak:.3g}"]


def _read_summary(path: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return summary if {"rank", "steps", "of", "operators", "memory", "window_s"} <= summary.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
