"""What runs recorded of themselves: steps that stood out, what was done about them, and settings that were resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.compare.comparison import ComparedRun, Comparison
from launch.compare.run_files import Point
from trainer.monitors.guard_config import DONE, Action

MAX_STEPS = 20
"""Steps that are listed of a run, the last ones."""
MAX_DOCUMENTS = 3
"""Documents that are named of a step."""


@dataclass(frozen=True, slots=True)
class NotableStep:
    """A step that stood out."""

    step: int
    text: str
    """What stood out, how far, and what was done."""


def notable_steps(point: Point) -> list[NotableStep]:
    """Steps that guards told of, and those whose update was left out since their gradients were not finite, in order."""
    comparison = [NotableStep(event["step"], _event_text(event)) for event in point.events]
    named = {mark.step for mark in comparison}
    comparison += [
        NotableStep(step, "its update was left out, since its gradients were not finite")
        for step, row in point.steps.items()
        if row.get("skipped") and step not in named
    ]
    return sorted(comparison, key=lambda mark: mark.step)


def _event_text(event: dict[str, Any]) -> str:
    if event.get("event") == "challenge":
        return f"{event.get('challenge')}: {event.get('says')}"
    scores = event.get("scores") or {}
    far = " and ".join(
        f"{name} {value:.4g}"
        + (f" ({scores[name]:.1f} standard deviations above the median)" if name in scores else "")
        for name, value in (event.get("values") or {}).items()
        if isinstance(value, int | float)
    )
    action = event.get("action")
    done = DONE[Action(action)] if action in set(Action) else str(action)
    documents = [f"{each.get('file')}:{each.get('line')}" for each in event.get("documents") or []]
    more = f" and {len(documents) - MAX_DOCUMENTS} more" if len(documents) > MAX_DOCUMENTS else ""
    return f"{far or 'stood out'}; {done}" + (f"; {', '.join(documents[:MAX_DOCUMENTS])}{more}" if documents else "")


def notable_step_lines(comparison: Comparison) -> list[str]:
    """A line for each such step of each run."""
    lines = []
    for run in comparison.runs:
        marks = notable_steps(run.point)
        left = len(marks) - MAX_STEPS
        lines += (
            [f"{_run_prefix(comparison, run)}{left} earlier steps, in {run.point.directory}/events.jsonl"]
            if left > 0
            else []
        )
        lines += [f"{_run_prefix(comparison, run)}step {mark.step}: {mark.text}" for mark in marks[-MAX_STEPS:]]
    return lines


def resolved_settings(comparison: Comparison) -> list[str]:
    """What stood in for settings: a line for all runs where all say the same."""
    told = {run.name: run.point.record.substitutions for run in comparison.runs if not run.point.record.is_empty}
    lines = []
    for key in dict.fromkeys(key for each in told.values() for key in each):
        values = {name: each.get(key) for name, each in told.items()}
        if len(set(map(str, values.values()))) == 1:
            lines.append(f"{key}: {next(iter(values.values()))}")
        else:
            lines += [f"{name}: {key}: {value}" for name, value in values.items() if value is not None]
    return lines


def _run_prefix(comparison: Comparison, run: ComparedRun) -> str:
    return f"{run.name}: " if len(comparison.runs) > 1 else ""
