"""Reads the profiler summaries of a run (`trainer/reporting/profile.py`)."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

TOP_OPERATORS = 12
"""Operators that are shown."""
RANK_TABLE_HEADINGS = ["rank", "window ms", "communication", "exposed", "idle", "peak GiB"]
"""Headings of the table with a row for each rank."""
OPERATOR_TABLE_HEADINGS = ["operator", "ms", "share", "calls"]
"""Headings of the table with a row for each operator."""


class OperatorSummary(TypedDict):
    """The time of one operator on a rank."""

    name: str
    self_s: float
    """Seconds in the operator itself, without those that it calls."""
    calls: int


class MemorySample(TypedDict):
    """Allocated memory at one moment of the profiled time."""

    s: float
    """Seconds since its beginning."""
    gib: float


class RankSummary(TypedDict):
    """One rank's `rank-*.summary.json`, with its keys."""

    rank: int
    steps: list[int]
    """The first and the last profiled step."""
    of: str
    """What the times are of: `device` (kernels of a GPU) or `operators` (of the CPU)."""
    window_s: float
    """The profiled time."""
    operators: list[OperatorSummary]
    memory: list[MemorySample]
    communication_s: float
    exposed_s: float
    """Communication during which nothing was computed."""
    idle_s: float
    """Neither communication nor computation."""


SUMMARY_KEYS = {"rank", "steps", "of", "operators", "memory", "window_s"}
"""Keys of `rank-*.summary.json`; a file that lacks one is ignored."""


@dataclass(frozen=True, slots=True)
class ProfiledSteps:
    """The traced steps of one run."""

    steps: tuple[int, int]
    measured_on: str
    """`device` if the trace has the kernels of a GPU; `operators` if it has only those of the CPU."""
    ranks: list[list[str]]
    """A row a rank, as `RANK_TABLE_HEADINGS` names its cells."""
    operators: list[list[str]]
    """A row an operator, all ranks together, as `OPERATOR_TABLE_HEADINGS` names its cells.

    Each rank records those that took longest on it.
    """
    memory: list[dict[str, Any]]
    """Allocated memory over time, a row for each change: rank, ms, GiB."""
    traces: str
    """Glob pattern of the trace files."""


def read_profile(run_dir: Path) -> ProfiledSteps | None:
    """Read what the profiler recorded in a run: tables of ranks and operators, and memory over time. None if it was not profiled.

    Only ranks whose summary is written whole are in it.
    """
    summaries = _read_summaries(run_dir)
    if not summaries:
        return None
    memory_rows = []
    for summary in summaries:
        for sample in summary["memory"]:
            memory_rows.append({"rank": str(summary["rank"]), "ms": 1e3 * sample["s"], "GiB": sample["gib"]})
    # All ranks trace the same steps, on the same kind of device.
    first_step, last_step = summaries[0]["steps"]
    return ProfiledSteps(
        steps=(first_step, last_step),
        measured_on=summaries[0]["of"],
        ranks=[_rank_row(summary) for summary in summaries],
        operators=_operator_rows(summaries),
        memory=memory_rows,
        traces=str(run_dir / "profile" / "rank-*.json.gz"),
    )


def exposed_communication_s(run_dir: Path) -> float | None:
    """How long a GPU waits for communication in a profiled step, in seconds: it communicates and computes nothing.

    The mean over the ranks. None if the run was not profiled on GPUs.
    """
    seconds_per_step = []
    for summary in _read_summaries(run_dir):
        # A trace of the CPU's operators does not show when a GPU computes.
        if summary["of"] == "device":
            first_step, last_step = summary["steps"]
            num_steps = last_step - first_step + 1
            seconds_per_step.append(summary["exposed_s"] / num_steps)
    if not seconds_per_step:
        return None
    return sum(seconds_per_step) / len(seconds_per_step)


def _operator_rows(summaries: list[RankSummary]) -> list[list[str]]:
    """Rows of the table of operators that took longest, all ranks together, with the cells of `OPERATOR_TABLE_HEADINGS`.

    An operator is a kernel of a GPU or, without a GPU, a function of torch such as a matrix product. Its time is without
    the operators that it calls. At most `TOP_OPERATORS` rows.
    """
    self_s_by_operator: defaultdict[str, float] = defaultdict(float)
    calls_by_operator = Counter[str]()
    for summary in summaries:
        for operator in summary["operators"]:
            self_s_by_operator[operator["name"]] += operator["self_s"]
            calls_by_operator[operator["name"]] += operator["calls"]
    total_s = sum(self_s_by_operator.values()) or 1.0  # 0 would be divided by
    slowest_operators = sorted(self_s_by_operator.items(), key=lambda item: item[1], reverse=True)[:TOP_OPERATORS]
    rows = []
    for name, self_s in slowest_operators:
        milliseconds = f"{1e3 * self_s:.2f}"
        share = f"{self_s / total_s:.0%}"
        rows.append([name, milliseconds, share, str(calls_by_operator[name])])
    return rows


def _rank_row(summary: RankSummary) -> list[str]:
    """The row of one rank, with the cells of `RANK_TABLE_HEADINGS`. Shares are of the profiled time (`window_s`)."""
    window_s = summary["window_s"]
    whole_s = window_s or 1.0  # 0 would be divided by
    communication = f"{summary['communication_s'] / whole_s:.0%}"
    exposed = f"{summary['exposed_s'] / whole_s:.0%}"
    idle = f"{summary['idle_s'] / whole_s:.0%}"
    peak_gib = max((sample["gib"] for sample in summary["memory"]), default=None)
    peak_cell = "-" if peak_gib is None else f"{peak_gib:.3g}"
    return [str(summary["rank"]), f"{1e3 * window_s:.1f}", communication, exposed, idle, peak_cell]


def _read_summaries(directory: Path) -> list[RankSummary]:
    """Read the summary that each rank wrote at the end of profiling, in the order of the ranks; unreadable ones are left out."""
    summaries = []
    for path in (directory / "profile").glob("rank-*.summary.json"):
        summary = _read_summary(path)
        if summary is not None:
            summaries.append(summary)
    return sorted(summaries, key=lambda summary: summary["rank"])


def _read_summary(path: Path) -> RankSummary | None:
    """One rank's summary; None if the file cannot be read, or is not whole yet."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return summary if summary.keys() >= SUMMARY_KEYS else None
    except (OSError, ValueError, AttributeError):
        return None
