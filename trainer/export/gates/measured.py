"""Finds the measurement that a gate names: metrics of training's evaluations, of evaluation reports, of reviews.

A gate may name a report's metric by `TASK/METRIC` (`eval/` before it or not), by one name if task and metric are
called alike, by `KIND/METRIC`, by `METRIC`, or by a task or kind, which stands for its first metric. The first of
these forms that matches anything counts, with everything that it matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.reporting.results import EVALUATION, REVIEW, KeptReport, at_step, kept_reports, rows

FORGETTING = "forgetting"
GENERAL = (FORGETTING, "general")
"""Tasks of these names, or that begin with them, ask what the base knew."""
WAYS = 5
"""Ways to name a metric of a report, as above."""


@dataclass(frozen=True, slots=True)
class MeasuredMetric:
    """One number of some weights."""

    names: tuple[str, ...]
    """What it is called in each of the ways; empty where it has no such name."""
    value: float
    where: str
    """Where it was measured, in words."""
    mine: bool
    """Whether it was measured of the weights that are asked about."""
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str:
        """The name that it is listed by."""
        return self.names[0]


def measured(run_dir: Path, step: int | None, artefact: str | None) -> list[MeasuredMetric]:
    """All that is known of a run, the newest first: of the weights at `step`, whose hash is `artefact`, and of others."""
    found = []
    for report in kept_reports(run_dir):
        mine = artefact is not None and report.artefact == artefact
        found += [*({EVALUATION: _of_evaluation, REVIEW: _of_review}[report.kind](report, mine))]
    evaluated = [row["step"] for row in rows(run_dir) if any(name.startswith("eval/") for name in row)]
    for there in dict.fromkeys([step, *reversed(evaluated)]):
        for name, value in ({} if there is None else at_step(run_dir, there)).items():
            if isinstance(value, int | float):
                inner = name.removeprefix("eval/")
                names = (inner, "", "", inner.rpartition("/")[2], "")
                found.append(
                    MeasuredMetric(names, float(value), f"training's evaluation at step {there}", there == step)
                )
    return found


def matching(gate: str, found: list[MeasuredMetric]) -> list[MeasuredMetric]:
    """Everything that a gate means, the newest of each."""
    wanted = gate.removeprefix("eval/") or gate
    for way in range(WAYS):
        newest: dict[str, MeasuredMetric] = {}
        for each in found:
            if each.names[way] == wanted:
                newest.setdefault(each.name, each)
        if newest:
            return [*newest.values()]
    return []


def _of_evaluation(kept_report: KeptReport, mine: bool) -> Iterator[MeasuredMetric]:
    report = kept_report.report
    against = report.get("against") or {}
    for task, said in (report.get("tasks") or {}).items():
        for place, (metric, each) in enumerate((said.get("metrics") or {}).items()):
            kind, alike = str(said.get("kind")), metric if task == metric else ""
            for leading in (task, kind) if place == 0 else ("",):
                names = (f"{task}/{metric}", alike, f"{kind}/{metric}", metric, leading)
                yield _measured(kept_report, names, each, mine)
        if against.get("what") == "base" and task.startswith(GENERAL):
            forgotten = _forgotten(said, (against.get("tasks") or {}).get(task) or {})
            names = (f"{task}/{FORGETTING}", "", "", FORGETTING, "")
            yield from [_measured(kept_report, names, forgotten, mine)] if forgotten else []


def _forgotten(said: dict[str, Any], apart: dict[str, Any]) -> dict[str, Any]:
    """How much worse than the base the first metric is, as a share of the base's; empty where that is not known."""
    metric = next(iter(said.get("metrics") or {}), None)
    if metric is None or not (change := (apart.get("metrics") or {}).get(metric)) or not change.get("value"):
        return {}
    scale = (-1 if said["metrics"][metric].get("greater_is_better", True) else 1) / abs(change["value"])
    low, high = sorted((change["low"] * scale, change["high"] * scale))
    return {"value": change["difference"] * scale, "low": low, "high": high}


def _of_review(kept_report: KeptReport, mine: bool) -> Iterator[MeasuredMetric]:
    for name, each in (kept_report.report.get("metrics") or {}).items():
        yield _measured(kept_report, (f"review/{name}", "", "", "", ""), each, mine)


def _measured(kept_report: KeptReport, names: tuple[str, ...], each: dict[str, Any], mine: bool) -> MeasuredMetric:
    value = each.get("value")
    where = f"{kept_report.kind} of {kept_report.checkpoint} ({kept_report.path.parent.name}/{kept_report.path.name})"
    return MeasuredMetric(
        names, float("nan") if value is None else float(value), where, mine, each.get("low"), each.get("high")
    )
