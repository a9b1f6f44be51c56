"""Says which step a run exports, and its held-out value, if that is not the last step, whose metrics a comparison shows."""

from __future__ import annotations

from launch.compare.metric_meaning import monitored_metric
from launch.compare.run_files import RecordedRun
from trainer.export.exported_checkpoint import EXPORTED_CHECKPOINT_KEY, recorded_export_step
from trainer.reporting.numbers import format_metric


def earlier_export_text(run: RecordedRun) -> str:
    """The exported step of a run and its held-out value, if it is before the last step; else empty.

    Such as `step 4, with eval/loss 1.5556 (1.8516 at the last step, 16)`. A value that was not evaluated is left out. Empty
    also if the run has chosen no checkpoint yet, or is of an earlier version, which exported the last one.
    """
    exported_step = recorded_export_step({EXPORTED_CHECKPOINT_KEY: run.record.exported_checkpoint})
    last_step = max(run.steps, default=0)
    if exported_step is None or exported_step >= last_step:
        return ""
    metric = monitored_metric(run)
    exported_value = run.evaluations.get(exported_step, {}).get(metric)
    last_value = run.evaluations.get(last_step, {}).get(metric)
    text = f"step {exported_step}"
    if exported_value is not None:
        text += f", with {metric} {format_metric(exported_value)}"
    if exported_value is not None and last_value is not None:
        return f"{text} ({format_metric(last_value)} at the last step, {last_step})"
    return f"{text} (the last step is {last_step})"
