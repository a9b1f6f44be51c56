"""What runs recorded of themselves: steps that stood out, what was done about them, and settings that were resolved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.compare.comparison import ComparedPoint
from launch.compare.run_files import RecordedRun
from trainer.monitors.guard_config import OUTCOME_TEXT_BY_ACTION, Action, outlier_text

MAX_NOTABLE_STEPS_SHOWN = 20
"""Notable steps of a run that are listed: the last ones."""
MAX_DOCUMENTS = 3
"""Documents of a notable step that are named."""


@dataclass(frozen=True, slots=True)
class NotableStep:
    """A step of which a guard or detector recorded an event, or whose update was left out."""

    step: int
    text: str
    """What stood out, how far, and what was done."""


def notable_steps(run: RecordedRun) -> list[NotableStep]:
    """The training steps of a run that a reader should look at, in order: those with an event, and those without an update.

    Events are in `events.jsonl`: a guard found a number that stood out, or a detector found trouble. An update is left out
    if the gradients are not finite.
    """
    steps = [NotableStep(event["step"], _event_text(event)) for event in run.events]
    # A guard may have left the same update out, and its event says more.
    steps_with_event = {notable.step for notable in steps}
    for step, row in run.steps.items():
        if row.get("skipped") and step not in steps_with_event:
            steps.append(NotableStep(step, "its update was left out, since its gradients were not finite"))
    return sorted(steps, key=lambda notable: notable.step)


def _event_text(event: dict[str, Any]) -> str:
    """Write a clause on an event of `events.jsonl`, for a reader of the comparison.

    - What a detector found (`challenge`): its name and what it says.
    - What a guard found: which numbers stood out, what was done, and at most `MAX_DOCUMENTS` documents of the step: `...;
      its update was left out; train.jsonl:12`.
    """
    if event.get("event") == "challenge":
        return f"{event.get('challenge')}: {event.get('says')}"
    action = event.get("action")
    # An action of a later version is shown as it is.
    what_was_done = OUTCOME_TEXT_BY_ACTION[Action(action)] if action in set(Action) else str(action)
    # A level: metrics that have stood out since the step `began`, and not at this step alone.
    level_began = event.get("began") if event.get("is_level") else None
    what_stood_out = outlier_text(event.get("values") or {}, event.get("scores") or {}, level_began)
    sentence = f"{what_stood_out or 'stood out'}; {what_was_done}"
    documents = [f"{document.get('file')}:{document.get('line')}" for document in event.get("documents") or []]
    if not documents:
        return sentence
    sentence += f"; {', '.join(documents[:MAX_DOCUMENTS])}"
    if len(documents) > MAX_DOCUMENTS:
        sentence += f" and {len(documents) - MAX_DOCUMENTS} more"
    return sentence


def notable_step_lines(points: Sequence[ComparedPoint]) -> list[str]:
    """A line for each step that stood out in the first repeat of each point, such as `ddp: step 40: grad_norm 9.5 (...); ...`.

    Of a point with more than `MAX_NOTABLE_STEPS_SHOWN` steps, the last ones, and a line that says where the earlier ones
    are.
    """
    lines = []
    for point in points:
        prefix = f"{point.name}: " if len(points) > 1 else ""
        steps = notable_steps(point.first_repeat)
        if len(steps) > MAX_NOTABLE_STEPS_SHOWN:
            events_file = f"{point.first_repeat.directory}/events.jsonl"
            lines.append(f"{prefix}{len(steps) - MAX_NOTABLE_STEPS_SHOWN} earlier steps, in {events_file}")
        lines += [f"{prefix}step {notable.step}: {notable.text}" for notable in steps[-MAX_NOTABLE_STEPS_SHOWN:]]
    return lines


def resolved_setting_lines(points: Sequence[ComparedPoint]) -> list[str]:
    """Tell the reader what settings such as `auto` were resolved to, as the runs recorded it (`substitutions` in `run.json`).

    A line is like `run.matmul: blas` if all points did alike, else `ddp: run.matmul: blas` for each point.
    """
    # A run that never started has an empty record.
    begun_points = [point for point in points if not point.first_repeat.record.is_empty]
    keys: dict[str, None] = {}  # a dict as an ordered set
    for point in begun_points:
        keys |= dict.fromkeys(point.first_repeat.record.substitutions)
    lines = []
    for key in keys:
        resolved_value_by_point = {
            point.name: point.first_repeat.record.substitutions.get(key) for point in begun_points
        }
        different_values = set(resolved_value_by_point.values())
        if len(different_values) == 1:
            lines.append(f"{key}: {different_values.pop()}")
            continue
        for name, resolved_value in resolved_value_by_point.items():
            if resolved_value is not None:
                lines.append(f"{name}: {key}: {resolved_value}")
    return lines
