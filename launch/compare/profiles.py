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
KEYS = {"rank", "steps", "of", "operators", "memory", "window_s"}
"""What a summary has; a file without one of them is no summary."""


@dataclass(frozen=True, slots=True)
class ProfiledSteps:
    """The traced steps of one run."""

    steps: tuple[int, int]
    measured_on: str
    """`device` or `operators`: what was looked at."""
    ranks: list[list[str]]
    """A row a rank, as `RANKS` names its cells."""
    operators: list[list[str]]
    """A row an operator, all ranks together, as `OPERATORS` names its cells. Each rank records those that took longest on it."""
    memory: list[dict[str, Any]]
    """Points of the memory's course: rank, ms, GiB."""
    traces: str
    """Where they are."""


def read_profile(directory: Path) -> ProfiledSteps | None:
    """The traced steps of a run; None if there are none. A summary that is just being written is left out."""
    summaries = _read_summaries(directory)
    if not summaries:
        return None
    memory = []
    for summary in summaries:
        for point in summary["memory"]:
            memory.append({"rank": str(summary["rank"]), "ms": 1e3 * point["s"], "GiB": point["gib"]})
    first, last = summaries[0]["steps"]
    return ProfiledSteps(
        steps=(first, last),
        measured_on=summaries[0]["of"],
        ranks=[_rank_row(summary) for summary in summaries],
        operators=_operator_rows(summaries),
        memory=memory,
        traces=str(directory / "profile" / "rank-*.json.gz"),
    )


def exposed_s(directory: Path) -> float | None:
    """Seconds of a traced step of GPUs in which there was exchange and nothing was computed, mean over the ranks; else None."""
    seconds_per_step = []
    for summary in _read_summaries(directory):
        if summary["of"] == "device":
            first, last = summary["steps"]
            seconds_per_step.append(summary["exposed_s"] / (last - first + 1))
    return sum(seconds_per_step) / len(seconds_per_step) if seconds_per_step else None


def _operator_rows(summaries: list[dict[str, Any]]) -> list[list[str]]:
    """The operators that took longest, all ranks together, as `OPERATORS` names their cells."""
    seconds = Counter[str]()
    calls = Counter[str]()
    for summary in summaries:
        for operator in summary["operators"]:
            seconds[operator["name"]] += operator["self_s"]
            calls[operator["name"]] += operator["calls"]
    total_s = seconds.total() or 1.0
    return [
        [name, f"{1e3 * self_s:.2f}", f"{self_s / total_s:.0%}", str(calls[name])]
        for name, self_s in seconds.most_common(TOP)
    ]


def _rank_row(summary: dict[str, Any]) -> list[str]:
    window = summary["window_s"] or 1.0
    shares = [f"{summary[key] / window:.0%}" for key in ("communication_s", "exposed_s", "idle_s")]
    peak = max((point["gib"] for point in summary["memory"]), default=None)
    return [str(summary["rank"]), f"{1e3 * summary['window_s']:.1f}", *shares, "-" if peak is None else f"{peak:.3g}"]


def _read_summaries(directory: Path) -> list[dict[str, Any]]:
    """The ranks' summaries that can be read, by rank."""
    files = (directory / "profile").glob("rank-*.summary.json")
    summaries = [summary for file in files if (summary := _read_summary(file)) is not None]
    return sorted(summaries, key=lambda summary: summary["rank"])


def _read_summary(path: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return summary if summary.keys() >= KEYS else None
    except (OSError, ValueError, AttributeError):
        return None
