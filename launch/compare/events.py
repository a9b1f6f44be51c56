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
    """Steps in `events.jsonl`, and those whose update was left out since their gradients were not finite, in order."""
    notable_steps = [NotableStep(event["step"], _event_text(event)) for event in point.events]
    # A guard may have left the same update out, and its event says more.
    steps_with_event = {notable.step for notable in notable_steps}
    for step, row in point.steps.items():
        if row.get("skipped") and step not in steps_with_event:
            notable_steps.append(NotableStep(step, "its update was left out, since its gradients were not finite"))
    return sorted(notable_steps, key=lambda notable: notable.step)


def _event_text(event: dict[str, Any]) -> str:
    """An event of `events.jsonl`: what a detector found, or which numbers stood out, what was done, and in which documents."""
    if event.get("event") == "challenge":
        return f"{event.get('challenge')}: {event.get('says')}"
    action = event.get("action")
    done = DONE[Action(action)] if action in set(Action) else str(action)
    text = f"{_values_text(event) or 'stood out'}; {done}"
    documents = [f"{document.get('file')}:{document.get('line')}" for document in event.get("documents") or []]
    if not documents:
        return text
    more = f" and {len(documents) - MAX_DOCUMENTS} more" if len(documents) > MAX_DOCUMENTS else ""
    return f"{text}; {', '.join(documents[:MAX_DOCUMENTS])}{more}"


def _values_text(event: dict[str, Any]) -> str:
    """The numbers that stood out, such as `loss 9.5 (7.1 standard deviations above the median)`."""
    scores = event.get("scores") or {}
    texts = []
    for name, value in (event.get("values") or {}).items():
        if not isinstance(value, int | float):
            continue
        score = f" ({scores[name]:.1f} standard deviations above the median)" if name in scores else ""
        texts.append(f"{name} {value:.4g}{score}")
    return " and ".join(texts)


def notable_step_lines(comparison: Comparison) -> list[str]:
    """A line for each such step of each run."""
    lines = []
    for run in comparison.runs:
        prefix = _run_prefix(comparison, run)
        steps = notable_steps(run.point)
        if len(steps) > MAX_STEPS:
            lines.append(f"{prefix}{len(steps) - MAX_STEPS} earlier steps, in {run.point.directory}/events.jsonl")
        lines += [f"{prefix}step {notable.step}: {notable.text}" for notable in steps[-MAX_STEPS:]]
    return lines


def resolved_settings(comparison: Comparison) -> list[str]:
    """Settings whose values the runs chose themselves: one line for all runs if all say the same."""
    recorded = [run for run in comparison.runs if not run.point.record.is_empty]
    keys: dict[str, None] = {}
    for run in recorded:
        keys |= dict.fromkeys(run.point.record.substitutions)
    lines = []
    for key in keys:
        sentences = {run.name: run.point.record.substitutions.get(key) for run in recorded}
        if len(set(sentences.values())) == 1:
            lines.append(f"{key}: {next(iter(sentences.values()))}")
        else:
            lines += [f"{name}: {key}: {sentence}" for name, sentence in sentences.items() if sentence is not None]
    return lines


def _run_prefix(comparison: Comparison, run: ComparedRun) -> str:
    return f"{run.name}: " if len(comparison.runs) > 1 else ""
